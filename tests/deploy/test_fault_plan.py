from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.faults import FaultRecord
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import Refused
from silvershard.deploy.fault_plan import (
    FaultRequest,
    check_request,
    faults_dir,
    host_of,
    numbers_of,
    plan_fault,
)
from silvershard.deploy.processes import myself
from silvershard.deploy.state import (
    ClusterRecord,
    RouterRecord,
    SequencerRecord,
    ShardRecord,
    StateDir,
    TableRecord,
)
from silvershard.model.request import RequestError


def copy(shard: int, replica: int, **more: Any) -> ShardRecord:
    fields: dict[str, Any] = {
        "state": "serving",
        "pid": 100 + 10 * shard + replica,
        "address": f"10.0.0.{replica + 1}:700{shard}",
        "documents": 5,
    }
    return ShardRecord(shard=shard, replica=replica, **{**fields, **more})


def cluster(*shards: ShardRecord, **more: Any) -> ClusterRecord:
    fields: dict[str, Any] = {
        "guard": myself(),
        "driver": myself(),
        "address": "127.0.0.1:8001",
        "model": "films",
        "generation": 3,
        "documents": 10,
        "router": RouterRecord(state="serving", pid=9),
        "shards": shards or (copy(0, 0), copy(1, 0), copy(0, 1), copy(1, 1)),
        "sequencer": SequencerRecord(state="serving", pid=8),
        "tables": (TableRecord(shard=0, state="serving", pid=7),),
        "ray_dir": "",
        "since_unix_s": 0.0,
    }
    return ClusterRecord(**{**fields, **more})


def want(kind: Any, target: str, **more: Any) -> FaultRequest:
    lasting = {} if kind == "kill" else {"seconds": 5.0}
    slow = {"delay_ms": 9} if kind == "slow" else {}
    return FaultRequest("a", kind, target, **{**lasting, **slow, **more})


def pids(request: FaultRequest, record: ClusterRecord, *active: FaultRecord) -> tuple[int, ...]:
    return plan_fault(request, record, active)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (want("kill", "shard 1.0"), (110,)),
        (want("hang", "shard 0.1"), (101,)),
        (want("slow", "shard 1.1"), (111,)),
        (want("stall", "shard 1.1"), (111,)),
        (want("fill", "shard 1.1", share=0.5), (111,)),
        (want("stall", "sequencer"), (8,)),
        (want("kill", "sequencer"), (8,)),
        (want("drop", "shard 0.0", share=0.1), (9,)),
        (want("partition", "shard 0.0"), (9,)),
        (want("partition", "host 10.0.0.2"), (9,)),
        (want("hang", "supervisor"), (myself().pid,)),
        (want("kill", "supervisor", allow_outage=True), (myself().pid,)),
        (want("kill", "router", allow_outage=True), (9,)),
        (want("hang", "tables 0", allow_outage=True), (7,)),
    ],
)
def test_a_fault_hits_the_processes_of_its_target(
    request_: FaultRequest, expected: tuple[int, ...]
) -> None:
    assert pids(request_, cluster()) == expected


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (want("kill", "shard 0.0", seconds=1.0), "duration", "lasts no time"),
        (want("hang", "shard 0.0", seconds=0.0), "duration", "above 0 s and at most 3600 s, got 0"),
        (want("hang", "shard 0.0", seconds=-1.0), "duration", "got -1 s"),
        (want("hang", "shard 0.0", seconds=3600.5), "duration", "at most 3600 s"),
        (want("slow", "shard 0.0", delay_ms=0), "delay_ms", r"in 1\.\.60000, got 0"),
        (want("slow", "shard 0.0", delay_ms=60_001), "delay_ms", "got 60001"),
        (want("hang", "shard 0.0", delay_ms=3), "delay_ms", "hang has none, got 3"),
        (want("drop", "shard 0.0", share=0.0), "share", "above 0 and at most 1, got 0"),
        (want("drop", "shard 0.0", share=1.5), "share", "got 1.5"),
        (want("drop", "shard 0.0", share=float("nan")), "share", "got nan"),
        (want("slow", "shard 0.0", share=0.5), "share", "slow has none"),
        (want("corrupt", "generation 2"), "copy_url", "must name where another copy"),
        (want("kill", "shard 0.0", copy_url="x"), "copy_url", "kill has none"),
        (want("slow", "router"), "target", r"of slow must be shard S\.R, got 'router'"),
        (want("fill", "shard 0"), "target", "got 'shard 0'"),
        (want("kill", "shard 7.0"), "target", r"there is no shard 7\.0; there is shard 0\.0, "),
        (want("kill", "tables 3"), "target", "there is no tables 3; there is tables 0"),
        (want("drop", "host 10.0.0.3"), "target", r"there is host 10\.0\.0\.1, host 10\.0\.0\.2"),
    ],
)
def test_what_makes_no_sense_names_its_field(request_: FaultRequest, field: str, text: str) -> None:
    with pytest.raises(RequestError, match=text) as refused:
        pids(request_, cluster())
    assert refused.value.field == field


def test_a_cluster_without_updates_has_no_sequencer() -> None:
    with pytest.raises(RequestError, match="takes no updates"):
        pids(want("stall", "sequencer"), cluster(sequencer=None))


@pytest.mark.parametrize("kind", ["kill", "hang", "drop", "partition"])
def test_the_last_copy_that_answers_is_kept(kind: Any) -> None:
    record = cluster(copy(0, 0), copy(0, 1, state="restarting"), copy(0, 2, standby=True))
    request = want(kind, "shard 0.0")
    with pytest.raises(Refused) as refused:
        pids(request, record)
    assert str(refused.value) == (
        "shard 0 would lose its last copy that answers, of 2: replica 1 is restarting; "
        "--allow-outage does it all the same"
    )
    assert pids(request._replace(allow_outage=True), record)
    with pytest.raises(Refused, match="of 1: there is no other"):
        pids(request, cluster(copy(0, 0)))
    # Which is no outage where it is only slow.
    assert pids(want("slow", "shard 0.0"), cluster(copy(0, 0)))


def test_a_copy_that_suffers_a_fault_does_not_count() -> None:
    for active in (want("partition", "shard 0.1"), want("drop", "host 10.0.0.2")):
        with pytest.raises(Refused, match="replica 1 suffers a fault itself"):
            pids(want("hang", "shard 0.0"), cluster(), active.record(0.0))
    for harmless in (want("slow", "shard 0.1"), want("partition", "shard 1.1")):
        assert pids(want("hang", "shard 0.0"), cluster(), harmless.record(0.0))


def test_a_host_is_not_cut_off_with_the_last_copy_of_a_shard() -> None:
    with pytest.raises(Refused, match="shard 1 would lose its last copy that answers, of 1"):
        pids(want("partition", "host 10.0.0.1"), cluster(copy(0, 0), copy(0, 1), copy(1, 0)))


@pytest.mark.parametrize(
    ("target", "text"),
    [("router", "no other router"), ("supervisor", "ends with"), ("tables 0", "default rows")],
)
def test_what_there_is_but_one_of_is_kept(target: str, text: str) -> None:
    with pytest.raises(Refused, match=text):
        pids(want("kill", target), cluster())


def test_a_process_that_is_not_there_cannot_suffer() -> None:
    record = cluster(copy(0, 0, pid=0, state="restarting"), copy(0, 1))
    with pytest.raises(Refused, match=r"shard 0\.0 has no process now"):
        pids(want("slow", "shard 0.0"), record)
    with pytest.raises(Refused, match="router has no process now"):
        pids(
            want("partition", "shard 0.0"),
            record.model_copy(update={"router": RouterRecord(state="restarting")}),
        )


def test_targets_and_addresses_are_taken_apart() -> None:
    assert check_request(want("corrupt", "generation 12", copy_url="x")) == "generation"
    assert numbers_of("generation", "generation 12") == ("12",)
    assert numbers_of("shard", "shard 3.1") == ("3", "1")
    assert (host_of("10.0.0.1:7"), host_of("[::1]:7")) == ("10.0.0.1", "::1")


def test_processes_are_told_where_faults_are_only_if_there_may_be_some(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert faults_dir(state, Config()) == ""
    allowed = load(None, environ={}, options={"chaos.enabled": True})
    assert faults_dir(state, allowed) == str(tmp_path / "faults")
