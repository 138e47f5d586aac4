"""The files of remote tables in a generation: where they are, and what they say of themselves.

Read without torch, so that what starts and serves tables stays small.
"""

import json
from pathlib import Path
from typing import NamedTuple

import safetensors

from silvershard.shard.errors import SnapshotError
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows, record_bytes

RECORDS = "records"
"""Name of the tensor in a file of rows."""

_FOLDER = "rows"


class RowFile(NamedTuple):
    """The rows of one remote table of a generation."""

    name: str
    path: Path
    num_rows: int
    dim: int
    default_row: tuple[float, ...]
    """Values of row 0, which stands for what is absent, unknown or out of reach."""

    def plan(self, num_shards: int) -> TablePlan:
        """Return the cut of the table into at most so many shards; each holds a row at least."""
        return TablePlan(
            name=self.name,
            num_rows=self.num_rows,
            dim=self.dim,
            num_shards=min(num_shards, self.num_rows),
        )


def row_path(table: str) -> str:
    """Return the path of the rows of a table inside a generation."""
    return f"{_FOLDER}/{table}.safetensors"


def row_files(generation: Path) -> list[RowFile]:
    """Return the remote tables of a published generation by name, none where it has none.

    Only sizes are read, and row 0 of each: whoever serves verifies the checksums.

    Raises:
        SnapshotError: if the manifest or a file cannot be read.
    """
    try:
        names = json.loads((generation / "manifest.json").read_bytes())["files"]
        tables = sorted(
            Path(name).name.removesuffix(".safetensors")
            for name in names
            if name.startswith(f"{_FOLDER}/")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(str(generation), f"manifest.json cannot be read: {error}") from None
    return [_row_file(generation, table) for table in tables]


def _row_file(generation: Path, table: str) -> RowFile:
    path = generation / row_path(table)
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            records = file.get_slice(RECORDS)
            num_rows, width = records.get_shape()
            default = dequantize_rows(records[0:1])[0]
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise SnapshotError(str(path), f"cannot be read: {error}") from None
    dim = width - record_bytes(0)
    return RowFile(table, path, num_rows, dim, tuple(default.tolist()))
