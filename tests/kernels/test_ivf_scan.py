import random
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    PAD_TERM,
    FilterOp,
    ScanResult,
    bloom_build,
    bloom_positions,
    ivf_scan,
    merge_topk,
    pack_bits,
)

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]

# The package re-exports the function under the name of its module.
MODULE = import_module("silvershard.kernels.ivf_scan")


class Queries(NamedTuple):
    """What differs between the rows of a batch."""

    codes: Tensor
    scales: Tensor
    clusters: Tensor
    programs: Tensor
    verify: Tensor
    excluded: Tensor

    def rows(self, rows: slice) -> "Queries":
        return Queries(*(part[rows] for part in self))


def make_queries(
    seed: int, pool: Any, num_queries: int, *, probes: int = 3, exclusions: int = 0
) -> Queries:
    generator = torch.Generator().manual_seed(seed)
    dim = pool.codes.shape[2]
    num_clusters = pool.page_table.shape[0]
    clusters = torch.stack(
        [torch.randperm(num_clusters, generator=generator)[:probes] for _ in range(num_queries)]
    )
    clusters[torch.rand(clusters.shape, generator=generator) < 0.1] = -1
    none = torch.empty((num_queries, 0, 4), dtype=torch.int64)
    shape = (num_queries, exclusions)
    return Queries(
        codes=torch.randint(-127, 128, (num_queries, dim), generator=generator).to(torch.int8),
        scales=torch.rand(num_queries, generator=generator),
        clusters=clusters.int(),
        programs=none,
        verify=none,
        excluded=torch.randint(-1, pool.num_slots, shape, generator=generator),
    )


def scan(pool: Any, queries: Queries, num_results: int) -> ScanResult:
    return ivf_scan(
        queries.codes,
        queries.scales,
        queries.clusters,
        *pool.scan_arguments(),
        queries.programs,
        queries.verify,
        queries.excluded,
        num_results,
    )


def score_of(pool: Any, queries: Queries, query: int, slot: int) -> float:
    page, offset = divmod(slot, pool.page_size)
    codes = zip(queries.codes[query].tolist(), pool.codes[page, offset].tolist(), strict=True)
    dot = np.float32(sum(a * b for a, b in codes))
    scale, query_scale = pool.scales[page, offset].item(), queries.scales[query].item()
    return float((dot * np.float32(scale)) * np.float32(query_scale))


def slow_row(
    pool: Any, queries: Queries, query: int
) -> tuple[list[tuple[float, int, int]], int, int]:
    """Every slot that may be returned, best first, and the two counts."""
    clusters = {cluster for cluster in queries.clusters[query].tolist() if cluster >= 0}
    pages = {
        page for cluster in clusters for page in pool.page_table[cluster].tolist() if page >= 0
    }
    excluded = set(queries.excluded[query].tolist())
    programs, verify = queries.programs[query].tolist(), queries.verify[query].tolist()
    slots = [page * pool.page_size + offset for page in pages for offset in range(pool.page_size)]
    live = [slot for slot in slots if pool.bit(0, slot)]
    eligible = [slot for slot in live if slot not in excluded and pool.accepts(programs, slot)]
    ranked = sorted(
        (-score_of(pool, queries, query, slot), int(pool.item_ids.flatten()[slot]), slot)
        for slot in eligible
        if pool.accepts(verify, slot)
    )
    return ranked, len(live), len(eligible)


def assert_equals_slow(pool: Any, queries: Queries, result: ScanResult) -> None:
    num_results = result.scores.shape[1]
    for query in range(queries.codes.shape[0]):
        ranked, probed, eligible = slow_row(pool, queries, query)
        best = ranked[:num_results]
        padding = num_results - len(best)
        assert int(result.probed[query]) == probed
        assert int(result.eligible[query]) == eligible
        assert result.scores[query].tolist() == [-row[0] for row in best] + [-torch.inf] * padding
        assert result.item_ids[query].tolist() == [row[1] for row in best] + [-1] * padding
        assert result.slots[query].tolist() == [row[2] for row in best] + [-1] * padding


def assert_same(a: ScanResult, b: ScanResult) -> None:
    assert torch.equal(a.scores.view(torch.int32), b.scores.view(torch.int32))
    for mine, other in zip(a[1:], b[1:], strict=True):
        assert torch.equal(mine, other)


def test_hand_computed_case(pool_of: PoolOf) -> None:
    pool = pool_of(0, num_pages=2, num_clusters=2, dim=2, live=0.0)
    pool.page_table = torch.tensor([[1, -1], [0, -1]], dtype=torch.int32)
    live = torch.zeros((2, 64), dtype=torch.bool)
    live[0, :4] = True
    live[1, 0] = True
    pool.planes[0] = pack_bits(live)
    pool.codes[0, :4] = torch.tensor([[1, 2], [2, 1], [3, 0], [-1, 0]])
    pool.codes[1, 0] = torch.tensor([127, 127])
    pool.scales[0, :4] = torch.tensor([1.0, 1.0, 0.5, 4.0])
    pool.item_ids[0, :4] = torch.tensor([30, 20, 10, 5])
    queries = make_queries(0, pool, 1)._replace(
        codes=torch.tensor([[1, 1]], dtype=torch.int8),
        scales=torch.tensor([2.0]),
        clusters=torch.tensor([[1, -1]], dtype=torch.int32),
    )
    result = scan(pool, queries, 5)
    assert result.scores.tolist() == [[6.0, 6.0, 3.0, -8.0, -torch.inf]]
    assert result.item_ids.tolist() == [[20, 30, 10, 5, -1]]
    assert result.slots.tolist() == [[1, 0, 2, 3, -1]]
    assert (result.probed.tolist(), result.eligible.tolist()) == ([4], [4])


@pytest.mark.parametrize("seed", range(40))
def test_random_scans_equal_one_slot_at_a_time(
    seed: int, pool_of: PoolOf, rows_of: RowsOf, programs_of: ProgramsOf
) -> None:
    rng = random.Random(seed)
    pool = pool_of(
        seed,
        page_size=rng.choice([64, 128]),
        num_pages=rng.choice([1, 4, 7]),
        dim=rng.choice([1, 16, 33]),
        live=rng.choice([0.0, 0.3, 1.0]),
        distinct_scores=rng.random() < 0.5,
    )
    num_queries = rng.choice([1, 2, 5])
    queries = make_queries(
        seed, pool, num_queries, probes=rng.choice([1, 3, 5]), exclusions=rng.choice([0, 1, 50])
    )
    programs = [
        [] if rng.random() < 0.3 else rows_of(rng, pool, 3, with_terms=False)
        for _ in range(num_queries)
    ]
    verify = [
        [] if rng.random() < 0.4 else rows_of(rng, pool, 3, with_terms=True)
        for _ in range(num_queries)
    ]
    queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
    result = scan(pool, queries, rng.choice([1, 7, 40, 1000]))
    assert_equals_slow(pool, queries, result)


@pytest.mark.parametrize("dim", [16, 100, 1024])
def test_extreme_codes_are_summed_exactly(dim: int, pool_of: PoolOf) -> None:
    pool = pool_of(dim, dim=dim, num_pages=3, num_clusters=2, live=1.0)
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, pool.codes.shape, generator=generator) * 254 - 127
    # Sums near 127 * 127 * dim that differ by one show any rounding.
    pool.codes[:] = torch.where(torch.rand(signs.shape, generator=generator) < 0.01, signs, 127)
    pool.codes[0, :, 0] = torch.arange(64)
    queries = make_queries(dim, pool, 3, probes=2)
    queries.codes[:] = 127
    queries.codes[1, ::3] = -127
    queries.codes[2, -1] = 126
    queries.clusters[:] = torch.tensor([0, 1])
    assert_equals_slow(pool, queries, scan(pool, queries, 200))


def test_equal_scores_are_ordered_by_item_id_through_every_cut(pool_of: PoolOf) -> None:
    pool = pool_of(1, live=1.0)
    pool.codes[:] = 1
    queries = make_queries(1, pool, 4, probes=5)
    queries.clusters[:] = torch.arange(5)
    for num_results in (1, 10, 100, 512, 600):
        result = scan(pool, queries, num_results)
        expected = pool.item_ids[:-1].flatten().sort().values[:num_results].tolist()
        expected += [-1] * (num_results - len(expected))
        assert result.item_ids.tolist() == [expected] * 4


def test_a_batch_equals_its_rows_alone_bit_for_bit(
    pool_of: PoolOf, rows_of: RowsOf, programs_of: ProgramsOf
) -> None:
    rng = random.Random(0)
    for distinct_scores in (True, False):
        pool = pool_of(3, num_pages=30, num_clusters=12, distinct_scores=distinct_scores)
        queries = make_queries(3, pool, 64, probes=6, exclusions=30)
        programs = [rows_of(rng, pool, 2, with_terms=False) for _ in range(64)]
        verify = [rows_of(rng, pool, 1, with_terms=True) for _ in range(64)]
        programs[::3] = [[] for _ in programs[::3]]
        verify[::2] = [[] for _ in verify[::2]]
        queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
        whole = scan(pool, queries, 50)
        for row in range(64):
            one = slice(row, row + 1)
            assert_same(
                scan(pool, queries.rows(one), 50), ScanResult(*(part[one] for part in whole))
            )


def test_passes_over_few_queries_equal_one_pass(
    pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(4)
    queries = make_queries(4, pool, 11, exclusions=5)
    whole = scan(pool, queries, 30)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 3 * pool.num_slots)
    assert_same(scan(pool, queries, 30), whole)


def test_a_thousand_queries_are_answered(pool_of: PoolOf) -> None:
    pool = pool_of(5, num_pages=4, num_clusters=4)
    queries = make_queries(5, pool, 1024, probes=2)
    result = scan(pool, queries, 3)
    some = slice(0, 1024, 128)
    assert_equals_slow(pool, queries.rows(some), ScanResult(*(part[some] for part in result)))


def test_a_page_is_scanned_once_however_often_its_cluster_is_named(pool_of: PoolOf) -> None:
    pool = pool_of(6)
    queries = make_queries(6, pool, 3)
    once = queries._replace(clusters=torch.tensor([[0], [1], [2]], dtype=torch.int32))
    often = queries._replace(clusters=torch.tensor([[0, 0, -1], [-1, 1, 1], [2, 2, 2]]).int())
    assert_same(scan(pool, once, 20), scan(pool, often, 20))


def test_shards_of_the_pages_merge_to_the_answer_of_the_whole(pool_of: PoolOf) -> None:
    whole = pool_of(7, num_pages=12)
    queries = make_queries(7, whole, 5, probes=5)
    expected = scan(whole, queries, 40)
    for num_shards in (2, 3, 7):
        results = []
        for shard in range(num_shards):
            part = pool_of(7, num_pages=12)
            part.page_table = torch.where(
                part.page_table % num_shards == shard, part.page_table, -1
            ).int()
            results.append(scan(part, queries, 40))
        merged = merge_topk(
            torch.stack([result.scores for result in results]),
            torch.stack([result.item_ids for result in results]),
            40,
        )
        assert torch.equal(merged.scores, expected.scores)
        assert torch.equal(merged.item_ids, expected.item_ids)
        assert torch.equal(sum(result.probed for result in results), expected.probed)


def bloom_pool(pool_of: PoolOf) -> tuple[Any, dict[str, int]]:
    pool = pool_of(8, num_pages=10, num_planes=14, live=1.0, distinct_scores=True)
    hashing = {"num_planes": 12, "num_hashes": 2, "seed": 5}
    slots = torch.arange(pool.num_slots)
    bloom_build(pool.planes, slots, pool.terms.flatten(0, 1), first_plane=2, **hashing)
    return pool, hashing


def bloom_rows(key: int, hashing: dict[str, int]) -> list[list[int]]:
    first, second = (bloom_positions(torch.tensor(key), **hashing) + 2).tolist()
    return [[FilterOp.PLANE, first, 0, 0], [FilterOp.PLANE, second, 0, 0], [FilterOp.AND, 0, 0, 0]]


def has_term(pool: Any, key: int) -> Tensor:
    return (pool.terms == key).any(-1).flatten()


def test_verification_rejects_exactly_the_false_positives_of_bloom_planes(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool, hashing = bloom_pool(pool_of)
    queries = make_queries(8, pool, 6, probes=5)
    queries.clusters[:] = torch.arange(5)
    programs = [bloom_rows(key, hashing) for key in range(6)]
    verify = [[[FilterOp.TERM, 0, 0, key]] for key in range(6)]
    queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
    for num_results in (1, 10, 700):
        assert_equals_slow(pool, queries, scan(pool, queries, num_results))
    result = scan(pool, queries, 700)
    rejected = result.eligible - (result.slots >= 0).sum(dim=1)
    assert int(rejected.sum()) > 50
    for key in range(6):
        found = result.slots[key][result.slots[key] >= 0]
        assert has_term(pool, key)[found].all()
        assert len(found) == int(has_term(pool, key)[: 9 * 64].sum())


def test_not_over_a_bloom_term_is_settled_by_verification(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool, _ = bloom_pool(pool_of)
    queries = make_queries(9, pool, 2, probes=5)
    queries.clusters[:] = torch.arange(5)
    # Plane 1 is exact. Under NOT the Bloom term is TRUE in the scan program.
    negated_plane = [[FilterOp.PLANE, 1, 0, 0], [FilterOp.NOT, 0, 0, 0]]
    programs = [[*negated_plane, [FilterOp.TRUE, 0, 0, 0], [FilterOp.AND, 0, 0, 0]], []]
    negated_term = [[FilterOp.TERM, 0, 0, 3], [FilterOp.NOT, 0, 0, 0]]
    verify = [[*negated_plane, *negated_term, [FilterOp.AND, 0, 0, 0]], negated_term]
    queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
    result = scan(pool, queries, 700)
    assert_equals_slow(pool, queries, result)
    plane = torch.tensor([pool.bit(1, slot) for slot in range(9 * 64)])
    allowed = ~has_term(pool, 3)[: 9 * 64]
    assert int((result.slots[0] >= 0).sum()) == int((allowed & ~plane).sum())
    assert int((result.slots[1] >= 0).sum()) == int(allowed.sum())


def test_results_are_full_when_verification_rejects_nearly_all(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool = pool_of(10, live=1.0, distinct_scores=True)
    pool.terms[:] = PAD_TERM
    queries = make_queries(10, pool, 3, probes=5)
    queries.clusters[:] = torch.arange(5)
    worst = []
    for query in range(3):
        ranked, _, _ = slow_row(pool, queries, query)
        for _, _, slot in ranked[-4:]:
            page, offset = divmod(slot, 64)
            pool.terms[page, offset, query] = 100 + query
        worst.append([slot for _, _, slot in ranked[-4:]])
    verify = programs_of([[[FilterOp.TERM, 0, 0, 100 + query]] for query in range(3)])
    result = scan(pool, queries._replace(verify=verify), 4)
    assert result.slots.tolist() == worst
    assert result.eligible.tolist() == [512] * 3


def test_an_updated_item_is_found_under_its_new_terms_only(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool, hashing = bloom_pool(pool_of)
    slots = torch.tensor([5, 70, 130])
    pool.terms.view(-1, 3)[slots] = torch.tensor([[40, PAD_TERM, PAD_TERM]] * 3)
    bloom_build(pool.planes, slots, pool.terms.view(-1, 3)[slots], first_plane=2, **hashing)
    queries = make_queries(11, pool, 7, probes=5)
    queries.clusters[:] = torch.arange(5)
    keys = [40, 0, 1, 2, 3, 4, 5]
    queries = queries._replace(
        programs=programs_of([bloom_rows(key, hashing) for key in keys]),
        verify=programs_of([[[FilterOp.TERM, 0, 0, key]] for key in keys]),
    )
    result = scan(pool, queries, 600)
    assert sorted(result.slots[0][:3].tolist()) == slots.tolist()
    assert int(result.slots[0][3]) == -1
    assert not torch.isin(result.slots[1:], slots).any()


def test_excluding_everything_leaves_only_padding(pool_of: PoolOf) -> None:
    pool = pool_of(12, live=1.0)
    queries = make_queries(12, pool, 2, probes=4)
    everything = torch.arange(pool.num_slots).repeat(2, 2)
    result = scan(pool, queries._replace(excluded=everything), 5)
    assert (result.scores == -torch.inf).all()
    assert (result.item_ids == -1).all()
    assert (result.slots == -1).all()
    assert not result.eligible.any()
    assert result.probed.all()


@pytest.mark.parametrize("num_queries", [0, 1, 3])
def test_an_index_without_items_answers_with_padding(num_queries: int, pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = make_queries(0, pool, max(1, num_queries)).rows(slice(num_queries))
    pool.planes = pool.planes[:, :0].contiguous()
    pool.columns = pool.columns[:, :0].contiguous()
    pool.terms, pool.codes, pool.scales = pool.terms[:0], pool.codes[:0], pool.scales[:0]
    pool.item_ids = pool.item_ids[:0]
    for page_table in (torch.full_like(pool.page_table, -1), pool.page_table[:, :0]):
        pool.page_table = page_table
        result = scan(pool, queries, 4)
        assert result.item_ids.tolist() == [[-1] * 4] * num_queries
        assert result.probed.tolist() == [0] * num_queries


def test_no_probes_find_nothing(pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = make_queries(0, pool, 2)
    for clusters in (torch.empty((2, 0)).int(), torch.full((2, 3), -1).int()):
        result = scan(pool, queries._replace(clusters=clusters), 3)
        assert (result.slots == -1).all()
        assert not result.probed.any()


def test_a_tiny_negative_score_that_rounds_to_zero_is_a_plain_zero(pool_of: PoolOf) -> None:
    pool = pool_of(13, live=1.0)
    pool.scales[:] = 1e-30
    queries = make_queries(13, pool, 1, probes=5)
    queries.clusters[:] = torch.arange(5)
    queries.scales[:] = 1e-30
    result = scan(pool, queries, 20)
    assert result.item_ids[0].tolist() == pool.item_ids[:-1].flatten().sort().values[:20].tolist()
    assert not result.scores.signbit().any()


def test_bad_input_is_refused(pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = make_queries(0, pool, 2, exclusions=1)
    names = ["page_table", "codes", "scales", "item_ids", "planes", "columns", "terms"]
    good = {
        "query_codes": queries.codes,
        "query_scales": queries.scales,
        "clusters": queries.clusters,
        **dict(zip(names, pool.scan_arguments(), strict=True)),
        "programs": torch.zeros((2, 1, 4), dtype=torch.int64),
        "verify": torch.zeros((2, 1, 4), dtype=torch.int64),
        "excluded": queries.excluded,
        "num_results": 3,
    }
    ivf_scan(**good)

    def refuses(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ivf_scan(**(good | changes))

    refuses("query_codes must be torch.int8", query_codes=queries.codes.int())
    refuses(r"query_codes must have shape \(Q, D\)", query_codes=queries.codes[0])
    wide = torch.zeros((2, 1025), dtype=torch.int8)
    refuses(r"query_codes must have D in \[1, 1024\], got 1025", query_codes=wide)
    refuses(r"query_codes must have D in \[1, 1024\], got 0", query_codes=wide[:, :0])
    refuses("query_scales must be torch.float32", query_scales=queries.scales.double())
    refuses(r"query_scales must have shape \(2\)", query_scales=queries.scales[:1])
    refuses("query_scales must be finite", query_scales=queries.scales * torch.nan)
    refuses("clusters must be torch.int32", clusters=queries.clusters.long())
    refuses(r"clusters must have shape \(2, P\)", clusters=queries.clusters[:1])
    refuses(r"clusters must be in \[-1, 5\), got 5", clusters=queries.clusters * 0 + 5)
    refuses(r"clusters must be in \[-1, 5\), got -2", clusters=queries.clusters * 0 - 2)
    refuses("page_table must be torch.int32", page_table=pool.page_table.long())
    refuses(r"page_table must have shape \(C, X\)", page_table=pool.page_table[0])
    refuses(r"page_table must be in \[-1, 9\), got 9", page_table=pool.page_table * 0 + 9)
    refuses(r"page_table must be in \[-1, 9\), got -2", page_table=pool.page_table * 0 - 2)
    refuses("codes must be torch.int8", codes=pool.codes.int())
    refuses(r"codes must have shape \(9, 64, 16\)", codes=pool.codes[:, :, 1:])
    refuses("codes must be contiguous", codes=pool.codes.repeat(1, 1, 2)[:, :, ::2])
    refuses("scales must be torch.float32", scales=pool.scales.double())
    refuses(r"scales must have shape \(9, 64\)", scales=pool.scales[1:])
    refuses("scales must be contiguous", scales=pool.scales.repeat(1, 2)[:, ::2])
    refuses("scales must be finite at live slots", scales=pool.scales * torch.nan)
    refuses("scales must be finite at live slots", scales=pool.scales * torch.inf)
    refuses(
        "scales must be finite at live slots, got a score of -inf",
        scales=pool.scales * torch.inf,
        codes=-pool.codes.abs() - 1,
        query_codes=queries.codes.abs() // 2 + 1,
        verify=good["verify"][:, :0],
    )
    refuses("item_ids must be torch.int64", item_ids=pool.item_ids.int())
    refuses(r"item_ids must have shape \(9, 64\)", item_ids=pool.item_ids[1:])
    refuses("item_ids must be contiguous", item_ids=pool.item_ids.repeat(1, 2)[:, ::2])
    refuses("planes must hold the live plane", planes=pool.planes[:0])
    refuses("columns must have shape", columns=pool.columns[:, 1:])
    refuses("terms must be torch.int64", terms=pool.terms.int())
    refuses("programs must be torch.int64", programs=good["programs"].int())
    refuses(r"programs must have shape \(2, L, 4\)", programs=good["programs"][:1])
    refuses("unknown opcode 99", programs=good["programs"] + 99)
    refuses("verify must be torch.int64", verify=good["verify"].int())
    refuses(r"verify must have shape \(2, Lv, 4\)", verify=good["verify"][:1])
    refuses("unknown opcode 99", verify=good["verify"] + 99)
    refuses("excluded must be torch.int64", excluded=queries.excluded.int())
    refuses(r"excluded must have shape \(2, E\)", excluded=queries.excluded[:1])
    refuses(r"excluded must be in \[-1, 576\), got 576", excluded=queries.excluded * 0 + 576)
    refuses("excluded must be on the device", excluded=queries.excluded.to("meta"))
    refuses("num_results must be at least 1, got 0", num_results=0)


def test_a_bad_scale_at_a_slot_that_is_not_live_does_no_harm(pool_of: PoolOf) -> None:
    pool = pool_of(14, distinct_scores=True)
    queries = make_queries(14, pool, 2)
    expected = scan(pool, queries, 30)
    dead = torch.tensor([not pool.bit(0, slot) for slot in range(pool.num_slots)])
    pool.scales.view(-1)[dead] = torch.nan
    pool.item_ids.view(-1)[dead] = -1
    assert_same(scan(pool, queries, 30), expected)


def test_operator_keeps_its_torch_contract(pool_of: PoolOf, programs_of: ProgramsOf) -> None:
    pool = pool_of(0)
    queries = make_queries(0, pool, 2, exclusions=2)
    queries = queries._replace(
        programs=programs_of([[[FilterOp.PLANE, 1, 0, 0]], []]),
        verify=programs_of([[], [[FilterOp.TERM, 0, 0, 1]]]),
    )
    torch.library.opcheck(
        torch.ops.silvershard.ivf_scan.default,
        (
            queries.codes,
            queries.scales,
            queries.clusters,
            *pool.scan_arguments(),
            queries.programs,
            queries.verify,
            queries.excluded,
            7,
        ),
    )


@pytest.mark.slow
def test_a_compiled_scan_equals_the_eager_one(pool_of: PoolOf) -> None:
    pool = pool_of(15)
    queries = make_queries(15, pool, 3, exclusions=4)

    def scan_and_merge(queries: Queries) -> tuple[Tensor, Tensor]:
        result = scan(pool, queries, 9)
        merged = merge_topk(result.scores[None], result.item_ids[None], 5)
        return merged.scores, merged.item_ids

    compiled = torch.compile(scan_and_merge, fullgraph=True, backend="aot_eager")
    for mine, other in zip(compiled(queries), scan_and_merge(queries), strict=True):
        assert torch.equal(mine, other)
