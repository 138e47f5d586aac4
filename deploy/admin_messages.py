"""The messages of the admin plane: requests as tasks, operations and records as answers."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from silvershard.cluster import admin_pb2
from silvershard.cluster.codec import code_number
from silvershard.deploy.admin_store import AdminOperation, AdminTask
from silvershard.deploy.cluster_size import SIZE_LIMITS
from silvershard.deploy.control_store import CANARY, LIVE, WARM
from silvershard.deploy.state import ClusterRecord
from silvershard.model.request import RequestError

M = TypeVar("M", bound=Message)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_GENERATION = 10**12
_MAX_URL = 2048
_ENTRIES, _MAX_ENTRIES = 100, 1000

_RESULTS: Final[Mapping[str, str]] = {
    "plan": "plan",
    "stage": "staged",
    "verify": "verified",
    "scale": "scaled",
}
"""Where the result of each kind of operation goes; that of all others to ``moved``."""


def name_of(message: Any) -> str:
    """Return the ``operation_id`` of a request.

    Raises:
        RequestError: if it has none, or it is not a name.
    """
    if not _NAME.fullmatch(message.operation_id):
        raise RequestError(
            "operation_id",
            "must be 1 to 64 letters, digits, dots, underscores and hyphens, "
            f"got {message.operation_id[:80]!r}",
        )
    return str(message.operation_id)


def task_from(message: Message) -> AdminTask:
    """Return what a request asks for.

    Raises:
        RequestError: naming the field.
    """
    if isinstance(message, admin_pb2.PlanRequest):
        # A plan changes nothing: with or without the flag it is the same operation.
        return AdminTask(kind="plan", generation=_generation(message), dry_run=True)
    if isinstance(message, admin_pb2.StageSnapshotRequest):
        if not 0 < len(message.url) <= _MAX_URL:
            raise RequestError(
                "url", f"must have 1 to {_MAX_URL} characters, got {len(message.url)}"
            )
        return AdminTask(
            kind="stage",
            generation=_generation(message),
            url=message.url,
            dry_run=message.dry_run,
        )
    if isinstance(message, admin_pb2.RollbackRequest):
        return AdminTask(kind="rollback", dry_run=message.dry_run)
    if isinstance(message, admin_pb2.VerifySnapshotRequest):
        return AdminTask(
            kind="verify", generation=_generation(message), **{**_checks(message), "dry_run": True}
        )
    if isinstance(message, admin_pb2.WarmSnapshotRequest):
        generation = _generation(message, least=0)
        return AdminTask(kind="warm", alias=WARM, generation=generation, **_checks(message))
    if isinstance(message, admin_pb2.ActivateRequest):
        return AdminTask(kind="activate", generation=_generation(message), **_checks(message))
    if isinstance(message, admin_pb2.ScaleRequest):
        return AdminTask(kind="scale", dry_run=message.dry_run, **_size(message))
    assert isinstance(message, admin_pb2.SetAliasRequest)
    if message.alias not in (LIVE, CANARY):
        raise RequestError("alias", f"must be {LIVE} or {CANARY}, got {message.alias[:80]!r}")
    is_live = message.alias == LIVE
    return AdminTask(
        kind="set_alias",
        alias=LIVE if is_live else CANARY,
        generation=_generation(message, least=1 if is_live else 0),
        **_checks(message),
    )


def _generation(message: Any, least: int = 1) -> int:
    if not least <= message.generation <= _MAX_GENERATION:
        raise RequestError(
            "generation", f"must be in {least}..{_MAX_GENERATION}, got {message.generation}"
        )
    return int(message.generation)


def _size(message: admin_pb2.ScaleRequest) -> dict[str, Any]:
    given = {
        name: getattr(message, name)
        for name in ("shards", "replicas", "standby")
        if message.HasField(name)
    }
    for name, (least, most) in SIZE_LIMITS.items():
        if name in given and not least <= given[name] <= most:
            raise RequestError(name, f"must be in {least}..{most}, got {given[name]}")
    if not given:
        raise RequestError("shards", "shards, replicas or standby must be given, got none")
    return given


def _checks(message: Any) -> dict[str, Any]:
    if message.checks not in admin_pb2.Checks.values():
        raise RequestError("checks", f"unknown choice {message.checks}")
    return {
        "load": message.checks == admin_pb2.CHECKS_ALL,
        "allow_schema": message.allow_schema,
        "dry_run": message.dry_run,
    }


def timeout_from(message: admin_pb2.WaitOperationRequest) -> float | None:
    """Return for how long a call wants to wait, in seconds; None if it does not say.

    Raises:
        RequestError: if it is negative.
    """
    if not message.HasField("timeout"):
        return None
    timeout_s = message.timeout.ToNanoseconds() / 1e9
    if timeout_s < 0:
        raise RequestError("timeout", f"must be at least 0 s, got {timeout_s:g} s")
    return timeout_s


def operation_to(operation: AdminOperation) -> admin_pb2.Operation:
    """Return an operation as a message."""
    task = operation.task
    message = admin_pb2.Operation(
        operation_id=operation.operation_id,
        kind=f"OPERATION_KIND_{task.kind.upper()}",
        dry_run=task.dry_run,
        state=f"OPERATION_STATE_{operation.state.upper()}",
        progress=operation.progress,
        began=_timestamp(operation.began_unix_s),
    )
    if operation.ended_unix_s:
        message.ended.CopyFrom(_timestamp(operation.ended_unix_s))
    if operation.failure is not None:
        message.error.code = code_number(operation.failure.code)
        message.error.reason = operation.failure.reason
        message.error.message = operation.failure.message
    if operation.result is not None:
        result = getattr(message, _RESULTS.get(task.kind, "moved"))
        result.SetInParent()
        _filled(result, operation.result)
    return message


def _timestamp(unix_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(unix_s * 1e9))
    return stamp


def shards_to(record: ClusterRecord) -> admin_pb2.ListShardsResponse:
    """Return the processes of the shards, as the driver sees them, as a message."""
    return _filled(admin_pb2.ListShardsResponse(), record.model_dump(mode="json"))


def audit_limit(message: admin_pb2.AuditRequest) -> int:
    """Return how many entries of the audit log are asked for.

    Raises:
        RequestError: if they are too many.
    """
    if message.limit > _MAX_ENTRIES:
        raise RequestError("limit", f"must be at most {_MAX_ENTRIES}, got {message.limit}")
    return message.limit or _ENTRIES


def audit_to(lines: Sequence[Mapping[str, Any]]) -> admin_pb2.AuditResponse:
    """Return lines of the audit log as a message."""
    message = admin_pb2.AuditResponse()
    for line in lines:
        request = json.dumps(line["request"]) if "request" in line else ""
        _filled(message.entries.add(), {**line, "request": request})
    return message


def freshness_to(document: Mapping[str, Any], *, degraded: bool) -> admin_pb2.FreshnessResponse:
    """Return what the verb ``freshness`` found as a message."""
    message = _filled(admin_pb2.FreshnessResponse(), document)
    message.degraded = degraded
    return message


def _filled(message: M, document: Mapping[str, Any]) -> M:
    """Fill a message from a document of the same names; what it has no field for stays out."""
    json_format.ParseDict(dict(document), message, ignore_unknown_fields=True)
    return message
