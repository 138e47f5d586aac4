import numpy as np
import pytest
from numpy.typing import NDArray

from silvershard.model import id_map
from silvershard.model.dtypes import INT64_MAX, INT64_MIN
from silvershard.model.id_map import IdMap

Ints = NDArray[np.int64]


def ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def test_ids_are_found_at_their_slots_and_unknown_ids_nowhere() -> None:
    held = IdMap(ints([5, 0, INT64_MAX, 7]), ints([3, 2, 0, (1 << 31) - 2]))
    found = held.locate(ints([7, INT64_MAX, 5, 0, 6, -1, -2, INT64_MIN]))
    assert found.slots.tolist() == [(1 << 31) - 2, 0, 3, 2, -1, -1, -1, -1]
    assert found.versions.tolist() == [0] * 8
    assert len(IdMap(ints([]), ints([])).locate(ints([])).slots) == 0


def test_a_deleted_id_keeps_its_version() -> None:
    held = IdMap(ints([5]), ints([3]))
    held.put(ints([5, 9]), ints([-1, -1]), ints([4, 6]))
    assert held.locate(ints([5, 9, 1])).slots.tolist() == [-1, -1, -1]
    assert held.locate(ints([5, 9, 1])).versions.tolist() == [4, 6, 0]
    held.put(ints([5]), ints([8]), ints([5]))
    assert (held.locate(ints([5])).slots[0], held.locate(ints([5])).versions[0]) == (8, 5)
    assert held.num_ids == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_map_that_grows_in_steps_equals_a_dict(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few cells a call, so that most calls find the map in the middle of growing.
    monkeypatch.setattr(id_map, "_MOVED_PER_CALL", 40)
    draw = np.random.default_rng(seed)
    first = draw.permutation(4_000)[:500].astype(np.int64)
    held = IdMap(first, np.arange(500, dtype=np.int64))
    known = {item: (slot, 0) for slot, item in enumerate(first.tolist())}
    sizes = set()
    forgotten = 0
    for version in range(1, 400):
        # Neighbours share their cells, far ones wrap around.
        space = 12 * version + 4_000
        some = np.unique(draw.integers(0, space, 24)) * draw.choice([1, 1 << 40])
        slots = np.where(draw.random(len(some)) < 0.3, -1, draw.integers(0, 1 << 20, len(some)))
        held.put(some, slots, np.full(len(some), version))
        known |= {
            item: (slot, version) for item, slot in zip(some.tolist(), slots.tolist(), strict=True)
        }
        dead = [item for item, (slot, _) in known.items() if slot < 0]
        gone = ints([item for item in dead if draw.random() < 0.2])
        right = draw.random(len(gone)) < 0.8
        last = ints([known[item][1] for item in gone.tolist()])
        held.forget(gone, last + ~right)
        for item in gone[right].tolist():
            del known[item]
            forgotten += 1
        assert held.num_ids == len(known)
        sizes.add(held.num_cells)
        if version % 7 == 0:
            asked = np.concatenate([draw.integers(0, 9_000, 300), ints([*known])])
            found = held.locate(asked)
            got = list(zip(found.slots.tolist(), found.versions.tolist(), strict=True))
            assert got == [known.get(item, (-1, 0)) for item in asked.tolist()]
    assert forgotten > 100
    assert len(sizes) > 4


def test_ids_that_are_held_or_were_seen_later_are_not_forgotten() -> None:
    held = IdMap(ints([5, 6]), ints([3, 4]))
    held.put(ints([5, 7, 8]), ints([9, -1, -1]), ints([2, 2, 3]))
    held.forget(ints([5, 6, 7, 8, 9]), ints([2, 2, 2, 2, 2]))
    found = held.locate(ints([5, 6, 7, 8, 9]))
    assert found.slots.tolist() == [9, 4, -1, -1, -1]
    assert found.versions.tolist() == [2, 0, 0, 3, 0]
    assert held.num_ids == 3


@pytest.mark.parametrize(("per_call", "size"), [(8, 2048), (300, 4096)])
def test_ids_that_come_and_are_forgotten_take_no_more_and_more_memory(
    per_call: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(id_map, "_MOVED_PER_CALL", 0)
    count = 700
    held = IdMap(np.arange(count, dtype=np.int64), np.arange(count, dtype=np.int64))
    most = 0
    for first in range(count, 20 * count, per_call):
        some = np.arange(first, first + per_call, dtype=np.int64)
        held.put(some, some, np.full(per_call, 1))
        held.put(some, np.full(per_call, -1), np.full(per_call, 2))
        held.forget(some, np.full(per_call, 2))
        most = max(most, held.num_cells)
        assert held.num_ids == count
    # Two tables for the ids that are held and those of a call, while one takes over.
    assert most <= 2 * size
    assert (held.locate(np.arange(count, dtype=np.int64)).slots == np.arange(count)).all()
    assert (held.locate(np.arange(count, 20 * count, dtype=np.int64)).slots == -1).all()


def test_one_call_may_bring_more_ids_than_the_map_holds() -> None:
    held = IdMap(ints([1, 2]), ints([0, 1]))
    many = np.arange(3, 100_000, dtype=np.int64)
    held.put(many, many, many)
    assert held.locate(ints([1, 2, 3, 99_999, 100_000])).slots.tolist() == [0, 1, 3, 99_999, -1]
    held.put(many[:5] + 200_000, many[:5], many[:5])
    assert held.locate(ints([2, 99_999, 200_003])).slots.tolist() == [1, 99_999, 3]


def test_growing_moves_a_bounded_number_of_cells_a_call() -> None:
    held = IdMap(np.arange(1 << 17, dtype=np.int64), np.arange(1 << 17, dtype=np.int64))
    before = held.num_cells
    new = np.arange(1 << 17, 1 << 18, dtype=np.int64)
    calls_while_growing = 0
    for part in np.split(new, 512):
        held.put(part, part, part)
        calls_while_growing += held.num_cells == 3 * before
    assert held.num_cells == 2 * before
    # All cells are moved at 2**14 and 8 per id a call.
    assert calls_while_growing >= before // ((1 << 14) + 8 * 256) - 1
    everyone = held.locate(np.arange(1 << 18, dtype=np.int64))
    assert (everyone.slots == np.arange(1 << 18)).all()


def test_memory_can_be_touched_without_a_change() -> None:
    held = IdMap(ints([5]), ints([3]))
    held.put(ints([5]), ints([4]), ints([2]))
    held.touch()
    assert held.locate(ints([5])).versions.tolist() == [2]
