import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from silvershard.shard.page_pool import PagePool, scrambled, slot_bits

Ints = NDArray[np.int64]


def make_pool(sizes: list[int], pages: int, width: int = 4, words: int = 1) -> PagePool:
    """Clusters on a line, filled from the front of the pool, and free pages behind."""
    table = torch.full((len(sizes), width), -1, dtype=torch.int32)
    live = torch.zeros(pages, words, dtype=torch.int64)
    first, slots = 0, 64 * words
    for cluster, size in enumerate(sizes):
        for page in range(-(-size // slots)):
            table[cluster, page] = first
            held = np.arange(min(slots, size - page * slots))
            row = live[first].numpy().view(np.uint64)
            np.bitwise_or.at(row, held >> 6, slot_bits(held))
            first += 1
    centroids = torch.arange(float(len(sizes)))[:, None]
    return PagePool(table, live, centroids)


def ids(count: int, first: int = 0) -> Ints:
    return np.arange(first, first + count, dtype=np.int64)


def test_slots_are_taken_in_pages_of_the_cluster_and_free_pages_when_these_are_full() -> None:
    pool = make_pool([60, 64, 0], pages=6)
    assert pool.usage(0).free_pages == 4
    clusters = np.array([0] * 4 + [1] * 2 + [2] * 70, dtype=np.int64)
    slots = pool.take(ids(76), clusters, salt=1)
    assert len(set(slots.tolist())) == 76
    assert (pool.cluster_of(slots) == clusters).all()
    assert set(slots[:4].tolist()) == {60, 61, 62, 63}
    usage = pool.usage(0)
    assert (usage.free_pages, usage.live_slots, usage.retired_slots) == (1, 200, 0)
    assert (usage.longest_list, usage.mean_list) == (70, pytest.approx(200 / 3))
    assert usage.dead_slots == 6 * 64 - 200


def test_the_slot_of_an_item_is_chosen_by_hash_not_by_the_order_of_items() -> None:
    first, second, salted = (make_pool([30], pages=2) for _ in range(3))
    own = np.zeros(20, dtype=np.int64)
    slots = first.take(ids(20), own, salt=3)
    assert (second.take(ids(20)[::-1], own, salt=3)[::-1] == slots).all()
    assert (salted.take(ids(20), own, salt=4) != slots).any()
    assert slots.tolist() != sorted(slots.tolist())


def test_a_page_goes_back_when_its_last_slot_is_free_and_the_others_close_up() -> None:
    pool = make_pool([64, 64 * 3], pages=6)
    middle = ids(64, first=2 * 64)
    pool.retire(middle)
    assert (pool.usage(0).retired_slots, pool.usage(0).free_pages) == (64, 2)
    pool.free(middle[:-1])
    assert pool.usage(0).free_pages == 2
    pool.free(middle[-1:])
    assert pool.usage(0).free_pages == 3
    assert pool._table[1].tolist() == [1, 3, -1, -1]
    # A free page is reused, in whatever cluster.
    slots = pool.take(ids(64 * 3), np.zeros(64 * 3, dtype=np.int64), salt=0)
    assert set((slots // 64).tolist()) == {2, 4, 5}


def test_a_retired_slot_is_not_taken_before_it_is_free() -> None:
    pool = make_pool([64], pages=1)
    pool.retire(ids(10))
    with pytest.raises(ValueError, match="1 slots are needed, 0 are dead"):
        pool.take(ids(1), np.zeros(1, dtype=np.int64), salt=0)
    pool.free(ids(10))
    assert sorted(pool.take(ids(10), np.zeros(10, dtype=np.int64), salt=0).tolist()) == [*range(10)]


def test_items_without_room_go_to_the_nearest_cluster_with_some() -> None:
    pool = make_pool([64, 64, 62, 40, 64], pages=5)
    assert pool.has_room(ids(5)).tolist() == [False, False, True, True, False]
    slots = pool.take(ids(4), np.array([0, 1, 4, 2], dtype=np.int64), salt=0)
    assert pool.cluster_of(slots[3:]).tolist() == [2]
    assert sorted(pool.cluster_of(slots[:2]).tolist()) == [2, 3]
    assert pool.cluster_of(slots[2:3]).tolist() == [3]


def test_a_cluster_whose_row_is_full_gets_a_wider_table_with_the_pages_of_all() -> None:
    pool = make_pool([64 * 2, 64, 0], pages=8, width=2)
    narrow = pool.page_table
    before = narrow.clone()
    pool.take(ids(1), np.full(1, 2, dtype=np.int64), salt=0)
    assert pool.page_table is narrow
    slots = pool.take(ids(70, first=1), np.zeros(70, dtype=np.int64), salt=1)
    assert (pool.cluster_of(slots) == 0).all()
    assert pool.usage(0).free_pages == 2
    table = pool.page_table
    assert table.shape == (3, 8)
    assert table[:, :2].tolist() == [[0, 1], before[1].tolist(), [3, -1]]
    assert table[0].tolist() == [0, 1, 4, 5, *[-1] * 4]
    assert (table[1:, 2:] == -1).all()
    # Pages go back from the wider table as from the other one.
    pool.retire(slots)
    pool.free(slots)
    assert pool.page_table is table
    assert table[0].tolist() == [0, 1, *[-1] * 6]


def test_a_pool_can_be_filled_to_its_last_slot_from_one_cluster() -> None:
    pool = make_pool([1, 2, 3], pages=9, width=3)
    room = pool.dead_slots
    slots = pool.take(ids(room), np.zeros(room, dtype=np.int64), salt=0)
    assert len(set(slots.tolist())) == room
    assert pool.dead_slots == 0


@pytest.mark.parametrize("words", [1, 2])
def test_the_items_of_the_emptiest_page_are_told_where_they_find_room_in_others(
    words: int,
) -> None:
    size = 64 * words
    pool = make_pool([3 * size, 2 * size], pages=6, words=words)
    live = pool._live_words.reshape(-1)

    def kill(slots: Ints) -> None:
        np.bitwise_and.at(live, slots >> 6, ~slot_bits(slots))
        pool.retire(slots)
        pool.free(slots)

    assert len(pool.loose_slots(1000)) == 0
    kill(ids(size - 5, first=size))
    kill(ids(4))
    assert len(pool.loose_slots(1000)) == 0
    kill(ids(1, first=4))
    loose = pool.loose_slots(1000)
    assert loose.tolist() == ids(5, first=2 * size - 5).tolist()
    # Nothing is put where it would have to move from.
    taken = pool.take(ids(5), np.zeros(5, dtype=np.int64), salt=1)
    assert sorted(taken.tolist()) == [0, 1, 2, 3, 4]
    pool.retire(loose)
    pool.free(loose)
    assert pool.usage(0).free_pages == 2


def test_no_more_pages_are_emptied_at_once_than_were_asked_for() -> None:
    pool = make_pool([2 * 64] * 4, pages=8)
    live = pool._live_words.reshape(-1)
    for cluster in range(4):
        slots = ids(64 + 40, first=128 * cluster)
        np.bitwise_and.at(live, slots >> 6, ~slot_bits(slots))
        pool.retire(slots)
        pool.free(slots)
    assert pool.usage(0).free_pages == 4
    pool = make_pool([65] * 4, pages=8)
    live = pool._live_words.reshape(-1)
    for cluster in range(4):
        slots = ids(10, first=128 * cluster)
        np.bitwise_and.at(live, slots >> 6, ~slot_bits(slots))
        pool.retire(slots)
        pool.free(slots)
    assert len(pool.loose_slots(2)) == 2
    assert len(pool.loose_slots(0)) == 0


def test_hashes_are_the_same_everywhere() -> None:
    hashed = scrambled(np.array([0, 1, 2**62], dtype=np.int64), 7)
    assert len(set(hashed.tolist())) == 3
    assert hashed.tolist() == [1794149439, 3307082812, 2290512632]
