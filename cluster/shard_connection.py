"""A connection of a router to one process of a shard: signs of life, fencing by epoch.

All generations that the process serves share it.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
import grpc.aio

from silvershard.cluster import shard_pb2, shard_pb2_grpc, wire
from silvershard.cluster.codec import Refusal, code_name
from silvershard.cluster.config import PingSection
from silvershard.cluster.dialer import PLAIN, Dials
from silvershard.cluster.faults import Faults
from silvershard.cluster.freshness import AFTER, FOREIGN_TOKEN, Seen
from silvershard.cluster.hosting import seen_from
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.races import SOON_S
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry
from silvershard.cluster.stream_link import RECONNECT_S, Connection, StreamLink
from silvershard.model.request import RequestError
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    GenerationError,
    Overloaded,
    ReplicaStale,
    ShardUnavailable,
)

_log = logging.getLogger(__name__)

_Reply = asyncio.Future[shard_pb2.ShardReply]


class _Limit(NamedTuple):
    """How long a call may wait for its reply."""

    waiting: _Reply
    until_s: float
    """Reading of the clock of the event loop."""
    waited_s: float
    """From its begin."""


# Far more than the calls that batches have on their way to one process: it has stopped reading.
_MAX_UNSENT = 1024

# Longest wait for a call that takes along which candidates may be given up.
_RELEASE_S = 0.02


class ShardConnection(StreamLink[shard_pb2.ShardCall, shard_pb2.ShardReply, _Reply]):
    """One incarnation of one replica of one shard, as a router reaches it."""

    def __init__(
        self,
        entry: ShardEntry,
        ping: PingSection,
        dialer: Dials = PLAIN,
        faults: Faults | None = None,
    ) -> None:
        """Make a connection that does not connect yet; ``start`` does.

        Args:
            entry: the replica.
            ping: when it counts as hung.
            dialer: opens the channel.
            faults: say which messages are lost on their way; None: none.
        """
        super().__init__(entry.address, f"shard {entry.shard}", ping, dialer)
        self.entry = entry
        self.served: dict[int, Seen] | None = None
        """The generations that it serves, by its last word; None: it has not said yet."""
        self._fenced = False
        self._faults = faults
        self._released: list[str] = []
        """What the shard is still to be told that nobody waits for."""
        self._release_timer: asyncio.TimerHandle | None = None
        self._limits: dict[int, _Limit] = {}
        """Of the calls that wait for a reply."""
        self._limit_timer: asyncio.TimerHandle | None = None
        """Set for the first of them to be over, or for earlier."""

    @property
    def state(self) -> LinkState:
        """Return what is believed of the replica; one that was not tried yet counts as up."""
        if self._connected is False or self._fenced:
            return LinkState.DOWN
        if self.hung:
            return LinkState.EJECTED
        return LinkState.SUSPECT if self._misses >= self._ping.suspect_after else LinkState.UP

    @property
    def is_idle(self) -> bool:
        """Return whether nobody waits for a reply."""
        return self._connection is None or not self._connection.pending

    def fence(self) -> None:
        """Refuse every answer from now on: another incarnation has taken the place of this one.

        It may live on, cut off from those who replaced it, and its answers are of the past.
        """
        self._fenced = True
        if self._connection is not None:
            for waiting in self._connection.pending.values():
                self._fail(waiting, f"epoch {self.entry.epoch} is fenced by a newer one")

    def release(self, key: str) -> None:
        """Tell the shard that nobody waits for a batch any more; never waits, never fails.

        It is said together with the next call; if there is none soon, by itself.
        """
        self._released.append(key)
        if self._release_timer is None:
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(_RELEASE_S, self._send_released)

    def _send_released(self) -> None:
        self._release_timer = None
        if self._released:
            self._send(shard_pb2.ShardCall())

    def _send(self, call: shard_pb2.ShardCall) -> None:
        """Send a call that has no reply."""
        addressed = self._addressed(call, 0, 0.0)
        if self._connection is not None and not self._lost():
            self._connection.put(addressed)

    async def call(
        self, call: shard_pb2.ShardCall, generation: int, remaining_s: float
    ) -> shard_pb2.ShardReply:
        """Return the reply to a call.

        Raises:
            CandidatesExpired: if the candidates that it needs are open no more.
            DeadlineExceeded: if no answer came in ``remaining_s``.
            GenerationError: if the shard does not serve the generation.
            Overloaded: if the queue of the shard is full.
            ReplicaStale: if the shard has not applied what the call demands.
            Refusal: if what the call demands is of another log.
            RequestError: if what the call demands is beyond the end of that log.
            ShardUnavailable: if there is no connection, or the answer cannot be used.
        """
        shard, connection = self.entry.shard, self._connection
        if connection is None:
            why = f": {self.refusal}" if self.refusal else ""
            raise ShardUnavailable(shard, f"no connection to {self.entry.address}{why}")
        if self._fenced:
            raise ShardUnavailable(shard, f"epoch {self.entry.epoch} is fenced by a newer one")
        if len(connection.outgoing) >= _MAX_UNSENT:
            raise ShardUnavailable(shard, f"it has stopped reading at {self.entry.address}")
        call_id = self._addressed(call, generation, remaining_s).call_id
        loop = asyncio.get_running_loop()
        future: _Reply = loop.create_future()
        self._limits[call_id] = _Limit(future, loop.time() + remaining_s, remaining_s)
        self._watch_limit(self._limits[call_id])
        if self._lost():
            connection.pending[call_id] = future
        else:
            self._post(connection, call, future)
        try:
            reply = await future
        except asyncio.CancelledError:
            self._send(shard_pb2.ShardCall(cancel=call_id))
            raise
        finally:
            del self._limits[call_id]
            connection.pending.pop(call_id, None)
        self._check(reply, call.key, generation)
        return reply

    def _addressed(
        self, call: shard_pb2.ShardCall, generation: int, remaining_s: float
    ) -> shard_pb2.ShardCall:
        call.call_id = next(self._ids)
        call.generation = generation
        call.epoch = self.entry.epoch
        call.remaining_us = max(0, int(remaining_s * 1e6))
        if self._released:
            call.released.extend(self._released)
            self._released.clear()
        return call

    def _check(self, reply: shard_pb2.ShardReply, key: str, generation: int) -> None:
        """Raise what a reply reports, or what makes it unusable."""
        shard = self.entry.shard
        if reply.epoch != self.entry.epoch:
            raise ShardUnavailable(
                shard, f"answered as epoch {reply.epoch}, {self.entry.epoch} was asked"
            )
        if reply.generation != generation:
            raise GenerationError(generation, reply.generation)
        if not reply.code:
            if self.served is not None and generation in self.served:
                self.served[generation] = seen_from(reply.seen)
            return
        code = code_name(reply.code)
        if reply.reason == "CANDIDATES_EXPIRED":
            raise CandidatesExpired(key)
        if reply.reason == "REPLICA_STALE":
            raise ReplicaStale(shard, reply.message)
        if reply.reason == FOREIGN_TOKEN:
            raise Refusal(code, reply.message, reply.reason)
        if reply.field == AFTER:
            raise RequestError(reply.field, reply.message)
        if code == "DEADLINE_EXCEEDED":
            raise DeadlineExceeded(f"shard {shard}: {reply.message}")
        if code == "RESOURCE_EXHAUSTED":
            raise Overloaded(f"shard {shard}: {reply.message}", RECONNECT_S)
        where = f"{reply.field}: " if reply.field else ""
        raise ShardUnavailable(shard, f"{code}: {where}{reply.message}")

    def _refusal(self, metadata: Any) -> str:
        return wire.refusal(metadata)

    def _open(self, channel: grpc.aio.Channel) -> Any:
        return shard_pb2_grpc.ShardStub(channel).Execute()

    def _receive(
        self, connection: Connection[shard_pb2.ShardCall, _Reply], reply: shard_pb2.ShardReply
    ) -> None:
        if self._lost():
            return
        self._heard = True
        future = connection.pending.get(reply.call_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def _lost(self) -> bool:
        """Return whether a message is lost on its way by a fault."""
        entry, faults = self.entry, self._faults
        return faults is not None and faults.loses(entry.shard, entry.replica, entry.address)

    def _fail(self, waiting: _Reply, message: str) -> None:
        if not waiting.done():
            waiting.set_exception(ShardUnavailable(self.entry.shard, message))

    def _watch_limit(self, limit: _Limit) -> None:
        """Look at the limits again when this one is over.

        One timer for all calls: nearly all of them end long before.
        """
        timer = self._limit_timer
        if timer is not None:
            if timer.when() <= limit.until_s:
                return
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._limit_timer = loop.call_at(limit.until_s, self._expire)

    def _expire(self) -> None:
        """Fail the calls whose time is over."""
        self._limit_timer = None
        now_s = asyncio.get_running_loop().time() + SOON_S
        left = [limit for limit in self._limits.values() if not limit.waiting.done()]
        for limit in left:
            if limit.until_s <= now_s:
                shard, waited_s = self.entry.shard, limit.waited_s
                message = f"shard {shard} did not answer within {waited_s:.3f} s"
                limit.waiting.set_exception(DeadlineExceeded(message))
        left = [limit for limit in left if limit.until_s > now_s]
        if left:
            self._watch_limit(min(left, key=lambda limit: limit.until_s))

    async def _watch(self) -> None:
        """Ping on a channel of its own, so that a large answer never delays a sign of life."""
        every_s = self._ping.every_ms / 1e3
        async with self._dialer.aio_channel(self.entry.address, LINK_OPTIONS) as channel:
            reader = asyncio.create_task(self._listen(channel))
            try:
                while True:
                    await asyncio.sleep(every_s)
                    self._count_look()
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _listen(self, channel: grpc.aio.Channel) -> None:
        stub, shard = shard_pb2_grpc.ShardStub(channel), self.entry.shard
        while True:
            try:
                async for beat in stub.Ping(self._beats()):
                    # Another incarnation on the same address is not a sign of life of this one.
                    if beat.epoch == self.entry.epoch and not self._lost():
                        self._heard = True
                        self.served = {one.generation: seen_from(one.seen) for one in beat.served}
            except grpc.aio.AioRpcError as error:
                _log.debug("pings of shard %d ended: %s", shard, error.code().name)
            except Exception as error:  # noqa: BLE001  # bytes that are no beat; logged
                _log.error("pings of shard %d: malformed answer: %s", shard, error)
            await asyncio.sleep(self._ping.every_ms / 1e3)

    async def _beats(self) -> AsyncIterator[shard_pb2.Beat]:
        for sequence in itertools.count(1):
            yield shard_pb2.Beat(sequence=sequence)
            await asyncio.sleep(self._ping.every_ms / 1e3)
