import sys

import numpy as np

from silvershard.model.catalogue import NULL_INT
from silvershard.shard.fields import FieldStore, SlotFields


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


def test_columns_by_slot_are_copied_written_and_forgotten() -> None:
    ids, slots = np.array([5, 3], dtype=np.int64), np.array([2, 0], dtype=np.int64)
    titles = np.array(["five", "three"], dtype=object)
    store = FieldStore(ids, {"year": np.array([2001, 1999], dtype=np.int64), "title": titles})
    fields = SlotFields(store, ids, slots, 4)
    assert fields.names == store.names == ("year", "title")
    assert fields.lookup(slots, ["title", "year"]) == {
        "title": ["five", "three"],
        "year": [2001, 1999],
    }
    fields.copy(slots[:1], np.array([3], dtype=np.int64))
    fields.write("title", np.array([3], dtype=np.int64), np.array(["changed"], dtype=object))
    fields.write("year", slots[:1], np.array([NULL_INT], dtype=np.int64))
    found = fields.lookup(np.array([2, 3], dtype=np.int64), ["title", "year"])
    assert found == {"title": ["five", "changed"], "year": [None, 2001]}
    before = sys.getrefcount(titles[0])
    fields.forget(slots[:1])
    # The assertion keeps what it is made of, hence not in it.
    after = sys.getrefcount(titles[0])
    assert after == before - 1
