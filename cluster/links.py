"""Links of a router to its shards, one per replica and generation, over shared connections.

Shapes: B requests, H heads.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from silvershard.cluster import shard_pb2, tensors
from silvershard.cluster.codec import values_to
from silvershard.cluster.config import PingSection
from silvershard.cluster.dialer import PLAIN, Dials
from silvershard.cluster.faults import Faults
from silvershard.cluster.field_columns import column_from
from silvershard.cluster.freshness import ANYTHING, Demand, Seen
from silvershard.cluster.hosting import seen_from
from silvershard.cluster.shard_connection import ShardConnection
from silvershard.cluster.shard_link import LinkState
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.model.request import FeatureValues
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.errors import ShardUnavailable
from silvershard.shard.fields import FieldValue

# Between two looks at whether a connection that is to be closed is idle.
_LOOK_S = 0.02


class GrpcShardLink:
    """One generation of one incarnation of a replica of a shard, as a router reaches it."""

    def __init__(self, connection: ShardConnection, generation: int) -> None:
        """Make a link over a connection that others may share."""
        self.connection = connection
        self.generation = generation
        self.shard = connection.entry.shard
        self.replica = connection.entry.replica

    @property
    def state(self) -> LinkState:
        """Return what is believed of the replica.

        One that does not name the generation among those that it serves is suspect: another one is
        preferred, but only its answer settles it.
        """
        state = self.connection.state
        return LinkState.SUSPECT if state is LinkState.UP and not self._is_served else state

    @property
    def reached(self) -> bool:
        """Return True while the replica is connected, and may be asked for the generation."""
        return self.connection.reached and self._is_served

    @property
    def _is_served(self) -> bool:
        """Return False if the replica does not serve the generation by its last word."""
        served = self.connection.served
        return served is None or self.generation in served

    @property
    def seen(self) -> Seen | None:
        """Return what the replica had applied by its last word; None: it has not said yet."""
        served = self.connection.served
        return None if served is None else served.get(self.generation)

    async def encode(
        self,
        users: Sequence[Mapping[str, FeatureValues]],
        remaining_s: float,
        demand: Demand = ANYTHING,
    ) -> tuple[Encoded, Seen]:
        """Return the query embeddings of users whose features are checked already.

        And what the replica had applied: rows of the tables of its user tower change, too.
        Every method that asks the shard raises the same errors.

        Raises:
            ShardUnavailable: if there is no connection, or the answer cannot be used.
            DeadlineExceeded: if no answer came in ``remaining_s``.
            GenerationError: if the shard serves another generation.
            Overloaded: if the queue of the shard is full.
            ReplicaStale: if it has not applied what ``demand`` asks for.
            Refusal: if ``demand`` is of another log than the shard follows.
            RequestError: if ``demand`` is beyond the end of that log.
        """
        call = shard_pb2.ShardCall()
        call.encode.SetInParent()
        for user in users:
            message = call.encode.users.add()
            for name, values in user.items():
                message.features[name].CopyFrom(values_to(name, values))
        reply = await self._call(call, remaining_s, demand)
        with self._usable():
            found = tensors.from_map(reply.tensors, tensors.ENCODED)
            self._same_batch(found["embedding"], len(users))
            lost = set(reply.fallback_users)
            encoded = Encoded(
                found["embedding"],
                found["user_state"],
                tuple(tensors.warnings_of(reply, len(users))),
                tuple(at in lost for at in range(len(users))),
            )
            return encoded, seen_from(reply.seen)

    async def count(self, scan: Tensor, remaining_s: float, demand: Demand = ANYTHING) -> Tensor:
        """Return how many documents of the shard pass each program ``(B, L, 4)``, ``(B,)``."""
        call = shard_pb2.ShardCall(count=tensors.to_map({"scan": scan}))
        reply = await self._call(call, remaining_s, demand)
        with self._usable():
            count = tensors.from_map(reply.tensors, tensors.COUNT)["count"]
            self._same_batch(count, scan.shape[0])
            return count

    async def open(
        self, key: str, work: Work, remaining_s: float, demand: Demand = ANYTHING
    ) -> tuple[RoundOne, Seen]:
        """Run round one, and tell what it saw.

        The candidates stay open under ``key`` for ``remaining_s``.
        """
        call = shard_pb2.ShardCall(key=key, open=tensors.work_to_map(work))
        reply = await self._call(call, remaining_s, demand)
        with self._usable():
            first = tensors.round_one_from_map(reply.tensors, dict(reply.times_us))
            self._same_batch(first.scores, *work.embedding.shape[:2])
            return first, seen_from(reply.seen)

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

    async def fields(
        self, key: str, item_ids: Sequence[int], names: Sequence[str], remaining_s: float
    ) -> dict[str, list[FieldValue]]:
        """Return stored columns of items as the candidates open under ``key`` saw them.

        Raises:
            CandidatesExpired: if they are open no more.
        """
        asked = shard_pb2.Fields(item_ids=item_ids, names=names)
        call = shard_pb2.ShardCall(key=key, fields=asked)
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
        self.connection.release(key)

    async def _call(
        self, call: shard_pb2.ShardCall, remaining_s: float, demand: Demand = ANYTHING
    ) -> shard_pb2.ShardReply:
        if not demand.is_any:
            tokens, most_s = demand.consistency.after, demand.consistency.max_staleness_s
            call.fresh.wait_us = int(max(demand.wait_s, 0.0) * 1e6)
            call.fresh.log_id = tokens[0].log_id if tokens else 0
            for token in tokens:
                call.fresh.after.add(partition=token.partition, position=token.position)
            if most_s is not None:
                call.fresh.max_staleness_us = int(most_s * 1e6)
        return await self.connection.call(call, self.generation, remaining_s)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ShardUnavailable(self.shard, f"malformed answer: {error}") from None

    def _same_batch(self, tensor: Tensor, *sizes: int) -> None:
        if tuple(tensor.shape[: len(sizes)]) != sizes:
            raise ValueError(f"answer must be of shape {sizes}, got {tuple(tensor.shape)}")


class Connections:
    """The connections to all processes that any shard map names, each shared by who needs it."""

    def __init__(
        self, ping: PingSection, dialer: Dials = PLAIN, faults: Faults | None = None
    ) -> None:
        """Connect to nobody yet.

        Args:
            ping: when a replica counts as hung.
            dialer: opens the channels.
            faults: say which messages are lost on their way; None: none.
        """
        self._ping = ping
        self._dialer = dialer
        self._faults = faults
        self._held: dict[tuple[int, int, str, int], tuple[ShardConnection, int]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._lingers = True

    def acquire(self, entry: ShardEntry) -> ShardConnection:
        """Return the connection to an incarnation; give it back by ``release``."""
        key = _incarnation(entry)
        connection, users = self._held.get(key, (None, 0))
        if connection is None:
            connection = ShardConnection(entry, self._ping, self._dialer, self._faults)
            connection.start()
        self._held[key] = (connection, users + 1)
        return connection

    def release(self, connection: ShardConnection, linger_s: float = 0.0) -> None:
        """Disconnect, unless somebody else needs the connection.

        Args:
            connection: one that was acquired.
            linger_s: longest wait for the replies of calls that are on their way.
        """
        key = _incarnation(connection.entry)
        _, users = self._held.pop(key)
        if users > 1:
            self._held[key] = (connection, users - 1)
            return
        task = asyncio.create_task(self._close(connection, linger_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Disconnect from everything."""
        held = [connection for connection, _ in self._held.values()]
        self._held.clear()
        self._lingers = False
        await asyncio.gather(*(one.aclose() for one in held), *self._closing)

    async def _close(self, connection: ShardConnection, linger_s: float) -> None:
        until_s = asyncio.get_running_loop().time() + linger_s
        while self._lingers and not connection.is_idle:
            if asyncio.get_running_loop().time() >= until_s:
                break
            await asyncio.sleep(_LOOK_S)
        await connection.aclose()


class Links:
    """The links of one generation to the processes of the newest shard map."""

    def __init__(self, connections: Connections, generation: int, *, linger_s: float = 0.0) -> None:
        """Make no link yet.

        Args:
            connections: shared by all generations.
            generation: that is asked for.
            linger_s: longest life of a call.
        """
        self._connections = connections
        self._generation = generation
        self._linger_s = linger_s
        self._links: dict[tuple[int, int, str, int], GrpcShardLink] = {}
        self._replicas: dict[int, tuple[GrpcShardLink, ...]] = {}
        """Those of each shard, by replica."""

    def update(self, shard_map: ShardMap) -> None:
        """Connect to what is new in the map and let go of what is no longer in it.

        Whoever was drained or relieved may still answer what it was asked; whose place a newer
        incarnation has taken otherwise may not.
        """
        wanted = {_incarnation(entry): entry for entry in shard_map.entries}
        newest = {(entry.shard, entry.replica): entry for entry in shard_map.entries}
        for key in [one for one in self._links if one not in wanted]:
            connection = self._links.pop(key).connection
            entry = newest.get((connection.entry.shard, connection.entry.replica))
            epoch = connection.entry.epoch
            if entry is not None and entry.epoch > epoch != entry.relieves:
                connection.fence()
            self._connections.release(connection, self._linger_s)
        for key in [one for one in wanted if one not in self._links]:
            connection = self._connections.acquire(wanted[key])
            self._links[key] = GrpcShardLink(connection, self._generation)
        links = sorted(self._links.values(), key=lambda link: (link.shard, link.replica))
        self._replicas = {
            shard: tuple(same) for shard, same in itertools.groupby(links, lambda link: link.shard)
        }

    def replicas(self, shard: int) -> Sequence[GrpcShardLink]:
        """Return the links to a shard, by replica."""
        return self._replicas.get(shard, ())

    def close(self) -> None:
        """Let go of everything."""
        for link in self._links.values():
            self._connections.release(link.connection)
        self._links.clear()
        self._replicas.clear()


def _incarnation(entry: ShardEntry) -> tuple[int, int, str, int]:
    """Return what tells the process of an entry from every other one."""
    return entry.shard, entry.replica, entry.address, entry.epoch
