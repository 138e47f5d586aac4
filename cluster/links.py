"""Connections of a router to its shards: multiplexed calls, signs of life, fencing by epoch.

Shapes: B requests, H heads.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from torch import Tensor

from silvershard.cluster import shard_pb2, shard_pb2_grpc, tensors
from silvershard.cluster.codec import code_name, column_from, values_to
from silvershard.cluster.config import PingSection
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.stream_link import RECONNECT_S, Connection, StreamLink
from silvershard.model.request import FeatureValues
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    GenerationError,
    Overloaded,
    ShardUnavailable,
)
from silvershard.shard.fields import FieldValue

_log = logging.getLogger(__name__)


_Reply = asyncio.Future[shard_pb2.ShardReply]


class GrpcShardLink(StreamLink[shard_pb2.ShardCall, shard_pb2.ShardReply, _Reply]):
    """One incarnation of one replica of one shard, as a router reaches it."""

    def __init__(self, entry: ShardEntry, generation: int, ping: PingSection) -> None:
        """Make a link that does not connect yet; ``start`` does."""
        super().__init__(entry.address, f"shard {entry.shard}", ping)
        self.shard = entry.shard
        self.replica = entry.replica
        self.entry = entry
        self.generation = generation

    @property
    def state(self) -> LinkState:
        """Return what is believed of the replica; a link that has not tried yet counts as up."""
        if self._connected is False:
            return LinkState.DOWN
        if self.hung:
            return LinkState.EJECTED
        return LinkState.SUSPECT if self._misses >= self._ping.suspect_after else LinkState.UP

    async def encode(
        self, users: Sequence[Mapping[str, FeatureValues]], remaining_s: float
    ) -> Encoded:
        """Return the query embeddings of users whose features are checked already.

        Every method that asks the shard raises the same errors.

        Raises:
            ShardUnavailable: if there is no connection, or the answer cannot be used.
            DeadlineExceeded: if no answer came in ``remaining_s``.
            GenerationError: if the shard serves another generation.
            Overloaded: if the queue of the shard is full.
        """
        call = shard_pb2.ShardCall()
        call.encode.SetInParent()
        for user in users:
            message = call.encode.users.add()
            for name, values in user.items():
                message.features[name].CopyFrom(values_to(name, values))
        reply = await self._call(call, remaining_s)
        with self._usable():
            found = tensors.from_map(reply.tensors, tensors.ENCODED)
            self._same_batch(found["embedding"], len(users))
            lost = set(reply.fallback_users)
            return Encoded(
                found["embedding"],
                found["user_state"],
                tuple(tensors.warnings_of(reply, len(users))),
                tuple(at in lost for at in range(len(users))),
            )

    async def count(self, scan: Tensor, remaining_s: float) -> Tensor:
        """Return how many documents of the shard pass each program ``(B, L, 4)``, ``(B,)``."""
        call = shard_pb2.ShardCall(count=tensors.to_map({"scan": scan}))
        reply = await self._call(call, remaining_s)
        with self._usable():
            count = tensors.from_map(reply.tensors, tensors.COUNT)["count"]
            self._same_batch(count, scan.shape[0])
            return count

    async def open(self, key: str, work: Work, remaining_s: float) -> RoundOne:
        """Run round one; its candidates stay open under ``key`` for ``remaining_s``."""
        call = shard_pb2.ShardCall(key=key, open=tensors.work_to_map(work))
        reply = await self._call(call, remaining_s)
        with self._usable():
            first = tensors.round_one_from_map(reply.tensors, dict(reply.times_us))
            self._same_batch(first.scores, *work.embedding.shape[:2])
            return first

    async def close(self, key: str, cutoffs: Cutoffs, remaining_s: float) -> RoundTwo:
        """Run round two on the candidates open under ``key``.

        Raises:
            CandidatesExpired: if they are open no more.
        """
        call = shard_pb2.ShardCall(key=key, close=tensors.cutoffs_to_map(cutoffs))
        reply = await self._call(call, remaining_s)
        with self._usable():
            second = tensors.round_two_from_map(reply.tensors, dict(reply.times_us))
            self._same_batch(second.values, cutoffs.scores.shape[0])
            return second

    async def open_and_close(
        self, key: str, work: Work, cutoffs: Cutoffs, remaining_s: float
    ) -> RoundTwo:
        """Run both rounds at once, to take over when the cutoffs are known."""
        both = shard_pb2.OpenAndClose(
            work=tensors.work_to_map(work), cutoffs=tensors.cutoffs_to_map(cutoffs)
        )
        reply = await self._call(shard_pb2.ShardCall(key=key, open_and_close=both), remaining_s)
        with self._usable():
            second = tensors.round_two_from_map(reply.tensors, dict(reply.times_us))
            self._same_batch(second.values, cutoffs.scores.shape[0])
            return second

    async def fields(
        self, item_ids: Sequence[int], names: Sequence[str], remaining_s: float
    ) -> dict[str, list[FieldValue]]:
        """Return stored columns of items that the shard holds."""
        call = shard_pb2.ShardCall(fields=shard_pb2.Fields(item_ids=item_ids, names=names))
        reply = await self._call(call, remaining_s)
        with self._usable():
            columns = {name: column_from(reply.fields.columns[name]) for name in names}
            for name, values in columns.items():
                if len(values) != len(item_ids):
                    raise ValueError(
                        f"field {name} must have {len(item_ids)} values, got {len(values)}"
                    )
            return columns

    def release(self, key: str) -> None:
        """Tell the shard that nobody waits for ``key`` any more; never waits, never fails."""
        if self._connection is not None:
            call = shard_pb2.ShardCall(key=key, release=shard_pb2.Release())
            self._connection.outgoing.put_nowait(self._addressed(call, 0.0))

    def _addressed(self, call: shard_pb2.ShardCall, remaining_s: float) -> shard_pb2.ShardCall:
        call.call_id = next(self._ids)
        call.generation = self.generation
        call.epoch = self.entry.epoch
        call.remaining_us = max(0, int(remaining_s * 1e6))
        return call

    async def _call(self, call: shard_pb2.ShardCall, remaining_s: float) -> shard_pb2.ShardReply:
        connection = self._connection
        if connection is None:
            raise ShardUnavailable(self.shard, f"no connection to {self.entry.address}")
        call_id = self._addressed(call, remaining_s).call_id
        future: _Reply = asyncio.get_running_loop().create_future()
        self._post(connection, call, future)
        try:
            async with asyncio.timeout(remaining_s):
                reply = await future
        except TimeoutError:
            raise DeadlineExceeded(
                f"shard {self.shard} did not answer within {remaining_s:.3f} s"
            ) from None
        finally:
            connection.pending.pop(call_id, None)
        self._check(reply, call.key)
        return reply

    def _check(self, reply: shard_pb2.ShardReply, key: str) -> None:
        """Raise what a reply reports, or what makes it unusable."""
        if reply.epoch != self.entry.epoch:
            raise ShardUnavailable(
                self.shard, f"answered as epoch {reply.epoch}, {self.entry.epoch} was asked"
            )
        if reply.generation != self.generation:
            raise GenerationError(self.generation, reply.generation)
        if not reply.code:
            return
        code = code_name(reply.code)
        if reply.reason == "CANDIDATES_EXPIRED":
            raise CandidatesExpired(key)
        if code == "DEADLINE_EXCEEDED":
            raise DeadlineExceeded(f"shard {self.shard}: {reply.message}")
        if code == "RESOURCE_EXHAUSTED":
            raise Overloaded(f"shard {self.shard}: {reply.message}", RECONNECT_S)
        raise ShardUnavailable(self.shard, f"{code}: {reply.message}")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ShardUnavailable(self.shard, f"malformed answer: {error}") from None

    def _same_batch(self, tensor: Tensor, *sizes: int) -> None:
        if tuple(tensor.shape[: len(sizes)]) != sizes:
            raise ValueError(f"answer must be of shape {sizes}, got {tuple(tensor.shape)}")

    def _open(self, channel: grpc.aio.Channel) -> Any:
        return shard_pb2_grpc.ShardStub(channel).Execute()

    def _receive(
        self, connection: Connection[shard_pb2.ShardCall, _Reply], reply: shard_pb2.ShardReply
    ) -> None:
        self._heard = True
        future = connection.pending.get(reply.call_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def _fail(self, waiting: _Reply, message: str) -> None:
        if not waiting.done():
            waiting.set_exception(ShardUnavailable(self.shard, message))

    async def _watch(self) -> None:
        """Ping on a channel of its own, so that a large answer never delays a sign of life."""
        every_s = self._ping.every_ms / 1e3
        async with grpc.aio.insecure_channel(self.entry.address, options=LINK_OPTIONS) as channel:
            reader = asyncio.create_task(self._listen(channel))
            try:
                while True:
                    await asyncio.sleep(every_s)
                    self._count_look()
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _listen(self, channel: grpc.aio.Channel) -> None:
        stub = shard_pb2_grpc.ShardStub(channel)
        while True:
            try:
                async for beat in stub.Ping(self._beats()):
                    # Another incarnation on the same address is not a sign of life of this one.
                    if beat.epoch == self.entry.epoch:
                        self._heard = True
            except grpc.aio.AioRpcError as error:
                _log.debug("pings of shard %d ended: %s", self.shard, error.code().name)
            except Exception as error:  # noqa: BLE001  # bytes that are no beat; logged
                _log.error("pings of shard %d: malformed answer: %s", self.shard, error)
            await asyncio.sleep(self._ping.every_ms / 1e3)

    async def _beats(self) -> AsyncIterator[shard_pb2.Beat]:
        for sequence in itertools.count(1):
            yield shard_pb2.Beat(sequence=sequence)
            await asyncio.sleep(self._ping.every_ms / 1e3)


class Links:
    """The links to all processes of the newest shard map."""

    def __init__(self, ping: PingSection) -> None:
        self._ping = ping
        self._links: dict[tuple[int, ShardEntry], GrpcShardLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, shard_map: ShardMap) -> None:
        """Connect to what is new in the map and let go of what is no longer in it."""
        wanted = {(shard_map.generation, entry) for entry in shard_map.entries}
        for key in self._links.keys() - wanted:
            task = asyncio.create_task(self._links.pop(key).aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for generation, entry in wanted - self._links.keys():
            link = GrpcShardLink(entry, generation, self._ping)
            link.start()
            self._links[generation, entry] = link

    def replicas(self, shard: int) -> list[GrpcShardLink]:
        """Return the links to a shard, by replica."""
        found = [link for link in self._links.values() if link.shard == shard]
        return sorted(found, key=lambda link: link.replica)

    async def aclose(self) -> None:
        """Disconnect from everything."""
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*(link.aclose() for link in links), *self._closing)
