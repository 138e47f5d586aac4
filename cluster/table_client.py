"""A remote embedding table as one object: rows by number, wherever they are.

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
from silvershard.cluster.map_file import Stamp, stamp_of
from silvershard.cluster.table_cache import RowCache
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_flight import Flight, Part, cut
from silvershard.cluster.table_link import UNAVAILABLE, Refused, TableLink
from silvershard.cluster.table_lookup import Lookup, PendingLookup, RecordLookup, TableCounts
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.cluster.table_server import MAX_CALL_ROWS
from silvershard.model.request import RequestError
from silvershard.shard.errors import ConfigError, DeadlineExceeded, ShardUnavailable, StateError
from silvershard.shard.table_rows import (
    Floats,
    Ints,
    Records,
    quantize_rows,
    split,
    whole,
)

T = TypeVar("T")

_PUT_ROWS = 4096
"""Rows of one call of an update: lookups pass between two calls."""

# A position takes 31 bits of a word of 63.
_INDEX_BITS = 32

_log = logging.getLogger(__name__)


class _Arrival(NamedTuple):
    """Rows that came from a shard."""

    link: TableLink
    version: int
    rows: slice
    """Which of the rows that were asked for they are."""
    records: Records


class RemoteTable:
    """A table whose rows live in other processes; any thread may call.

    Rows are asked for once however often they repeat, looked for in a cache, fetched from their
    shards at the same time as 8-bit records, and restored here. What a shard does not give in time
    is the default row: a lookup never fails because of a shard.

    Every answer and every beat of a shard names the rows that were replaced since the last one, and
    they leave the cache. So a row is at most ``max_stale_ms`` behind its shard, about one beat in
    practice, and a client sees its own updates at once.
    """

    def __init__(
        self,
        table_map: TableShardMap,
        config: RemoteTableSection | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to the shards of a map, on a thread of its own."""
        self.plan = table_map.plan
        self._config = config or RemoteTableSection()
        self._clock = clock
        self._default = table_map.default_values
        self._default_record = whole(quantize_rows(self._default[None], self.plan.dim))
        self._lock = threading.Lock()
        self._cache = RowCache(self._config.cache_mib * MEBIBYTE, self.plan.record_bytes)
        self._confirmed_at_s = np.full(self.plan.num_shards, -np.inf)
        self._links: dict[int, TableLink] = {}
        self._arrived: deque[tuple[Ints, list[_Arrival]]] = deque()
        self._num_lookups = self._num_rows = self._num_fetched = self._num_defaulted = 0
        self._failures: Counter[str] = Counter()
        self._closed = False
        self._watch: Future[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"table-{self.plan.name}", daemon=True
        )
        self._thread.start()
        self.update_map(table_map)

    @classmethod
    def follow(cls, path: Path, config: RemoteTableSection | None = None) -> Self:
        """Return the table of the map in a file, which is looked at again and again.

        Raises:
            StateError: if there is no map, or it is damaged; a later one that is, is logged.
        """
        stamp = stamp_of(path)
        table = cls(TableShardMap.read(path), config)
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
            places = self._find(wanted)
            held = np.flatnonzero(places >= 0)
            if len(held) == len(wanted):
                records = whole(self._cache.take(places))
            elif len(held):
                records[held] = whole(self._cache.take(places[held]))
        missing = np.flatnonzero(places < 0)
        asked = wanted[missing]
        parts = [
            Part(shard, rows, table_pb2.TableCall(take=_take(asked[rows])))
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
                self._arrived.append((asked, came))
            return RecordLookup(split(records[back], self.plan.record_bytes), lost[back])

        return PendingLookup(finish, self._default)

    def update(self, ids: Ints, values: Floats, timeout_s: float = 10.0) -> None:
        """Replace rows in place; when it returns, every later lookup here sees the new ones.

        Args:
            ids: ``(n,)`` int64 numbers of rows, none twice.
            values: ``(n, D)`` float32; quantised here, so that all clients send the same bytes.
            timeout_s: for all shards together.

        Raises:
            RequestError: if a row or value is refused; nothing changes.
            ShardUnavailable: if a shard did not take its rows; other rows may be replaced, and
                doing it again is harmless.
            DeadlineExceeded: if a shard did not say so in time; the same holds.
        """
        expires_at_s = self._clock() + timeout_s
        self._check_open()
        positions = self.plan.positions(self._checked(ids))
        records = quantize_rows(values, self.plan.dim)
        if len(records) != len(positions):
            raise RequestError("values", f"must be of {len(positions)} rows, got {len(records)}")
        order = positions.argsort(kind="stable")
        positions, records = positions[order], records[order]
        repeated = positions[1:][positions[1:] == positions[:-1]]
        if len(repeated):
            row = int(self.plan.rows(repeated[:1])[0])
            raise RequestError("ids", f"must not repeat, got {row} more than once")
        parts = []
        for shard, rows in cut(positions, self.plan.bounds, _PUT_ROWS):
            put = table_pb2.Put(
                positions=positions[rows].tobytes(), records=records[rows].tobytes()
            )
            parts.append(Part(shard, rows, table_pb2.TableCall(put=put)))
        flight = self._launch(parts, expires_at_s)
        self._wait_for(flight)
        for part in parts:
            if part.outcome is None:
                raise DeadlineExceeded(
                    f"shard {part.shard} did not confirm an update within {timeout_s:.3f} s"
                )
            if isinstance(part.outcome, Refused):
                raise ShardUnavailable(part.shard, f"{part.outcome.code}: {part.outcome.message}")

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

    def _find(self, wanted: Ints) -> Ints:
        """Return the places of positions in the cache, of those that are fresh enough."""
        places = self._cache.find(wanted)
        known = self._confirmed_at_s >= self._clock() - self._config.max_stale_ms / 1e3
        if not known.all():
            places[~known[self.plan.owners(wanted)]] = -1
        return places

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
            if isinstance(outcome, table_pb2.TableReply) and part.link is not None:
                if len(outcome.records) == len(rows) * width:
                    found = np.frombuffer(outcome.records, dtype=np.uint8).reshape(-1, width)
                    records[rows] = whole(found)
                    came.append(_Arrival(part.link, outcome.version, part.rows, found))
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
        """Put rows that came into the cache, unless rows of their shard were replaced meanwhile.

        It runs while the next calls are on their way, so that no lookup waits for it.
        """
        while self._arrived:
            asked, came = self._arrived.popleft()
            with self._lock:
                current = [
                    one
                    for one in came
                    if self._links.get(one.link.entry.shard) is one.link
                    and one.link.version == one.version
                ]
                if current:
                    self._cache.insert(
                        np.concatenate([asked[one.rows] for one in current]),
                        np.concatenate([one.records for one in current]),
                    )

    def _answered(self, link: TableLink, reply: table_pb2.TableReply, sent_at_s: float) -> None:
        """Take note of what changed in a shard, before the rows of the answer are used."""
        shard = link.entry.shard
        with self._lock:
            if self._links.get(shard) is not link:
                return
            if reply.forget:
                self._cache.drop_span(self.plan.span(shard))
            elif reply.changed:
                self._cache.drop(np.frombuffer(reply.changed, dtype="<i8").astype(np.int64))
            link.version = reply.version
            self._confirmed_at_s[shard] = sent_at_s
        if self._arrived:
            self._loop.call_soon(self._keep)

    async def _take_map(self, table_map: TableShardMap) -> None:
        if table_map.plan != self.plan:
            raise ConfigError(
                f"table map {table_map.version} must be of the plan of table {self.plan.name} "
                f"that is in use, got {table_map.plan!r}"
            )
        wanted: dict[int, TableEntry] = {one.shard: one for one in table_map.entries}
        gone = [link for shard, link in self._links.items() if wanted.get(shard) != link.entry]
        with self._lock:
            for link in gone:
                shard = link.entry.shard
                del self._links[shard]
                # Another incarnation has the rows of the source, and counts from there.
                self._cache.drop_span(self.plan.span(shard))
                self._confirmed_at_s[shard] = -np.inf
        for shard, entry in wanted.items():
            if shard not in self._links:
                link = TableLink(entry, self._config.ping, self._answered, clock=self._clock)
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
        with self._lock:
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


def _take(positions: Ints) -> table_pb2.Take:
    return table_pb2.Take(positions=positions.tobytes())
