"""The gRPC server of one table shard: rows in and out, one call at a time."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np
from google.rpc import code_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.codec import code_number, status_row
from silvershard.cluster.listen import bind, server_options
from silvershard.model.request import RequestError
from silvershard.shard.errors import DeadlineExceeded, Overloaded, RetrievalError
from silvershard.shard.table import TableShard
from silvershard.shard.table_rows import Ints

STALE_EPOCH = "STALE_EPOCH"

MAX_CALL_ROWS = 1 << 16
"""Rows that one call may take or put, so that none holds up the others for long."""

# Room for the largest call: its positions, its records of the largest rows, and its frame.
_MIN_MESSAGE_BYTES = 1 << 20

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(eq=False)
class _Stream:
    """What one client has asked for and not yet received."""

    replies: asyncio.Queue[table_pb2.TableReply] = field(default_factory=asyncio.Queue)
    unanswered: int = 0
    """Accepted calls whose reply is not on its way."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False


@dataclass(eq=False)
class _Job:
    call: table_pb2.TableCall
    stream: _Stream
    expires_at_s: float


class TableServer:
    """Serves one shard of a table on a port of its own.

    The event loop does all the work: to take 1,000 rows costs it some 0.1 ms, less than a way to
    another thread and back. Between two calls it answers health checks.
    """

    def __init__(
        self,
        table: TableShard,
        *,
        epoch: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        insecure: bool = False,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            table: the rows.
            epoch: incarnation, larger than that of every earlier one; by default the time in ns.
            host: address to bind.
            port: 0 lets the system choose a free one.
            insecure: allow an address that other machines can reach.
            max_queue: calls that may wait or be on their way back; more are refused.
            clock: seconds that only grow.
        """
        self.table = table
        self.epoch = time.time_ns() if epoch is None else epoch
        self.address = ""
        self._host, self._port, self._insecure = host, port, insecure
        self._max_queue = max_queue
        self._clock = clock
        self._pending = 0
        self._busy = False
        """A call ran in this turn of the event loop."""
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._names = ("", f"table/{table.plan.name}/{table.shard}")

    async def start(self) -> None:
        """Bind the port and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if the host is refused.
            StateError: if the port is in use.
        """
        largest = MAX_CALL_ROWS * (8 + self.table.plan.record_bytes) + _MIN_MESSAGE_BYTES
        server = grpc.aio.server(options=server_options(largest))
        table_pb2_grpc.add_TableServicer_to_server(_Servicer(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = bind(server, self._host, self._port, insecure=self._insecure)
        await server.start()
        self._server = server
        self._worker = asyncio.create_task(self._work())
        for name in self._names:
            await self._health.set(name, _SERVING)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, wait for the running ones at most ``grace_s``, and free the port."""
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
        if self._worker is not None:
            self._worker.cancel()

    async def execute(self, context: grpc.aio.ServicerContext) -> None:
        """Serve one client until it goes away; what waits for it then is dropped."""
        stream = _Stream()
        # Tells the client that it is connected, before there is anything to answer.
        await context.send_initial_metadata(())
        writer = asyncio.create_task(self._write(stream, context))
        try:
            while True:
                call = await context.read()
                if call is grpc.aio.EOF:
                    break
                reply = self._accept(call, stream)
                if reply is not None:
                    await context.write(reply)
                    self._sent(stream)
            while stream.unanswered:
                stream.drained.clear()
                await stream.drained.wait()
        finally:
            stream.closed = True
            self._pending -= stream.unanswered
            writer.cancel()

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await stream.replies.get())
            self._sent(stream)

    def _sent(self, stream: _Stream) -> None:
        stream.unanswered -= 1
        self._pending -= 1
        stream.drained.set()

    def _accept(self, call: table_pb2.TableCall, stream: _Stream) -> table_pb2.TableReply | None:
        """Queue a call, or return its answer if nothing is in its way.

        The first call of a turn of the event loop runs at once if no other one waits: two turns
        less, and every turn looks for events, which takes some 20 us.
        """
        refusal = self._refusal(call)
        alone = not stream.unanswered
        stream.unanswered += 1
        self._pending += 1
        if refusal is not None:
            stream.replies.put_nowait(refusal)
            return None
        job = _Job(call, stream, self._clock() + call.remaining_us / 1e6)
        if not alone or self._busy or not self._jobs.empty():
            self._jobs.put_nowait(job)
            return None
        self._busy = True
        asyncio.get_running_loop().call_soon(self._rest)
        return self._run(job)

    def _rest(self) -> None:
        self._busy = False

    def _refusal(self, call: table_pb2.TableCall) -> table_pb2.TableReply | None:
        if call.epoch and call.epoch != self.epoch:
            reply = self._reply(call)
            reply.code = code_pb2.FAILED_PRECONDITION
            reply.reason = STALE_EPOCH
            reply.message = f"epoch {call.epoch} was asked for, this shard is epoch {self.epoch}"
            return reply
        if self._pending >= self._max_queue:
            return self._failure(call, Overloaded(f"{self._pending} calls are queued", 0.1))
        return None

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            if not job.stream.closed:
                job.stream.replies.put_nowait(self._run(job))
            # Lets calls, replies and health checks pass between two jobs.
            await asyncio.sleep(0)

    def _run(self, job: _Job) -> table_pb2.TableReply:
        try:
            if self._clock() >= job.expires_at_s:
                raise DeadlineExceeded("the time of the call ran out in the queue")
            return self._dispatch(job.call)
        except (RetrievalError, RequestError) as error:
            return self._failure(job.call, error)
        except Exception as error:  # noqa: BLE001  # a process border; the error is logged
            error_id = uuid.uuid4().hex[:12]
            _log.exception("internal error %s in shard %d", error_id, self.table.shard)
            return self._failure(job.call, error, error_id)

    def _dispatch(self, call: table_pb2.TableCall) -> table_pb2.TableReply:
        op = call.WhichOneof("op")
        if op == "take":
            positions = _positions(call.take.positions)
        elif op == "put":
            positions = _positions(call.put.positions)
            width = self.table.plan.record_bytes
            if len(call.put.records) != len(positions) * width:
                raise RequestError(
                    "records",
                    f"must have {len(positions) * width} bytes for {len(positions)} positions, "
                    f"got {len(call.put.records)}",
                )
            records = np.frombuffer(call.put.records, dtype=np.uint8).reshape(-1, width)
            self.table.put(positions, records)
            positions = positions[:0]
        else:
            raise RequestError("op", "must name an operation")
        found = self.table.read(positions, call.seen_version)
        reply = self._reply(call)
        reply.version = found.version
        if found.changed is None:
            reply.forget = True
        elif len(found.changed):
            reply.changed = found.changed.tobytes()
        reply.records = found.records.tobytes()
        return reply

    def _reply(self, call: table_pb2.TableCall) -> table_pb2.TableReply:
        return table_pb2.TableReply(call_id=call.call_id, epoch=self.epoch)

    def _failure(
        self, call: table_pb2.TableCall, error: Exception, error_id: str = ""
    ) -> table_pb2.TableReply:
        reply = self._reply(call)
        row = status_row(error)
        if row is None:
            reply.code, reply.reason = code_pb2.INTERNAL, "INTERNAL"
            reply.message = f"internal error {error_id}"
        else:
            reply.code, reply.reason = code_number(row.code), row.reason
            reply.message = str(error)
        return reply


def _positions(data: bytes) -> Ints:
    """Return the positions in a call.

    Raises:
        RequestError: if they are cut off, or too many.
    """
    if len(data) % 8:
        raise RequestError("positions", f"must have 8 bytes each, got {len(data)} bytes")
    if len(data) > 8 * MAX_CALL_ROWS:
        raise RequestError(
            "positions", f"must be at most {MAX_CALL_ROWS} in a call, got {len(data) // 8}"
        )
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)


class _Servicer:
    """The names of the service in front of a server."""

    def __init__(self, server: TableServer) -> None:
        self._server = server

    async def Execute(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._server.execute(context)
