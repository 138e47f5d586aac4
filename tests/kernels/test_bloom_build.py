from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import PAD_TERM, bloom_build, bloom_positions, unpack_bits

pytestmark = pytest.mark.usefixtures("implementation")

# The package re-exports the function under the name of its module.
MODULE = import_module("silvershard.kernels.bloom_build")
MASK = (1 << 64) - 1
HASHING: dict[str, int] = {"num_planes": 24, "num_hashes": 3, "seed": 11}


def mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def positions_of(key: int, *, num_planes: int, num_hashes: int, seed: int) -> list[int]:
    salts = [
        mix((seed + number * 0x9E3779B97F4A7C15) & MASK) for number in range(1, num_hashes + 1)
    ]
    return [(mix((key & MASK) ^ salt) & ((1 << 63) - 1)) % num_planes for salt in salts]


def build(planes: Tensor, slots: Tensor, terms: Tensor, **changes: Any) -> None:
    bloom_build(planes, slots, terms, **{"first_plane": 2, **HASHING, **changes})


def expected_bits(slots: list[int], terms: list[list[int]], num_slots: int) -> Tensor:
    bits = torch.zeros((24, num_slots), dtype=torch.bool)
    for slot, keys in zip(slots, terms, strict=True):
        for key in keys:
            if key != PAD_TERM:
                bits[positions_of(key, **HASHING), slot] = True
    return bits


def test_positions_equal_splitmix_in_python_integers() -> None:
    keys = [0, 1, 2, (1 << 63) - 1, 1 << 40, -1, -(1 << 63)]
    for num_planes in (1, 7, 64, 1000):
        for seed in (0, 5, -3, 1 << 70):
            hashing = {"num_planes": num_planes, "num_hashes": 4, "seed": seed}
            got = bloom_positions(torch.tensor(keys), **hashing)
            assert got.tolist() == [positions_of(key, **hashing) for key in keys]


def test_positions_are_pinned_because_snapshots_hold_planes_built_with_them() -> None:
    got = bloom_positions(torch.tensor([[1], [123456789]]), num_planes=256, num_hashes=4, seed=7)
    assert got.shape == (2, 1, 4)
    assert got[:, 0].tolist() == [[23, 100, 212, 174], [104, 255, 168, 6]]


def test_positions_spread_evenly_and_differ_between_seeds() -> None:
    keys = torch.arange(20_000)
    positions = bloom_positions(keys, num_planes=50, num_hashes=2, seed=1)
    counts = positions.flatten().bincount(minlength=50)
    # 800 are expected in each, with a standard deviation of 28.
    assert 650 < int(counts.min()) <= int(counts.max()) < 950
    assert not torch.equal(positions, bloom_positions(keys, num_planes=50, num_hashes=2, seed=2))


@pytest.mark.parametrize("num_words", [1, 2])
def test_bits_equal_those_set_one_by_one(num_words: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    num_slots = 5 * num_words * 64
    planes = torch.zeros((30, 5, num_words), dtype=torch.int64)
    slots = torch.randperm(num_slots, generator=generator)[:150]
    terms = torch.randint(0, 1 << 62, (150, 5), generator=generator)
    terms[torch.rand(terms.shape, generator=generator) < 0.4] = PAD_TERM
    build(planes, slots, terms)
    bits = unpack_bits(planes).view(30, num_slots)
    assert torch.equal(bits[2:26], expected_bits(slots.tolist(), terms.tolist(), num_slots))
    assert not bits[:2].any()
    assert not bits[26:].any()


def test_rebuilding_some_slots_leaves_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(9)
    planes = torch.randint(-(1 << 62), 1 << 62, (30, 4, 1), generator=generator)
    before = unpack_bits(planes).view(30, 256).clone()
    slots = torch.tensor([255, 0, 63, 64, 100])
    terms = torch.tensor([[5, 6], [7, PAD_TERM], [PAD_TERM, PAD_TERM], [5, 5], [0, 9]])
    build(planes, slots, terms)
    after = unpack_bits(planes).view(30, 256)
    untouched = torch.ones(256, dtype=torch.bool)
    untouched[slots] = False
    assert torch.equal(after[:, untouched], before[:, untouched])
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[26:], before[26:])
    fresh = expected_bits(slots.tolist(), terms.tolist(), 256)
    assert torch.equal(after[2:26, slots], fresh[:, slots])
    assert not after[2:26, 63].any()


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_building_in_pieces_equals_building_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    slots = torch.randperm(640, generator=generator)
    terms = torch.randint(0, 1000, (640, 3), generator=generator)
    whole = torch.zeros((26, 10, 1), dtype=torch.int64)
    build(whole, slots, terms)
    pieces = torch.zeros_like(whole)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 64 * 24 * 7)
    build(pieces, slots, terms)
    assert torch.equal(pieces, whole)


def test_nothing_to_build_changes_nothing() -> None:
    planes = torch.ones((26, 1, 1), dtype=torch.int64)
    build(planes, torch.empty(0, dtype=torch.int64), torch.empty((0, 3), dtype=torch.int64))
    assert (planes == 1).all()
    build(planes, torch.tensor([0]), torch.empty((1, 0), dtype=torch.int64))
    assert not planes[2:].any()


def test_every_term_of_an_item_is_found_again() -> None:
    planes = torch.zeros((26, 10, 1), dtype=torch.int64)
    terms = torch.arange(640).view(640, 1) * 977
    build(planes, torch.arange(640), terms)
    positions = bloom_positions(terms[:, 0], **HASHING) + 2
    bits = unpack_bits(planes).view(26, 640)
    assert bits[positions, torch.arange(640)[:, None]].all()


def test_bad_input_is_refused() -> None:
    planes = torch.zeros((30, 2, 1), dtype=torch.int64)
    slots = torch.tensor([0, 1])
    terms = torch.tensor([[1], [2]])

    def refuses(message: str, *args: Tensor, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            build(*(args or (planes, slots, terms)), **changes)

    refuses("planes must be torch.int64", planes.int(), slots, terms)
    refuses("planes must have shape", planes[0], slots, terms)
    refuses("planes must be contiguous", planes[:, ::2], slots, terms)
    refuses("slots must be torch.int64", planes, slots.int(), terms)
    refuses("slots must have shape", planes, slots[None], terms)
    refuses(r"slots must be in \[0, 128\), got 128", planes, slots + 127, terms)
    refuses(r"slots must be in \[0, 128\), got -1", planes, slots - 1, terms)
    refuses("slots must be distinct", planes, slots * 0, terms)
    refuses("terms must be torch.int64", planes, slots, terms.float())
    refuses(r"terms must have shape \(2, F\)", planes, slots, terms[:1])
    refuses("terms must be in", planes, slots, -terms)
    refuses("terms must be on the device", planes, slots, terms.to("meta"))
    refuses("first_plane must be at least 1, got 0", first_plane=0)
    refuses("num_planes must be at least 1, got 0", num_planes=0)
    refuses("num_hashes must be at least 1, got 0", num_hashes=0)
    refuses(r"must be at most J = 30, got 7 \+ 24", first_plane=7)
    with pytest.raises(ValueError, match=r"keys must be torch.int64"):
        bloom_positions(slots.int(), **HASHING)
    with pytest.raises(ValueError, match="num_planes must be at least 1"):
        bloom_positions(slots, num_planes=0, num_hashes=1, seed=0)
    assert not planes.any()
