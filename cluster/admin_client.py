"""The client of the admin plane: calls that may be repeated, and operations that are waited for."""

import math
import time
import uuid
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from silvershard.cluster import admin_pb2, admin_pb2_grpc
from silvershard.cluster.admin_pb2 import Operation
from silvershard.cluster.codec import RequestRefused, code_name
from silvershard.cluster.dialer import Dialer, client_dialer
from silvershard.cluster.faults import FaultKind
from silvershard.cluster.service import refused_by
from silvershard.shard.errors import DeadlineExceeded

_WAIT_S = 20.0
"""Longest wait of one call; a longer one would not notice a cluster that hangs."""
_ANSWER_S = 5.0
_FAULT_S = 30.0
"""Longest wait until a fault is there or over."""
_PAUSE_S = 0.1
"""Time between two waits, of which a cluster may cut the first one short."""

_GOING_ON = (admin_pb2.OPERATION_STATE_WAITING, admin_pb2.OPERATION_STATE_RUNNING)


class AdminClient:
    """A connection to the admin plane of a cluster; a context manager, for any number of threads.

    What begins an operation returns it at once. Give it a name of your own to repeat the call when
    it is not known whether it arrived: the same call under the same name is the same operation.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        token: str = "",
        root_certificates: bytes | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        """Make a client; it connects with the first call.

        Args:
            address: host:port that ``silvershard status`` shows.
            timeout_s: time limit of a call; that of ``finish`` is its own.
            token: bearer token to show; empty: none. In plain text only loopback addresses get it.
            root_certificates: PEM of the CAs by which the cluster is known; None: plain text.
            dialer: reaches the cluster, instead of ``token`` and ``root_certificates``.

        Raises:
            ConfigError: if a token would be shown to another machine in plain text.
        """
        self.address = address
        self.timeout_s = timeout_s
        self._channel = (dialer or client_dialer(token, root_certificates)).channel(address)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; calls in flight fail. Closing twice is harmless."""
        self._channel.close()

    def plan(self, generation: int, *, operation_id: str = "") -> Operation:
        """Begin to plan how a generation could be brought in.

        Args:
            generation: its number.
            operation_id: name of the operation; empty: a random one. Also below.

        Raises:
            RequestRefused: with the status of the cluster. Also below.
        """
        request = admin_pb2.PlanRequest(operation_id=_named(operation_id), generation=generation)
        return self._operation(self._stub.Plan, request)

    def stage_snapshot(
        self, url: str, generation: int, *, operation_id: str = "", dry_run: bool = False
    ) -> Operation:
        """Begin to fetch a generation from a URL into the state directory."""
        request = admin_pb2.StageSnapshotRequest(
            operation_id=_named(operation_id), dry_run=dry_run, generation=generation, url=url
        )
        return self._operation(self._stub.StageSnapshot, request)

    def verify_snapshot(
        self,
        generation: int,
        *,
        load: bool = True,
        allow_schema: bool = False,
        operation_id: str = "",
    ) -> Operation:
        """Begin to check a generation.

        Args:
            generation: its number.
            load: load it whole to check it. Also below.
            allow_schema: let through what requests for the live one would not fit. Also below.
            operation_id: name of the operation.
        """
        request = admin_pb2.VerifySnapshotRequest(
            operation_id=_named(operation_id),
            generation=generation,
            checks=_checks(load),
            allow_schema=allow_schema,
        )
        return self._operation(self._stub.VerifySnapshot, request)

    def warm_snapshot(
        self,
        generation: int,
        *,
        load: bool = True,
        allow_schema: bool = False,
        operation_id: str = "",
        dry_run: bool = False,
    ) -> Operation:
        """Begin to load a generation beside the live one, where no request can name it.

        Args:
            generation: its number; 0: give up the one that is warm.
            load: see above.
            allow_schema: see above.
            operation_id: name of the operation.
            dry_run: plan and check, and change nothing. Also below.
        """
        request = admin_pb2.WarmSnapshotRequest(
            operation_id=_named(operation_id),
            dry_run=dry_run,
            generation=generation,
            checks=_checks(load),
            allow_schema=allow_schema,
        )
        return self._operation(self._stub.WarmSnapshot, request)

    def activate(
        self,
        generation: int,
        *,
        load: bool = True,
        allow_schema: bool = False,
        operation_id: str = "",
        dry_run: bool = False,
    ) -> Operation:
        """Begin to make a generation live."""
        request = admin_pb2.ActivateRequest(
            operation_id=_named(operation_id),
            dry_run=dry_run,
            generation=generation,
            checks=_checks(load),
            allow_schema=allow_schema,
        )
        return self._operation(self._stub.Activate, request)

    def rollback(self, *, operation_id: str = "", dry_run: bool = False) -> Operation:
        """Begin to make the generation live again that was live before."""
        request = admin_pb2.RollbackRequest(operation_id=_named(operation_id), dry_run=dry_run)
        return self._operation(self._stub.Rollback, request)

    def set_alias(
        self,
        alias: str,
        generation: int,
        *,
        load: bool = True,
        allow_schema: bool = False,
        operation_id: str = "",
        dry_run: bool = False,
    ) -> Operation:
        """Begin to let an alias, ``live`` or ``canary``, name a generation; 0: no canary."""
        request = admin_pb2.SetAliasRequest(
            operation_id=_named(operation_id),
            dry_run=dry_run,
            generation=generation,
            checks=_checks(load),
            allow_schema=allow_schema,
            alias=alias,
        )
        return self._operation(self._stub.SetAlias, request)

    def scale(
        self,
        *,
        shards: int | None = None,
        replicas: int | None = None,
        standby: int | None = None,
        operation_id: str = "",
        dry_run: bool = False,
    ) -> Operation:
        """Begin to give the cluster another number of shards or of their copies.

        Args:
            shards: how many there shall be; None: as now. Also below.
            replicas: processes of each shard that are asked.
            standby: further ones, kept warm.
            operation_id: name of the operation.
            dry_run: plan, and change nothing.
        """
        request = admin_pb2.ScaleRequest(
            operation_id=_named(operation_id),
            dry_run=dry_run,
            shards=shards,
            replicas=replicas,
            standby=standby,
        )
        return self._operation(self._stub.Scale, request)

    def get_operation(self, operation_id: str) -> Operation:
        """Return an operation as it is now."""
        request = admin_pb2.GetOperationRequest(operation_id=operation_id)
        return self._operation(self._stub.GetOperation, request)

    def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """Return an operation when it has ended, or as it is when the time is up.

        Raises:
            RequestRefused: with the status of the cluster.
            ValueError: if the time is no finite number of seconds.
        """
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a finite number from 0, got {timeout_s}")
        timeout = Duration()
        timeout.FromNanoseconds(int(timeout_s * 1e9))
        request = admin_pb2.WaitOperationRequest(operation_id=operation_id, timeout=timeout)
        return self._operation(self._stub.WaitOperation, request, timeout_s + _ANSWER_S)

    def finish(self, operation: Operation, *, timeout_s: float) -> Operation:
        """Return an operation once it is done.

        Raises:
            RequestRefused: if it failed, was cancelled or abandoned, with its reason, or if the
                cluster refused the call.
            DeadlineExceeded: if it has not ended in time; it goes on.
        """
        until_s = time.monotonic() + timeout_s
        while operation.state in _GOING_ON:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                said = f": {operation.progress[-1]}" if operation.progress else ""
                raise DeadlineExceeded(
                    f"operation {operation.operation_id} has not ended after {timeout_s:g} s{said}"
                )
            operation = self.wait_operation(operation.operation_id, min(left_s, _WAIT_S))
            if operation.state in _GOING_ON:
                time.sleep(max(min(_PAUSE_S, until_s - time.monotonic()), 0.0))
        if operation.state != admin_pb2.OPERATION_STATE_DONE:
            error = operation.error
            raise RequestRefused(code_name(error.code), error.message, reason=error.reason)
        return operation

    def cancel_operation(self, operation_id: str) -> Operation:
        """Ask for the end of an operation and return it as it is then."""
        request = admin_pb2.CancelOperationRequest(operation_id=operation_id)
        return self._operation(self._stub.CancelOperation, request)

    def list_operations(self, *, going_on: bool = False) -> list[Operation]:
        """Return the operations that are remembered, the newest first.

        Args:
            going_on: leave out those that have ended.

        Raises:
            RequestRefused: with the status of the cluster. Also below.
        """
        request = admin_pb2.ListOperationsRequest(going_on=going_on)
        found: admin_pb2.ListOperationsResponse = self._call(self._stub.ListOperations, request)
        return list(found.operations)

    def list_shards(self) -> admin_pb2.ListShardsResponse:
        """Return every process of a shard and every generation that is held."""
        request = admin_pb2.ListShardsRequest()
        found: admin_pb2.ListShardsResponse = self._call(self._stub.ListShards, request)
        return found

    def freshness(self) -> admin_pb2.FreshnessResponse:
        """Return how far the update log is, and how far every shard process."""
        request = admin_pb2.FreshnessRequest()
        found: admin_pb2.FreshnessResponse = self._call(self._stub.Freshness, request)
        return found

    def audit(self, *, limit: int = 100) -> list[admin_pb2.AuditEntry]:
        """Return who changed what, and which calls were refused, the newest last.

        Args:
            limit: most entries, 1 to 1,000.
        """
        request = admin_pb2.AuditRequest(limit=limit)
        found: admin_pb2.AuditResponse = self._call(self._stub.Audit, request)
        return list(found.entries)

    def inject_fault(
        self,
        kind: FaultKind,
        target: str,
        seconds: float = 0.0,
        *,
        delay_ms: int = 0,
        share: float = 1.0,
        copy_url: str = "",
        allow_outage: bool = False,
        operation_id: str = "",
        dry_run: bool = False,
    ) -> admin_pb2.Fault:
        """Return a fault once it is there.

        Args:
            kind: what happens.
            target: what it happens to, such as ``shard 1.0``.
            seconds: how long it lasts; 0 for a kill.
            delay_ms: by how much calls take longer, of a slow shard.
            share: of the messages that are dropped, or of the free slots that are filled, 0..1.
            copy_url: where another copy of the generation is that is damaged.
            allow_outage: do it also where no other copy of a shard answers.
            operation_id: name of the fault; empty: a random one.
            dry_run: say what would be done, and do nothing.
        """
        duration = Duration()
        duration.FromNanoseconds(int(seconds * 1e9))
        request = admin_pb2.InjectFaultRequest(
            operation_id=_named(operation_id),
            dry_run=dry_run,
            kind=f"FAULT_KIND_{kind.upper()}",
            target=target,
            duration=duration,
            delay_ms=delay_ms,
            share=share,
            copy_url=copy_url,
            allow_outage=allow_outage,
        )
        found: admin_pb2.Fault = self._call(self._stub.InjectFault, request, _FAULT_S)
        return found

    def list_faults(self) -> list[admin_pb2.Fault]:
        """Return the faults that are remembered, the oldest first."""
        request = admin_pb2.ListFaultsRequest()
        found: admin_pb2.ListFaultsResponse = self._call(self._stub.ListFaults, request)
        return list(found.faults)

    def clear_faults(self, *operation_ids: str) -> list[admin_pb2.Fault]:
        """End faults before their time, by default all; return all that are remembered."""
        request = admin_pb2.ClearFaultsRequest(operation_ids=operation_ids)
        found: admin_pb2.ListFaultsResponse = self._call(self._stub.ClearFaults, request, _FAULT_S)
        return list(found.faults)

    def _operation(
        self, method: Any, request: Message, timeout_s: float | None = None
    ) -> Operation:
        operation: Operation = self._call(method, request, timeout_s)
        return operation

    def _call(self, method: Any, request: Message, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise refused_by(error) from None


def _named(operation_id: str) -> str:
    return operation_id or uuid.uuid4().hex


def _checks(load: bool) -> admin_pb2.Checks:
    return admin_pb2.CHECKS_ALL if load else admin_pb2.CHECKS_FILES
