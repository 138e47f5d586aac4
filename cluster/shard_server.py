"""The gRPC server of one shard: it queues calls for the one thread that owns the model."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import grpc
import grpc.aio
from google.rpc import code_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.cluster import shard_pb2, shard_pb2_grpc, tensors, wire
from silvershard.cluster.codec import values_from
from silvershard.cluster.faults import Faults
from silvershard.cluster.hosting import Hosted, Hosting, Load, Loaded, Spawn, seen_to, spawn
from silvershard.cluster.listen import INTERNAL_MESSAGE_BYTES, bind, server_options
from silvershard.cluster.query_gaps import QueryGaps
from silvershard.cluster.security import ALONE, Peers
from silvershard.cluster.shard_replies import demand_from, failed, set_fields, set_round
from silvershard.cluster.stage_gate import Abandoned, StageGate
from silvershard.cluster.table_lookup import TableCounts
from silvershard.model.request import RequestError
from silvershard.shard.errors import (
    Overloaded,
    RetrievalError,
    StateError,
)
from silvershard.shard.executor import ShardExecutor

STALE_EPOCH = "STALE_EPOCH"

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(eq=False)
class _Job:
    call: shard_pb2.ShardCall
    hosted: Hosted
    arrived_s: float
    expires_at_s: float
    dropped: bool = False


@dataclass(eq=False)
class _Stream:
    """What one router has asked for and not yet received."""

    replies: asyncio.Queue[shard_pb2.ShardReply] = field(default_factory=asyncio.Queue)
    jobs: set[_Job] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a job has ended and there is no other."""
    keys: set[str] = field(default_factory=set)
    """Batches that may have candidates open."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class ShardServer:
    """Serves one shard on a port of its own, in one generation or several side by side.

    Everything that touches the model runs on one thread, in order of arrival. Health and pings are
    answered by the event loop, so they keep answering while the model works.
    """

    def __init__(
        self,
        executor: ShardExecutor | Loaded,
        *,
        snapshot: str = "",
        load: Load | None = None,
        replica: int = 0,
        epoch: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Peers = ALONE,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        lookups: Callable[[], Mapping[str, TableCounts]] = dict,
        gaps: QueryGaps | None = None,
        faults: Faults | None = None,
        model_thread: Executor | None = None,
        spawn: Spawn = spawn,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            executor: the loaded shard, caught up with the log that it follows; from now on only
                this server may call it.
            snapshot: directory that it was loaded from.
            load: loads further generations; None: there will be none.
            replica: index of this copy of the shard.
            epoch: incarnation, larger than that of every earlier one; by default the time in ns.
            host: address to bind.
            port: 0 lets the system choose a free one.
            peers: how it meets the other processes of its cluster.
            max_queue: calls that may wait or run; more are refused.
            clock: the clock of ``executor``.
            lookups: returns what was looked up in each remote table so far; any thread may call it.
            gaps: is told of the calls of queries; None: nothing gives way to them.
            faults: say how slow it shall be and how full; None: neither.
            model_thread: runs what touches the model, one by one; None: a thread of this server.
            spawn: runs what loads further generations and lets go of them.
        """
        first = executor if isinstance(executor, Loaded) else Loaded(executor)
        self.shard = first.executor.shard
        self.num_shards = first.executor.num_shards
        self.replica = replica
        self.epoch = time.time_ns() if epoch is None else epoch
        self.address = ""
        self._host, self._port, self._peers = host, port, peers
        self._max_queue = max_queue
        self._clock = clock
        self._lookups = lookups
        self._gaps = QueryGaps() if gaps is None else gaps
        self._faults = faults
        self._pending = 0
        self._gate = StageGate(clock)
        self._by_key: dict[str, set[_Job]] = {}
        name = f"shard-{self.shard}"
        self._thread = model_thread or ThreadPoolExecutor(1, thread_name_prefix=name)
        self._server: grpc.aio.Server | None = None
        self._is_on = False
        self._health = health.aio.HealthServicer()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.hosting = Hosting(self.shard, self._thread.submit, clock, load, self._changed, spawn)
        self.hosting.add(first, snapshot)

    @property
    def executor(self) -> ShardExecutor:
        """Return the shard in its newest generation.

        Raises:
            StateError: if none is in service.
        """
        return self._newest.executor_in_service

    @property
    def generation(self) -> int:
        """Return the newest generation in service.

        Raises:
            StateError: if there is none.
        """
        return self._newest.generation

    @property
    def _newest(self) -> Hosted:
        served = self.hosting.served
        if not served:
            raise StateError(f"shard {self.shard} has no generation in service")
        return served[-1]

    async def start(self) -> None:
        """Bind the port and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if the host is refused.
            StateError: if the port is in use.
        """
        protection = self._peers.protection
        server = grpc.aio.server(
            interceptors=protection.interceptors, options=server_options(INTERNAL_MESSAGE_BYTES)
        )
        await self.serve(server)
        self.address = bind(server, self._host, self._port, protection.door)
        await server.start()
        self._server = server

    async def serve(self, server: grpc.aio.Server) -> None:
        """Offer the services on a server that is not started yet, from the running event loop."""
        shard_pb2_grpc.add_ShardServicer_to_server(_Servicer(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._loop = asyncio.get_running_loop()
        self.hosting.attach(self._loop)
        self._is_on = True
        await self._set_health()

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, wait for the running ones at most ``grace_s``, and free the port."""
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        server, self._server = self._server, None
        self._is_on = False
        if server is not None:
            await server.stop(grace_s)
        await asyncio.to_thread(self.hosting.close)
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _names(self) -> tuple[str, str]:
        return "", f"shard/{self.shard}"

    def _changed(self) -> None:
        """Let the health follow what is in service; any thread may call it."""
        if self._loop is not None and not self._loop.is_closed():
            work = self._set_health
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(work()))

    async def _set_health(self) -> None:
        serves = self._is_on and bool(self.hosting.served)
        for name in self._names:
            await self._health.set(name, _SERVING if serves else _NOT_SERVING)

    async def execute(self, context: grpc.aio.ServicerContext) -> None:
        """Serve one router until it goes away; then give up everything it has open."""
        stream = _Stream()
        # Tells the router that it is connected, and to whom, before there is anything to answer.
        await context.send_initial_metadata(wire.METADATA)
        writer = asyncio.create_task(self._write(stream, context))
        try:
            while True:
                call = await context.read()
                if call is grpc.aio.EOF:
                    break
                self._accept(call, stream)
            while stream.jobs:
                stream.idle.clear()
                await stream.idle.wait()
            await stream.replies.join()
        finally:
            writer.cancel()
            for task in stream.tasks:
                task.cancel()
            for job in stream.jobs:
                job.dropped = True
            self._give_up(tuple(stream.keys))

    async def ping(self, context: grpc.aio.ServicerContext) -> None:
        """Answer every beat with the identity of this incarnation."""
        while True:
            beat = await context.read()
            if beat is grpc.aio.EOF:
                return
            served = [
                shard_pb2.ServedGeneration(generation=one.generation, seen=seen_to(one.seen))
                for one in self.hosting.served
            ]
            await context.write(
                shard_pb2.Beat(sequence=beat.sequence, epoch=self.epoch, served=served)
            )

    def inspect(self) -> shard_pb2.ShardReport:
        """Return what this incarnation holds and has counted."""
        report = shard_pb2.ShardReport(
            epoch=self.epoch,
            shard=self.shard,
            replica=self.replica,
            generations=[one.report() for one in self.hosting.all],
            expired=self._gate.expired,
            cancelled=self._gate.cancelled,
        )
        if self._faults is not None:
            self._faults.fill(report)
        for name, counts in self._lookups().items():
            report.tables.add(
                table=name,
                lookups=counts.lookups,
                rows=counts.rows,
                cached=counts.cached,
                fetched=counts.fetched,
                defaulted=counts.defaulted,
                failures=counts.failures,
            )
        return report

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            reply = await stream.replies.get()
            await context.write(reply)
            stream.replies.task_done()

    def _accept(self, call: shard_pb2.ShardCall, stream: _Stream) -> None:
        """Queue a call, or answer it at once if it cannot be served."""
        if call.released:
            self._release(call.released, stream)
        op = call.WhichOneof("op")
        if op is None and call.released:
            return
        if op == "cancel":
            for job in stream.jobs:
                job.dropped |= job.call.call_id == call.cancel
            return
        refusal = self._refusal(call)
        if refusal is not None:
            stream.replies.put_nowait(refusal)
            return
        try:
            hosted = self.hosting.find(call.generation)
        except RetrievalError as error:
            stream.replies.put_nowait(self._failure(call, error))
            return
        now_s = self._clock()
        job = _Job(call, hosted, now_s, now_s + call.remaining_us / 1e6)
        if op == "open":
            stream.keys.add(call.key)
        stream.jobs.add(job)
        self._by_key.setdefault(call.key, set()).add(job)
        self._pending += 1
        if call.HasField("fresh"):
            task = asyncio.create_task(self._wait(job, stream))
            stream.tasks.add(task)
            task.add_done_callback(stream.tasks.discard)
        else:
            self._submit(job, stream)

    def _release(self, keys: Iterable[str], stream: _Stream) -> None:
        # What has not started yet would only open the candidates again.
        for key in keys:
            for job in self._by_key.get(key, ()):
                job.dropped = True
            stream.keys.discard(key)
        self._give_up(tuple(keys))

    def _give_up(self, keys: Sequence[str]) -> None:
        """Release candidates on the thread of the model, unless the server has ended."""
        if not self._is_on:
            return
        executors = [hosted.executor_in_service for hosted in self.hosting.served]

        def release() -> None:
            for executor in executors:
                for key in keys:
                    executor.release(key)

        self._thread.submit(release)

    def _refusal(self, call: shard_pb2.ShardCall) -> shard_pb2.ShardReply | None:
        if call.epoch and call.epoch != self.epoch:
            reply = self._reply(call)
            reply.code = code_pb2.FAILED_PRECONDITION
            reply.reason = STALE_EPOCH
            reply.message = f"epoch {call.epoch} was asked for, this shard is epoch {self.epoch}"
            return reply
        if self._pending >= self._max_queue:
            return self._failure(call, Overloaded(f"{self._pending} calls are queued", 0.1))
        return None

    async def _wait(self, job: _Job, stream: _Stream) -> None:
        """Run a job as soon as the shard is as fresh as it demands; answer why if it never is."""
        try:
            await self.hosting.wait(
                job.hosted, demand_from(job.call.fresh), job.arrived_s, job.call.ByteSize()
            )
        except (RetrievalError, RequestError) as error:
            self._end(job, stream, self._failure(job.call, error))
        except BaseException:
            self._end(job, stream, None)
            raise
        else:
            self._submit(job, stream)

    def _submit(self, job: _Job, stream: _Stream) -> None:
        """Let a job run on the thread of the model."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            reply = self._run(job)
            # A server that has ended waits for nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish, reply)

        def finish(reply: shard_pb2.ShardReply | None) -> None:
            self._gaps.end()
            self._end(job, stream, reply)

        # What waits for updates is in nobody's way.
        self._gaps.begin()
        self._thread.submit(run)

    def _end(self, job: _Job, stream: _Stream, reply: shard_pb2.ShardReply | None) -> None:
        """Forget a job, and send its reply; None if nobody waits for one."""
        if reply is not None:
            stream.replies.put_nowait(reply)
        self._pending -= 1
        waiting = self._by_key[job.call.key]
        waiting.discard(job)
        if not waiting:
            del self._by_key[job.call.key]
        stream.jobs.discard(job)
        if not stream.jobs:
            stream.idle.set()

    def _run(self, job: _Job) -> shard_pb2.ShardReply | None:
        """Answer a call on the thread of the model; None if nobody waits for it any more."""
        call = job.call
        if self._faults is not None and (delay_s := self._faults.delay_s()):
            time.sleep(delay_s)
        try:
            self._gate.check(job, call.WhichOneof("op") or "")
            return self._dispatch(call, job)
        except Abandoned:
            return None
        except (RetrievalError, RequestError, tensors.TensorError) as error:
            return self._failure(call, error)
        except Exception as error:  # noqa: BLE001  # a process border; the error is logged
            error_id = uuid.uuid4().hex[:12]
            _log.exception("internal error %s in shard %d", error_id, self.shard)
            return self._failure(call, error, error_id)

    def _dispatch(self, call: shard_pb2.ShardCall, job: _Job) -> shard_pb2.ShardReply:
        hosted, proceed = job.hosted, partial(self._gate.check, job)
        executor = hosted.executor_in_service
        reply = self._reply(call)
        reply.seen.CopyFrom(seen_to(hosted.seen))
        op = call.WhichOneof("op")
        if op == "encode":
            users = [
                {name: values_from(name, one.features[name]) for name in one.features}
                for one in call.encode.users
            ]
            encoded = executor.encode(users)
            found = {"embedding": encoded.embedding, "user_state": encoded.user_state}
            reply.tensors.CopyFrom(tensors.to_map(found))
            tensors.add_warnings(reply, encoded.warnings)
            reply.fallback_users.extend(at for at, lost in enumerate(encoded.fallback) if lost)
        elif op == "count":
            scan = tensors.from_map(call.count, tensors.SCAN)["scan"]
            reply.tensors.CopyFrom(tensors.to_map({"count": executor.count(scan)}))
        elif op == "open":
            first = executor.open(
                call.key, tensors.work_from_map(call.open), job.expires_at_s, proceed
            )
            set_round(reply, tensors.round_to_map(first), first.times)
        elif op == "close":
            second = executor.close(call.key, tensors.cutoffs_from_map(call.close), proceed)
            set_round(reply, tensors.round_to_map(second), second.times)
        elif op == "fields":
            set_fields(reply, call, hosted)
        else:
            raise RequestError("op", "must name an operation")
        return reply

    def _reply(self, call: shard_pb2.ShardCall) -> shard_pb2.ShardReply:
        return shard_pb2.ShardReply(
            call_id=call.call_id, generation=call.generation, epoch=self.epoch
        )

    def _failure(
        self, call: shard_pb2.ShardCall, error: Exception, error_id: str = ""
    ) -> shard_pb2.ShardReply:
        return failed(self._reply(call), error, error_id)


class _Servicer:
    """The names of the service in front of a server."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server

    async def Execute(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._server.execute(context)

    async def Ping(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._server.ping(context)

    async def Inspect(
        self, _request: shard_pb2.InspectRequest, _context: grpc.aio.ServicerContext
    ) -> shard_pb2.ShardReport:
        return self._server.inspect()

    async def Prepare(
        self, request: shard_pb2.PrepareRequest, context: grpc.aio.ServicerContext
    ) -> shard_pb2.GenerationReport:
        try:
            hosted = self._server.hosting.prepare(request.generation, request.snapshot)
        except StateError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return hosted.report()

    async def Retire(
        self, request: shard_pb2.RetireRequest, _context: grpc.aio.ServicerContext
    ) -> shard_pb2.RetireReply:
        self._server.hosting.retire(request.generation)
        return shard_pb2.RetireReply()
