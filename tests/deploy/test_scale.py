import socket
import threading
import time
from typing import Any

import pytest

from silvershard.deploy import fleet
from silvershard.deploy.cluster_size import ClusterSize, size_of
from silvershard.deploy.config import load
from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.scale import render_done, scale
from silvershard.deploy.state import StateDir

MIB = 1 << 20
ONE = ClusterSize(shards=2, replicas=1)
CONFIG = load(None, environ={})


@pytest.fixture
def state(idle_state: StateDir, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    """A state directory whose cluster, which is this process, has two shards and much memory."""
    record = idle_state.read_record()
    assert record is not None
    idle_state.write_record(record.model_copy(update={"size": ONE}))
    monkeypatch.setattr(fleet, "free_memory", lambda: 1 << 40)
    return idle_state


def ask(state: StateDir, lines: list[str] | None = None, **given: Any) -> dict[str, Any]:
    report = (lines if lines is not None else []).append
    return scale(state, CONFIG, timeout_s=60.0, report=report, **given)


def test_a_refused_plan_changes_nothing(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "free_memory", lambda: MIB)
    before, lines = state.control.read(), []
    with pytest.raises(Refused, match="the cluster is not scaled: 3 new processes with gen"):
        ask(state, lines, shards=3)
    assert lines[1].endswith("free 1.0 MiB")
    assert state.control.read() == before


def test_a_dry_run_changes_nothing(state: StateDir) -> None:
    before, lines = state.control.read(), []
    found = ask(state, lines, shards=3, replicas=2, dry_run=True)
    assert (found["done"], found["starts"], found["ends"]) == (False, 6, 2)
    assert found["after"] == {"shards": 3, "replicas": 2, "standby": 0}
    assert render_done(found) == "would scale from 2 shards x 1 replica to 3 shards x 2 replicas"
    assert len(lines) == 2
    assert state.control.read() == before


def test_what_is_so_already_is_done_at_once(state: StateDir) -> None:
    before = state.control.read()
    found = ask(state, shards=2)
    assert found["done"]
    assert render_done(found) == "the cluster has 2 shards x 1 replica already"
    assert state.control.read() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say what to change"),
        ({"shards": 0}, "shards must be in 1..1048576, got 0"),
        ({"replicas": 17}, r"replicas must be in 1\.\.16, got 17"),
        ({"standby": -1}, r"standby must be in 0\.\.4, got -1"),
        ({"shards": 65}, "shards must be at most 64, the partitions of generation 1, got 65"),
    ],
)
def test_numbers_out_of_bounds_are_refused(
    state: StateDir, given: dict[str, int], message: str
) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        ask(state, **given)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_generation_to_return_to_counts_as_long_as_it_is_there(state: StateDir) -> None:
    state.control.change(lambda now: now.model_copy(update={"previous": 2}))
    both = ask(state, shards=3, dry_run=True)
    state.control.change(lambda now: now.model_copy(update={"previous": 7}))
    alone = ask(state, shards=3, dry_run=True)
    assert both["new_bytes"] > alone["new_bytes"]


def driver(state: StateDir, end: str, reason: str = "") -> threading.Thread:
    """Do in place of a driver what is wanted."""

    def run() -> None:
        give_up_s = time.monotonic() + 60.0
        store = state.control
        while (going := store.read().current) is None:
            assert time.monotonic() < give_up_s
            time.sleep(0.001)
        ended = going.ended(end, reason)  # type: ignore[arg-type]
        store.change(lambda now: now.replaced(ended))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_what_is_wanted_is_written_and_waited_for(state: StateDir) -> None:
    thread = driver(state, "done")
    found = ask(state, shards=3, operation_id="mine")
    thread.join(60.0)
    assert found["done"]
    assert render_done(found).startswith("scaled from 2 shards x 1 replica to 3 shards x 1 rep")
    operation = state.control.read().operation("mine")
    assert operation is not None
    assert operation.kind == "scale"
    assert operation.scaled is not None
    assert operation.scaled.size == ClusterSize(shards=3, replicas=1)
    assert operation.scaled.instead_of == size_of(CONFIG)


def test_what_could_not_be_done_says_why(state: StateDir) -> None:
    thread = driver(state, "failed", "shard 1 could not start")
    with pytest.raises(
        CommandError, match="the cluster has 2 shards x 1 replica as before: shard 1 could not"
    ):
        ask(state, shards=3)
    thread.join(60.0)


def test_one_thing_at_a_time(state: StateDir) -> None:
    operation = wanted("activate", 2, "live")
    state.control.change(lambda now: now.with_operation(operation))
    with pytest.raises(Refused, match="activate of generation 2 is going on since"):
        ask(state, shards=3)
    assert state.control.read().current == operation


def test_a_host_that_takes_no_new_copies_gets_none(state: StateDir) -> None:
    name = socket.gethostname()
    state.control.change(lambda now: now.model_copy(update={"host_states": {name: "maintenance"}}))
    with pytest.raises(Refused, match=f"no host takes new copies: {name} is in maintenance"):
        ask(state, shards=3)
    # What only ends processes needs no host.
    assert not ask(state, replicas=1, standby=0, dry_run=True)["starts"]


def test_a_cluster_that_starts_is_not_scaled(state: StateDir) -> None:
    record = state.read_record()
    assert record is not None
    state.write_record(record.model_copy(update={"size": None}))
    with pytest.raises(CommandError, match="still starting"):
        ask(state, shards=3)
