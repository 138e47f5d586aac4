import pytest

from silvershard.cluster import admin_pb2
from silvershard.cluster.faults import FaultRecord
from silvershard.deploy.fault_messages import fault_from, fault_to, faults_to
from silvershard.deploy.fault_plan import FaultRequest
from silvershard.model.request import RequestError


def test_a_request_says_all_of_a_fault() -> None:
    message = admin_pb2.InjectFaultRequest(
        kind=admin_pb2.FAULT_KIND_SLOW,
        target="shard 1.0",
        delay_ms=7,
        share=0.5,
        copy_url="file:///copies",
        allow_outage=True,
        dry_run=True,
    )
    message.duration.FromMilliseconds(1500)
    assert fault_from("a", message) == FaultRequest(
        "a", "slow", "shard 1.0", 1.5, 7, 0.5, "file:///copies", allow_outage=True, dry_run=True
    )
    # What is not said: all of it, and no time.
    least = fault_from("a", admin_pb2.InjectFaultRequest(kind=admin_pb2.FAULT_KIND_KILL))
    assert (least.share, least.seconds) == (1.0, 0.0)


def test_an_unknown_kind_and_a_long_url_are_refused_by_field() -> None:
    with pytest.raises(RequestError, match="unknown choice 0") as refused:
        fault_from("a", admin_pb2.InjectFaultRequest())
    assert refused.value.field == "kind"
    kill = admin_pb2.FAULT_KIND_KILL
    with pytest.raises(RequestError, match="at most 2048 characters, got 2049") as refused:
        fault_from("a", admin_pb2.InjectFaultRequest(kind=kill, copy_url="x" * 2049))
    assert refused.value.field == "copy_url"


@pytest.mark.parametrize("kind", admin_pb2.FaultKind.values()[1:])
def test_every_kind_goes_both_ways(kind: admin_pb2.FaultKind) -> None:
    request = fault_from("a", admin_pb2.InjectFaultRequest(kind=kind))
    assert fault_to(request.record(1.0)).kind == kind


def test_a_fault_says_how_long_it_was_and_whom_it_hit() -> None:
    fault = FaultRecord(
        name="a",
        kind="hang",
        target="router",
        seconds=2.5,
        pids=(7, 8),
        began_unix_s=1000.25,
        ended_unix_s=1002.5,
        state="cleared",
    )
    message = fault_to(fault)
    assert (message.operation_id, message.target) == ("a", "router")
    assert message.state == admin_pb2.FAULT_STATE_CLEARED
    assert list(message.pids) == [7, 8]
    assert message.duration.ToMilliseconds() == 2500
    assert (message.began.ToMilliseconds(), message.ended.ToMilliseconds()) == (1000250, 1002500)
    assert list(faults_to([fault]).faults) == [message]
    planned = fault_to(fault.model_copy(update={"ended_unix_s": 0.0}), dry_run=True)
    assert (planned.dry_run, planned.state) == (True, 0)
    assert not planned.HasField("ended")
