import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import PAD_TERM, FilterOp, pack_bits
from silvershard.kernels.ivf_scan import ivf_scan_reference
from silvershard.kernels.ivf_scan_triton import ivf_scan_triton

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]

MODULE = import_module("silvershard.kernels.ivf_scan_triton")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a program costs the same however much it does."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(MODULE, "_FEW_QUERIES", 0)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample and a list so small that a few hundred slots are cut."""
    monkeypatch.setattr(MODULE, "SAMPLES", 64)
    monkeypatch.setattr(MODULE, "list_capacity", lambda k, *_: k + 150)


def make_queries(
    seed: int, pool: Any, num_queries: int, *, probes: int = 3, exclusions: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_clusters, dim = pool.page_table.shape[0], pool.codes.shape[2]
    clusters = torch.randint(-1, num_clusters, (num_queries, probes), generator=generator)
    excluded = torch.randint(-1, pool.num_slots, (num_queries, exclusions), generator=generator)
    none = torch.empty((num_queries, 0, 4), dtype=torch.int64)
    return [
        torch.randint(-127, 128, (num_queries, dim), generator=generator).to(torch.int8),
        torch.rand(num_queries, generator=generator),
        clusters.int(),
        *pool.scan_arguments(),
        none,
        none,
        excluded,
    ]


def assert_equals_reference(
    arguments: list[Tensor], num_results: int, device: torch.device
) -> list[Tensor]:
    got = ivf_scan_triton(*(tensor.to(device) for tensor in arguments), num_results)
    expected = ivf_scan_reference(*arguments, num_results)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu(), other)
    return list(expected)


def every_cluster(arguments: list[Tensor]) -> None:
    num_clusters = arguments[3].shape[0]
    arguments[2] = torch.arange(num_clusters, dtype=torch.int32).repeat(len(arguments[2]), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "page_size", "distinct_scores"),
    [(1, 64, False), (16, 128, True), (33, 64, True), (64, 64, False), (128, 128, True)],
)
def test_every_slot_in_the_list_is_ranked(
    dim: int, page_size: int, distinct_scores: bool, pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(dim, num_pages=6, dim=dim, page_size=page_size, distinct_scores=distinct_scores)
    arguments = make_queries(dim, pool, 2, probes=6, exclusions=9)
    assert_equals_reference(arguments, 50, device)


@pytest.mark.slow
@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize(
    ("dim", "page_size", "num_queries", "distinct_scores"),
    [(16, 64, 5, False), (16, 128, 1, True), (96, 64, 1, False), (33, 128, 2, True)],
)
def test_slots_cut_by_a_sample_equal_the_reference(
    dim: int,
    page_size: int,
    num_queries: int,
    distinct_scores: bool,
    pool_of: PoolOf,
    device: torch.device,
) -> None:
    pool = pool_of(dim, dim=dim, page_size=page_size, distinct_scores=distinct_scores)
    arguments = make_queries(dim, pool, num_queries, exclusions=9)
    every_cluster(arguments)
    assert_equals_reference(arguments, 10, device)


@pytest.mark.slow
@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_filtered_and_verified_scans_equal_the_reference(
    seed: int, pool_of: PoolOf, rows_of: RowsOf, programs_of: ProgramsOf, device: torch.device
) -> None:
    rng = random.Random(seed)
    pool = pool_of(seed, num_pages=12, live=0.9, distinct_scores=seed % 2 == 0)
    arguments = make_queries(seed, pool, 3, probes=4, exclusions=seed * 20)
    every_cluster(arguments)
    for place in (-3, -2):
        rows = [rows_of(rng, pool, seed, with_terms=True) for _ in range(3)]
        arguments[place] = programs_of([[], *rows[1:]])
    for num_results in (30, 700):
        assert_equals_reference(arguments, num_results, device)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rank", [1, 63])
@pytest.mark.parametrize("distinct_scores", [False, True])
def test_a_list_too_short_or_too_long_is_made_again(
    dense: bool,
    rank: int,
    distinct_scores: bool,
    pool_of: PoolOf,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    set_cuts = MODULE.set_cuts

    def mistaken(cuts: Tensor, *rest: Any) -> None:
        set_cuts(cuts, *rest[:-1], 1 if rank == 1 else 200)

    monkeypatch.setattr(MODULE, "SAMPLES", 64)
    monkeypatch.setattr(MODULE, "list_capacity", lambda k, *_: k + 20)
    monkeypatch.setattr(MODULE, "set_cuts", mistaken)
    pool = pool_of(1, live=1.0 if dense else 0.3, distinct_scores=distinct_scores)
    arguments = make_queries(1, pool, 1)
    every_cluster(arguments)
    assert_equals_reference(arguments, 40, device)


@pytest.mark.usefixtures("sampled")
def test_slots_that_tie_at_the_cut_are_cut_by_id_and_need_no_second_scan(
    pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    class Idle:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    monkeypatch.setattr(MODULE, "_rescan_kernel", Idle())
    pool = pool_of(2, live=1.0)
    pool.codes[:] = 0
    arguments = make_queries(2, pool, 2)
    every_cluster(arguments)
    assert_equals_reference(arguments, 30, device)


@pytest.mark.usefixtures("sampled")
def test_results_are_full_when_verification_rejects_nearly_all(
    pool_of: PoolOf, programs_of: ProgramsOf, device: torch.device
) -> None:
    pool = pool_of(10, live=1.0, distinct_scores=True)
    pool.terms[:] = PAD_TERM
    pool.terms[2:7, 5, 1] = 100
    arguments = make_queries(10, pool, 2)
    every_cluster(arguments)
    arguments[-2] = programs_of([[[FilterOp.TERM, 0, 0, 100]]] * 2)
    expected = assert_equals_reference(arguments, 4, device)
    assert int((expected[2] >= 0).sum()) == 8
    assert int(expected[4].sum()) == 2 * 512


def test_a_page_is_scanned_once_however_often_its_cluster_is_named(
    pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(MODULE, "_FEW_QUERIES", 3)
    pool = pool_of(6)
    arguments = make_queries(6, pool, 3)
    arguments[2] = torch.tensor([[2, 0, 0, -1, 2], [-1, 1, 1, 1, 1], [3, 2, 3, 2, 0]]).int()
    assert_equals_reference(arguments, 300, device)


def test_holes_in_the_page_table_are_no_pages(pool_of: PoolOf, device: torch.device) -> None:
    pool = pool_of(7, num_pages=12, num_clusters=4)
    pool.page_table = pool.page_table.flip(1).contiguous()
    pool.page_table[:, 0::5] = -1
    for num_queries in (1, 4):
        assert_equals_reference(make_queries(7, pool, num_queries), 300, device)


def test_a_pool_with_every_page_taken_and_every_slot_live_is_scanned(
    pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(3, num_pages=4, num_clusters=2, page_size=128, live=1.0)
    pool.page_table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    arguments = make_queries(3, pool, 2)
    every_cluster(arguments)
    for num_results in (1, 600):
        assert_equals_reference(arguments, num_results, device)


def test_an_index_without_items_or_probes_answers_with_padding(
    pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(0)
    arguments = make_queries(0, pool, 2)
    for clusters in (torch.empty((2, 0)).int(), torch.full((2, 3), -1).int()):
        arguments[2] = clusters
        assert_equals_reference(arguments, 3, device)
    pool.planes[0] = 0
    pool.scales[:] = torch.nan
    arguments = make_queries(0, pool, 2)
    every_cluster(arguments)
    assert_equals_reference(arguments, 3, device)
    pool.planes, pool.columns = pool.planes[:, :0].contiguous(), pool.columns[:, :0].contiguous()
    pool.terms, pool.codes, pool.scales = pool.terms[:0], pool.codes[:0], pool.scales[:0]
    pool.item_ids = pool.item_ids[:0]
    pool.page_table = pool.page_table[:, :0]
    for num_queries in (0, 1, 2):
        assert_equals_reference(make_queries(0, pool, num_queries), 4, device)


def test_bad_values_at_dead_slots_and_free_pages_do_no_harm(
    pool_of: PoolOf, device: torch.device
) -> None:
    pool = pool_of(14, distinct_scores=True)
    alive = torch.rand(9, 64) < 0.5
    pool.planes[0] = pack_bits(alive)
    pool.scales[~alive] = torch.nan
    pool.item_ids[~alive] = -1
    assert_equals_reference(make_queries(14, pool, 2), 200, device)


def test_scores_that_round_to_zero_are_plain_zeros(pool_of: PoolOf, device: torch.device) -> None:
    pool = pool_of(13, live=1.0)
    pool.scales[:] = 1e-30
    arguments = make_queries(13, pool, 1)
    every_cluster(arguments)
    arguments[1][:] = 1e-30
    expected = assert_equals_reference(arguments, 20, device)
    assert not expected[0].signbit().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("num_queries", "probes"), [(1, 8), (16, 8), (300, 40)])
@pytest.mark.parametrize("num_results", [100, 2048, 30_000])
def test_scans_of_real_size_equal_the_reference(
    dim: int,
    num_queries: int,
    probes: int,
    num_results: int,
    pool_of: PoolOf,
    programs_of: ProgramsOf,
    device: torch.device,
) -> None:
    pool = pool_of(
        dim, dim=dim, page_size=128, num_pages=2000, num_clusters=100, distinct_scores=True
    )
    arguments = make_queries(dim, pool, num_queries, probes=probes, exclusions=300)
    arguments[-3] = programs_of([[], [[FilterOp.PLANE, 1, 0, 0]]] * num_queries)[:num_queries]
    arguments[-2] = programs_of([[[FilterOp.TERM, 0, 0, 1]], []] * num_queries)[:num_queries]
    assert_equals_reference(arguments, num_results, device)
