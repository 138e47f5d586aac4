import numpy as np

from silvershard.shard.fields import FieldStore


def test_missing_field_values_are_none() -> None:
    store = FieldStore(
        np.array([5, 3], dtype=np.int64),
        {
            "year": np.array([np.iinfo(np.int64).min, 1999], dtype=np.int64),
            "price": np.array([1.5, np.nan]),
            "title": np.array(["a", "b"], dtype=object),
        },
    )
    assert store.lookup([3, 5], ["year", "price", "title"]) == {
        "year": [1999, None],
        "price": [None, 1.5],
        "title": ["b", "a"],
    }
