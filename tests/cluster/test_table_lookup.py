import numpy as np

from silvershard.cluster.table_lookup import EMBEDDING_FALLBACK, PendingLookup, RecordLookup
from silvershard.shard.table_rows import dequantize_rows, quantize_rows

DEFAULT = np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32)


def make(defaulted: list[bool]) -> tuple[PendingLookup, RecordLookup, list[int]]:
    values = np.random.default_rng(0).standard_normal((len(defaulted), 4)).astype(np.float32)
    found = RecordLookup(quantize_rows(values, 4), np.array(defaulted, dtype=bool))
    waits: list[int] = []

    def finish() -> RecordLookup:
        waits.append(1)
        return found

    return PendingLookup(finish, DEFAULT), found, waits


def test_values_are_restored_records() -> None:
    pending, found, waits = make([False] * 5)
    assert waits == []
    lookup = pending.result()
    np.testing.assert_array_equal(lookup.values, dequantize_rows(found.records))
    assert lookup.reasons == ()
    assert waits == [1]
    assert pending.records() is found


def test_lost_rows_are_the_exact_default_row_with_the_reason() -> None:
    pending, found, _ = make([False, True, False, True])
    lookup = pending.result()
    np.testing.assert_array_equal(lookup.values[[1, 3]], np.stack([DEFAULT, DEFAULT]))
    expected = dequantize_rows(found.records)[[0, 2]]
    np.testing.assert_array_equal(lookup.values[[0, 2]], expected)
    assert lookup.reasons == (EMBEDDING_FALLBACK,)
    assert lookup.defaulted.tolist() == [False, True, False, True]


def test_a_lookup_of_nothing_has_no_reason() -> None:
    pending, _, _ = make([])
    assert pending.result().values.shape == (0, 4)
    assert pending.result().reasons == ()
