"""The messages of faults: requests, and records as answers."""

from collections.abc import Iterable
from typing import get_args

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from silvershard.cluster import admin_pb2
from silvershard.cluster.faults import FaultKind, FaultRecord, FaultState
from silvershard.deploy.fault_plan import FaultRequest
from silvershard.model.request import RequestError

_KINDS: dict[int, FaultKind] = {
    admin_pb2.FaultKind.Value(f"FAULT_KIND_{kind.upper()}"): kind for kind in get_args(FaultKind)
}
_STATES: dict[FaultState, admin_pb2.FaultState] = {
    "active": admin_pb2.FAULT_STATE_ACTIVE,
    "over": admin_pb2.FAULT_STATE_OVER,
    "cleared": admin_pb2.FAULT_STATE_CLEARED,
}
_MAX_URL = 2048


def fault_from(name: str, message: admin_pb2.InjectFaultRequest) -> FaultRequest:
    """Return the fault that a request asks for; what makes no sense in it is seen later.

    Raises:
        RequestError: naming the field, if it names no kind or its URL is too long.
    """
    if message.kind not in _KINDS:
        raise RequestError("kind", f"unknown choice {message.kind}")
    if len(message.copy_url) > _MAX_URL:
        raise RequestError(
            "copy_url", f"must have at most {_MAX_URL} characters, got {len(message.copy_url)}"
        )
    return FaultRequest(
        name=name,
        kind=_KINDS[message.kind],
        target=message.target,
        seconds=message.duration.ToNanoseconds() / 1e9,
        delay_ms=message.delay_ms,
        share=message.share or 1.0,
        copy_url=message.copy_url,
        allow_outage=message.allow_outage,
        dry_run=message.dry_run,
    )


def fault_to(fault: FaultRecord, *, dry_run: bool = False) -> admin_pb2.Fault:
    """Return a fault as a message."""
    message = admin_pb2.Fault(
        operation_id=fault.name,
        dry_run=dry_run,
        kind=f"FAULT_KIND_{fault.kind.upper()}",
        target=fault.target,
        duration=Duration(),
        delay_ms=fault.delay_ms,
        share=fault.share,
        copy_url=fault.copy_url,
        pids=fault.pids,
        began=_timestamp(fault.began_unix_s),
    )
    message.duration.FromNanoseconds(int(fault.seconds * 1e9))
    if dry_run:
        return message
    message.state = _STATES[fault.state]
    if fault.ended_unix_s:
        message.ended.CopyFrom(_timestamp(fault.ended_unix_s))
    return message


def faults_to(faults: Iterable[FaultRecord]) -> admin_pb2.ListFaultsResponse:
    """Return faults as a message."""
    return admin_pb2.ListFaultsResponse(faults=map(fault_to, faults))


def _timestamp(unix_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(unix_s * 1e9))
    return stamp
