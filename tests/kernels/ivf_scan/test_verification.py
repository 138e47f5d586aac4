from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import PAD_TERM, FilterOp, bloom_build, bloom_positions

pytestmark = pytest.mark.usefixtures("implementation")

PoolOf = Callable[..., Any]
ProgramsOf = Callable[..., Tensor]


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
    has: Tensor = (pool.terms == key).any(-1).flatten()
    return has


def test_verification_rejects_exactly_the_false_positives_of_bloom_planes(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool, hashing = bloom_pool(pool_of)
    queries = pool.queries(8, 6, probes=5)
    queries.clusters[:] = torch.arange(5)
    programs = [bloom_rows(key, hashing) for key in range(6)]
    verify = [[[FilterOp.TERM, 0, 0, key]] for key in range(6)]
    queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
    for num_results in (1, 10, 700):
        pool.check(queries, pool.scan(queries, num_results))
    result = pool.scan(queries, 700)
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
    queries = pool.queries(9, 2, probes=5)
    queries.clusters[:] = torch.arange(5)
    # Plane 1 is exact. Under NOT the Bloom term is TRUE in the scan program.
    negated_plane = [[FilterOp.PLANE, 1, 0, 0], [FilterOp.NOT, 0, 0, 0]]
    programs = [[*negated_plane, [FilterOp.TRUE, 0, 0, 0], [FilterOp.AND, 0, 0, 0]], []]
    negated_term = [[FilterOp.TERM, 0, 0, 3], [FilterOp.NOT, 0, 0, 0]]
    verify = [[*negated_plane, *negated_term, [FilterOp.AND, 0, 0, 0]], negated_term]
    queries = queries._replace(programs=programs_of(programs), verify=programs_of(verify))
    result = pool.scan(queries, 700)
    pool.check(queries, result)
    plane = torch.tensor([pool.bit(1, slot) for slot in range(9 * 64)])
    allowed = ~has_term(pool, 3)[: 9 * 64]
    assert int((result.slots[0] >= 0).sum()) == int((allowed & ~plane).sum())
    assert int((result.slots[1] >= 0).sum()) == int(allowed.sum())


def test_results_are_full_when_verification_rejects_nearly_all(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool = pool_of(10, live=1.0, distinct_scores=True)
    pool.terms[:] = PAD_TERM
    queries = pool.queries(10, 3, probes=5)
    queries.clusters[:] = torch.arange(5)
    worst = []
    for query in range(3):
        ranked, _, _ = pool.ranked(queries, query)
        for _, _, slot in ranked[-4:]:
            page, offset = divmod(slot, 64)
            pool.terms[page, offset, query] = 100 + query
        worst.append([slot for _, _, slot in ranked[-4:]])
    verify = programs_of([[[FilterOp.TERM, 0, 0, 100 + query]] for query in range(3)])
    result = pool.scan(queries._replace(verify=verify), 4)
    assert result.slots.tolist() == worst
    assert result.eligible.tolist() == [512] * 3


def test_an_updated_item_is_found_under_its_new_terms_only(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool, hashing = bloom_pool(pool_of)
    slots = torch.tensor([5, 70, 130])
    pool.terms.view(-1, 3)[slots] = torch.tensor([[40, PAD_TERM, PAD_TERM]] * 3)
    bloom_build(pool.planes, slots, pool.terms.view(-1, 3)[slots], first_plane=2, **hashing)
    queries = pool.queries(11, 7, probes=5)
    queries.clusters[:] = torch.arange(5)
    keys = [40, 0, 1, 2, 3, 4, 5]
    queries = queries._replace(
        programs=programs_of([bloom_rows(key, hashing) for key in keys]),
        verify=programs_of([[[FilterOp.TERM, 0, 0, key]] for key in keys]),
    )
    result = pool.scan(queries, 600)
    assert sorted(result.slots[0][:3].tolist()) == slots.tolist()
    assert int(result.slots[0][3]) == -1
    assert not torch.isin(result.slots[1:], slots).any()
