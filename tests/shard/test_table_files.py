import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from silvershard.model.quantized_rows import restore_rows
from silvershard.shard.errors import SnapshotError
from silvershard.shard.snapshot import open_snapshot
from silvershard.shard.table import TableShard
from silvershard.shard.table_files import row_files, row_path
from silvershard.shard.table_rows import dequantize_rows


@pytest.fixture(scope="module")
def remote_generation(publish_model: Any) -> Any:
    return publish_model("int8", remote=("recent", "history"))


def test_a_generation_names_its_remote_tables_and_their_sizes(remote_generation: Any) -> None:
    files = row_files(remote_generation.path)
    assert [(one.name, one.num_rows, one.dim) for one in files] == [
        ("history", 151, 16),
        ("recent", 151, 16),
    ]
    assert files[0].path == remote_generation.path / "rows" / "history.safetensors"


def test_the_default_row_is_row_0(remote_generation: Any) -> None:
    (file, _) = row_files(remote_generation.path)
    records = open_snapshot(remote_generation.path).load_rows("history")
    np.testing.assert_array_equal(
        np.array(file.default_row, dtype=np.float32), restore_rows(records, "int8")[0].numpy()
    )


def test_a_table_process_loads_the_rows_that_the_model_has(remote_generation: Any) -> None:
    (file, _) = row_files(remote_generation.path)
    plan = file.plan(3)
    records = open_snapshot(remote_generation.path).load_rows("history").numpy()
    for shard in range(3):
        table = TableShard.from_file(plan, shard, file.path)
        positions = np.arange(table.span.start, table.span.stop)
        found = dequantize_rows(table.take(positions))
        np.testing.assert_array_equal(found, dequantize_rows(records[plan.rows(positions)]))


def test_a_table_is_cut_into_no_more_parts_than_rows(remote_generation: Any) -> None:
    file = row_files(remote_generation.path)[0]
    assert file.plan(64).num_shards == 64
    assert file._replace(num_rows=3).plan(64).num_shards == 3


def test_a_generation_without_remote_tables_has_none(generation: Any) -> None:
    assert row_files(generation.path) == []


@pytest.mark.parametrize("damage", ["manifest", "no files", "missing", "bytes", "tensor"])
def test_what_cannot_be_read_is_named(remote_generation: Any, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "gen-000001"
    shutil.copytree(remote_generation.path, path)
    table, manifest = path / row_path("history"), path / "manifest.json"
    named = table
    if damage == "manifest":
        manifest.write_text("{")
        named = path
    elif damage == "no files":
        manifest.write_text(json.dumps({"files": 3}))
        named = path
    elif damage == "missing":
        table.unlink()
    elif damage == "bytes":
        table.write_bytes(table.read_bytes()[:20])
    else:
        save_file({"weight": np.zeros((3, 8), dtype=np.float32)}, table)
    with pytest.raises(SnapshotError, match=f"{named}.*cannot be read"):
        row_files(path)
