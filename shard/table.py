"""One shard of an embedding table in memory: rows are replaced, and read as of any late version.

Shapes: n rows, D embedding dimension, W bytes of a record.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors

from silvershard.model.request import RequestError
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.table_files import RECORDS
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import (
    Ints,
    Records,
    check_records,
    quantize_rows,
    split,
    whole,
)

UNDO_BYTES = 16 << 20
"""Memory of a shard for what rows were before: a dozen of the largest changes that a log takes."""

_BLOCK_ROWS = 1 << 16
# A reader waits for one slice of a change at most: 1,024 rows of 68 bytes take 0.1 ms.
_SLICE_ROWS = 1024
# Of an undo entry besides its record: the version that replaced the row, and its place.
_ENTRY_BYTES = 16


class TableShard:
    """The rows at the positions of ``span`` as of the row changes of a log up to some version.

    Any thread may read, and one thread at a time applies changes. Versions are those of the log: of
    one table each change has a larger one than the last. A change replaces rows in place, and what
    they were before is kept for a while, so that a reader whose own version is a bit behind gets
    the rows of exactly that version, whatever is applied meanwhile.

    A lock is held while records are copied in or out, since numpy lets other threads run. A change
    of many rows is applied in slices, between which others read what was there before it.
    """

    def __init__(
        self, plan: TablePlan, shard: int, records: Records, *, undo_bytes: int = UNDO_BYTES
    ) -> None:
        """Take over the records ``(n, W)`` of a shard, in order of position; they are not copied.

        Args:
            plan: of the table.
            shard: index of the shard.
            records: as of version 0.
            undo_bytes: memory for what rows were before; the oldest gives way.

        Raises:
            RequestError: if there is no such shard, or the records are not those of one.
        """
        self.plan = plan
        self.shard = shard
        self.span = plan.span(shard)
        _check_shape("records", records, (len(self.span), plan.record_bytes))
        check_records(records)
        self._records = whole(records)
        self._lock = threading.Lock()
        self._row_version = 0
        self._num_kept = max(undo_bytes // (plan.record_bytes + _ENTRY_BYTES), _SLICE_ROWS)
        self._num_undone = 0
        """Rows replaced so far; each one's entry lies at its number modulo ``_num_kept``."""
        self._lost_version = 0
        """Newest version of which an entry gave way."""
        # Before the first change nothing is kept.
        self._undo_versions = self._undo_places = np.empty(0, dtype=np.int64)
        self._undo_records = whole(np.empty((0, plan.record_bytes), dtype=np.uint8))

    @classmethod
    def from_blocks(
        cls, plan: TablePlan, shard: int, blocks: Iterable[npt.NDArray[np.float32]]
    ) -> Self:
        """Quantise the rows of a shard out of the whole table.

        Args:
            plan: of the table.
            shard: index of the shard.
            blocks: ``(m, D)`` float32 or float16, one after another in order of the rows.

        Raises:
            RequestError: if blocks do not hold the ``num_rows`` rows, or a value is refused.
        """
        return cls._collect(plan, shard, _numbered(blocks, plan.num_rows), plan.dim, quantize_rows)

    @classmethod
    def from_file(cls, plan: TablePlan, shard: int, path: Path) -> Self:
        """Load the rows of a shard from a safetensors file that holds the whole table.

        The file is mapped: with contiguous placement only the rows of the shard are read.

        Args:
            plan: of the table.
            shard: index of the shard.
            path: a file with a tensor ``weight``, ``(num_rows, D)`` float32 or float16, or
                ``records``, ``(num_rows, W)`` uint8, in order of the rows.

        Raises:
            SnapshotError: if the file is missing, damaged, or of another table.
        """
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                name = RECORDS if RECORDS in file.keys() else "weight"  # noqa: SIM118
                tensor = file.get_slice(name)
                width = plan.record_bytes if name == RECORDS else plan.dim
                if tuple(tensor.get_shape()) != (plan.num_rows, width):
                    raise SnapshotError(
                        str(path),
                        f"tensor {name!r} must be of shape ({plan.num_rows}, {width}), "
                        f"got {tuple(tensor.get_shape())}",
                    )
                rows = range(plan.num_rows)
                if plan.placement == "contiguous":
                    rows = plan.span(shard)
                blocks = (
                    (start, tensor[start : min(start + _BLOCK_ROWS, rows.stop)])
                    for start in range(rows.start, rows.stop, _BLOCK_ROWS)
                )
                to_records = _checked if name == RECORDS else quantize_rows
                return cls._collect(plan, shard, blocks, width, to_records)
        except (OSError, safetensors.SafetensorError, RequestError) as error:
            raise SnapshotError(str(path), str(error)) from None

    @classmethod
    def generated(cls, plan: TablePlan, shard: int, seed: int = 0) -> Self:
        """Make the rows of a shard of a table of random values within ±1, for tests and benchmarks.

        A row depends on its number, ``dim`` and ``seed`` only.
        """
        blocks = (
            (start, _random_records(start, plan, seed))
            for start in range(0, plan.num_rows, _BLOCK_ROWS)
        )
        return cls._collect(plan, shard, blocks, plan.record_bytes, _checked)

    @classmethod
    def _collect(
        cls,
        plan: TablePlan,
        shard: int,
        blocks: Iterable[tuple[int, npt.NDArray[Any]]],
        width: int,
        to_records: Callable[[npt.NDArray[Any], int], Records],
    ) -> Self:
        """Pick the rows of a shard from blocks, each of which comes with its first row."""
        span = plan.span(shard)
        records = np.empty((len(span), plan.record_bytes), dtype=np.uint8)
        for start, block in blocks:
            places = plan.positions(np.arange(start, start + len(block))) - span.start
            mine = np.flatnonzero((places >= 0) & (places < len(span)))
            if len(mine):
                owned = block if len(mine) == len(block) else block.take(mine, axis=0)
                whole(records)[places[mine]] = whole(to_records(owned, width))
        return cls(plan, shard, records)

    @property
    def num_bytes(self) -> int:
        """Return the memory that the rows take."""
        return int(self._records.nbytes)

    @property
    def row_version(self) -> int:
        """Return the newest version that is wholly applied, 0 before the first."""
        return self._row_version

    @property
    def oldest_version(self) -> int:
        """Return the oldest version that rows can be read at."""
        return self._lost_version

    def take(self, positions: Ints, at: int | None = None) -> Records:
        """Return the records ``(n, W)`` at positions ``(n,)``, which may repeat, of one version.

        Args:
            positions: int64, may be none.
            at: the version; by default the newest.

        Raises:
            RequestError: if a position is not of this shard.
            StateError: if that version is not applied yet, or is too long ago.
        """
        places = self._places(positions)
        with self._lock:
            version = self._row_version if at is None else at
            if not self._lost_version <= version <= self._row_version:
                raise StateError(
                    f"rows of table {self.plan.name} can be had as of versions "
                    f"{self._lost_version} to {self._row_version}, {version} was asked for"
                )
            found = self._records.take(places)
            self._undo(found, places, version)
        return split(found, self.plan.record_bytes)

    def apply(self, version: int, rows: Ints, values: npt.NDArray[np.float32]) -> None:
        """Replace rows; those of other shards are passed over.

        A version that is not above the last one came before and is ignored.

        Args:
            version: of the change.
            rows: ``(n,)`` int64, numbers of rows in the table, none twice.
            values: ``(n, D)``.

        Raises:
            RequestError: if a row is not of the table or a value is refused; nothing changes.
        """
        if version <= self._row_version:
            return
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.plan.num_rows):
            raise RequestError("rows", f"must be from 0 to {self.plan.num_rows - 1}")
        if values.shape != (len(rows), self.plan.dim):
            raise RequestError("values", f"must be of {len(rows)} rows, got {values.shape}")
        places = self.plan.positions(rows) - self.span.start
        mine = np.flatnonzero((places >= 0) & (places < len(self.span)))
        places, fresh = places[mine], whole(quantize_rows(values[mine], self.plan.dim))
        for start in range(0, len(places), _SLICE_ROWS):
            part = slice(start, start + _SLICE_ROWS)
            with self._lock:
                self._replace(version, places[part], fresh[part])
        with self._lock:
            self._row_version = version

    def _replace(self, version: int, places: Ints, fresh: npt.NDArray[np.void]) -> None:
        """Replace rows, and note what they were; one that stays as it is needs no note."""
        width = self.plan.record_bytes
        differ = (split(self._records[places], width) != split(fresh, width)).any(axis=1)
        places, fresh = places[differ], fresh[differ]
        if not len(places):
            return
        if not len(self._undo_versions):
            self._undo_versions = np.zeros(self._num_kept, dtype=np.int64)
            self._undo_places = np.zeros(self._num_kept, dtype=np.int64)
            self._undo_records = whole(
                np.zeros((self._num_kept, self.plan.record_bytes), dtype=np.uint8)
            )
        ring = np.arange(self._num_undone, self._num_undone + len(places)) % self._num_kept
        self._lost_version = max(self._lost_version, int(self._undo_versions[ring].max(initial=0)))
        self._undo_versions[ring] = version
        self._undo_places[ring] = places
        self._undo_records[ring] = self._records[places]
        self._num_undone += len(places)
        self._records[places] = fresh

    def _undo(self, found: npt.NDArray[np.void], places: Ints, version: int) -> None:
        """Put into ``found`` what the rows at ``places`` were as of a version."""
        first = max(self._num_undone - self._num_kept, 0)
        first = (
            bisect_right(
                range(first, self._num_undone),
                version,
                key=lambda number: int(self._undo_versions[number % self._num_kept]),
            )
            + first
        )
        if first == self._num_undone:
            return
        ring = np.arange(first, self._num_undone) % self._num_kept
        # Of a row that changed several times the earliest entry counts.
        changed, entry = np.unique(self._undo_places[ring], return_index=True)
        near = np.minimum(changed.searchsorted(places), len(changed) - 1)
        hit = np.flatnonzero(changed[near] == places)
        found[hit] = self._undo_records[ring[entry[near[hit]]]]

    def _places(self, positions: Ints) -> Ints:
        """Return where positions lie in this shard."""
        if positions.ndim != 1 or positions.dtype != np.int64:
            raise RequestError(
                "positions", f"must be (n,) int64, got {positions.shape} {positions.dtype}"
            )
        places = positions - self.span.start
        # As unsigned numbers, places below 0 lie beyond all others.
        if len(places) and places.view(np.uint64).max() >= len(self.span):
            raise RequestError(
                "positions",
                f"must be from {self.span.start} to {self.span.stop - 1} in shard {self.shard} "
                f"of table {self.plan.name}, got {positions.min()} to {positions.max()}",
            )
        return places


def _check_shape(field: str, records: Records, shape: tuple[int, int]) -> None:
    if records.dtype != np.uint8 or records.shape != shape:
        raise RequestError(
            field, f"must be {shape} uint8, got {tuple(records.shape)} {records.dtype}"
        )


def _checked(records: Records, width: int) -> Records:
    _check_shape("records", records, (len(records), width))
    return records


def _numbered(
    blocks: Iterable[npt.NDArray[Any]], num_rows: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield every block with the number of its first row; together they are ``num_rows`` rows."""
    start = 0
    for block in blocks:
        if start + len(block) > num_rows:
            raise RequestError("blocks", f"must hold {num_rows} rows, got more")
        yield start, block
        start += len(block)
    if start != num_rows:
        raise RequestError("blocks", f"must hold {num_rows} rows, got {start}")


def _random_records(start: int, plan: TablePlan, seed: int) -> Records:
    """Return the records of up to ``_BLOCK_ROWS`` rows from row ``start``, a multiple of it."""
    generator = np.random.default_rng((seed, start))
    num_rows = min(_BLOCK_ROWS, plan.num_rows - start)
    flat = generator.bytes(_BLOCK_ROWS * plan.record_bytes)
    records = np.frombuffer(flat, dtype=np.uint8).reshape(-1, plan.record_bytes)[:num_rows].copy()
    header = np.empty((num_rows, 2), dtype=np.float16)
    # The two random bytes in front choose a largest value between 0.5 and 1.
    largest = 0.5 + records[:, :2].copy().view(np.uint16)[:, 0] / 131072
    header[:, 0] = largest * 2 / 255
    header[:, 1] = -largest
    records[:, :4] = header.view(np.uint8)
    return records
