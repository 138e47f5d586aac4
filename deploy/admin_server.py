"""The gRPC server of the admin plane, on a thread of the driver, and what it answers."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from silvershard.cluster import admin_pb2
from silvershard.cluster.audit import AuditLog, AuditTrail
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.security import front_protection
from silvershard.cluster.service import Malformed, abort, parser, serialize
from silvershard.deploy.admin_errors import public
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
from silvershard.deploy.admin_runner import AdminRunner
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.fault_injector import FaultInjector
from silvershard.deploy.fault_messages import fault_from, fault_to, faults_to
from silvershard.deploy.state import StateDir
from silvershard.model.request import RequestError

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

_MAX_REQUEST_BYTES = 64 << 10
# Of a call, in which its answer travels.
_ANSWER_MARGIN_S = 0.05
_DRAIN_S = 1.0

_Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message]]


class AdminService:
    """``silvershard.v1.Admin`` on top of a runner."""

    def __init__(
        self,
        state: StateDir,
        runner: AdminRunner,
        injector: FaultInjector,
        audit: AuditLog | None = None,
    ) -> None:
        """Make the service.

        Args:
            state: of the cluster.
            runner: carries out the operations.
            injector: of the faults.
            audit: what ``Audit`` reads; None: nothing is noted.
        """
        self._state = state
        self._runner = runner
        self._injector = injector
        self._audit = audit

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server that is not started yet."""
        submitted: dict[str, tuple[_Behaviour, type[Message]]] = {
            "Plan": (self._submit, admin_pb2.PlanRequest),
            "StageSnapshot": (self._submit, admin_pb2.StageSnapshotRequest),
            "VerifySnapshot": (self._submit, admin_pb2.VerifySnapshotRequest),
            "WarmSnapshot": (self._submit, admin_pb2.WarmSnapshotRequest),
            "Activate": (self._submit, admin_pb2.ActivateRequest),
            "Rollback": (self._submit, admin_pb2.RollbackRequest),
            "SetAlias": (self._submit, admin_pb2.SetAliasRequest),
            "Scale": (self._submit, admin_pb2.ScaleRequest),
            "GetOperation": (self._get, admin_pb2.GetOperationRequest),
            "WaitOperation": (self._wait, admin_pb2.WaitOperationRequest),
            "CancelOperation": (self._cancel, admin_pb2.CancelOperationRequest),
            "ListOperations": (self._list, admin_pb2.ListOperationsRequest),
            "ListShards": (self._shards, admin_pb2.ListShardsRequest),
            "Freshness": (self._freshness, admin_pb2.FreshnessRequest),
            "InjectFault": (self._inject, admin_pb2.InjectFaultRequest),
            "ListFaults": (self._faults, admin_pb2.ListFaultsRequest),
            "ClearFaults": (self._clear, admin_pb2.ClearFaultsRequest),
            "Audit": (self._read_audit, admin_pb2.AuditRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(_guarded, behaviour),
                request_deserializer=parser(kind),
                response_serializer=serialize,
            )
            for name, (behaviour, kind) in submitted.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _submit(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        return operation_to(self._runner.submit(name_of(message), task_from(message)))

    async def _get(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        return operation_to(self._runner.find(name_of(message)))

    async def _wait(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        limits = [timeout_from(message)]
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            limits.append(max(remaining_s - _ANSWER_MARGIN_S, 0.0))
        timeout_s = min((one for one in limits if one is not None), default=None)
        return operation_to(await self._runner.wait(name_of(message), timeout_s))

    async def _cancel(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        return operation_to(self._runner.cancel(name_of(message)))

    async def _list(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        found = [one for one in self._runner.all() if not (message.going_on and one.has_ended)]
        return admin_pb2.ListOperationsResponse(operations=map(operation_to, found))

    async def _shards(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        record = self._state.read_record()
        if record is None:
            raise CommandError(f"the cluster on {self._state.root} is still starting: wait for it")
        return shards_to(record)

    async def _freshness(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        from silvershard.deploy.freshness import freshness

        # It asks one process after the other, each for up to some seconds.
        document, code = await asyncio.to_thread(freshness, self._state)
        return freshness_to(document, degraded=code != ExitCode.OK)

    async def _inject(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        request = fault_from(name_of(message), message)
        fault = await asyncio.to_thread(self._injector.inject, request)
        return fault_to(fault, dry_run=request.dry_run)

    async def _faults(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        return faults_to(await asyncio.to_thread(self._injector.all))

    async def _clear(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        return faults_to(await asyncio.to_thread(self._injector.clear, message.operation_ids))

    async def _read_audit(self, message: Any, context: grpc.aio.ServicerContext) -> Message:
        limit = audit_limit(message)
        lines = await asyncio.to_thread(self._audit.read, limit) if self._audit else []
        return audit_to(lines)


async def _guarded(
    behaviour: _Behaviour, message: Message | Malformed, context: grpc.aio.ServicerContext
) -> Message:
    """Answer a call, or end it with the status of what is wrong."""
    try:
        if isinstance(message, Malformed):
            raise RequestError("message", message.message)
        return await behaviour(message, context)
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - a process border; what is a bug is logged
        await abort(context, public(error))


class AdminServer:
    """The admin plane of a cluster while its context is open."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        make_runner: Callable[[StateDir, Config], AdminRunner] = AdminRunner,
    ) -> None:
        """Prepare it; nothing listens yet.

        Args:
            state: of the cluster.
            config: its settings.
            make_runner: makes what carries out the operations, on the thread of the server.
        """
        self.address = ""
        self._state = state
        self._config = config
        self._make_runner = make_runner
        self._bound: Future[tuple[str, Callable[[], None]]] = Future()
        self._stop: Callable[[], None] | None = None
        # Processes of operations end with the thread that started them.
        self._thread = threading.Thread(target=self._run, daemon=True, name="admin")

    def __enter__(self) -> Self:
        """Listen; ``address`` is set from then on.

        Raises:
            StateError: if the port is in use, or the control store cannot be used.
            ConfigError: if the host is refused, or a file of tokens or certificates cannot be used.
        """
        self._thread.start()
        self.address, self._stop = self._bound.result()
        return self

    def __exit__(self, *_: object) -> None:
        """End everything; operations that are going on are abandoned."""
        if self._stop is not None:
            # Its thread may be gone by itself.
            with contextlib.suppress(RuntimeError):
                self._stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # handed to the thread that waits
            if self._bound.done():
                raise
            self._bound.set_exception(error)

    async def _serve(self) -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        runner = self._make_runner(self._state, self._config)
        security = self._config.security
        audit = AuditLog(Path(security.audit)) if security.audit else None
        protection = front_protection(security, audit)
        trail = (AuditTrail(audit),) if audit is not None else ()
        server = grpc.aio.server(
            interceptors=(*protection.interceptors, *trail),
            options=server_options(_MAX_REQUEST_BYTES),
        )
        injector = FaultInjector(self._state, self._config)
        AdminService(self._state, runner, injector, audit).add_to(server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (SERVICE, health_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        address = bind(server, self._config.admin.host, self._config.admin.port, protection.door)
        for name in ("", SERVICE):
            await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        self._bound.set_result((address, lambda: _set(loop, stopped)))
        try:
            await stopped.wait()
        finally:
            await runner.close()
            await server.stop(_DRAIN_S)
            injector.close()


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)
