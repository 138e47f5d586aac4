from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.mixture import SELECTIVITIES, data_set, filters
from benchmarks.ours import build, gather_linear_stand_in, repeated, use_implementation
from benchmarks.peers import Peers, dense
from benchmarks.search_cases import (
    NUM_FILTERS,
    Bench,
    batch_programs,
    our_call,
    same_as_definition,
)

ITEMS, DIM, LISTS, PROBES, K = 3000, 16, 12, 5, 40


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SILVERSHARD_BENCH_CACHE", str(tmp_path))
    data = data_set(ITEMS, DIM)
    lists = data.lists(LISTS)
    return Bench(data, lists, build(data, lists, 64), Peers(data, lists), gate_queries=4)


def differences(bench: Bench, batch: int, share: float | None) -> list[str]:
    distinct = batch if batch > 1 else NUM_FILTERS
    call = our_call(bench, batch, PROBES, K, batch_programs(bench, share, batch, distinct))
    return same_as_definition(
        bench, call, batch, PROBES, K, lambda row: bench.filter_of(share, row, distinct)
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("share", [None, *SELECTIVITIES])
def test_the_gate_is_green_on_a_sound_index(bench: Bench, batch: int, share: float | None) -> None:
    assert differences(bench, batch, share) == []


def test_the_gate_is_red_on_a_wrong_code(bench: Bench) -> None:
    bench.ours.index.codes[:, :, 0] = 1
    assert differences(bench, 1, None)


def test_the_gate_is_red_on_a_filter_plane_that_lost_a_bit(bench: Bench) -> None:
    bench.ours.index.planes[1:] = 0
    assert differences(bench, 8, 0.5)


def test_the_gate_is_red_on_verification_left_out(bench: Bench) -> None:
    bench.ours.index.planes[1:] = -1
    assert differences(bench, 8, 0.1) == []
    bench.ours.index.terms[:] = 0
    assert differences(bench, 8, 0.1)


def test_the_gate_is_red_on_ids_out_of_order(bench: Bench) -> None:
    sound = our_call(bench, 1, PROBES, K, batch_programs(bench, None, 1, 1))

    def swapped(at: int) -> Any:
        found = sound(at)
        ids = found.item_ids.clone()
        ids[:, [0, 1]] = ids[:, [1, 0]]
        return found._replace(item_ids=ids)

    assert same_as_definition(bench, sound, 1, PROBES, K, lambda _: None) == []
    assert same_as_definition(bench, swapped, 1, PROBES, K, lambda _: None)


def test_filters_let_about_their_share_through_and_are_distinct(bench: Bench) -> None:
    for share in SELECTIVITIES:
        found = filters(share)
        assert len({one.bits for one in found}) == len(found) >= 64
        passed = np.mean([bench.data.passing(one).mean() for one in found])
        assert share / 1.5 < passed < share * 1.5


def test_data_comes_from_the_cache_the_second_time(bench: Bench) -> None:
    again = data_set(ITEMS, DIM)
    assert np.array_equal(again.vectors, bench.data.vectors)
    assert np.array_equal(again.lists(LISTS).assignment, bench.lists.assignment)
    assert len(list(again.folder.glob(".*"))) == 0


def test_a_repeated_index_finds_every_copy(bench: Bench) -> None:
    twice = repeated(bench.ours, 2)
    query = torch.from_numpy(bench.data.queries[:1])
    once = bench.ours.search(query, LISTS, K, bench.ours.programs(None, 1))
    both = twice.search(query, 2 * LISTS, 2 * K, twice.programs(None, 1))
    assert sorted((both.item_ids[0] % ITEMS).tolist()) == sorted(once.item_ids[0].tolist() * 2)


def test_the_stand_in_of_gather_linear_is_zero_at_padding() -> None:
    cache = torch.arange(24.0).view(2, 3, 4).half()
    weight, bias = torch.ones(1, 4, 2), torch.tensor([[1.0, 2.0]])
    found = gather_linear_stand_in(cache, torch.tensor([[4, -1]]), weight, bias)
    assert found.tolist() == [[[71.0, 72.0], [0.0, 0.0]]]


def test_an_unknown_implementation_is_refused() -> None:
    with use_implementation("reference") as name:
        assert name == "reference"
    with pytest.raises(ValueError, match="implementation must be"), use_implementation("fast"):
        pass


def test_roaring_becomes_the_same_bits_whatever_its_containers() -> None:
    roaring = pytest.importorskip("pyroaring")
    size = 4 * 65536 + 77
    bits = np.zeros(size, dtype=np.bool_)
    generator = np.random.default_rng(0)
    bits[generator.integers(0, 65536, 500)] = True
    bits[65536 : 2 * 65536] = generator.random(65536) < 0.5
    bits[3 * 65536 + 5 : 4 * 65536 + 60] = True
    for optimise in (False, True):
        bitmap = roaring.BitMap(np.flatnonzero(bits).astype(np.uint32))
        if optimise:
            bitmap.run_optimize()
        found = np.unpackbits(dense(bitmap.serialize(), size), bitorder="little")
        assert np.array_equal(found[:size], bits)
    assert not dense(roaring.BitMap().serialize(), size).any()
    with pytest.raises(ValueError, match="cookie"):
        dense(b"\0\0\0\0", size)
