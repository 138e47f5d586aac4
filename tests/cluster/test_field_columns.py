from typing import Any

import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.field_columns import column_from, column_to


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, None, -(2**62), 0], "int"),
        ([0.1, None, -1e300], "float"),
        (["a", "", None, "é"], "string"),
        ([None] * 9, "int"),
        ([None, None], "string"),
        ([], "float"),
        ([1] * 17, "int"),
    ],
)
def test_a_column_crosses_with_its_missing_values(values: list[Any], dtype: Any) -> None:
    data = column_to(values, dtype).SerializeToString()
    column = retrieval_pb2.Column.FromString(data)
    assert column_from(column) == values
    assert (
        column.WhichOneof("kind") == {"int": "ints", "float": "doubles", "string": "strings"}[dtype]
    )
    assert bool(column.null_bitmap) == (None in values)


def test_a_bitmap_of_another_length_is_refused() -> None:
    column = column_to([1, 2, 3], "int")
    column.null_bitmap = b"\1\0"
    with pytest.raises(ValueError, match="must have 1 bytes, got 2"):
        column_from(column)
