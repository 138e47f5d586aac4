"""Values outside a contract: every implementation refuses them and names the same clause."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    PAD_TERM,
    ValueOp,
    bloom_build,
    coarse_probe,
    count_eligible,
    eligibility,
    gather_linear,
    ivf_scan,
    merge_topk,
    native_library,
    quantize_rows,
    refine,
    select_topk,
    value_program,
)

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["scalar", "avx2", "avx512"], indirect=True),
]

PoolOf = Callable[..., Any]

NAN, INF = math.nan, math.inf
HUGE, TINY = (1 << 62), -(1 << 63)


def refusal(operator: Callable[..., Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"\w") as refused:
        operator(**arguments)
    return str(refused.value)


def check_refusal(
    operator: Callable[..., Any], good: dict[str, Any], name: str, place: int, value: float
) -> None:
    """One value of one argument is changed; then the operator must refuse, and before not."""
    operator(**good)
    bad = good | {name: good[name].clone()}
    bad[name].view(-1)[place] = value
    message = refusal(operator, bad)
    with native_library.use("reference"):
        assert message == refusal(operator, bad)


# Of the queries only the last is wrong, of the index one value that every query reads.
@pytest.mark.parametrize("num_queries", [1, 9, 64])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        *(("query_scales", -1, value) for value in (NAN, INF, -INF)),
        *(("clusters", -1, value) for value in (1, -2, 1 << 30, -(1 << 31))),
        *(("excluded", -1, value) for value in (12 * 64, -2, HUGE, TINY)),
        *(("page_table", 0, value) for value in (12, -2, (1 << 31) - 1, -(1 << 31))),
        *(("programs", -4, value) for value in (9, -1, HUGE, 5)),
        *(("verify", -4, value) for value in (9, -1, HUGE, 5)),
        *(("scales", 64, value) for value in (NAN, INF, 3e38)),
    ],
)
def test_a_bad_value_of_a_scan(
    name: str, place: int, value: float, num_queries: int, pool_of: PoolOf
) -> None:
    pool = pool_of(4, num_pages=12, live=1.0)
    # Every query reads page 1, whose first slot scores best.
    pool.page_table = torch.arange(-1, 10, dtype=torch.int32).roll(-2).view(1, -1).contiguous()
    pool.codes[1, 0] = 127
    queries = pool.everywhere(4, num_queries, exclusions=3)
    queries.excluded[:] = -1
    queries.codes[:] = 127
    no_operation = torch.zeros((num_queries, 2, 4), dtype=torch.int64)
    queries = queries._replace(programs=no_operation, verify=no_operation)
    names = ["query_codes", "query_scales", "clusters", "page_table", "codes", "scales"]
    names += ["item_ids", "planes", "columns", "terms", "programs", "verify", "excluded"]
    good = dict(zip(names, pool.arguments(queries), strict=True)) | {"num_results": 20}
    check_refusal(ivf_scan, good, name, place, value)


def arguments_of(operator: Callable[..., Any]) -> dict[str, Any]:
    query, centroids = torch.ones(3, 4), torch.ones(50, 4)
    queries, clusters = quantize_rows(query), quantize_rows(centroids)
    cache, slots = torch.ones(2, 64, 4).half(), torch.zeros((3, 9), dtype=torch.int64)
    scores, item_ids = torch.ones(2, 3, 40), torch.arange(240).view(2, 3, 40)
    filters = {
        "planes": torch.ones(2, 3, 1).long(),
        "columns": torch.ones(0, 3, 64).long(),
        "terms": torch.ones(3, 64, 0).long(),
        "programs": torch.zeros((2, 2, 4), dtype=torch.int64),
    }
    table: dict[Callable[..., Any], dict[str, Any]] = {
        coarse_probe: {
            "query": query,
            "query_codes": queries.codes,
            "query_scales": queries.scales,
            "centroids": centroids,
            "centroid_codes": clusters.codes,
            "centroid_scales": clusters.scales,
            "probes": 2,
        },
        quantize_rows: {"x": query},
        refine: {"query": query[:, None], "cache": cache, "slots": slots},
        gather_linear: {
            "cache": cache,
            "slots": slots,
            "weight": torch.ones(3, 4, 2),
            "bias": torch.ones(3, 2),
        },
        select_topk: {"scores": scores[0], "item_ids": item_ids[0], "k": 3},
        merge_topk: {"scores": scores, "item_ids": item_ids, "k": 3},
        eligibility: filters
        | {
            "pages": torch.zeros((2, 3), dtype=torch.int32),
            "excluded": torch.zeros((2, 3), dtype=torch.int64),
        },
        count_eligible: filters,
        value_program: {
            "columns": torch.ones(9, 1),
            "request": torch.zeros(9, dtype=torch.int64),
            "programs": torch.tensor([[[1, 0], [0, 0]]] * 2, dtype=torch.int32),
            "constants": torch.ones(2, 2),
        },
        bloom_build: {
            "planes": torch.zeros(9, 3, 1).long(),
            "slots": torch.arange(9),
            "terms": torch.ones(9, 2).long(),
            "first_plane": 1,
            "num_planes": 8,
            "num_hashes": 2,
            "seed": 0,
        },
    }
    return table[operator]


@pytest.mark.parametrize(
    ("operator", "name", "values"),
    [
        (coarse_probe, "query", [NAN, INF, -INF]),
        (coarse_probe, "query_scales", [NAN, INF, -INF]),
        (coarse_probe, "centroid_scales", [NAN, INF, -INF]),
        (quantize_rows, "x", [NAN, INF, -INF]),
        (refine, "query", [NAN, INF, -INF]),
        (refine, "slots", [128, -2, HUGE, TINY]),
        (gather_linear, "slots", [128, -2, HUGE, TINY]),
        (select_topk, "scores", [NAN]),
        (merge_topk, "scores", [NAN]),
        (eligibility, "programs", [9, -1, HUGE]),
        (eligibility, "pages", [3, -2, (1 << 31) - 1]),
        (eligibility, "excluded", [192, -2, HUGE, TINY]),
        (count_eligible, "programs", [9, -1, HUGE]),
        (value_program, "request", [2, -1, HUGE]),
        (value_program, "programs", [24, -1, 3, (1 << 31) - 1]),
        (value_program, "constants", [NAN]),
        (bloom_build, "slots", [192, -1, 4, HUGE]),
        (bloom_build, "terms", [-1, -PAD_TERM]),
    ],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_bad_value_of_another_operator(
    operator: Callable[..., Any], name: str, values: list[float], place: str
) -> None:
    good = arguments_of(operator)
    # The last row of a program, and its opcode.
    last = {eligibility: -4, count_eligible: -4, value_program: -2}
    at = 0 if place == "first" else last[operator] if name == "programs" else -1
    for value in values:
        check_refusal(operator, good, name, at, value)
    if operator is bloom_build:
        before = good["planes"].clone()
        refusal(operator, good | {"slots": good["slots"] - 1})
        assert torch.equal(good["planes"], before)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 60_000.0])
def test_a_score_that_is_not_finite(value: float) -> None:
    good = arguments_of(refine) | {"slots": torch.tensor([[5, -1], [127, 0], [1, 1]])}
    if value == 60_000.0:
        good["query"] = torch.full((3, 1, 4), 3e38)
        check = good | {"query": torch.ones(3, 1, 4)}
        refine(**check)
        assert "must be finite at the slots asked for" in refusal(refine, good)
    else:
        check_refusal(refine, good, "cache", -1, value)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("probes", [1, 2, 50])
def test_a_product_with_a_centroid_that_overflows(sign: float, probes: int) -> None:
    good = arguments_of(coarse_probe) | {"probes": probes}
    good["centroids"] = torch.full((50, 4), sign * 3e38)
    message = refusal(coarse_probe, good | {"query": torch.full((3, 4), 2.0)})
    assert "must be finite in float32, got an overflow" in message


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("probes", [2, 50])
def test_a_centroid_that_is_scored_exactly_and_not_finite(value: float, probes: int) -> None:
    # Only what the shortlist holds is read by the native operator.
    good = arguments_of(coarse_probe) | {"probes": probes}
    check_refusal(coarse_probe, good, "centroids", 0, value)
    assert "centroids must be finite" in refusal(
        coarse_probe, good | {"centroids": good["centroids"] * value}
    )


def test_a_score_of_minus_infinity_is_no_padding_where_a_program_verifies(
    pool_of: PoolOf,
) -> None:
    pool = pool_of(4, num_pages=3, num_clusters=1, live=1.0)
    pool.codes[:] = 127
    queries = pool.everywhere(4, 1)
    queries.codes[:] = -127
    queries = queries._replace(verify=torch.tensor([[[1, 0, 0, 0]]]))
    pool.scan(queries, 20)
    pool.scales[:] = INF
    with pytest.raises((ValueError, RuntimeError)):
        pool.scan(queries, 20)


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_bad_values_that_nobody_asks_for_do_no_harm() -> None:
    good = arguments_of(refine) | {"slots": torch.tensor([[5, -1], [127, 0], [1, 1]])}
    for operator in (refine, gather_linear):
        arguments = arguments_of(operator) | {"slots": good["slots"]}
        expected = tensors_of(operator(**arguments))
        arguments["cache"][1, 3] = NAN
        for mine, other in zip(tensors_of(operator(**arguments)), expected, strict=True):
            assert torch.equal(mine, other)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("operator", ["quantize_rows", "refine", "value_program", "ivf_scan"])
def test_a_bad_value_that_one_of_several_threads_finds(operator: str, pool_of: PoolOf) -> None:
    if operator == "quantize_rows":
        check_refusal(quantize_rows, {"x": torch.ones(5000, 8)}, "x", -1, NAN)
    elif operator == "refine":
        slots = torch.zeros(1, 600, dtype=torch.int64)
        good = {"query": torch.ones(1, 1, 4), "cache": torch.ones(1, 64, 4).half(), "slots": slots}
        check_refusal(refine, good, "slots", -1, 64)
    elif operator == "value_program":
        request = torch.zeros(5000, dtype=torch.int64)
        programs = torch.tensor([[[ValueOp.COLUMN, 0]]], dtype=torch.int32)
        good = {"columns": torch.ones(5000, 1), "request": request, "programs": programs}
        check_refusal(value_program, good | {"constants": torch.ones(1, 1)}, "request", -1, 1)
    else:
        pool = pool_of(4, num_pages=12, live=1.0)
        queries = pool.everywhere(4, 9, exclusions=0)
        names = ["query_codes", "query_scales", "clusters", "page_table", "codes", "scales"]
        names += ["item_ids", "planes", "columns", "terms", "programs", "verify", "excluded"]
        good = dict(zip(names, pool.arguments(queries), strict=True)) | {"num_results": 20}
        check_refusal(ivf_scan, good, "page_table", 0, 12)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_a_negative_id_of_a_live_slot(num_queries: int, pool_of: PoolOf) -> None:
    pool = pool_of(4, live=1.0)
    pool.item_ids.sub_(1 << 40)
    arguments = (*pool.arguments(pool.everywhere(4, num_queries)), 20)
    for name in (native_library.in_use(), "reference"):
        with (
            native_library.use(name),
            pytest.raises(ValueError, match="item_ids must be at least 0 at live slots"),
        ):
            ivf_scan(*arguments)


def test_a_page_that_stands_twice_is_never_called_allowed(pool_of: PoolOf) -> None:
    pool = pool_of(4, live=1.0)
    pool.page_table[1] = pool.page_table[0]
    arguments = (*pool.arguments(pool.everywhere(4, 9)), 20)
    with pytest.raises(ValueError, match="page_table must hold each page once"):
        ivf_scan(*arguments)


def test_an_infinite_scale_beside_a_verify_program(pool_of: PoolOf) -> None:
    pool = pool_of(4, live=1.0)
    pool.scales[0, 3] = -INF
    queries = pool.everywhere(4, 1)
    queries.codes[:] = 1
    pool.codes[0, 3] = 1
    queries = queries._replace(verify=torch.zeros((1, 1, 4), dtype=torch.int64))
    with pytest.raises(ValueError, match="scales must be finite"):
        ivf_scan(*pool.arguments(queries), 20_000)
