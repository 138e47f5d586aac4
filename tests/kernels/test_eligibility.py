import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    PAD_TERM,
    FilterOp,
    Relation,
    bloom_build,
    bloom_positions,
    count_eligible,
    eligibility,
    pack_bits,
    popcount,
    unpack_bits,
)

pytestmark = pytest.mark.usefixtures("implementation")

PoolOf = Callable[..., Any]
RowsOf = Callable[..., list[list[int]]]
ProgramsOf = Callable[..., Tensor]

# The package re-exports the function under the name of its module.
MODULE = import_module("silvershard.kernels.eligibility")


def filters(pool: Any) -> tuple[Tensor, Tensor, Tensor]:
    return pool.planes, pool.columns, pool.terms


def no_exclusions(num_queries: int) -> Tensor:
    return torch.empty((num_queries, 0), dtype=torch.int64)


def test_hand_computed_case(programs_of: ProgramsOf) -> None:
    bits = torch.zeros((2, 2, 64), dtype=torch.bool)
    bits[0, 0, :6] = True
    bits[0, 1, 63] = True
    bits[1, 0, 4:8] = True
    columns = torch.zeros((1, 2, 64), dtype=torch.int64)
    columns[0, 0, 5] = 9
    terms = torch.full((2, 64, 1), PAD_TERM)
    terms[1, 63, 0] = 77
    programs = programs_of(
        [
            [],
            [[FilterOp.PLANE, 1, 0, 0]],
            [[FilterOp.PLANE, 1, 0, 0], [FilterOp.NOT, 0, 0, 0]],
            [[FilterOp.COMPARE, 0, Relation.GT, 8]],
            [[FilterOp.TERM, 0, 0, 77]],
            [[FilterOp.FALSE, 0, 0, 0]],
        ]
    )
    pages = torch.tensor([[0, 1, -1]] * 6, dtype=torch.int32)
    excluded = torch.tensor([[1, 1, 64 + 63], [5, -1, -1]] + [[-1] * 3] * 4)
    words = eligibility(pack_bits(bits), columns, terms, programs, pages, excluded)
    top = -(1 << 63)
    assert words[..., 0].tolist() == [
        [0b111101, 0, 0],
        [0b010000, 0, 0],
        [0b001111, top, 0],
        [0b100000, 0, 0],
        [0, top, 0],
        [0, 0, 0],
    ]
    counts = count_eligible(pack_bits(bits), columns, terms, programs)
    assert counts.tolist() == [7, 2, 5, 1, 1, 0]


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("num_queries", [1, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_random_programs_equal_one_slot_at_a_time(
    page_size: int,
    num_queries: int,
    seed: int,
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
) -> None:
    rng = random.Random(seed)
    pool = pool_of(seed, page_size=page_size, num_pages=5)
    programs = [rows_of(rng, pool, 4, with_terms=True) for _ in range(num_queries)]
    if num_queries > 2:
        programs[0] = programs[1] = []
    pages = [[rng.randrange(-1, 5) for _ in range(6)] for _ in range(num_queries)]
    excluded = [[rng.randrange(-1, pool.num_slots) for _ in range(40)] for _ in pages]
    words = eligibility(
        *filters(pool),
        programs_of(programs),
        torch.tensor(pages, dtype=torch.int32),
        torch.tensor(excluded),
    )
    assert words.shape == (num_queries, 6, page_size // 64)
    bits = unpack_bits(words)
    for query in range(num_queries):
        allowed = [
            pool.bit(0, slot) and pool.accepts(programs[query], slot)
            for slot in range(pool.num_slots)
        ]
        for place, page in enumerate(pages[query]):
            assert bits[query, place].tolist() == [
                page >= 0
                and allowed[page * page_size + offset]
                and page * page_size + offset not in excluded[query]
                for offset in range(page_size)
            ]
    counts = count_eligible(*filters(pool), programs_of(programs))
    assert counts.tolist() == [
        sum(pool.bit(0, slot) and pool.accepts(program, slot) for slot in range(pool.num_slots))
        for program in programs
    ]


def test_dead_slots_and_absent_pages_are_never_eligible(
    pool_of: PoolOf, programs_of: ProgramsOf
) -> None:
    pool = pool_of(0, live=0.0)
    always = programs_of([[[FilterOp.TRUE, 0, 0, 0]], [[FilterOp.FALSE] + [0] * 3, [7, 0, 0, 0]]])
    pages = torch.tensor([[0, 1, 2], [-1, -1, -1]], dtype=torch.int32)
    assert not eligibility(*filters(pool), always, pages, no_exclusions(2)).any()
    pool = pool_of(0, live=1.0)
    words = eligibility(*filters(pool), always, pages, no_exclusions(2))
    assert (words[0] == -1).all()
    assert (words[1] == 0).all()


def test_excluding_everything_leaves_nothing(pool_of: PoolOf) -> None:
    pool = pool_of(0, page_size=128)
    everything = torch.arange(pool.num_slots).flip(0).repeat(2)[None]
    program = torch.empty((1, 0, 4), dtype=torch.int64)
    pages = torch.arange(9, dtype=torch.int32)[None]
    assert not eligibility(*filters(pool), program, pages, everything).any()
    all_but_one = everything[everything != 200][None]
    words = eligibility(*filters(pool), program, pages, all_but_one)
    assert int(popcount(words).sum()) == int(pool.bit(0, 200))


def test_duplicate_exclusions_count_once(pool_of: PoolOf) -> None:
    pool = pool_of(0, live=1.0)
    program = torch.empty((1, 0, 4), dtype=torch.int64)
    pages = torch.zeros((1, 1), dtype=torch.int32)
    once = eligibility(*filters(pool), program, pages, torch.tensor([[63, 5]]))
    many = eligibility(*filters(pool), program, pages, torch.tensor([[63, 5, 63, -1, 5, 63]]))
    assert torch.equal(once, many)
    assert int(popcount(once).sum()) == 62


def test_a_batch_equals_its_rows_alone(
    pool_of: PoolOf, rows_of: RowsOf, programs_of: ProgramsOf
) -> None:
    rng = random.Random(1)
    pool = pool_of(1)
    programs = programs_of([rows_of(rng, pool, 3, with_terms=True) for _ in range(64)])
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(-1, 9, (64, 5), generator=generator, dtype=torch.int32)
    excluded = torch.randint(-1, pool.num_slots, (64, 20), generator=generator)
    whole = eligibility(*filters(pool), programs, pages, excluded)
    counts = count_eligible(*filters(pool), programs)
    for row in range(64):
        one = slice(row, row + 1)
        alone = eligibility(*filters(pool), programs[one], pages[one], excluded[one])
        assert torch.equal(alone[0], whole[row])
        assert count_eligible(*filters(pool), programs[one]).tolist() == [int(counts[row])]


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_passes_over_few_pages_equal_one_pass(
    pool_of: PoolOf,
    rows_of: RowsOf,
    programs_of: ProgramsOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(2)
    pool = pool_of(2)
    programs = programs_of([rows_of(rng, pool, 4, with_terms=True) for _ in range(9)])
    pages = torch.arange(9, dtype=torch.int32).repeat(9, 1)
    whole = eligibility(*filters(pool), programs, pages, no_exclusions(9))
    counts = count_eligible(*filters(pool), programs)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", 2 * 64 * pool.terms.shape[2])
    assert torch.equal(eligibility(*filters(pool), programs, pages, no_exclusions(9)), whole)
    assert torch.equal(count_eligible(*filters(pool), programs), counts)


@pytest.mark.parametrize("num_queries", [0, 1, 3])
def test_nothing_to_look_at_gives_nothing(num_queries: int, pool_of: PoolOf) -> None:
    pool = pool_of(0)
    programs = torch.zeros((num_queries, 2, 4), dtype=torch.int64)
    none = torch.empty((num_queries, 0), dtype=torch.int32)
    words = eligibility(*filters(pool), programs, none, no_exclusions(num_queries))
    assert words.shape == (num_queries, 0, 1)
    empty = pool_of(0, num_pages=1)
    planes, columns, terms = empty.planes[:, :0], empty.columns[:, :0], empty.terms[:0]
    planes, columns = planes.contiguous(), columns.contiguous()
    absent = torch.full((num_queries, 4), -1, dtype=torch.int32)
    words = eligibility(planes, columns, terms, programs, absent, no_exclusions(num_queries))
    assert words.tolist() == [[[0]] * 4] * num_queries
    assert count_eligible(planes, columns, terms, programs).tolist() == [0] * num_queries


def test_a_bloom_term_finds_every_item_that_has_it_and_not_excludes_none() -> None:
    generator = torch.Generator().manual_seed(0)
    num_slots = 640
    terms = torch.randint(0, 40, (10, 64, 3), generator=generator)
    planes = torch.zeros((17, 10, 1), dtype=torch.int64)
    planes[0] = -1
    hashing = {"num_planes": 16, "num_hashes": 2, "seed": 3}
    bloom_build(planes, torch.arange(num_slots), terms.view(num_slots, 3), first_plane=1, **hashing)
    columns = torch.empty((0, 10, 64), dtype=torch.int64)
    false_positives = 0
    for key in range(40):
        first, second = (bloom_positions(torch.tensor(key), **hashing) + 1).tolist()
        rows = [[FilterOp.PLANE, first, 0, 0], [FilterOp.PLANE, second, 0, 0], [5, 0, 0, 0]]
        words = eligibility(
            planes,
            columns,
            terms,
            torch.tensor([rows]),
            torch.arange(10, dtype=torch.int32)[None],
            no_exclusions(1),
        )
        found = unpack_bits(words).flatten()
        has = (terms == key).any(-1).flatten()
        assert not (has & ~found).any()
        false_positives += int((found & ~has).sum())
    assert false_positives > 0


def test_bad_input_is_refused(pool_of: PoolOf) -> None:
    pool = pool_of(0)
    good = {
        "planes": pool.planes,
        "columns": pool.columns,
        "terms": pool.terms,
        "programs": torch.zeros((2, 1, 4), dtype=torch.int64),
        "pages": torch.zeros((2, 3), dtype=torch.int32),
        "excluded": torch.zeros((2, 3), dtype=torch.int64),
    }

    def refuses(message: str, **changes: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            eligibility(**(good | changes))
        if changes.keys() <= {"planes", "columns", "terms"}:
            with pytest.raises(ValueError, match=message):
                count_eligible(**{name: (good | changes)[name] for name in list(good)[:4]})

    refuses("planes must be torch.int64", planes=pool.planes.int())
    refuses(r"planes must have shape \(J, N, W\)", planes=pool.planes[0])
    refuses("planes must hold the live plane", planes=pool.planes[:0])
    refuses(r"G in \(64, 128\), got W = 3", planes=pool.planes.repeat(1, 1, 3))
    refuses("planes must be contiguous", planes=pool.planes.repeat(2, 1, 1)[::2])
    refuses("columns must be torch.int64", columns=pool.columns.float())
    refuses(r"columns must have shape \(V, 9, 64\)", columns=pool.columns[:, 1:])
    refuses("columns must be on the device of planes", columns=pool.columns.to("meta"))
    refuses("columns must be contiguous", columns=pool.columns.repeat(2, 1, 1)[::2])
    refuses("terms must be torch.int64", terms=pool.terms.int())
    refuses(r"terms must have shape \(9, 64, F\)", terms=pool.terms[1:])
    refuses("terms must be contiguous", terms=pool.terms.repeat(1, 1, 2)[:, :, ::2])
    refuses("programs must be torch.int64", programs=good["programs"].int())
    refuses(r"programs must have shape \(Q, L, 4\)", programs=good["programs"][0])
    refuses("unknown opcode 99", programs=good["programs"] + 99)
    refuses("pages must be torch.int32", pages=good["pages"].long())
    refuses(r"pages must have shape \(2, M\)", pages=good["pages"][:1])
    refuses(r"pages must be in \[-1, 9\), got 9", pages=good["pages"] + 9)
    refuses(r"pages must be in \[-1, 9\), got -2", pages=good["pages"] - 2)
    refuses("pages must be on the device", pages=good["pages"].to("meta"))
    refuses("excluded must be torch.int64", excluded=good["excluded"].int())
    refuses(r"excluded must have shape \(2, E\)", excluded=good["excluded"][:1])
    refuses(r"excluded must be in \[-1, 576\), got 576", excluded=good["excluded"] + 576)
    refuses(r"excluded must be in \[-1, 576\), got -2", excluded=good["excluded"] - 2)
    with pytest.raises(ValueError, match="unknown opcode 99"):
        count_eligible(pool.planes, pool.columns, pool.terms, good["programs"] + 99)
    with pytest.raises(ValueError, match=r"programs must be torch.int64"):
        count_eligible(pool.planes, pool.columns, pool.terms, good["programs"].int())


def test_a_malformed_program_is_refused_though_no_page_is_asked_for(pool_of: PoolOf) -> None:
    programs = torch.full((1, 1, 4), 99)
    with pytest.raises(ValueError, match="unknown opcode 99"):
        eligibility(
            *filters(pool_of(0)), programs, torch.empty((1, 0), dtype=torch.int32), no_exclusions(1)
        )


@pytest.mark.parametrize("page_size", [64, 128])
def test_a_pool_has_no_more_slots_than_can_be_numbered(page_size: int) -> None:
    def pool(num_pages: int) -> tuple[Tensor, Tensor, Tensor]:
        words = torch.empty((1, num_pages, page_size // 64), dtype=torch.int64, device="meta")
        keys = torch.empty((0, num_pages, page_size), dtype=torch.int64, device="meta")
        return words, keys, keys.view(num_pages, page_size, 0)

    most = (1 << 32) // page_size
    MODULE.check_pool(*pool(most - 1))
    with pytest.raises(ValueError, match=r"at most 4294967295 slots, got N G = 4294967296"):
        MODULE.check_pool(*pool(most))
