"""What the shards of the map say of themselves: their cuts and their room, for the sequencer."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from silvershard.cluster import shard_pb2, shard_pb2_grpc
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.feed_block import RoomReport
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.shard_map import ShardMap
from silvershard.shard.errors import StateError

_log = logging.getLogger(__name__)

_Place = tuple[int, int, int]
"""Shard, replica and incarnation."""


class ReplicaReport(NamedTuple):
    """What a replica says of the generation that the map names."""

    generation: int
    log_id: int
    cut: tuple[int, ...]
    pages: int
    taken: int
    """Slots that items take, or will leave as soon as queries have ended."""


class ShardReports:
    """Asks every process of the shard map how far it is, again and again."""

    def __init__(
        self,
        map_path: Path,
        dialer: Dialer = PLAIN,
        *,
        every_s: float = 0.2,
        eager_s: float = 0.01,
        timeout_s: float = 2.0,
    ) -> None:
        """Know nothing yet; ``run`` asks.

        Args:
            map_path: shard map file.
            dialer: opens channels.
            every_s: time between two questions to a process, and two looks at the map.
            eager_s: the same while somebody waits for an update to be applied.
            timeout_s: longest wait for an answer.
        """
        self.map: ShardMap | None = None
        self._path = map_path
        self._dialer = dialer
        self._every_s, self._eager_s, self._timeout_s = every_s, eager_s, timeout_s
        self._reports: dict[_Place, ReplicaReport] = {}
        self._askers: dict[_Place, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()
        """Set while somebody waits."""
        self._waiting = 0

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            while True:
                self._read_map()
                await self._pause()
        finally:
            for task in self._askers.values():
                task.cancel()
            await asyncio.gather(*self._askers.values(), return_exceptions=True)

    def changed(self) -> Coroutine[Any, Any, object]:
        """Return what ends as soon as there is something new since this was called.

        A task that is made of it begins later than that.
        """
        return self._changed.wait()

    def room(self, page_slots: int, num_clusters: int) -> list[RoomReport]:
        """Return the room of every replica of the map that has reported on its generation.

        A page of each cluster does not count: so much may stand half empty when the others are
        full, and items that find no page of their cluster would stand in those of another.

        Args:
            page_slots: slots G of a page.
            num_clusters: C.
        """
        found = []
        for (shard, replica, _), report in self._current():
            # Without a cut it follows no log, and has room for nothing.
            if report is not None and report.cut:
                slots = max(report.pages - num_clusters, 0) * page_slots
                found.append(RoomReport(shard, replica, slots, report.taken, report.cut))
        return found

    async def applied(self, tokens: Sequence[UpdateToken], *, every_replica: bool) -> None:
        """Return as soon as updates are applied.

        Args:
            tokens: of the updates.
            every_replica: whether by all replicas of the map; else by one of every shard.
        """
        self._waiting += 1
        self._hurry.set()
        try:
            while not self._is_applied(tokens, every_replica=every_replica):
                await self.changed()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._hurry.clear()

    def _is_applied(self, tokens: Sequence[UpdateToken], *, every_replica: bool) -> bool:
        if self.map is None:
            return False
        done: dict[int, list[bool]] = {shard: [] for shard in range(self.map.num_shards)}
        for (shard, _, _), report in self._current():
            done[shard].append(report is not None and _has_applied(report, tokens))
        enough = all if every_replica else any
        return all(found and enough(found) for found in done.values())

    def _current(self) -> list[tuple[_Place, ReplicaReport | None]]:
        if self.map is None:
            return []
        places = [(one.shard, one.replica, one.epoch) for one in self.map.entries]
        found = [(place, self._reports.get(place)) for place in places]
        generation = self.map.generation
        return [
            (place, report if report and report.generation == generation else None)
            for place, report in found
        ]

    def _read_map(self) -> None:
        try:
            shard_map = ShardMap.read(self._path)
        except StateError as error:
            if self.map is not None:
                _log.warning("the shard map cannot be read: %s", error)
            return
        if shard_map == self.map:
            return
        self.map = shard_map
        entries = {(one.shard, one.replica, one.epoch): one for one in shard_map.entries}
        for place in self._askers.keys() - entries.keys():
            self._askers.pop(place).cancel()
            self._reports.pop(place, None)
        for place in entries.keys() - self._askers.keys():
            task = asyncio.create_task(self._ask_forever(place, entries[place].address))
            self._askers[place] = task
        self._tell()

    async def _ask_forever(self, place: _Place, address: str) -> None:
        async with self._dialer.aio_channel(address, LINK_OPTIONS) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            while True:
                # What it said last stays true: it only ever gets further.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    report = await stub.Inspect(shard_pb2.InspectRequest(), timeout=self._timeout_s)
                    self._take_over(place, report)
                await self._pause()

    def _take_over(self, place: _Place, report: shard_pb2.ShardReport) -> None:
        wanted = self.map.generation if self.map else 0
        for one in report.generations:
            if one.generation == wanted:
                found = ReplicaReport(
                    generation=one.generation,
                    log_id=one.seen.log_id,
                    cut=tuple(one.seen.cut),
                    pages=one.pool.pages,
                    taken=one.pool.live_slots + one.pool.retired_slots,
                )
                if found != self._reports.get(place):
                    self._reports[place] = found
                    self._tell()

    async def _pause(self) -> None:
        """Wait until it is time to ask again."""
        if self._waiting:
            await asyncio.sleep(self._eager_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._every_s):
                await self._hurry.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _has_applied(report: ReplicaReport, tokens: Sequence[UpdateToken]) -> bool:
    return all(
        report.log_id == token.log_id
        and token.partition < len(report.cut)
        and report.cut[token.partition] >= token.position
        for token in tokens
    )
