from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.shard.errors import StateError
from silvershard.shard.table_plan import TablePlan

PLAN = TablePlan(name="users", num_rows=9, dim=3, num_shards=2)


def entry(shard: int, **more: Any) -> dict[str, Any]:
    fields = {"shard": shard, "address": "127.0.0.1:1", "epoch": 5, "pid": 1}
    return {**fields, "rows": 4 + shard, **more}


def make_map(*entries: dict[str, Any], **more: Any) -> TableShardMap:
    return TableShardMap.model_validate({"version": 1, "plan": PLAN, "entries": entries, **more})


def test_a_map_is_read_back_as_written_and_may_lack_shards(tmp_path: Path) -> None:
    written = make_map(entry(1), default_row=[1, 2, 3.5])
    written.write_atomic(tmp_path / "map.json")
    assert TableShardMap.read(tmp_path / "map.json") == written
    assert written.entries == (TableEntry(shard=1, address="127.0.0.1:1", epoch=5, rows=5, pid=1),)


def test_the_default_row_is_zeros_unless_it_is_given() -> None:
    np.testing.assert_array_equal(make_map().default_values, np.zeros(3, dtype=np.float32))
    given = make_map(default_row=[1, 2, 3.5]).default_values
    assert given.dtype == np.float32
    assert given.tolist() == [1, 2, 3.5]


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([entry(2)], {}, "shard must be below 2, got 2"),
        ([entry(0), entry(0)], {}, "shard 0 is listed twice"),
        ([entry(0, rows=5)], {}, "rows must be 4 in shard 0 by the plan, got 5"),
        ([], {"default_row": [1, 2]}, "default_row must have 3 values, got 2"),
        ([], {"default_row": [1, 2, float("nan")]}, "default_row"),
        ([entry(0, epoch=0)], {}, "epoch"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(
    entries: list[dict[str, Any]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_map(*entries, **more)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"^table map .*map\.json: No such file"):
        TableShardMap.read(tmp_path / "map.json")
