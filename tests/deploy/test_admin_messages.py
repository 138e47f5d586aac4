from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from silvershard.cluster import admin_pb2
from silvershard.deploy.admin_messages import (
    audit_limit,
    audit_to,
    freshness_to,
    name_of,
    operation_to,
    shards_to,
    task_from,
    timeout_from,
)
from silvershard.deploy.admin_store import AdminOperation, AdminTask, Failure
from silvershard.deploy.processes import myself
from silvershard.deploy.state import ClusterRecord, GenerationRecord, RouterRecord, ShardRecord
from silvershard.model.request import RequestError

FILES = admin_pb2.CHECKS_FILES


@pytest.mark.parametrize(
    ("message", "task"),
    [
        (
            admin_pb2.PlanRequest(generation=2),
            AdminTask(kind="plan", generation=2, dry_run=True),
        ),
        (
            admin_pb2.StageSnapshotRequest(generation=2, url="file:///c", dry_run=True),
            AdminTask(kind="stage", generation=2, url="file:///c", dry_run=True),
        ),
        (
            admin_pb2.VerifySnapshotRequest(generation=2, checks=FILES),
            AdminTask(kind="verify", generation=2, load=False, dry_run=True),
        ),
        (
            admin_pb2.WarmSnapshotRequest(generation=2, allow_schema=True),
            AdminTask(kind="warm", generation=2, alias="warm", allow_schema=True),
        ),
        (admin_pb2.WarmSnapshotRequest(), AdminTask(kind="warm", alias="warm")),
        (admin_pb2.ActivateRequest(generation=2), AdminTask(kind="activate", generation=2)),
        (admin_pb2.RollbackRequest(dry_run=True), AdminTask(kind="rollback", dry_run=True)),
        (
            admin_pb2.SetAliasRequest(generation=2, alias="live", checks=FILES),
            AdminTask(kind="set_alias", generation=2, load=False),
        ),
        (
            admin_pb2.SetAliasRequest(alias="canary"),
            AdminTask(kind="set_alias", alias="canary"),
        ),
        (
            admin_pb2.ScaleRequest(shards=3, standby=0, dry_run=True),
            AdminTask(kind="scale", shards=3, standby=0, dry_run=True),
        ),
    ],
)
def test_a_request_is_a_task(message: Any, task: AdminTask) -> None:
    assert task_from(message) == task


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (admin_pb2.PlanRequest(), "generation", r"must be in 1\.\.\d+, got 0"),
        (admin_pb2.VerifySnapshotRequest(), "generation", "got 0"),
        (admin_pb2.ActivateRequest(generation=1 << 63), "generation", "got 9223372036854775808"),
        (admin_pb2.StageSnapshotRequest(generation=1), "url", "1 to 2048 characters, got 0"),
        (admin_pb2.StageSnapshotRequest(generation=1, url="a" * 3000), "url", "got 3000"),
        (admin_pb2.StageSnapshotRequest(url="a"), "generation", "got 0"),
        (admin_pb2.SetAliasRequest(generation=1), "alias", "must be live or canary, got ''"),
        (admin_pb2.SetAliasRequest(generation=1, alias="warm"), "alias", "got 'warm'"),
        (admin_pb2.SetAliasRequest(alias="live"), "generation", "got 0"),
        (admin_pb2.ActivateRequest(generation=1, checks=7), "checks", "unknown choice 7"),
        (admin_pb2.ScaleRequest(), "shards", "shards, replicas or standby must be given, got none"),
        (admin_pb2.ScaleRequest(shards=0), "shards", r"must be in 1\.\.1048576, got 0"),
        (admin_pb2.ScaleRequest(replicas=17), "replicas", r"must be in 1\.\.16, got 17"),
        (admin_pb2.ScaleRequest(shards=3, standby=5), "standby", r"must be in 0\.\.4, got 5"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_field(message: Any, field: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        task_from(message)
    assert refused.value.field == field


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "x" * 65, "a\n"])
def test_a_name_has_few_plain_characters(name: str) -> None:
    with pytest.raises(RequestError, match="must be 1 to 64 letters") as refused:
        name_of(admin_pb2.RollbackRequest(operation_id=name))
    assert refused.value.field == "operation_id"
    assert name_of(admin_pb2.RollbackRequest(operation_id="a.B_9-")) == "a.B_9-"


def test_a_wait_has_a_time_or_none() -> None:
    request = admin_pb2.WaitOperationRequest
    assert timeout_from(request()) is None
    assert timeout_from(request(timeout=Duration())) == 0.0
    assert timeout_from(request(timeout=Duration(seconds=1, nanos=500_000_000))) == 1.5
    with pytest.raises(RequestError, match="at least 0 s, got -2 s"):
        timeout_from(request(timeout=Duration(seconds=-2)))


def operation(task: AdminTask, **changes: Any) -> AdminOperation:
    made = AdminOperation(operation_id="one", task=task, swap_id="s", began_unix_s=1000.5)
    return made.model_copy(update=changes)


def test_an_operation_is_told_with_its_progress_and_times() -> None:
    message = operation_to(
        operation(
            AdminTask(kind="activate", generation=2, dry_run=True),
            state="running",
            progress=("one", "two"),
        )
    )
    assert (message.operation_id, message.dry_run) == ("one", True)
    assert message.kind == admin_pb2.OPERATION_KIND_ACTIVATE
    assert message.state == admin_pb2.OPERATION_STATE_RUNNING
    assert list(message.progress) == ["one", "two"]
    assert message.began.ToMilliseconds() == 1_000_500
    assert not message.HasField("ended")
    assert not message.HasField("error")
    assert message.WhichOneof("result") is None


def test_every_kind_and_state_has_its_number() -> None:
    kinds = ("plan", "stage", "verify", "warm", "activate", "rollback", "set_alias", "scale")
    numbers = {operation_to(operation(AdminTask(kind=kind))).kind for kind in kinds}
    assert numbers == set(admin_pb2.OperationKind.values()) - {0}
    states = ("waiting", "running", "done", "failed", "cancelled", "abandoned")
    rollback = AdminTask(kind="rollback")
    numbers = {operation_to(operation(rollback, state=state)).state for state in states}
    assert numbers == set(admin_pb2.OperationState.values()) - {0}


@pytest.mark.parametrize(
    ("task", "result", "where"),
    [
        (
            AdminTask(kind="plan"),
            {"generation": 2, "mode": "beside", "new_bytes": 1 << 40, "checks_fit": True},
            "plan",
        ),
        (
            AdminTask(kind="stage"),
            {"generation": 2, "url": "file:///c", "copied_bytes": 5, "done": True},
            "staged",
        ),
        (
            AdminTask(kind="verify"),
            {"generation": 2, "live": 1, "passed": False, "checks": [{"name": "recall"}]},
            "verified",
        ),
        (
            AdminTask(kind="rollback"),
            {"kind": "rollback", "alias": "live", "generation": 1, "before": 2, "seconds": 0.5},
            "moved",
        ),
        (AdminTask(kind="scale"), {"starts": 3, "ends": 2, "done": True}, "scaled"),
    ],
)
def test_a_result_lies_where_its_kind_belongs(
    task: AdminTask, result: dict[str, Any], where: str
) -> None:
    message = operation_to(operation(task, state="done", result=result, ended_unix_s=1001.0))
    assert message.WhichOneof("result") == where
    assert message.ended.seconds == 1001
    found = getattr(message, where)
    for name, value in result.items():
        if isinstance(value, list):
            assert [one.name for one in found.checks] == ["recall"]
        elif name != "kind":
            assert getattr(found, name) == value
    # Even a result of nothing but zeros is one.
    assert operation_to(operation(task, result={})).WhichOneof("result") == where


def test_a_failure_has_a_code_a_reason_and_words() -> None:
    failure = Failure(code="DATA_LOSS", reason="CHECK_FAILED", message="it is damaged")
    message = operation_to(operation(AdminTask(kind="verify"), state="failed", failure=failure))
    found = message.error
    assert (found.code, found.reason, found.message) == (15, "CHECK_FAILED", "it is damaged")


def test_the_shards_are_told_as_the_driver_sees_them() -> None:
    shard = ShardRecord(shard=1, replica=2, state="serving", pid=7, epoch=1 << 40, documents=9)
    record = ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="127.0.0.1:9",
        model="films",
        generation=3,
        documents=600,
        map_version=4,
        router=RouterRecord(state="serving"),
        shards=(shard,),
        generations=(GenerationRecord(generation=3, role="live", prepared=1, processes=1),),
        ray_dir="",
        since_unix_s=0.0,
    )
    message = shards_to(record)
    assert (message.generation, message.map_version, message.documents) == (3, 4, 600)
    (found,) = message.shards
    assert (found.shard, found.replica, found.state, found.pid) == (1, 2, "serving", 7)
    assert (found.epoch, found.documents) == (1 << 40, 9)
    assert message.generations[0].role == "live"


def test_freshness_is_told_whatever_else_it_comes_to_say() -> None:
    document = {
        "generation": 3,
        "lag": 4,
        "sequencer": {
            "log_id": (1 << 64) - 1,
            "queued": 2,
            "partitions": [{"partition": 0, "start": 1, "end": 9, "epoch": 5}],
            "blocked": [{"shard": 1, "use": 0.5, "limit": 0.4}],
            "counts": [{"op": "upsert", "code": 0, "count": 3}],
        },
        "shards": [
            {"shard": 0, "generation": 3, "cut": [5, 6], "staleness_s": 0.25, "new": {"a": 1}},
            {"shard": 1, "generation": 3, "error": "no answer"},
        ],
    }
    message = freshness_to(document, degraded=True)
    assert (message.generation, message.lag, message.degraded) == (3, 4, True)
    assert message.sequencer.log_id == (1 << 64) - 1
    assert message.sequencer.partitions[0].end == 9
    assert message.sequencer.blocked[0].use == 0.5
    assert list(message.shards[0].cut) == [5, 6]
    assert message.shards[1].error == "no answer"


def test_lines_of_the_audit_log_are_entries() -> None:
    change = {
        **{"time": "1970-01-02T00:00:00.500+00:00", "event": "admin", "who": "olga", "peer": "p"},
        **{"method": "/a/B", "code": "OK", "request": {"generation": "3"}},
    }
    refused = {"event": "refused", "reason": "TOKEN_MISSING", "suppressed": 3, "later": 1}
    first, second = audit_to([change, refused]).entries
    assert (first.time.seconds, first.time.nanos) == (86400, 500_000_000)
    assert (first.event, first.who, first.peer, first.method) == ("admin", "olga", "p", "/a/B")
    assert (first.code, first.request) == ("OK", '{"generation": "3"}')
    assert (second.reason, second.suppressed, second.request) == ("TOKEN_MISSING", 3, "")


def test_no_more_entries_are_asked_for_than_fit_an_answer() -> None:
    assert [audit_limit(admin_pb2.AuditRequest(limit=one)) for one in (0, 1, 1000)] == [
        *(100, 1, 1000)
    ]
    with pytest.raises(RequestError, match=r"limit.*at most 1000, got 1001"):
        audit_limit(admin_pb2.AuditRequest(limit=1001))
