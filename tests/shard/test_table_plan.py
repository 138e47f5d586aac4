from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from silvershard.model.request import RequestError
from silvershard.shard.table_plan import MAX_ROWS, TablePlan


def make_plan(num_rows: int, num_shards: int, placement: Any = "hashed") -> TablePlan:
    return TablePlan(
        name="users", num_rows=num_rows, dim=4, num_shards=num_shards, placement=placement
    )


@pytest.mark.parametrize("placement", ["contiguous", "hashed"])
@pytest.mark.parametrize(
    ("num_rows", "num_shards"), [(1, 1), (2, 1), (7, 7), (1000, 3), (4096, 2), (65_537, 5)]
)
def test_every_row_has_one_place_in_one_shard(
    num_rows: int, num_shards: int, placement: Any
) -> None:
    plan = make_plan(num_rows, num_shards, placement)
    rows = np.arange(num_rows)
    positions = plan.positions(rows)
    np.testing.assert_array_equal(np.sort(positions), rows)
    np.testing.assert_array_equal(plan.rows(positions), rows)
    owners = plan.owners(positions)
    spans = [plan.span(shard) for shard in range(num_shards)]
    assert [one for span in spans for one in span] == rows.tolist()
    assert all(int(at) in spans[owner] for at, owner in zip(positions, owners, strict=True))
    sizes = np.bincount(owners, minlength=num_shards)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.tolist() == [len(span) for span in spans]


def test_a_place_does_not_depend_on_the_other_rows_or_their_order() -> None:
    plan = make_plan(100_003, 4)
    rows = np.random.default_rng(0).integers(0, plan.num_rows, 500)
    places = plan.positions(rows)
    np.testing.assert_array_equal(plan.positions(rows[::-1]), places[::-1])
    assert all(plan.positions(rows[at : at + 1])[0] == places[at] for at in range(500))
    same = TablePlan.model_validate_json(plan.model_dump_json())
    assert same == plan
    np.testing.assert_array_equal(same.positions(rows), places)


def test_hashed_neighbours_are_spread_over_the_shards_and_contiguous_ones_lie_together() -> None:
    popular = np.arange(1000)
    hashed, contiguous = make_plan(10_000_000, 8), make_plan(10_000_000, 8, "contiguous")
    counts = np.bincount(hashed.owners(hashed.positions(popular)), minlength=8)
    assert counts.min() >= 115
    assert counts.max() <= 135
    assert set(contiguous.owners(contiguous.positions(popular)).tolist()) == {0}


def test_positions_of_the_largest_table_do_not_overflow() -> None:
    plan = make_plan(MAX_ROWS, 4)
    rows = np.array([0, 1, MAX_ROWS // 2, MAX_ROWS - 1])
    positions = plan.positions(rows)
    assert positions.min() >= 0
    assert positions.max() < MAX_ROWS
    np.testing.assert_array_equal(plan.rows(positions), rows)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_rows": 0}, "num_rows"),
        ({"num_rows": MAX_ROWS + 1}, "num_rows"),
        ({"num_shards": 11}, "num_shards must be at most num_rows=10"),
        ({"dim": 0}, "dim"),
        ({"name": "../users"}, "name"),
        ({"placement": "random"}, "placement"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], field: str) -> None:
    good = {"name": "users", "num_rows": 10, "dim": 4, "num_shards": 2}
    TablePlan.model_validate(good)
    with pytest.raises(ValidationError, match=field):
        TablePlan.model_validate({**good, **change})


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_is_not_planned_has_no_span(shard: int) -> None:
    with pytest.raises(RequestError, match=f"shard: must be from 0 to 2, got {shard}"):
        make_plan(10, 3).span(shard)
