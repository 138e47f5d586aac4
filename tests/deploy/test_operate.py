import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from silvershard.cluster import shard_pb2
from silvershard.cluster.table_follower import TableProgress
from silvershard.cluster.table_server import TableServer
from silvershard.cluster.update_log import NewRecord, open_log
from silvershard.deploy import operate
from silvershard.deploy.cluster_size import ClusterSize, Scaled
from silvershard.deploy.config import load
from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.processes import myself
from silvershard.deploy.state import (
    ClusterRecord,
    GenerationRecord,
    RouterRecord,
    SequencerRecord,
    ShardRecord,
    StateDir,
    TableRecord,
)
from silvershard.deploy.state_log import log_url
from silvershard.shard.errors import SnapshotError
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    directory = StateDir(tmp_path)
    directory.create()
    return directory


def record(**changes: Any) -> ClusterRecord:
    shards = (
        ShardRecord(shard=0, state="serving", documents=6, pid=11, address="127.0.0.1:1"),
        ShardRecord(shard=1, state="failed", documents=4, reason="gave up after 5 deaths"),
    )
    fields: dict[str, Any] = {
        "guard": myself(),
        "driver": myself(),
        "address": "127.0.0.1:8001",
        "model": "films",
        "generation": 3,
        "documents": 10,
        "map_version": 2,
        "router": RouterRecord(state="serving", pid=9),
        "shards": shards,
        "ray_dir": "",
        "since_unix_s": 0.0,
    }
    return ClusterRecord(**{**fields, **changes})


def test_a_lost_shard_is_degraded_with_its_reason(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    state.write_record(record())
    document, code = operate.status(state)
    assert (document["state"], document["coverage"], code) == ("degraded", 0.6, ExitCode.DEGRADED)
    shown = operate.render_cluster(document)
    for text in ("degraded", "0.6000", "gave up after 5 deaths", "films, generation 3"):
        assert text in shown


def test_what_is_going_on_is_shown(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    state.write_record(record())
    assert "going on" not in operate.render_cluster(operate.status(state)[0])
    size = ClusterSize(shards=3, replicas=2)
    operation = wanted("scale", 0, "live").model_copy(
        update={"scaled": Scaled(size=size, instead_of=size), "progress": "prepared 2 of 6"}
    )
    state.control.change(lambda now: now.with_operation(operation))
    shown = operate.render_cluster(operate.status(state)[0])
    assert "scale to 3 shards x 2 replicas: prepared 2 of 6" in shown
    state.control.call_off(operation.operation_id, "a person did")
    assert "going on" not in operate.render_cluster(operate.status(state)[0])


def test_health_is_asked_for_by_name(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(operate, "_health", lambda *names: bool(asked.append(names[:2])) or True)
    state.write_record(record())
    operate.status(state)
    assert asked == [("127.0.0.1:8001", "model/films"), ("127.0.0.1:1", "shard/0")]


def test_a_shard_that_does_not_answer_counts_as_lost(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record().shards[0]
    state.write_record(record(shards=(whole, whole.model_copy(update={"shard": 1}))))
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: service != "shard/1")
    document, code = operate.status(state)
    assert code == ExitCode.DEGRADED
    assert [shard["state"] for shard in document["shards"]] == ["serving", "not answering"]
    monkeypatch.setattr(
        operate, "_health", lambda address, service, dialer: service != "model/films"
    )
    document, code = operate.status(state)
    assert (document["router"]["state"], code) == ("not serving", ExitCode.DEGRADED)
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    assert operate.status(state)[1] == ExitCode.OK


def test_a_process_of_tables_that_does_not_answer_is_degraded(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = TableRecord(
        shard=1,
        state="serving",
        pid=7,
        rows=5000,
        addresses={"history": "127.0.0.1:5", "recent": "127.0.0.1:6"},
    )
    state.write_record(record(shards=record().shards[:1], tables=(tables,)))
    asked = []

    def health(address: str, service: str, dialer: Any) -> bool:
        asked.append((address, service))
        return service != "table/recent/1"

    monkeypatch.setattr(operate, "_health", health)
    counts = {"lookups": 3, "rows": 12345, "cached": 1, "fetched": 2, "defaulted": 678}
    monkeypatch.setattr(operate, "_lookups", lambda shards, dialer: {"history": counts})
    document, code = operate.status(state)
    assert document["lookups"] == {"history": counts}
    assert asked[-2:] == [("127.0.0.1:5", "table/history/1"), ("127.0.0.1:6", "table/recent/1")]
    assert (document["state"], code) == ("degraded", ExitCode.DEGRADED)
    shown = operate.render_cluster(document)
    for text in (
        "not answering",
        "5,000",
        "history, recent",
        "its health check failed",
        "12,345",
        "678",
    ):
        assert text in shown
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    assert operate.status(state)[1] == ExitCode.OK


def test_a_process_of_tables_says_how_far_it_is_behind_the_log(
    run_table_server: Callable[..., str],
) -> None:
    lag = TableProgress(partition=0, position=40, end=44)
    address = run_table_server(progress=lag, trouble="the log is away")
    caught_up = run_table_server(progress=TableProgress(partition=0, position=4, end=4), trouble="")
    found = operate._followed([caught_up, address])
    assert found == {"behind": 4, "reason": "the log is away"}
    assert operate._followed([caught_up]) == {"behind": 0, "reason": ""}
    assert operate._followed([caught_up, "127.0.0.1:1"]) == {}


@pytest.fixture
def run_table_server() -> Iterator[Callable[..., str]]:
    """``run_table_server(progress=..., trouble=...)`` serves rows; returns the address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[TableServer] = []

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(20)

    def make(progress: TableProgress, trouble: str) -> str:
        follower: Any = SimpleNamespace(
            log_id=1, rejected=0, trouble=trouble, progress=lambda _: progress
        )
        plan = TablePlan(name="users", num_rows=9, dim=4, num_shards=1)
        server = TableServer(TableShard.generated(plan, 0), follower=follower)
        run(server.start())
        servers.append(server)
        return server.address

    yield make
    for server in servers:
        run(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_a_daemon_that_is_gone_is_degraded(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    gone = myself().model_copy(update={"boot": "another"})
    state.write_record(record(driver=gone, shards=record().shards[:1]))
    document, code = operate.status(state)
    assert (document["daemon"]["state"], code) == ("gone", ExitCode.DEGRADED)


def test_a_cluster_without_a_map_is_starting(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: False)
    state.write_record(record(map_version=0))
    document, code = operate.status(state)
    assert (document["state"], code) == ("starting", ExitCode.FAILED)


def test_nobody_at_the_address_is_not_healthy() -> None:
    assert not operate._health("", "x")
    assert not operate._health("127.0.0.1:1", "x")


@pytest.mark.parametrize(
    ("was_running", "leftovers", "killed", "said"),
    [
        (True, 0, 0, "stopped the cluster on {root} in 1.5 s"),
        (True, 0, 2, "stopped the cluster on {root} in 1.5 s; 2 processes had to be killed"),
        (False, 0, 0, "nothing is running on {root}"),
        (False, 3, 0, "nothing is running on {root}; ended 3 processes that a crashed cluster"),
    ],
)
def test_down_says_what_it_did(
    state: StateDir, was_running: bool, leftovers: int, killed: int, said: str
) -> None:
    document = {
        "was_running": was_running,
        "leftovers": leftovers,
        "killed": killed,
        "unreachable": [],
        "seconds": 1.5,
    }
    shown = operate.render_down(document, state)
    assert shown.startswith(said.format(root=state.root))


def test_down_names_the_hosts_that_it_could_not_reach(state: StateDir) -> None:
    document = {"was_running": True, "leftovers": 0, "killed": 0, "unreachable": ["h1", "h2"]}
    shown = operate.render_down({**document, "seconds": 1.5}, state)
    assert shown == (
        f"stopped the cluster on {state.root}; h1, h2 cannot be reached: what runs there ends when "
        "it is back"
    )


def test_a_broken_snapshot_is_found_before_it_is_served(tmp_path: Path, generation: Any) -> None:
    operate.verify_snapshot(generation.path, 64)
    with pytest.raises(CommandError, match="at most 64, the partitions of gen-000001, got 65"):
        operate.verify_snapshot(generation.path, 65)
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        operate.verify_snapshot(tmp_path, 2)


def test_a_short_wait_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = operate.PhaseBar("starting")
    for phase in ("a", "b"):
        bar.phase(phase)
    bar.close()
    assert capsys.readouterr().err == ""


def test_a_long_wait_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    written = io.StringIO()

    def shown(**options: Any) -> Any:
        return tqdm.tqdm(**{**options, "delay": 0, "mininterval": 0, "file": written})

    monkeypatch.setattr(operate, "tqdm", shown)
    bar = operate.PhaseBar("starting")
    bar.phase("shards 1/2")
    bar.close()
    assert "starting: shards 1/2 00:0" in written.getvalue()


def held(generation: int, cut: int, end: int) -> shard_pb2.ShardReport:
    report = shard_pb2.ShardReport()
    one = report.generations.add(generation=generation, ends=[end])
    one.seen.cut.append(cut)
    return report


def test_replicas_sequencer_and_generations_are_shown(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    monkeypatch.setattr(operate, "_inspected", lambda address, dialer: held(3, 40, 57))
    first = record().shards[0]
    copies = [
        first.model_copy(update={"shard": shard, "replica": replica, "documents": 5})
        for replica in (0, 1)
        for shard in (0, 1)
    ]
    copies[3] = copies[3].model_copy(update={"state": "restarting"})
    sequencer = SequencerRecord(state="serving", pid=77, address="127.0.0.1:7")
    generations = (
        GenerationRecord(generation=2, role="previous", prepared=3, processes=4),
        GenerationRecord(generation=3, role="live", prepared=3, processes=4, reason="loading"),
    )
    whole = record(shards=tuple(copies), sequencer=sequencer, generations=generations)
    state.write_record(whole)
    document, code = operate.status(state)
    # Every document has a process that serves it, yet one process is missing.
    assert (document["coverage"], code) == (1.0, ExitCode.DEGRADED)
    assert [one["behind"] for one in document["shards"]] == [17, 17, 17, None]
    shown = operate.render_cluster(document)
    for text in ("1.1", "pid 77, serving", "previous", "3 of 4", " 17 "):
        assert text in shown
    assert "standby" not in shown
    copies[2] = copies[2].model_copy(update={"standby": True})
    state.write_record(record(shards=tuple(copies), sequencer=sequencer))
    document, _ = operate.status(state)
    assert " standby " in operate.render_cluster(document)


def test_a_sequencer_that_is_away_is_degraded(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_inspected", lambda address, dialer: None)
    monkeypatch.setattr(
        operate, "_health", lambda address, service, dialer: address != "127.0.0.1:7"
    )
    sequencer = SequencerRecord(state="serving", pid=77, address="127.0.0.1:7")
    state.write_record(record(shards=record().shards[:1], sequencer=sequencer))
    document, code = operate.status(state)
    assert (document["sequencer"]["state"], code) == ("not answering", ExitCode.DEGRADED)
    assert "its health check failed" in operate.render_cluster(document)


def test_a_generation_that_is_being_prepared_is_no_harm_and_a_live_one_that_is_not_there_is(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_health", lambda address, service, dialer: True)
    live = GenerationRecord(generation=3, role="live", prepared=1, processes=1)
    staged = GenerationRecord(generation=4, role="staged", prepared=0, processes=1)
    state.write_record(record(shards=record().shards[:1], generations=(live, staged)))
    assert operate.status(state)[1] == ExitCode.OK
    lost = live.model_copy(update={"prepared": 0, "reason": "the log was trimmed"})
    state.write_record(record(shards=record().shards[:1], generations=(lost, staged)))
    assert operate.status(state)[1] == ExitCode.DEGRADED


def test_a_generation_of_another_log_is_refused_before_it_is_served(
    state: StateDir, generation: Any
) -> None:
    config = load(None, environ={})
    operate.verify_log(state, config, generation.path)
    log = open_log(log_url(state, config))
    operate.verify_log(state, config, generation.path)
    epoch = log.acquire(0)
    log.append(0, epoch, [NewRecord(1, 1, False, False, 0, b"x")], 1)
    log.trim(0, 1)
    log.close()
    with pytest.raises(Refused, match="can be brought up to date no more"):
        operate.verify_log(state, config, generation.path)
