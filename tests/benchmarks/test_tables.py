import numpy as np
import pytest

from benchmarks.tables import Side, cell_of, distinct_ids, fbgemm_look, gate, measure
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import Floats, Ints, dequantize_rows

PLAN = TablePlan(name="bench", num_rows=3000, dim=8, num_shards=1, placement="contiguous")


@pytest.fixture
def local() -> TableShard:
    return TableShard.generated(PLAN, 0)


def test_the_gate_names_every_side_that_gives_other_bits(local: TableShard) -> None:
    def right(ids: Ints) -> Floats:
        return dequantize_rows(local.take(ids))

    def wrong(ids: Ints) -> Floats:
        values = right(ids)
        if len(values) >= 1000:
            values[-1, 0] = np.nextafter(values[-1, 0], np.float32(9))
        return values

    fbgemm = fbgemm_look(PLAN, local)
    assert fbgemm is not None
    sides = [Side("right", right, True), Side("wrong", wrong, True), Side("fbgemm", fbgemm, True)]
    assert gate(sides, right, PLAN.num_rows) == ["wrong, 1000 ids", "wrong, 10000 ids"]


def test_fresh_ids_come_once_and_end_the_measurement() -> None:
    lists = list(distinct_ids(100, 7, np.random.default_rng(0)))
    assert [len(one) for one in lists] == [7] * 14
    assert len(np.unique(np.concatenate(lists))) == 98
    seen: dict[str, list[int]] = {"fresh": [], "warm": []}

    def look(name: str) -> Side:
        def note(ids: Ints) -> Floats:
            seen[name].append(int(ids[0]))
            return np.zeros((1, 1), dtype=np.float32)

        return Side(name, note, name == "fresh")

    sides = [look("fresh"), look("warm")]
    measure(sides, iter(lists), lists[0], rounds=50)
    firsts = [int(one[0]) for one in lists]
    # Three lists each warm a side up; the eight that are left are measured.
    assert seen["fresh"] == firsts[:3] + firsts[6:]
    assert seen["warm"] == firsts[:1] * 11
    assert [len(side.seconds) for side in sides] == [8, 8]


def test_a_cell_tells_the_quiet_rounds_apart() -> None:
    side = Side("remote", lambda ids: np.zeros((1, 1), np.float32), True)
    side.seconds, side.quiet = [0.001, 0.002, 0.009], [True, True, False]
    cell = cell_of(side, 100)
    assert (cell.p50_ms, cell.quiet_p50_ms, cell.rounds, cell.quiet_rounds) == (2.0, 1.5, 3, 2)
    side.quiet = [False] * 3
    assert cell_of(side, 100).quiet_p50_ms is None
