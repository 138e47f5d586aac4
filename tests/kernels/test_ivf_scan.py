import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import ScanResult, ivf_scan, merge_topk, pack_bits

pytestmark = pytest.mark.usefixtures("implementation")

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]
AssertSame = Callable[..., None]

# The package re-exports the function under the name of its module.
MODULE = import_module("silvershard.kernels.ivf_scan")


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
    queries = pool.queries(0, 1)._replace(
        codes=torch.tensor([[1, 1]], dtype=torch.int8),
        scales=torch.tensor([2.0]),
        clusters=torch.tensor([[1, -1]], dtype=torch.int32),
    )
    result = pool.scan(queries, 5)
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
    queries = pool.queries(
        seed, num_queries, probes=rng.choice([1, 3, 5]), exclusions=rng.choice([0, 1, 50])
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
    result = pool.scan(queries, rng.choice([1, 7, 40, 1000]))
    pool.check(queries, result)


@pytest.mark.parametrize("dim", [16, 100, 1024])
def test_extreme_codes_are_summed_exactly(dim: int, pool_of: PoolOf) -> None:
    pool = pool_of(dim, dim=dim, num_pages=3, num_clusters=2, live=1.0)
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, pool.codes.shape, generator=generator) * 254 - 127
    # Sums near 127 * 127 * dim that differ by one show any rounding.
    pool.codes[:] = torch.where(torch.rand(signs.shape, generator=generator) < 0.01, signs, 127)
    pool.codes[0, :, 0] = torch.arange(64)
    queries = pool.queries(dim, 3, probes=2)
    queries.codes[:] = 127
    queries.codes[1, ::3] = -127
    queries.codes[2, -1] = 126
    queries.clusters[:] = torch.tensor([0, 1])
    pool.check(queries, pool.scan(queries, 200))


def test_equal_scores_are_ordered_by_item_id_through_every_cut(pool_of: PoolOf) -> None:
    pool = pool_of(1, live=1.0)
    pool.codes[:] = 1
    queries = pool.queries(1, 4, probes=5)
    queries.clusters[:] = torch.arange(5)
    for num_results in (1, 10, 100, 512, 600):
        result = pool.scan(queries, num_results)
        expected = pool.item_ids[:-1].flatten().sort().values[:num_results].tolist()
        expected += [-1] * (num_results - len(expected))
        assert result.item_ids.tolist() == [expected] * 4


def test_a_batch_equals_its_rows_alone_bit_for_bit(
    pool_of: PoolOf, rows_of: RowsOf, programs_of: ProgramsOf, assert_same: AssertSame
) -> None:
    rng = random.Random(0)
    for distinct_scores in (True, False):
        pool = pool_of(3, num_pages=30, num_clusters=12, distinct_scores=distinct_scores)
        queries = pool.queries(3, 64, probes=6, exclusions=30)
        programs = [rows_of(rng, pool, 2, with_terms=False) for _ in range(64)]
        verify = [rows_of(rng, pool, 1, with_terms=True) for _ in range(64)]
        programs[::3] = [[] for _ in programs[::3]]
        verify[::2] = [[] for _ in verify[::2]]
        queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
        whole = pool.scan(queries, 50)
        for row in range(64):
            one = slice(row, row + 1)
            assert_same(
                pool.scan(queries.rows(one), 50), ScanResult(*(part[one] for part in whole))
            )


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_passes_over_few_queries_equal_one_pass(
    pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch, assert_same: AssertSame
) -> None:
    pool = pool_of(4)
    queries = pool.queries(4, 11, exclusions=5)
    whole = pool.scan(queries, 30)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 3 * pool.num_slots)
    assert_same(pool.scan(queries, 30), whole)


def test_a_thousand_queries_are_answered(pool_of: PoolOf) -> None:
    pool = pool_of(5, num_pages=4, num_clusters=4)
    queries = pool.queries(5, 1024, probes=2)
    result = pool.scan(queries, 3)
    some = slice(0, 1024, 128)
    pool.check(queries.rows(some), ScanResult(*(part[some] for part in result)))


def test_a_page_is_scanned_once_however_often_its_cluster_is_named(
    pool_of: PoolOf, assert_same: AssertSame
) -> None:
    pool = pool_of(6)
    queries = pool.queries(6, 3)
    once = queries._replace(clusters=torch.tensor([[0], [1], [2]], dtype=torch.int32))
    often = queries._replace(clusters=torch.tensor([[0, 0, -1], [-1, 1, 1], [2, 2, 2]]).int())
    assert_same(pool.scan(once, 20), pool.scan(often, 20))


def test_shards_of_the_pages_merge_to_the_answer_of_the_whole(pool_of: PoolOf) -> None:
    whole = pool_of(7, num_pages=12)
    queries = whole.queries(7, 5, probes=5)
    expected = whole.scan(queries, 40)
    for num_shards in (2, 3, 7):
        results = []
        for shard in range(num_shards):
            part = pool_of(7, num_pages=12)
            part.page_table = torch.where(
                part.page_table % num_shards == shard, part.page_table, -1
            ).int()
            results.append(part.scan(queries, 40))
        merged = merge_topk(
            torch.stack([result.scores for result in results]),
            torch.stack([result.item_ids for result in results]),
            40,
        )
        assert torch.equal(merged.scores, expected.scores)
        assert torch.equal(merged.item_ids, expected.item_ids)
        assert torch.equal(sum(result.probed for result in results), expected.probed)


def test_excluding_everything_leaves_only_padding(pool_of: PoolOf) -> None:
    pool = pool_of(12, live=1.0)
    queries = pool.queries(12, 2, probes=4)
    everything = torch.arange(pool.num_slots).repeat(2, 2)
    result = pool.scan(queries._replace(excluded=everything), 5)
    assert (result.scores == -torch.inf).all()
    assert (result.item_ids == -1).all()
    assert (result.slots == -1).all()
    assert not result.eligible.any()
    assert result.probed.all()


@pytest.mark.parametrize("num_queries", [0, 1, 3])
def test_an_index_without_items_answers_with_padding(num_queries: int, pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = pool.queries(0, max(1, num_queries)).rows(slice(num_queries))
    pool.planes = pool.planes[:, :0].contiguous()
    pool.columns = pool.columns[:, :0].contiguous()
    pool.terms, pool.codes, pool.scales = pool.terms[:0], pool.codes[:0], pool.scales[:0]
    pool.item_ids = pool.item_ids[:0]
    for page_table in (torch.full_like(pool.page_table, -1), pool.page_table[:, :0]):
        pool.page_table = page_table
        result = pool.scan(queries, 4)
        assert result.item_ids.tolist() == [[-1] * 4] * num_queries
        assert result.probed.tolist() == [0] * num_queries


def test_no_probes_find_nothing(pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = pool.queries(0, 2)
    for clusters in (torch.empty((2, 0)).int(), torch.full((2, 3), -1).int()):
        result = pool.scan(queries._replace(clusters=clusters), 3)
        assert (result.slots == -1).all()
        assert not result.probed.any()


def test_a_tiny_negative_score_that_rounds_to_zero_is_a_plain_zero(pool_of: PoolOf) -> None:
    pool = pool_of(13, live=1.0)
    pool.scales[:] = 1e-30
    queries = pool.queries(13, 1, probes=5)
    queries.clusters[:] = torch.arange(5)
    queries.scales[:] = 1e-30
    result = pool.scan(queries, 20)
    assert result.item_ids[0].tolist() == pool.item_ids[:-1].flatten().sort().values[:20].tolist()
    assert not result.scores.signbit().any()


def test_bad_input_is_refused(pool_of: PoolOf) -> None:
    pool = pool_of(0)
    queries = pool.queries(0, 2, exclusions=1)
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


def test_a_bad_scale_at_a_slot_that_is_not_live_does_no_harm(
    pool_of: PoolOf, assert_same: AssertSame
) -> None:
    pool = pool_of(14, distinct_scores=True)
    queries = pool.queries(14, 2)
    expected = pool.scan(queries, 30)
    dead = torch.tensor([not pool.bit(0, slot) for slot in range(pool.num_slots)])
    pool.scales.view(-1)[dead] = torch.nan
    pool.item_ids.view(-1)[dead] = -1
    assert_same(pool.scan(queries, 30), expected)
