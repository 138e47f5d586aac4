from typing import Any

import numpy as np
import pytest

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.mutation_codec import logged, logged_from
from silvershard.cluster.table_changes import MAX_CHANGE_BYTES, change_from, log_partition
from silvershard.model.schema import Schema
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import MAX_MUTATION_BYTES, MAX_TABLE_VALUE, RowChange, conform
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import MAX_VALUE

PLANS = {"users": TablePlan(name="users", num_rows=60_000, dim=3, num_shards=2)}
TABLES = {"users": (60_000, 3)}


def tensor(values: Any, dtype: str = "F32") -> retrieval_pb2.Tensor:
    array = np.asarray(values, dtype=np.float32)
    if dtype == "F16":
        data = array.astype("<f2").tobytes()
    elif dtype == "BF16":
        data = (array.view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = array.tobytes()
    number = getattr(retrieval_pb2.Tensor, f"D_TYPE_{dtype}")
    return retrieval_pb2.Tensor(dtype=number, shape=array.shape, data=data)


def payload(
    rows: Any, values: retrieval_pb2.Tensor, table: str = "users", version: int = 7
) -> bytes:
    update = retrieval_pb2.RowUpdate(table=table, rows=rows, values=values)
    return logged(retrieval_pb2.Mutation(rows=update), version)


def by_shards(given: bytes) -> RowChange | str:
    """What a shard makes of the payload of a record."""
    try:
        found = conform(logged_from(given), Schema(), TABLES)
    except MutationError as error:
        return error.field
    assert isinstance(found, RowChange)
    return found


GOOD = np.array([[1.5, -2.0, 0.25], [3.0, 4.0, -65504.0]], dtype=np.float32)
MANY = MAX_MUTATION_BYTES // (8 + 4 * 3)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_change_is_what_a_shard_takes(dtype: str) -> None:
    values = GOOD if dtype != "BF16" else GOOD // 8 * 8
    given = payload([4, 2], tensor(values, dtype))
    found, wanted = change_from(given, PLANS), by_shards(given)
    assert found is not None
    assert isinstance(wanted, RowChange)
    assert (found.table, found.version, tuple(found.rows)) == ("users", 7, wanted.rows)
    np.testing.assert_array_equal(found.values, wanted.values)
    assert found.values.dtype == np.float32


@pytest.mark.parametrize(
    "given",
    [
        b"\xff",
        payload([], tensor(np.zeros((0, 3)))),
        payload([1, 60_000], tensor(GOOD)),
        payload([-1, 2], tensor(GOOD)),
        payload([2, 2], tensor(GOOD)),
        payload([1], tensor(GOOD)),
        payload([1, 2], tensor(GOOD[:, :2])),
        payload([1, 2], tensor(GOOD[0])),
        payload([1, 2], tensor(GOOD * [1, 1, np.nan])),
        payload([1, 2], tensor(GOOD * [1, 1, np.inf])),
        payload([1, 2], tensor(GOOD * 2)),
        payload([1, 2], tensor(GOOD), version=0),
        payload([1, 2], tensor(GOOD), version=(1 << 64) - 1),
        payload([1, 2], retrieval_pb2.Tensor(dtype=3, shape=[2, 3], data=bytes(6))),
        payload([1, 2], retrieval_pb2.Tensor(shape=[2, 3], data=bytes(23))),
        payload(range(MANY + 1), tensor(np.zeros((MANY + 1, 3)))),
    ],
)
def test_what_a_shard_refuses_is_refused(given: bytes) -> None:
    assert isinstance(by_shards(given), str)
    with pytest.raises(MutationError):
        change_from(given, PLANS)


def test_the_largest_change_that_a_shard_takes_is_taken() -> None:
    given = payload(range(MANY), tensor(np.zeros((MANY, 3))))
    assert isinstance(by_shards(given), RowChange)
    found = change_from(given, PLANS)
    assert found is not None
    assert len(found.rows) == MANY


def test_the_limits_are_those_of_shards() -> None:
    assert (MAX_CHANGE_BYTES, MAX_VALUE) == (MAX_MUTATION_BYTES, MAX_TABLE_VALUE)


def test_other_tables_and_items_are_passed_over() -> None:
    assert change_from(payload([1, 2], tensor(GOOD), table="tags"), PLANS) is None
    delete = retrieval_pb2.Mutation(delete=retrieval_pb2.ItemDelete(item_id=3))
    assert change_from(logged(delete, 2), PLANS) is None
    assert change_from(update_pb2.LoggedMutation().SerializeToString(), PLANS) is None


def test_the_changes_of_a_table_are_in_one_partition() -> None:
    # By the CRC32 of its name, as the sequencer does, whatever process asks.
    assert [log_partition(name, 8) for name in ("users", "history", "recent")] == [1, 3, 6]
    assert log_partition("users", 1) == 0
