from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from silvershard.cluster import RequestRefused, admin_client, admin_pb2, admin_pb2_grpc
from silvershard.cluster.admin_client import AdminClient
from silvershard.shard.errors import DeadlineExceeded

WAITING = admin_pb2.OPERATION_STATE_WAITING
DONE = admin_pb2.OPERATION_STATE_DONE


class Admin(admin_pb2_grpc.AdminServicer):
    """An admin plane that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.waits = 0
        self.ends = admin_pb2.Operation(operation_id="one", state=DONE)

    def begin(self, request: Any, context: Any) -> admin_pb2.Operation:
        self.asked.append(request)
        return admin_pb2.Operation(
            operation_id=request.operation_id, state=WAITING, progress=["loading"]
        )

    Plan = StageSnapshot = VerifySnapshot = WarmSnapshot = Activate = begin
    Rollback = SetAlias = Scale = GetOperation = CancelOperation = begin

    def WaitOperation(self, request: Any, context: Any) -> admin_pb2.Operation:
        going_on = self.begin(request, context)
        self.waits += 1
        # Some waits are over before the operation is.
        return self.ends if self.waits > 2 else going_on

    def ListOperations(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return admin_pb2.ListOperationsResponse(operations=[self.ends])

    def ListShards(self, request: Any, context: Any) -> Any:
        return admin_pb2.ListShardsResponse(generation=3)

    def InjectFault(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return admin_pb2.Fault(operation_id=request.operation_id)

    def ListFaults(self, request: Any, context: Any) -> Any:
        return admin_pb2.ListFaultsResponse(faults=[admin_pb2.Fault(operation_id="one")])

    def ClearFaults(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return self.ListFaults(request, context)

    def Audit(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return admin_pb2.AuditResponse(entries=[admin_pb2.AuditEntry(who="olga")])

    def Freshness(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it takes no updates")


@pytest.fixture
def admin() -> Admin:
    return Admin()


@pytest.fixture
def client(admin: Admin) -> Iterator[AdminClient]:
    server = grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with AdminClient(f"127.0.0.1:{port}") as connected:
        yield connected
    server.stop(None).wait()


def test_every_call_says_what_it_was_given(admin: Admin, client: AdminClient) -> None:
    files = admin_pb2.CHECKS_FILES
    client.plan(2, operation_id="a")
    client.stage_snapshot("file:///c", 2, operation_id="a", dry_run=True)
    client.verify_snapshot(2, load=False, operation_id="a")
    client.warm_snapshot(2, allow_schema=True, operation_id="a")
    client.activate(2, operation_id="a", dry_run=True)
    client.rollback(operation_id="a")
    client.set_alias("canary", 2, load=False, operation_id="a")
    client.scale(shards=3, standby=0, operation_id="a", dry_run=True)
    client.get_operation("a")
    client.cancel_operation("a")
    assert admin.asked == [
        admin_pb2.PlanRequest(operation_id="a", generation=2),
        admin_pb2.StageSnapshotRequest(
            operation_id="a", generation=2, url="file:///c", dry_run=True
        ),
        admin_pb2.VerifySnapshotRequest(operation_id="a", generation=2, checks=files),
        admin_pb2.WarmSnapshotRequest(operation_id="a", generation=2, allow_schema=True),
        admin_pb2.ActivateRequest(operation_id="a", generation=2, dry_run=True),
        admin_pb2.RollbackRequest(operation_id="a"),
        admin_pb2.SetAliasRequest(operation_id="a", generation=2, alias="canary", checks=files),
        admin_pb2.ScaleRequest(operation_id="a", dry_run=True, shards=3, standby=0),
        admin_pb2.GetOperationRequest(operation_id="a"),
        admin_pb2.CancelOperationRequest(operation_id="a"),
    ]


def test_faults_say_what_they_were_given(admin: Admin, client: AdminClient) -> None:
    fault = client.inject_fault("drop", "host a", 1.5, share=0.5, operation_id="a", dry_run=True)
    assert fault.operation_id == "a"
    assert client.inject_fault("kill", "shard 1.0", allow_outage=True).operation_id
    client.inject_fault("slow", "shard 1.0", 2.0, delay_ms=7, operation_id="b")
    client.inject_fault("corrupt", "generation 2", 2.0, copy_url="file:///c", operation_id="c")
    lasting = Duration(seconds=2)
    assert admin.asked == [
        admin_pb2.InjectFaultRequest(
            operation_id="a",
            dry_run=True,
            kind=admin_pb2.FAULT_KIND_DROP,
            target="host a",
            duration=Duration(seconds=1, nanos=500_000_000),
            share=0.5,
        ),
        admin_pb2.InjectFaultRequest(
            operation_id=admin.asked[1].operation_id,
            kind=admin_pb2.FAULT_KIND_KILL,
            target="shard 1.0",
            duration=Duration(),
            share=1.0,
            allow_outage=True,
        ),
        admin_pb2.InjectFaultRequest(
            operation_id="b",
            kind=admin_pb2.FAULT_KIND_SLOW,
            target="shard 1.0",
            duration=lasting,
            delay_ms=7,
            share=1.0,
        ),
        admin_pb2.InjectFaultRequest(
            operation_id="c",
            kind=admin_pb2.FAULT_KIND_CORRUPT,
            target="generation 2",
            duration=lasting,
            share=1.0,
            copy_url="file:///c",
        ),
    ]
    assert [one.operation_id for one in client.list_faults()] == ["one"]
    assert [one.operation_id for one in client.clear_faults("a", "b")] == ["one"]
    assert admin.asked[-1] == admin_pb2.ClearFaultsRequest(operation_ids=["a", "b"])


def test_an_operation_without_a_name_gets_one_of_its_own(client: AdminClient) -> None:
    names = {client.rollback().operation_id, client.rollback().operation_id}
    assert len(names) == 2
    assert all(names)


def test_a_long_wait_is_several_calls(admin: Admin, client: AdminClient) -> None:
    ended = client.finish(client.activate(2), timeout_s=60.0)
    assert ended.state == DONE
    waits = admin.asked[1:]
    assert len(waits) == 3
    assert all(0 < one.timeout.ToNanoseconds() <= 20e9 for one in waits)


def test_waits_that_are_over_at_once_are_paced(
    client: AdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr(
        admin_client, "time", SimpleNamespace(monotonic=lambda: sum(paused), sleep=paused.append)
    )
    client.finish(client.activate(2), timeout_s=60.0)
    assert len(paused) == 2
    assert all(one > 0 for one in paused)


def test_what_was_not_done_is_an_error_with_its_status(admin: Admin, client: AdminClient) -> None:
    error = admin_pb2.OperationError(code=15, reason="CHECK_FAILED", message="it is damaged")
    admin.ends = admin_pb2.Operation(
        operation_id="one", state=admin_pb2.OPERATION_STATE_FAILED, error=error
    )
    with pytest.raises(RequestRefused, match="it is damaged") as refused:
        client.finish(client.activate(2), timeout_s=60.0)
    assert (refused.value.code, refused.value.reason) == ("DATA_LOSS", "CHECK_FAILED")


def test_what_does_not_end_in_time_says_how_far_it_is(client: AdminClient) -> None:
    operation = client.activate(2, operation_id="mine")
    with pytest.raises(DeadlineExceeded, match=r"operation mine has not ended .* s: loading"):
        client.finish(operation, timeout_s=0.0)
    with pytest.raises(ValueError, match="finite number from 0, got -1"):
        client.wait_operation("mine", -1)


def test_reads_are_answers_and_refusals_are_errors(admin: Admin, client: AdminClient) -> None:
    assert [one.operation_id for one in client.list_operations(going_on=True)] == ["one"]
    assert admin.asked == [admin_pb2.ListOperationsRequest(going_on=True)]
    assert client.list_shards().generation == 3
    assert [one.who for one in client.audit(limit=7)] == ["olga"]
    assert admin.asked[-1] == admin_pb2.AuditRequest(limit=7)
    with pytest.raises(RequestRefused, match="it takes no updates") as refused:
        client.freshness()
    assert refused.value.code == "FAILED_PRECONDITION"


def test_nobody_at_the_address_is_unavailable() -> None:
    with AdminClient("127.0.0.1:9", timeout_s=5.0) as client, pytest.raises(RequestRefused) as no:
        client.list_shards()
    assert no.value.code == "UNAVAILABLE"
