"""The gRPC server of the sequencer: it takes updates, and answers once they are durable."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.codec import Refusal, code_number, status_row
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.feed_block import FeedBlock, RoomReport
from silvershard.cluster.group_commit import MAX_GROUP, Backlog, GroupCommit, decided, groups_of
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.security import ALONE, Peers
from silvershard.cluster.sequencer import Checked, Outcome, Sequencer, Write
from silvershard.cluster.service import Malformed, abort, parser, serialize
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.updates import (
    ApplyResult,
    LoggedNotApplied,
    UpdateRejection,
    result_to,
)
from silvershard.model.request import RequestError
from silvershard.shard.errors import Fenced, Overloaded, RetrievalError

SERVICE = update_pb2.DESCRIPTOR.services_by_name["Sequencer"].full_name
MAX_MUTATIONS = 10_000
"""Most mutations of one request."""
MAX_MESSAGE_BYTES = 64 << 20
"""Largest request; routers have a limit of their own."""

# So few mutations are checked faster than they get to another thread and back.
_AT_ONCE = 16
# Requests of a stream that are read ahead of their answers.
_STREAM_WINDOW = 16
_DEFAULT_DEADLINE_S = 30.0
_RETRY_AFTER_S = 0.2
# Of a client, in which an answer travels.
_ANSWER_MARGIN_S = 0.05

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Reports(Protocol):
    """What the sequencer needs to know of the shards; ``ShardReports`` is one."""

    @property
    def map(self) -> ShardMap | None:
        """Return the shard map."""

    async def run(self) -> None:
        """Keep it true until cancelled."""

    def changed(self) -> Coroutine[Any, Any, object]:
        """Return what ends as soon as there is something new since this was called."""

    def room(self, page_slots: int, num_clusters: int) -> list[RoomReport]:
        """Return the room of every replica that has reported."""

    async def applied(self, tokens: Sequence[UpdateToken], *, every_replica: bool) -> None:
        """Return as soon as updates are applied."""


class _Accepted(NamedTuple):
    """A request on its way: what will become of its parts."""

    checked: Checked
    partitions: list[int]
    """Log partition of every part."""
    outcomes: asyncio.Future[list[Outcome | BaseException]]
    """What will become of every part."""
    durability: int
    deadline_s: float


class SequencerServer:
    """Serves a sequencer on a port of its own.

    A sequencer that is fenced refuses everything from then on and tells its owner, who must not
    start it again: another one writes the log.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        *,
        reports: Reports | None = None,
        feed: FeedBlock | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Peers = ALONE,
        max_queue: int = 100_000,
        max_queue_bytes: int = MAX_MESSAGE_BYTES,
        expiry_every_s: float = 1.0,
        on_fenced: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            sequencer: from now on only this server may call it.
            reports: follows the shards; without it nobody can wait for an update to be applied.
            feed: the sequencer's, told what the shards report.
            host: address to bind.
            port: 0 lets the system choose a free one.
            peers: how it meets the other processes of its cluster.
            max_queue: mutations that may wait; more are refused.
            max_queue_bytes: bytes of requests that may wait, but for a single one.
            expiry_every_s: time between two looks for items whose time is over.
            on_fenced: called once another sequencer has taken over.
            clock: must be the clock of the event loop.
        """
        self.sequencer = sequencer
        self.address = ""
        self._reports, self._feed = reports, feed
        self._host, self._port, self._peers = host, port, peers
        self._expiry_every_s = expiry_every_s
        self._on_fenced = on_fenced
        self._clock = clock
        self._stepped_down = False
        self._queued = Backlog(max_queue, max_queue_bytes)
        self._reported = asyncio.Event()
        """Set when shards have said how much room they have."""
        # Urgent updates do not wait until large requests are checked.
        self._checkers = {
            urgent: ThreadPoolExecutor(1, thread_name_prefix="check") for urgent in (False, True)
        }
        self._commits: list[GroupCommit] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        """Bind the port and serve; ``address`` is set from then on.

        Raises:
            ConfigError: if the host is refused.
            StateError: if the port is in use.
        """
        protection = self._peers.protection
        server = grpc.aio.server(
            interceptors=protection.interceptors, options=server_options(MAX_MESSAGE_BYTES)
        )
        apply = parser(retrieval_pb2.ApplyRequest)
        handlers = {
            "Apply": grpc.unary_unary_rpc_method_handler(
                self._apply, request_deserializer=apply, response_serializer=serialize
            ),
            "StreamUpdates": grpc.stream_stream_rpc_method_handler(
                self._stream, request_deserializer=apply, response_serializer=serialize
            ),
            "Report": grpc.unary_unary_rpc_method_handler(
                self._report,
                request_deserializer=parser(update_pb2.SequencerReportRequest),
                response_serializer=serialize,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = bind(server, self._host, self._port, protection.door)
        for partition in range(self.sequencer.log.num_partitions):
            commit = GroupCommit(
                functools.partial(self.sequencer.commit, partition),
                clock=self._clock,
                name=f"log-{partition}",
            )
            self._commits.append(commit)
            self._start_task(commit.run())
            self._start_task(self._expire_forever(partition, commit))
        if self._reports is not None:
            self._start_task(self._reports.run())
            self._start_task(self._follow_forever(self._reports))
        await server.start()
        self._server = server
        await self._set_health(serving=True)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, wait for the running ones at most ``grace_s``, and free the port."""
        await self._set_health(serving=False)
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for commit in self._commits:
            commit.close(Refusal("UNAVAILABLE", "the sequencer has ended", "NOT_READY"))
        for checker in self._checkers.values():
            checker.shutdown(wait=False)

    async def _apply(
        self, message: retrieval_pb2.ApplyRequest | Malformed, context: grpc.aio.ServicerContext
    ) -> retrieval_pb2.ApplyResponse:
        try:
            request = self._valid(message)
            queued = self._queued
            if not queued.fits(len(request.mutations), request.ByteSize()):
                waiting = f"{queued.updates} updates are queued, {queued.bytes} bytes"
                raise Overloaded(waiting, _RETRY_AFTER_S)
            deadline_s = self._deadline_s(context.time_remaining())
            return await self._answer(await self._accept(request, deadline_s, alone=True))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await abort(context, error)

    async def _stream(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Answer the requests of a stream in order, and work on some of them at the same time."""
        answers: asyncio.Queue[asyncio.Task[retrieval_pb2.ApplyResponse] | None] = asyncio.Queue()
        window = asyncio.Semaphore(_STREAM_WINDOW)
        reader = asyncio.create_task(self._read(context, answers, window))
        try:
            while (answer := await answers.get()) is not None:
                await context.write(await answer)
                window.release()
            await reader
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await abort(context, error)
        finally:
            left: list[asyncio.Task[Any]] = [reader]
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    left.append(answer)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _read(
        self,
        context: grpc.aio.ServicerContext,
        answers: asyncio.Queue[asyncio.Task[retrieval_pb2.ApplyResponse] | None],
        window: asyncio.Semaphore,
    ) -> None:
        try:
            while True:
                await window.acquire()
                message = await context.read()
                if message is grpc.aio.EOF:
                    return
                answers.put_nowait(await self._accept_next(message, context))
        finally:
            answers.put_nowait(None)

    async def _accept_next(
        self, message: retrieval_pb2.ApplyRequest | Malformed, context: grpc.aio.ServicerContext
    ) -> asyncio.Task[retrieval_pb2.ApplyResponse]:
        """Queue a request of a stream behind those before it, and return its answer to be."""
        try:
            request = self._valid(message)
            await self._queued.until_fits(len(request.mutations), request.ByteSize())
            deadline_s = self._deadline_s(context.time_remaining())
            accepted = await self._accept(request, deadline_s, alone=False)
        except (RequestError, Refusal) as error:
            size = 1 if isinstance(message, Malformed) else len(message.mutations)
            return asyncio.create_task(_refuse_all(size, error))
        return asyncio.create_task(self._answer(accepted))

    def _deadline_s(self, remaining_s: float | None) -> float:
        return self._clock() + (_DEFAULT_DEADLINE_S if remaining_s is None else remaining_s)

    def _valid(self, message: retrieval_pb2.ApplyRequest | Malformed) -> retrieval_pb2.ApplyRequest:
        """Return a request whose mutations can be looked at.

        Raises:
            RequestError: naming the field.
            Refusal: if it addresses what is not served.
        """
        if isinstance(message, Malformed):
            raise RequestError("message", message.message)
        model = self.sequencer.live.spec.model
        if message.model and message.model != model:
            raise Refusal(
                "NOT_FOUND",
                f"no model {message.model[:80]!r}; this cluster serves {model!r}",
                "MODEL_NOT_FOUND",
            )
        if len(message.mutations) > MAX_MUTATIONS:
            raise RequestError(
                "mutations", f"must be at most {MAX_MUTATIONS}, got {len(message.mutations)}"
            )
        if message.durability not in retrieval_pb2.Durability.values():
            raise RequestError("durability", f"unknown durability {message.durability}")
        if message.durability and self._reports is None:
            raise Refusal(
                "FAILED_PRECONDITION",
                "durability must be LOGGED: the sequencer does not know the shards",
                "NO_REPORTS",
            )
        return message

    async def _accept(
        self, request: retrieval_pb2.ApplyRequest, deadline_s: float, *, alone: bool
    ) -> _Accepted:
        """Check the mutations of a request and queue them for the log.

        Args:
            request: valid as a whole.
            deadline_s: when its client waits no more.
            alone: whether no other request has to come before it.
        """
        size = len(request.mutations)
        urgent = size > 0 and all(one.delete.urgent for one in request.mutations)
        load = size, request.ByteSize()
        self._queued.add(*load)
        try:
            check = self.sequencer.check
            if size <= _AT_ONCE:
                checked = check(request.mutations)
            else:
                loop = asyncio.get_running_loop()
                checker = self._checkers[urgent]
                checked = await loop.run_in_executor(checker, check, request.mutations)
            await self._until_room_is_known(checked.writes, deadline_s)
        except BaseException:
            self._queued.remove(*load)
            raise
        by_partition: dict[int, list[Write]] = {}
        for write in checked.writes:
            by_partition.setdefault(write.partition, []).append(write)
        parts = [
            (partition, part)
            for partition, writes in by_partition.items()
            for part in groups_of(writes)
        ]
        lane = urgent and alone
        outcomes = asyncio.gather(
            *(self._commits[one].submit(part, deadline_s, urgent=lane) for one, part in parts),
            return_exceptions=True,
        )
        outcomes.add_done_callback(lambda _: self._queued.remove(*load))
        return _Accepted(
            checked, [one for one, _ in parts], outcomes, request.durability, deadline_s
        )

    async def _until_room_is_known(self, writes: Sequence[Write], deadline_s: float) -> None:
        """Hold upserts until their shards have said once how much room they have.

        That takes a moment after a start; if the call ends before, they are refused.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._answer_by_s(deadline_s)):
                while self._reports is not None and self.sequencer.awaits_room(writes):
                    self._reported.clear()
                    await self._reported.wait()

    def _answer_by_s(self, deadline_s: float) -> float:
        """Return when an answer must be on its way, so that the client still listens to it."""
        return deadline_s - min(0.1 * (deadline_s - self._clock()), _ANSWER_MARGIN_S)

    async def _answer(self, accepted: _Accepted) -> retrieval_pb2.ApplyResponse:
        """Return what became of a request once that is final.

        Raises:
            RetrievalError: as ``decided``.
            DeadlineExceeded: if some of it did not get to the log in time.
            LoggedNotApplied: if all that is not rejected did, but is not applied in time.
        """
        try:
            outcomes = decided(await accepted.outcomes, self.sequencer.log.url)
        except RetrievalError:
            if self.sequencer.fenced is not None:
                await self._step_down(self.sequencer.fenced)
            raise
        rejected = list(accepted.checked.rejected)
        last: dict[int, int] = {}
        for partition, outcome in zip(accepted.partitions, outcomes, strict=True):
            rejected += outcome.rejected
            last[partition] = max(last.get(partition, 0), outcome.position)
        log_id = self.sequencer.log.log_id
        result = ApplyResult(
            tokens=tuple(UpdateToken(log_id, one, last[one]) for one in sorted(last) if last[one]),
            rejected=tuple(sorted(rejected, key=lambda one: one.index)),
        )
        await self._wait_applied(accepted, result)
        return result_to(result)

    async def _wait_applied(self, accepted: _Accepted, result: ApplyResult) -> None:
        durability = accepted.durability
        if self._reports is None or not durability or not result.tokens:
            return
        every_replica = durability == retrieval_pb2.DURABILITY_APPLIED_ALL_READY
        try:
            async with asyncio.timeout_at(self._answer_by_s(accepted.deadline_s)):
                await self._reports.applied(result.tokens, every_replica=every_replica)
        except TimeoutError:
            raise LoggedNotApplied(result) from None

    async def _step_down(self, error: Fenced) -> None:
        """Leave the log to the other sequencer."""
        if self._stepped_down:
            return
        self._stepped_down = True
        _log.error("this sequencer ends: %s", error)
        await self._set_health(serving=False)
        self._on_fenced()

    async def _set_health(self, *, serving: bool) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, _SERVING if serving else _NOT_SERVING)

    async def _expire_forever(self, partition: int, commit: GroupCommit) -> None:
        """Log deletes of items whose time is over."""
        while True:
            await asyncio.sleep(self._expiry_every_s)
            try:
                while await commit.call(lambda: self.sequencer.expire(partition, MAX_GROUP)):
                    pass
            except Fenced as error:
                await self._step_down(error)
                return
            except RetrievalError as error:
                _log.warning("items are not expired for now: %s", error)

    async def _follow_forever(self, reports: Reports) -> None:
        """Take over what shards report, and the generation that the map names."""
        while True:
            changed = asyncio.create_task(reports.changed())
            if reports.map is not None:
                await self._follow(reports.map)
            live = self.sequencer.live.spec
            if self._feed is not None:
                self._feed.report(reports.room(live.page_slots, live.num_clusters))
                self._reported.set()
            await changed

    async def _follow(self, now: ShardMap) -> None:
        live = self.sequencer.live
        if now.generation != live.spec.generation:
            try:
                live = await asyncio.to_thread(load_live_generation, Path(now.snapshot))
            except RetrievalError as error:
                _log.error("updates are still checked against the old generation: %s", error)
                return
            _log.info("updates are checked against generation %d", now.generation)
        self.sequencer.follow(live, now.num_shards)

    async def _report(
        self, _request: object, context: grpc.aio.ServicerContext
    ) -> update_pb2.SequencerReport:
        sequencer = self.sequencer
        report = update_pb2.SequencerReport(
            log_id=sequencer.log.log_id,
            model=sequencer.live.spec.model,
            generation=sequencer.live.spec.generation,
            queued=self._queued.updates,
        )
        try:
            await asyncio.to_thread(self._add_positions, report)
        except RetrievalError as error:
            await abort(context, error)
        for blocked in self._feed.blocked() if self._feed else ():
            report.blocked.add(shard=blocked.shard, use=blocked.use, limit=blocked.limit)
        for (op, code), count in sorted(sequencer.counts().items()):
            report.counts.add(op=op, code=code_number(code), count=count)
        return report

    def _add_positions(self, report: update_pb2.SequencerReport) -> None:
        log = self.sequencer.log
        for partition, epoch in enumerate(self.sequencer.epochs):
            report.partitions.add(
                partition=partition,
                epoch=epoch,
                start=log.start(partition),
                end=log.end(partition),
            )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task of the sequencer failed", exc_info=error)


async def _refuse_all(size: int, error: RequestError | Refusal) -> retrieval_pb2.ApplyResponse:
    """Return the answer to a request of a stream that is refused as a whole."""
    row = status_row(error)
    code = row.code if row else "INVALID_ARGUMENT"
    reason = error.message if isinstance(error, Refusal) else str(error)
    rejected = tuple(UpdateRejection(index, code, reason) for index in range(size))
    return result_to(ApplyResult((), rejected))
