import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from silvershard.model.request import RequestError
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows, quantize_rows

ROWS, DIM = 1000, 6


def make_plan(num_shards: int = 1, placement: Any = "hashed", **more: Any) -> TablePlan:
    fields = {"name": "users", "num_rows": ROWS, "dim": DIM, "placement": placement}
    return TablePlan(**{**fields, "num_shards": num_shards, **more})


def by_row(plan: TablePlan, shards: list[TableShard]) -> np.ndarray:
    """The records of the whole table in order of the rows."""
    records = np.concatenate([one.take(np.arange(one.span.start, one.span.stop)) for one in shards])
    return records[plan.positions(np.arange(plan.num_rows))]


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture
def table(values: np.ndarray) -> TableShard:
    """Shard 1 of 2, contiguous: rows 500 to 999."""
    return TableShard.from_blocks(make_plan(2, "contiguous"), 1, [values])


@pytest.mark.parametrize("placement", ["contiguous", "hashed"])
@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("source", ["blocks", "weight", "records", "half"])
def test_the_cut_and_the_source_do_not_change_a_row(
    tmp_path: Path, values: np.ndarray, source: str, num_shards: int, placement: Any
) -> None:
    plan, path = make_plan(num_shards, placement), tmp_path / "table.safetensors"
    expected = quantize_rows(values, DIM)
    if source == "blocks":
        blocks = [values[:1], values[1:700], values[700:]]
        shards = [TableShard.from_blocks(plan, one, blocks) for one in range(num_shards)]
    else:
        if source == "half":
            expected = quantize_rows(values.astype(np.float16), DIM)
        contents = {"weight": values, "records": expected, "half": values.astype(np.float16)}
        save_file({"records" if source == "records" else "weight": contents[source]}, path)
        shards = [TableShard.from_file(plan, one, path) for one in range(num_shards)]
    np.testing.assert_array_equal(by_row(plan, shards), expected)
    assert sum(one.num_bytes for one in shards) == ROWS * (DIM + 4)


def test_a_file_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    num_rows = (1 << 16) + 4000
    weight = np.random.default_rng(1).standard_normal((num_rows, 2)).astype(np.float32)
    save_file({"weight": weight}, tmp_path / "table.safetensors")
    for placement in ("contiguous", "hashed"):
        plan = make_plan(2, placement, num_rows=num_rows, dim=2)
        shards = [
            TableShard.from_file(plan, one, tmp_path / "table.safetensors") for one in range(2)
        ]
        np.testing.assert_array_equal(by_row(plan, shards), quantize_rows(weight, 2))


def test_a_generated_row_depends_on_its_number_and_the_seed_only() -> None:
    num_rows = (1 << 16) + 4000

    def generated(num_shards: int, placement: str, seed: int, rows: int) -> np.ndarray:
        plan = make_plan(num_shards, placement, num_rows=rows)
        return by_row(plan, [TableShard.generated(plan, one, seed) for one in range(num_shards)])

    whole = generated(1, "contiguous", 5, num_rows)
    np.testing.assert_array_equal(generated(3, "hashed", 5, num_rows), whole)
    np.testing.assert_array_equal(generated(2, "contiguous", 5, 70), whole[:70])
    assert (generated(1, "contiguous", 6, num_rows) != whole).any(axis=1).all()
    assert len(np.unique(whole, axis=0)) == num_rows


def test_rows_come_in_the_order_asked_for_as_often_as_asked_for(
    table: TableShard, values: np.ndarray
) -> None:
    positions = np.array([999, 500, 999, 731])
    np.testing.assert_array_equal(table.take(positions), quantize_rows(values[positions], DIM))
    assert table.take(positions[:0]).shape == (0, DIM + 4)


@pytest.mark.parametrize("bad", [[499], [600, 1000], [-1], [2**62], [-(2**63)]])
def test_positions_of_other_shards_are_refused(table: TableShard, bad: list[int]) -> None:
    with pytest.raises(RequestError, match="positions: must be from 500 to 999 in shard 1"):
        table.take(np.array(bad))


def test_positions_of_another_form_are_refused(table: TableShard) -> None:
    for bad in (np.array([500], dtype=np.int32), np.array([[500]])):
        with pytest.raises(RequestError, match=r"positions: must be \(n,\) int64"):
            table.take(bad)


@pytest.mark.parametrize("placement", ["contiguous", "hashed"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_changed_rows_have_their_new_values_and_the_others_keep_theirs(
    values: np.ndarray, num_shards: int, placement: Any
) -> None:
    plan = make_plan(num_shards, placement)
    shards = [TableShard.from_blocks(plan, one, [values]) for one in range(num_shards)]
    rows = np.random.default_rng(0).permutation(ROWS)[:300]
    values[rows] *= -2
    for shard in shards:
        shard.apply(4, rows, values[rows])
    np.testing.assert_array_equal(by_row(plan, shards), quantize_rows(values, DIM))
    assert [one.row_version for one in shards] == [4] * num_shards


def test_a_change_that_came_before_is_ignored(table: TableShard, values: np.ndarray) -> None:
    table.apply(7, np.array([600]), values[:1])
    for version in (7, 3):
        table.apply(version, np.array([600, 601]), values[1:3])
    positions = np.array([600, 601])
    np.testing.assert_array_equal(table.take(positions), quantize_rows(values[[0, 601]], DIM))
    assert table.row_version == 7


def test_rows_are_those_of_the_version_that_is_asked_for(values: np.ndarray) -> None:
    plan = make_plan(1, num_rows=40)
    table = TableShard.from_blocks(plan, 0, [values[:40]])
    generator, rows = np.random.default_rng(5), values[:40].copy()
    expected = {0: quantize_rows(rows, DIM)}
    for step in range(1, 30):
        changed = generator.permutation(40)[: generator.integers(0, 20)]
        rows[changed] = generator.standard_normal((len(changed), DIM))
        table.apply(3 * step, changed, rows[changed])
        expected[3 * step] = quantize_rows(rows, DIM)
    asked = generator.integers(0, 40, 60)
    for version, records in expected.items():
        for at in (version, version + 2):
            if at <= table.row_version:
                found = table.take(plan.positions(asked), at)
                np.testing.assert_array_equal(found, records[asked])
    assert table.oldest_version == 0
    np.testing.assert_array_equal(by_row(plan, [table]), expected[table.row_version])


def test_a_version_to_come_and_one_too_long_ago_are_refused_with_what_can_be_had(
    values: np.ndarray,
) -> None:
    plan = make_plan(1)
    table = TableShard(plan, 0, quantize_rows(values, DIM), undo_bytes=0)
    with pytest.raises(StateError, match="as of versions 0 to 0, 1 was asked for"):
        table.take(np.array([3]), 1)
    rows = np.arange(400)
    for version in (2, 5, 6, 9):
        table.apply(version, rows, values[rows] + version)
    # 1,024 replaced rows are kept: all of the last two changes, and a part of the one before.
    assert (table.oldest_version, table.row_version) == (5, 9)
    with pytest.raises(StateError, match="as of versions 5 to 9, 4 was asked for"):
        table.take(np.array([3]), 4)
    np.testing.assert_array_equal(
        table.take(plan.positions(rows), 5), quantize_rows(values[rows] + 5, DIM)
    )


def test_a_change_to_the_same_bytes_takes_no_room(table: TableShard, values: np.ndarray) -> None:
    rows = np.arange(500, 1000)
    for version in range(1, 2000):
        table.apply(version, rows, values[rows])
    np.testing.assert_array_equal(table.take(rows, 0), quantize_rows(values[rows], DIM))


def test_a_bad_change_names_its_field_and_changes_nothing(
    table: TableShard, values: np.ndarray
) -> None:
    before = table.take(np.arange(500, 1000))
    bad = np.array([[1, 2, 3, 4, 5, np.nan]], dtype=np.float32)
    with pytest.raises(RequestError, match="values: must be finite"):
        table.apply(1, np.array([600]), bad)
    with pytest.raises(RequestError, match="rows: must be from 0 to 999"):
        table.apply(1, np.array([1000]), values[:1])
    with pytest.raises(RequestError, match=r"values: must be of 2 rows, got \(1, 6\)"):
        table.apply(1, np.array([600, 601]), values[:1])
    np.testing.assert_array_equal(table.take(np.arange(500, 1000)), before)
    assert table.row_version == 0


def flip_and_read(
    table: TableShard, *, num_reads: int, until_torn_s: float = 0.0
) -> tuple[int, int]:
    """Return reads that mix versions, and how often the version changed from one to the next.

    A thread replaces every row again and again; all values of version v are v, which 8 bits hold
    exactly, so a mixture within a row or among rows shows.
    """
    rows, shape = np.arange(table.plan.num_rows), (table.plan.num_rows, table.plan.dim)
    ended, began = threading.Event(), threading.Event()

    def flip() -> None:
        version = 0
        while not ended.is_set():
            version += 1
            table.apply(version, rows, np.full(shape, version % 2000, dtype=np.float32))
            began.set()

    writer = threading.Thread(target=flip)
    writer.start()
    try:
        assert began.wait(60)
        torn = changes = reads = 0
        last, end_s = -1.0, time.monotonic() + until_torn_s
        while reads < num_reads or (not torn and time.monotonic() < end_s):
            found = dequantize_rows(table.take(table.plan.positions(rows)))
            torn += int((found != found[0, 0]).any())
            changes += int(found[0, 0] != last)
            last = float(found[0, 0])
            reads += 1
    finally:
        ended.set()
        writer.join(60)
    return torn, changes


@pytest.fixture
def tall() -> TableShard:
    """Rows that are replaced in several slices."""
    plan = make_plan(1, num_rows=5000, dim=16)
    return TableShard(plan, 0, np.zeros((5000, plan.record_bytes), dtype=np.uint8))


def test_a_reader_never_sees_parts_of_two_changes(tall: TableShard) -> None:
    torn, changes = flip_and_read(tall, num_reads=150)
    assert torn == 0
    assert changes > 1


def test_without_what_rows_were_before_a_reader_sees_parts_of_two_changes(
    tall: TableShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tall, "_undo", lambda *_: None)
    torn, _ = flip_and_read(tall, num_reads=1, until_torn_s=60)
    assert torn > 0


def test_blocks_that_are_not_the_table_are_refused(values: np.ndarray) -> None:
    plan = make_plan(2)
    with pytest.raises(RequestError, match="blocks: must hold 1000 rows, got 999"):
        TableShard.from_blocks(plan, 0, [values[:999]])
    with pytest.raises(RequestError, match="blocks: must hold 1000 rows, got more"):
        TableShard.from_blocks(plan, 0, [values, values[:1]])
    with pytest.raises(RequestError, match=r"values: must be of shape \(n, 6\)"):
        TableShard.from_blocks(plan, 0, [values[:, :5]])
    with pytest.raises(RequestError, match="shard: must be from 0 to 1, got 2"):
        TableShard.from_blocks(plan, 2, [values])
    values[3, 3] = np.inf
    with pytest.raises(RequestError, match="values: must be finite"):
        TableShard.from_blocks(make_plan(1), 0, [values])


def test_files_that_are_not_the_table_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "table.safetensors"
    plan = make_plan(2)
    with pytest.raises(SnapshotError, match=r"table\.safetensors"):
        TableShard.from_file(plan, 0, path)
    path.write_bytes(b"this is no such file")
    with pytest.raises(SnapshotError, match=r"table\.safetensors"):
        TableShard.from_file(plan, 0, path)
    save_file({"rows": values}, path)
    with pytest.raises(SnapshotError, match="weight"):
        TableShard.from_file(plan, 0, path)
    save_file({"weight": values[:10]}, path)
    with pytest.raises(
        SnapshotError, match=r"'weight' must be of shape \(1000, 6\), got \(10, 6\)"
    ):
        TableShard.from_file(plan, 0, path)
    save_file({"weight": values.astype(np.int32)}, path)
    with pytest.raises(SnapshotError, match="values: must be float32 or float16, got int32"):
        TableShard.from_file(plan, 0, path)
    values[0, 0] = np.nan
    save_file({"weight": values}, path)
    with pytest.raises(SnapshotError, match="values: must be finite"):
        TableShard.from_file(make_plan(1), 0, path)


def test_records_that_are_not_of_the_shard_are_refused() -> None:
    plan = make_plan(2)
    for bad in (np.zeros((499, DIM + 4), np.uint8), np.zeros((500, DIM), np.uint8)):
        with pytest.raises(RequestError, match=r"records: must be \(500, 10\) uint8"):
            TableShard(plan, 0, bad)
    with pytest.raises(RequestError, match="records: scale and bias"):
        TableShard(plan, 0, np.full((500, DIM + 4), 255, np.uint8))


def test_a_store_of_rows_needs_no_torch() -> None:
    code = "import sys, silvershard.shard.table\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr
