import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from silvershard.cluster import admin_pb2, admin_pb2_grpc
from silvershard.deploy import verbs
from silvershard.deploy.admin_server import AdminServer
from silvershard.deploy.chaos_verb import duration
from silvershard.deploy.config import Config
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.state import StateDir


class Admin(admin_pb2_grpc.AdminServicer):
    """An admin plane that notes which faults it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.faults: list[admin_pb2.Fault] = []

    def InjectFault(self, request: Any, context: Any) -> admin_pb2.Fault:
        self.asked.append(request)
        fault = admin_pb2.Fault(
            operation_id=request.operation_id or "random",
            dry_run=request.dry_run,
            kind=request.kind,
            target=request.target,
            duration=request.duration,
            delay_ms=request.delay_ms,
            share=request.share,
            state=0 if request.dry_run else admin_pb2.FAULT_STATE_ACTIVE,
            pids=[7],
        )
        fault.began.FromSeconds(0)
        self.faults.append(fault)
        return fault

    def ListFaults(self, request: Any, context: Any) -> Any:
        return admin_pb2.ListFaultsResponse(faults=self.faults)

    def ClearFaults(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return admin_pb2.ListFaultsResponse(faults=self.faults)


@pytest.fixture
def admin(idle_state: StateDir) -> Iterator[Admin]:
    made = Admin()
    server = grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_AdminServicer_to_server(made, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    reached_at(idle_state, address)
    yield made
    server.stop(None).wait()


def reached_at(state: StateDir, address: str) -> None:
    record = state.read_record()
    assert record is not None
    state.write_record(record.model_copy(update={"admin": address}))


def run(state: StateDir, *words: str) -> int:
    try:
        return verbs.run(["chaos", *words, "--state", str(state.root)])
    except SystemExit as error:
        return int(error.code or 0)


def test_a_fault_is_asked_for_as_the_words_say(
    idle_state: StateDir, admin: Admin, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("slow", "shard", "1.0", "--ms", "50", "--for", "2m", "--name", "mine")
    assert run(idle_state, *words) == ExitCode.OK
    assert capsys.readouterr().out == (
        "slow shard 1.0 for 120 s; `silvershard chaos stop mine` ends it before\n"
    )
    (asked,) = admin.asked
    assert (asked.kind, asked.target) == (admin_pb2.FAULT_KIND_SLOW, "shard 1.0")
    assert (asked.delay_ms, asked.duration.seconds, asked.operation_id) == (50, 120, "mine")
    assert not asked.allow_outage
    words = ("drop", "host", "a", "--share", "0.5", "--allow-outage", "--dry-run")
    assert run(idle_state, *words, "--output", "json") == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["seconds"], document["share"]) == ("planned", 30.0, 0.5)
    assert (admin.asked[1].dry_run, admin.asked[1].allow_outage) == (True, True)
    assert run(idle_state, "drop", "host", "a", "--dry-run") == ExitCode.OK
    assert capsys.readouterr().out == "would drop host a, processes [7]\n"


def test_what_is_not_said_is_as_by_default(idle_state: StateDir, admin: Admin) -> None:
    assert run(idle_state, "kill", "router") == ExitCode.OK
    assert run(idle_state, "slow", "shard", "0.0") == ExitCode.OK
    assert run(idle_state, "corrupt", "generation", "2", "--copy", "file:///c") == ExitCode.OK
    kill, slow, corrupt = admin.asked
    assert (kill.duration.seconds, kill.delay_ms, kill.share) == (0, 0, 1.0)
    assert (slow.duration.seconds, slow.delay_ms) == (30, 100)
    assert (corrupt.duration.seconds, corrupt.copy_url) == (30, "file:///c")


def test_faults_are_listed_and_stopped(
    idle_state: StateDir, admin: Admin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(idle_state, "list") == ExitCode.OK
    assert capsys.readouterr().out == "no fault was injected\n"
    run(idle_state, "hang", "shard", "1.0", "--name", "mine")
    capsys.readouterr()
    assert run(idle_state, "list") == ExitCode.OK
    shown = capsys.readouterr().out
    for text in ("mine", "hang", "shard 1.0", "active", "30", "1970-01-01"):
        assert text in shown
    assert run(idle_state, "stop", "mine", "other", "--output", "json") == ExitCode.OK
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["faults"]] == ["mine"]
    assert run(idle_state, "stop") == ExitCode.OK
    assert [list(one.operation_ids) for one in admin.asked[1:]] == [["mine", "other"], []]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("burn", "shard", "0.0"),
        ("list", "shard"),
        ("hang", "shard", "0.0", "--for", "-1"),
        ("hang", "shard", "0.0", "--for", "5d"),
        ("slow", "shard", "0.0", "--ms", "x"),
    ],
)
def test_wrong_usage_has_its_exit_code(
    idle_state: StateDir, admin: Admin, words: tuple[str, ...]
) -> None:
    assert run(idle_state, *words) == ExitCode.USAGE
    assert admin.asked == []


def test_a_cluster_that_does_not_allow_it_refuses(
    idle_state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with AdminServer(idle_state, Config()) as server:
        reached_at(idle_state, server.address)
        for words in (("kill", "router"), ("list",), ("stop",)):
            assert run(idle_state, *words) == ExitCode.REFUSED
            assert "set chaos.enabled to true" in capsys.readouterr().err


def test_without_a_cluster_or_its_admin_plane_it_says_so(
    idle_state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(idle_state, "list") == ExitCode.FAILED
    assert "has no admin plane: set admin.enabled" in capsys.readouterr().err
    assert run(StateDir(idle_state.root / "none"), "list") == ExitCode.FAILED
    assert "no cluster runs on" in capsys.readouterr().err


def test_times_have_units() -> None:
    assert [duration(one) for one in ("10", "10s", "1.5m", "1h")] == [10, 10, 90, 3600]
    for text in ("0s", "-1m", "m", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            duration(text)
