"""A remote embedding table as one object: rows by number as of one version, wherever they are.

Shapes: n rows asked for, u different ones among them, D embedding dimension, W bytes of a record.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from silvershard.cluster import table_pb2
from silvershard.cluster.config import MEBIBYTE
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.map_file import Stamp, stamp_of
from silvershard.cluster.table_cache import RowCache
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_flight import Flight, Part, cut
from silvershard.cluster.table_link import UNAVAILABLE, Refused, TableLink
from silvershard.cluster.table_lookup import Lookup, PendingLookup, RecordLookup, TableCounts
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.cluster.table_server import MAX_CALL_ROWS
from silvershard.model.request import RequestError
from silvershard.shard.errors import ConfigError, DeadlineExceeded, StateError
from silvershard.shard.table_rows import (
    Ints,
    Records,
    quantize_rows,
    split,
    whole,
)

T = TypeVar("T")

# A position takes 31 bits of a word of 63.
_INDEX_BITS = 32

_log = logging.getLogger(__name__)


class _Arrival(NamedTuple):
    """Rows that came from a shard."""

    rows: slice
    """Which of the rows that were asked for they are."""
    records: Records


class RemoteTable:
    """A table whose rows live in other processes; any thread may call.

    Rows are asked for once however often they repeat, looked for in a cache, fetched from their
    shards at the same time as 8-bit records, and restored here. What a shard does not give in time
    is the default row: a lookup never fails because of a shard.

    All rows are as of one version, which whoever uses the table moves on with ``advance``: the
    shards give the rows of exactly that version, and what a change replaced leaves the cache. So
    the answer does not depend on how far each shard is, nor on what is in the cache.
    """

    def __init__(
        self,
        table_map: TableShardMap,
        config: RemoteTableSection | None = None,
        dialer: Dialer = PLAIN,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to the shards of a map, on a thread of its own."""
        self._dialer = dialer
        self.plan = table_map.plan
        self._config = config or RemoteTableSection()
        self._clock = clock
        self._default = table_map.default_values
        self._default_record = whole(quantize_rows(self._default[None], self.plan.dim))
        self._lock = threading.Lock()
        self._cache = RowCache(self._config.cache_mib * MEBIBYTE, self.plan.record_bytes)
        self._row_version = 0
        self._links: dict[int, TableLink] = {}
        self._arrived: deque[tuple[int, Ints, list[_Arrival]]] = deque()
        self._num_lookups = self._num_rows = self._num_fetched = self._num_defaulted = 0
        self._failures: Counter[str] = Counter()
        self._closed = False
        self._watch: Future[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"table-{self.plan.name}", daemon=True
        )
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._keep_forever(), self._loop)
        self.update_map(table_map)

    @classmethod
    def follow(
        cls, path: Path, config: RemoteTableSection | None = None, dialer: Dialer = PLAIN
    ) -> Self:
        """Return the table of the map in a file, which is looked at again and again.

        Raises:
            StateError: if there is no map, or it is damaged; a later one that is, is logged.
        """
        stamp = stamp_of(path)
        table = cls(TableShardMap.read(path), config, dialer)
        table._watch = asyncio.run_coroutine_threadsafe(
            table._follow_forever(path, stamp), table._loop
        )
        return table

    def lookup(self, ids: Ints, timeout_s: float | None = None) -> Lookup:
        """Return the values of rows.

        Args:
            ids: ``(n,)`` int64 numbers of rows, in any order, may repeat, may be none.
            timeout_s: instead of ``deadline_ms``.

        Raises:
            RequestError: if ``ids`` is not an array of row numbers.
            StateError: if the table was closed.
        """
        return self.submit(ids, timeout_s).result()

    def submit(self, ids: Ints, timeout_s: float | None = None) -> PendingLookup:
        """Ask for rows as ``lookup`` does, without waiting for them."""
        timeout_s = self._config.deadline_ms / 1e3 if timeout_s is None else timeout_s
        expires_at_s = self._clock() + timeout_s
        self._check_open()
        wanted, back = _distinct(self.plan.positions(self._checked(ids)))
        records = np.zeros(len(wanted), dtype=f"V{self.plan.record_bytes}")
        with self._lock:
            row_version = self._row_version
            places = self._cache.find(wanted)
            held = np.flatnonzero(places >= 0)
            if len(held) == len(wanted):
                records = whole(self._cache.take(places))
            elif len(held):
                records[held] = whole(self._cache.take(places[held]))
        missing = np.flatnonzero(places < 0)
        asked = wanted[missing]
        parts = [
            Part(shard, rows, _take(asked[rows], row_version))
            for shard, rows in cut(asked, self.plan.bounds, MAX_CALL_ROWS)
        ]
        flight = self._launch(parts, expires_at_s)

        def finish() -> RecordLookup:
            self._wait_for(flight)
            lost, came = self._unpack(flight, missing, records)
            num_lost = int(np.count_nonzero(lost))
            if num_lost:
                records[lost] = self._default_record
            self._count(flight, len(wanted), num_lost, sum(len(one.records) for one in came))
            if came:
                self._arrived.append((row_version, asked, came))
            return RecordLookup(split(records[back], self.plan.record_bytes), lost[back])

        return PendingLookup(finish, self._default)

    def advance(self, version: int, ids: Ints) -> None:
        """Look rows up as of a later version from now on.

        Every version has to be told of. One that is not later than the last changes nothing.

        Args:
            version: of a change of rows.
            ids: ``(n,)`` int64 numbers of the rows that it replaced.

        Raises:
            RequestError: if ``ids`` is not an array of row numbers.
        """
        positions = self.plan.positions(self._checked(ids))
        with self._lock:
            if version > self._row_version:
                self._row_version = version
                self._cache.drop(positions)

    def update_map(self, table_map: TableShardMap) -> None:
        """Connect to what is new in the map and let go of what is no longer in it.

        Raises:
            ConfigError: if it is the map of another table, or of another cut of it.
            StateError: if the table was closed.
        """
        self._check_open()
        self._call(self._take_map(table_map))

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every shard can be asked.

        Raises:
            DeadlineExceeded: if that takes longer.
        """
        expires_at_s = self._clock() + timeout_s
        while missing := self._call(self._unreached()):
            if self._clock() >= expires_at_s:
                raise DeadlineExceeded(
                    f"shards {missing} of table {self.plan.name} cannot be asked yet"
                )
            time.sleep(0.005)

    def counts(self) -> TableCounts:
        """Return what was looked up so far."""
        with self._lock:
            return TableCounts(
                lookups=self._num_lookups,
                rows=self._num_rows,
                cached=self._num_rows - self._num_fetched - self._num_defaulted,
                fetched=self._num_fetched,
                defaulted=self._num_defaulted,
                failures=dict(self._failures),
            )

    def close(self) -> None:
        """Disconnect and end the thread; lookups on their way return default rows."""
        if self._closed:
            return
        self._closed = True
        self._call(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        """Return the table itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the table."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(f"table {self.plan.name} was closed")

    def _checked(self, ids: Ints) -> Ints:
        if ids.ndim != 1 or ids.dtype != np.int64:
            raise RequestError("ids", f"must be (n,) int64, got {ids.shape} {ids.dtype}")
        # As unsigned numbers, negative ones lie beyond all others.
        if len(ids) and ids.view(np.uint64).max() >= self.plan.num_rows:
            raise RequestError(
                "ids",
                f"must be from 0 to {self.plan.num_rows - 1} in table {self.plan.name}, "
                f"got {ids.min()} to {ids.max()}",
            )
        return ids

    def _launch(self, parts: list[Part], expires_at_s: float) -> Flight:
        flight = Flight(parts, expires_at_s)
        if parts:
            self._soon(self._send, flight)
        return flight

    def _wait_for(self, flight: Flight) -> None:
        if not flight.wait(flight.expires_at_s - self._clock()):
            self._soon(flight.forget)

    def _unpack(
        self, flight: Flight, missing: Ints, records: npt.NDArray[np.void]
    ) -> tuple[npt.NDArray[np.bool_], list[_Arrival]]:
        """Fill in the missing records; return which rows ``(u,)`` are lost, and what came."""
        lost = np.zeros(len(records), dtype=bool)
        width = self.plan.record_bytes
        came: list[_Arrival] = []
        for part in flight.parts:
            rows, outcome = missing[part.rows], part.outcome
            if isinstance(outcome, table_pb2.TableReply):
                if len(outcome.records) == len(rows) * width:
                    found = np.frombuffer(outcome.records, dtype=np.uint8).reshape(-1, width)
                    records[rows] = whole(found)
                    came.append(_Arrival(part.rows, found))
                    continue
                size = len(outcome.records)
                part.outcome = Refused("DATA_LOSS", f"{size} bytes came for {len(rows)} rows")
            lost[rows] = True
        return lost, came

    def _count(self, flight: Flight, num_rows: int, num_lost: int, num_fetched: int) -> None:
        with self._lock:
            self._num_lookups += 1
            self._num_rows += num_rows
            self._num_fetched += num_fetched
            self._num_defaulted += num_lost
            if num_lost:
                self._failures.update(
                    part.outcome.code if isinstance(part.outcome, Refused) else "DEADLINE_EXCEEDED"
                    for part in flight.parts
                    if not isinstance(part.outcome, table_pb2.TableReply)
                )

    def _soon(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do work on the event loop, unless the table is closed meanwhile."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work, *arguments)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # The rest runs on the event loop.

    def _send(self, flight: Flight) -> None:
        for part in flight.parts:
            remaining_s = flight.expires_at_s - self._clock()
            link = part.link = self._links.get(part.shard)
            if link is None:
                flight.end(part, Refused(UNAVAILABLE, f"shard {part.shard} is not in the map"))
            elif remaining_s > 0:
                part.call_id = link.send(part.call, remaining_s, partial(flight.end, part))
        self._loop.call_soon(self._keep)

    def _keep(self) -> None:
        """Put rows that came into the cache, unless they are of an older version by now.

        It runs while the next calls are on their way, so that no lookup waits for it.
        """
        while self._arrived:
            row_version, asked, came = self._arrived.popleft()
            with self._lock:
                if row_version == self._row_version:
                    self._cache.insert(
                        np.concatenate([asked[one.rows] for one in came]),
                        np.concatenate([one.records for one in came]),
                    )

    async def _keep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.ping.every_ms / 1e3)
            self._keep()

    async def _take_map(self, table_map: TableShardMap) -> None:
        if table_map.plan != self.plan:
            raise ConfigError(
                f"table map {table_map.version} must be of the plan of table {self.plan.name} "
                f"that is in use, got {table_map.plan!r}"
            )
        wanted: dict[int, TableEntry] = {one.shard: one for one in table_map.entries}
        gone = [link for shard, link in self._links.items() if wanted.get(shard) != link.entry]
        for link in gone:
            del self._links[link.entry.shard]
        for shard, entry in wanted.items():
            if shard not in self._links:
                link = TableLink(entry, self._config.ping, self._dialer)
                link.start()
                self._links[shard] = link
        await asyncio.gather(*(link.aclose() for link in gone))

    async def _follow_forever(self, path: Path, stamp: Stamp | None) -> None:
        while True:
            await asyncio.sleep(self._config.poll_ms / 1e3)
            found = stamp_of(path)
            if found is None or found == stamp:
                continue
            stamp = found
            try:
                await self._take_map(TableShardMap.read(path))
            except Exception as error:  # noqa: BLE001  # logged; nothing else would follow the map
                _log.error("the last good table map is kept: %s", error)

    async def _unreached(self) -> list[int]:
        reached = {shard for shard, link in self._links.items() if link.reached}
        return sorted(set(range(self.plan.num_shards)) - reached)

    async def _disconnect(self) -> None:
        await asyncio.gather(*(link.aclose() for link in self._links.values()))
        self._links.clear()
        # Besides the one that follows the map, gRPC has some that wait for the ends of calls.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _distinct(positions: Ints) -> tuple[Ints, Ints]:
    """Return the different positions ``(u,)`` in order, and which of them each one ``(n,)`` is.

    As ``numpy.unique`` does, in half the time: position and index share a word, so one sort orders
    both.
    """
    if not len(positions):
        return positions, positions
    words = (positions << _INDEX_BITS) | np.arange(len(positions))
    words.sort()
    ordered, order = words >> _INDEX_BITS, words & ((1 << _INDEX_BITS) - 1)
    first = np.empty(len(ordered), dtype=bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    back = np.empty_like(order)
    back[order] = first.cumsum() - 1
    return ordered[first], back


def _take(positions: Ints, row_version: int) -> table_pb2.TableCall:
    take = table_pb2.Take(positions=positions.tobytes())
    return table_pb2.TableCall(row_version=row_version, take=take)
