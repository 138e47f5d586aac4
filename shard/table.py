"""One shard of an embedding table in memory: rows are taken and replaced, and changes are counted.

Shapes: n rows, D embedding dimension, W bytes of a record.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import safetensors

from silvershard.model.request import RequestError
from silvershard.shard.errors import SnapshotError
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

CHANGES_KEPT = 1 << 14
"""Replaced rows that a shard can name; whoever lags behind further must forget all it knows."""

_BLOCK_ROWS = 1 << 16
# A reader waits for one slice of an update at most: 1,024 rows of 68 bytes take 0.1 ms.
_SLICE_ROWS = 1024

_NONE = np.empty(0, dtype=np.int64)


class TableRead(NamedTuple):
    """Rows with what the reader must know to keep them."""

    records: Records
    """``(n, W)``, each row wholly of one update."""
    version: int
    """Rows replaced so far: the records hold all of these changes, and may hold later ones."""
    changed: Ints | None
    """Positions replaced after the version that the reader knew; None: too many to name."""


class TableShard:
    """The rows at the positions of ``span``, and a count of replaced rows, which is the version.

    Any thread may call. A row is read wholly before or wholly after an update of it: a record is
    contiguous, and a lock is held while records are copied in or out, since numpy lets other
    threads run meanwhile. An update of many rows is applied in slices, between which others read.
    """

    def __init__(self, plan: TablePlan, shard: int, records: Records) -> None:
        """Take over the records ``(n, W)`` of a shard, in order of position; they are not copied.

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
        self._version = 0
        self._changes = np.zeros(CHANGES_KEPT, dtype=np.int64)

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
    def version(self) -> int:
        """Return how many rows were replaced so far."""
        return self._version

    def take(self, positions: Ints) -> Records:
        """Return the records ``(n, W)`` at positions ``(n,)``, which may repeat.

        Raises:
            RequestError: if a position is not of this shard.
        """
        return self.read(positions, self._version).records

    def read(self, positions: Ints, seen_version: int) -> TableRead:
        """Return rows and the changes since a version, as of one moment.

        Args:
            positions: ``(n,)`` int64, may repeat, may be none.
            seen_version: the version up to which the reader knows what changed.

        Raises:
            RequestError: if a position is not of this shard.
        """
        places = self._places(positions)
        with self._lock:
            found = self._records.take(places)
            version, changed = self._version, self._changed_since(seen_version)
        return TableRead(split(found, self.plan.record_bytes), version, changed)

    def update(self, rows: Ints, values: npt.NDArray[np.float32]) -> None:
        """Replace rows of this shard in place by float values.

        Args:
            rows: ``(n,)`` int64, numbers of rows in the table; of a repeated row the last counts.
            values: ``(n, D)``.

        Raises:
            RequestError: if a row is not of this shard or a value is refused; nothing changes.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.plan.num_rows):
            raise RequestError("rows", f"must be from 0 to {self.plan.num_rows - 1}")
        self.put(self.plan.positions(rows), quantize_rows(values, self.plan.dim))

    def put(self, positions: Ints, records: Records) -> None:
        """Replace the rows at positions ``(n,)`` by records ``(n, W)``.

        Raises:
            RequestError: if a position is not of this shard or a record is refused; nothing
                changes.
        """
        places = self._places(positions)
        _check_shape("records", records, (len(positions), self.plan.record_bytes))
        check_records(records)
        fresh = whole(records)
        for start in range(0, len(places), _SLICE_ROWS):
            part = slice(start, start + _SLICE_ROWS)
            with self._lock:
                self._records[places[part]] = fresh[part]
                self._note(positions[part])

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

    def _note(self, positions: Ints) -> None:
        ring = np.arange(self._version, self._version + len(positions)) % CHANGES_KEPT
        self._changes[ring] = positions
        self._version += len(positions)

    def _changed_since(self, version: int) -> Ints | None:
        if version == self._version:
            return _NONE
        if not 0 < self._version - version <= CHANGES_KEPT:
            return None
        return self._changes[np.arange(version, self._version) % CHANGES_KEPT]


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
