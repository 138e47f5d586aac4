import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import activate
from silvershard.deploy.admin_process import Errand, Said, carry_out
from silvershard.deploy.admin_store import AdminTask
from silvershard.deploy.cluster_size import ClusterSize
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import Control
from silvershard.deploy.processes import identify, is_alive
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import list_generations
from silvershard.shard.repository import Repository
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 60.0


def settings(**options: Any) -> Config:
    # With random embeddings the lists of two clusterings find more or less by chance.
    fixed = {"model.name": "films", "swap.max_recall_loss": 0.5, "updates.enabled": False}
    return load(None, environ={}, options={**fixed, **options})


def done(state: StateDir, kind: Any, **task: Any) -> tuple[Said, list[str]]:
    lines: list[str] = []
    errand = Errand(config=settings(), task=AdminTask(kind=kind, **task), swap_id="swap")
    return carry_out(state, errand, lines.append), lines


def failure(said: Said) -> tuple[str, str]:
    assert said.failure is not None
    return said.failure.code, said.failure.reason


def test_a_plan_says_how_a_generation_could_be_brought_in(idle_state: StateDir) -> None:
    said, _ = done(idle_state, "plan", generation=2)
    assert said.failure is None
    assert said.result is not None
    assert (said.result["generation"], said.result["mode"]) == (2, "beside")
    assert said.result["new_bytes"] > 0
    assert said.result["checks_fit"] is True
    assert failure(done(idle_state, "plan", generation=9)[0]) == (
        "NOT_FOUND",
        "GENERATION_NOT_FOUND",
    )
    idle_state.clear_record()
    said, _ = done(idle_state, "plan", generation=2)
    assert failure(said) == ("FAILED_PRECONDITION", "NOT_POSSIBLE")


def test_a_generation_is_checked_and_the_failed_check_is_said(idle_state: StateDir) -> None:
    said, _ = done(idle_state, "verify", generation=2)
    assert said.failure is None
    assert said.result is not None
    assert said.result["passed"]
    assert {one["name"] for one in said.result["checks"]} >= {"checksums", "schema", "recall"}
    os.truncate(idle_state.generations / "gen-000002" / "dense.safetensors", 100)
    said, _ = done(idle_state, "verify", generation=2)
    assert failure(said) == ("DATA_LOSS", "CHECK_FAILED")
    assert said.result is not None
    assert [one["passed"] for one in said.result["checks"]] == [False]


def test_a_generation_is_fetched_from_a_url_unless_it_is_a_dry_run(
    idle_state: StateDir, tmp_path: Path
) -> None:
    url = str(tmp_path / "copies")
    Repository(url).push(open_snapshot(idle_state.generations / "gen-000002"))
    other = StateDir(tmp_path / "other")
    other.create()
    said, _ = done(other, "stage", url=url, generation=2, dry_run=True)
    assert said.result is not None
    assert (said.result["done"], said.result["present"]) == (False, False)
    assert not other.generations.exists() or list_generations(other.generations) == []
    said, lines = done(other, "stage", url=url, generation=2)
    assert said.result is not None
    assert (said.result["generation"], said.result["done"]) == (2, True)
    assert any(line.startswith("copying ") for line in lines)
    assert list_generations(other.generations) == [2]
    assert failure(done(other, "stage", url=url, generation=7)[0])[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("activate", {"generation": 2, "load": False}),
        ("warm", {"generation": 2, "alias": "warm", "load": False}),
        ("set_alias", {"generation": 2, "alias": "canary", "load": False}),
        ("set_alias", {"generation": 0, "alias": "canary"}),
    ],
)
def test_a_dry_run_plans_and_checks_and_changes_nothing(
    idle_state: StateDir, kind: str, task: dict[str, Any]
) -> None:
    said, lines = done(idle_state, kind, dry_run=True, **task)
    assert said.failure is None
    assert said.result is not None
    assert said.result["done"] is False
    assert said.result["generation"] == task["generation"]
    assert any(line.startswith("checksums: ") for line in lines) == bool(task["generation"])
    assert idle_state.control.read() == Control(version=1, live=1)
    assert list_generations(idle_state.generations) == [1, 2]


def test_what_is_refused_says_so_in_words_and_wants_nothing(idle_state: StateDir) -> None:
    said, _ = done(idle_state, "rollback")
    assert failure(said) == ("FAILED_PRECONDITION", "NOT_POSSIBLE")
    errand = Errand(
        config=settings(**{"swap.memory_mib": 1}),
        task=AdminTask(kind="activate", generation=2),
        swap_id="swap",
    )
    said = carry_out(idle_state, errand, lambda _: None)
    assert failure(said) == ("FAILED_PRECONDITION", "REFUSED")
    assert said.failure is not None
    assert "MiB are free" in said.failure.message
    assert idle_state.control.read().operations == ()


def test_a_bug_tells_an_id_and_no_trace(
    idle_state: StateDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(activate, "rollback", lambda *_, **__: 1 / 0)
    said, _ = done(idle_state, "rollback")
    assert failure(said) == ("INTERNAL", "INTERNAL")
    assert said.failure is not None
    assert "division" not in said.failure.message
    assert said.failure.message.split()[-1] in caplog.text


def started(state: StateDir, content: str, parent: int = 0) -> "subprocess.Popen[str]":
    words = ("-P", "-m", "silvershard.deploy.admin_process")
    mine = str(parent or os.getpid())
    process = subprocess.Popen(
        [sys.executable, *words, "--state", str(state.root), "--parent", mine],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(content)
    process.stdin.close()
    return process


def test_a_cluster_is_scaled_as_by_the_command(idle_state: StateDir) -> None:
    record = idle_state.read_record()
    assert record is not None
    size = ClusterSize(shards=1, replicas=1)
    idle_state.write_record(record.model_copy(update={"size": size}))
    said, lines = done(idle_state, "scale", shards=3, dry_run=True)
    assert said.failure is None
    assert said.result is not None
    assert (said.result["done"], said.result["starts"], said.result["ends"]) == (False, 3, 1)
    assert lines[0].startswith("1 shard x 1 replica now, 3 shards x 1 replica then: 3 processes")
    said, _ = done(idle_state, "scale", shards=100)
    assert said.failure is not None
    assert said.failure.code == "INVALID_ARGUMENT"
    assert "shards must be at most 64" in said.failure.message
    assert idle_state.control.read().operations == ()


def test_the_process_says_one_object_a_line_and_ends(idle_state: StateDir) -> None:
    task = AdminTask(kind="set_alias", alias="canary", generation=0, dry_run=True)
    errand = Errand(config=settings(), task=task, swap_id="swap")
    process = started(idle_state, errand.model_dump_json())
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stdout]
        process.stderr.read()
    assert process.returncode == 0
    assert lines[-1]["result"]["alias"] == "canary"


def test_a_process_that_is_told_to_end_calls_off_what_it_wanted(idle_state: StateDir) -> None:
    task = AdminTask(kind="activate", generation=2, load=False)
    errand = Errand(config=settings(), task=task, swap_id="swap")
    process = started(idle_state, errand.model_dump_json())
    store = idle_state.control
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    with process:
        identity = identify(process.pid)
        assert identity is not None
        give_up_s = time.monotonic() + WAIT_S
        while store.read().operation("swap") is None:
            assert time.monotonic() < give_up_s
            assert is_alive(identity)
            time.sleep(0.01)
        # What checks and loads a generation leaves the machine to the queries.
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(mine + 10, 19)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.read()
        assert "called off" in process.stderr.read()
    assert process.returncode == 1
    assert "result" not in said
    control = store.read()
    assert control.live == 1
    ended = control.operation("swap")
    assert ended is not None
    assert ended.state == "cancelled"


def test_a_rollback_does_not_step_back_behind_queries(idle_state: StateDir) -> None:
    store = idle_state.control
    store.change(lambda control: control.pointed("live", 2))
    assert store.read().previous == 1
    errand = Errand(config=settings(), task=AdminTask(kind="rollback"), swap_id="swap")
    process = started(idle_state, errand.model_dump_json())
    with process:
        give_up_s = time.monotonic() + WAIT_S
        while store.read().operation("swap") is None:
            assert time.monotonic() < give_up_s
            assert process.poll() is None
            time.sleep(0.01)
        mine = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == mine
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read()
        assert "called off" in process.stderr.read()
    assert process.returncode == 1


def test_a_process_whose_driver_has_ended_ends_before_it_begins(idle_state: StateDir) -> None:
    task = AdminTask(kind="activate", generation=2, load=False)
    errand = Errand(config=settings(), task=task, swap_id="swap")
    with started(idle_state, errand.model_dump_json(), parent=1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == ""
        assert "called off" in process.stderr.read()
    assert process.returncode == 1
    assert idle_state.control.read().operations == ()
