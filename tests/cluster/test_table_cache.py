import numpy as np
import pytest

from silvershard.cluster.table_cache import WAYS, RowCache

WIDTH = 12


def records_of(positions: np.ndarray, version: int = 0) -> np.ndarray:
    records = np.full((len(positions), WIDTH), version, dtype=np.uint8)
    records[:, :8] = np.ascontiguousarray(positions)[:, None].view(np.uint8)
    return records


def make_cache(num_places: int) -> RowCache:
    return RowCache(num_places * (WIDTH + 12), WIDTH)


def held(cache: RowCache, positions: np.ndarray) -> np.ndarray:
    return cache.find(positions) >= 0


@pytest.mark.parametrize("num_places", [8, 64, 4096])
def test_what_is_held_is_found_with_its_own_record(num_places: int) -> None:
    cache, generator = make_cache(num_places), np.random.default_rng(0)
    for _ in range(30):
        positions = np.unique(generator.integers(0, 3000, 200))
        cache.insert(positions, records_of(positions))
        asked = generator.integers(0, 3000, 300)
        places = cache.find(asked)
        found = asked[places >= 0]
        np.testing.assert_array_equal(cache.take(places[places >= 0]), records_of(found))
    assert 0.8 * num_places <= len(cache) <= num_places or len(cache) > 1800


def test_a_position_is_held_once_however_often_it_is_inserted() -> None:
    cache, generator = make_cache(256), np.random.default_rng(1)
    for _ in range(50):
        positions = np.unique(generator.integers(0, 300, 100))
        cache.insert(positions, records_of(positions))
    everything = np.arange(300)
    count = len(cache)
    assert held(cache, everything).sum() == count
    cache.drop(everything)
    assert len(cache) == 0
    assert not held(cache, everything).any()


def test_what_is_held_already_stays_as_it_is() -> None:
    cache, positions = make_cache(64), np.arange(5)
    cache.insert(positions, records_of(positions, 1))
    cache.insert(np.arange(8), records_of(np.arange(8), 2))
    assert cache.take(cache.find(np.arange(8)))[:, -1].tolist() == [1] * 5 + [2] * 3


def test_the_row_of_a_set_that_was_asked_for_least_recently_leaves_first() -> None:
    cache = make_cache(WAYS)
    for position in range(WAYS):
        cache.insert(np.array([position]), records_of(np.array([position])))
    # All are in one set; 0 and 3 are asked for again.
    cache.take(cache.find(np.array([3, 0])))
    for position in (100, 101):
        cache.insert(np.array([position]), records_of(np.array([position])))
    assert held(cache, np.arange(WAYS)).tolist() == [True, False, False, *[True] * (WAYS - 3)]
    for position in range(200, 204):
        cache.insert(np.array([position]), records_of(np.array([position])))
    assert np.flatnonzero(held(cache, np.arange(102))).tolist() == [0, 3, 100, 101]


def test_of_new_rows_of_one_place_the_last_is_held_with_its_own_record() -> None:
    cache, positions = make_cache(WAYS), np.arange(50)
    cache.insert(positions, records_of(positions))
    assert np.flatnonzero(held(cache, positions)).tolist() == [49]
    np.testing.assert_array_equal(
        cache.take(cache.find(positions[49:])), records_of(positions[49:])
    )


def test_hot_rows_survive_a_stream_of_rows_that_come_once() -> None:
    cache, hot = make_cache(1024), np.arange(100)
    cache.insert(hot, records_of(hot))
    for start in range(1000, 100_000, 100):
        cache.take(cache.find(hot)[held(cache, hot)])
        once = np.arange(start, start + 100)
        cache.insert(once, records_of(once))
    assert held(cache, hot).sum() >= 95


def test_dropped_rows_are_gone_and_the_others_stay() -> None:
    cache, positions = make_cache(4096), np.arange(400)
    for _ in range(4):
        cache.insert(positions, records_of(positions))
    assert held(cache, positions).all()
    cache.drop(np.array([7, 7, 9, 100_000]))
    assert np.flatnonzero(~held(cache, positions)).tolist() == [7, 9]


def test_dropped_places_are_taken_before_any_row_leaves() -> None:
    cache = make_cache(WAYS)
    for position in [*range(WAYS), 50]:
        if position == 50:
            cache.drop(np.array([5]))
        cache.insert(np.array([position]), records_of(np.array([position])))
    assert held(cache, np.array([0, 1, 2, 3, 4, 6, 7, 50])).all()


def test_the_memory_is_bounded_and_a_cache_of_nothing_holds_nothing() -> None:
    cache = RowCache(1 << 20, 68)
    assert (1 << 19) < cache.num_bytes <= 1 << 20
    for empty in (RowCache(0, 68), RowCache(WAYS * 80 - 1, 68)):
        positions = np.arange(5)
        empty.insert(positions, np.zeros((5, 68), dtype=np.uint8))
        empty.drop(positions)
        assert empty.num_bytes == len(empty) == 0
        assert not held(empty, positions).any()


def test_no_rows_are_no_trouble() -> None:
    cache, none = make_cache(64), np.empty(0, dtype=np.int64)
    cache.insert(none, records_of(none))
    cache.drop(none)
    assert cache.take(cache.find(none)).shape == (0, WIDTH)
