import json
import operator
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from silvershard.kernels import (
    PAD_TERM,
    FilterOp,
    bloom_build,
    bloom_positions,
    eligibility,
    pack_bits,
    unpack_bits,
)
from silvershard.model import filter as filter_module
from silvershard.model.catalogue import NULL_INT, Catalogue, Ragged
from silvershard.model.filter import (
    And,
    AnyItem,
    CompiledFilter,
    Expr,
    FilterError,
    Not,
    Or,
    Term,
    canonical,
    compile_filter,
    parse_filter,
)
from silvershard.model.planes import PlaneDictionary, choose_planes, encode_items
from silvershard.model.request import FilterMode
from silvershard.model.schema import Attribute, Schema

SCHEMA = Schema(
    attributes=(
        Attribute(name="genre", kind="category", dtype="string"),
        Attribute(name="tag", kind="category", dtype="string"),
        Attribute(name="code", kind="category", dtype="int"),
        Attribute(name="year", kind="number", dtype="int"),
        Attribute(name="rating", kind="number", dtype="float"),
    )
)
NUM_ITEMS = 300
GENRES = ["Comedy", "Drama", "Sci-Fi", "Film Noir", "(none)"]
TAGS = [f"tag{number}" for number in range(40)]
CODES = list(range(-3, 25))
YEARS = list(range(1988, 1996))
RATINGS = [-1.5, -0.0, 0.0, 0.1, 2.5, 3.0, 1e300]


class Item(NamedTuple):
    genre: frozenset[str]
    tag: frozenset[str]
    code: frozenset[int]
    year: int | None
    rating: float | None


def make_items() -> list[Item]:
    random = np.random.default_rng(11)

    def some(values: list[Any], most: int) -> frozenset[Any]:
        count = min(int(random.integers(0, most + 1)), len(values))
        return frozenset(values[at] for at in random.choice(len(values), count, replace=False))

    return [
        Item(
            some(GENRES, 3),
            some(TAGS, 6),
            some(CODES, 2),
            None if random.random() < 0.2 else int(random.choice(YEARS)),
            None if random.random() < 0.2 else float(random.choice(RATINGS)),
        )
        for _ in range(NUM_ITEMS)
    ]


ITEMS = make_items()


def make_catalogue() -> Catalogue:
    return Catalogue(
        item_ids=np.arange(NUM_ITEMS, dtype=np.int64),
        categories={
            name: Ragged.from_rows([sorted(getattr(item, name)) for item in ITEMS], dtype=dtype)  # type: ignore[arg-type]
            for name, dtype in (("genre", "string"), ("tag", "string"), ("code", "int"))
        },
        numbers={
            "year": np.array(
                [NULL_INT if item.year is None else item.year for item in ITEMS], dtype=np.int64
            ),
            "rating": np.array([np.nan if item.rating is None else item.rating for item in ITEMS]),
        },
        signals=np.zeros((NUM_ITEMS, 0), np.float32),
        fields={},
        features={},
    )


@dataclass
class Pool:
    """Items laid into pages of 64 slots in a scrambled order, with dead slots between them."""

    dictionary: PlaneDictionary
    planes: Tensor
    columns: Tensor
    terms: Tensor
    slots: Tensor

    def holds(self, program: Tensor) -> set[int]:
        """The items that a program passes, in the kernels' eyes."""
        num_pages = self.planes.shape[1]
        words = eligibility(
            self.planes,
            self.columns,
            self.terms,
            program[None],
            torch.arange(num_pages, dtype=torch.int32)[None],
            torch.empty((1, 0), dtype=torch.int64),
        )
        passed = unpack_bits(words)[0].flatten()
        assert int(passed.sum()) == int(passed[self.slots].sum()), "a dead slot passed"
        return set(passed[self.slots].nonzero().flatten().tolist())


def make_pool(*, bloom: bool = True, **settings: Any) -> Pool:
    catalogue = make_catalogue()
    dictionary = choose_planes(SCHEMA, catalogue, seed=5, **settings)
    if not bloom:
        # As of generations that earlier releases published.
        without = {"num_bloom_planes": 0, "terms_width": 0}
        dictionary = dictionary.model_copy(update=without)
    bits = encode_items(dictionary, SCHEMA, catalogue)
    num_pages = 7
    slots = torch.from_numpy(np.random.default_rng(2).permutation(num_pages * 64)[:NUM_ITEMS])
    live = torch.zeros(num_pages * 64, dtype=torch.bool)
    live[slots] = True
    exact = torch.zeros((dictionary.num_exact_planes, num_pages * 64), dtype=torch.bool)
    exact[:, slots] = bits.exact.T
    planes = torch.zeros((dictionary.num_planes, num_pages, 1), dtype=torch.int64)
    planes[0] = pack_bits(live.view(num_pages, 64))
    planes[1 : dictionary.first_bloom_plane] = pack_bits(exact.view(-1, num_pages, 64))
    if dictionary.num_bloom_planes:
        bloom_build(
            planes,
            slots,
            bits.terms,
            first_plane=dictionary.first_bloom_plane,
            num_planes=dictionary.num_bloom_planes,
            num_hashes=dictionary.num_hashes,
            seed=dictionary.seed,
        )
    columns = torch.zeros((dictionary.num_columns, num_pages * 64), dtype=torch.int64)
    columns[:, slots] = bits.columns.T
    terms = torch.full((num_pages * 64, dictionary.terms_width), PAD_TERM, dtype=torch.int64)
    terms[slots] = bits.terms
    return Pool(
        dictionary,
        planes,
        columns.view(-1, num_pages, 64),
        terms.view(num_pages, 64, dictionary.terms_width),
        slots,
    )


POOLS = {
    "mixed": make_pool(min_exact_share=0.1, target_false_positive_rate=0.3, num_hashes=2),
    "bloom only": make_pool(max_exact_planes=0, target_false_positive_rate=0.1),
    "exact only": make_pool(bloom=False, min_exact_share=0),
}

Predicate = Callable[[Item], bool]
Case = tuple[str, Predicate]


def spelled(draw: st.DrawFn, value: object) -> str:
    """A way to write a value: bare where that is possible, else quoted."""
    if not isinstance(value, str):
        return repr(value)
    bare = value.replace("-", "").isalnum() and value[0].isalpha()
    return value if bare and draw(st.booleans()) else json.dumps(value)


NUMBER_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
    ":": operator.eq,
}
LITERALS = [*YEARS, 1990.5, 1990.0, -1, 0, 0.1, -1.5, 2.5, 3, 10**300, -(10**30), 2**63, 1e300]


@st.composite
def leaves(draw: st.DrawFn) -> Case:
    if draw(st.booleans()):
        name = draw(st.sampled_from(["year", "rating"]))
        relation = draw(st.sampled_from(sorted(NUMBER_RELATIONS)))
        literal = draw(st.sampled_from(LITERALS))
        compare = NUMBER_RELATIONS[relation]

        def holds(item: Item) -> bool:
            number = getattr(item, name)
            return number is not None and compare(number, literal)

        return f"{name}{draw(st.sampled_from(['', ' ']))}{relation} {literal}", holds
    name = draw(st.sampled_from(["genre", "tag", "code"]))
    known = {"genre": GENRES, "tag": TAGS, "code": CODES}[name]
    absent = [999] if name == "code" else ["absent", 'quo"te\\']
    values = draw(st.lists(st.sampled_from([*known, *absent]), min_size=1, max_size=3))
    if len(values) == 1 and draw(st.booleans()):
        text = f"{name}:{spelled(draw, values[0])}"
    else:
        text = f"{name} IN ({', '.join(spelled(draw, value) for value in values)})"
    return text, lambda item: not getattr(item, name).isdisjoint(values)


@st.composite
def negations(draw: st.DrawFn, inner: st.SearchStrategy[Case]) -> Case:
    text, holds = draw(inner)
    return f"{draw(st.sampled_from(['NOT ', 'not ', '!', '! ']))}({text})", lambda item: not holds(
        item
    )


@st.composite
def joins(draw: st.DrawFn, inner: st.SearchStrategy[Case]) -> Case:
    word, join = draw(
        st.sampled_from([("AND", all), ("&", all), ("and", all), ("OR", any), ("|", any)])
    )
    cases = draw(st.lists(inner, min_size=2, max_size=4))
    text = f" {word} ".join(f"({text})" for text, _ in cases)
    return text, lambda item: join(holds(item) for _, holds in cases)


def cases(depth: int) -> st.SearchStrategy[Case]:
    if depth == 0:
        return leaves()
    inner = cases(depth - 1)
    return st.one_of(leaves(), negations(inner), joins(inner), joins(inner))


def compiled(text: str, pool: Pool, mode: FilterMode = FilterMode.DEFAULT) -> CompiledFilter:
    return compile_filter(parse_filter(text, {}, SCHEMA), pool.dictionary, SCHEMA, mode)


def check(text: str, holds: Predicate, pool: Pool) -> None:
    truth = {row for row, item in enumerate(ITEMS) if holds(item)}
    result = compiled(text, pool)
    scanned = pool.holds(result.scan)
    assert scanned >= truth, f"{text}: an eligible item is lost"
    assert scanned & pool.holds(result.verify) == truth, text
    if len(result.verify):
        assert pool.holds(result.verify) == truth, text
    else:
        assert scanned == truth, text
    assert result.upper_bound == bool(len(result.verify))


@settings(max_examples=250, deadline=None)
@given(case=cases(6), pool=st.sampled_from(sorted(POOLS)))
def test_random_filters_pass_exactly_the_items_of_the_python_sets(case: Case, pool: str) -> None:
    check(*case, POOLS[pool])


@settings(max_examples=50, deadline=None)
@given(case=cases(3), pool=st.sampled_from(sorted(POOLS)))
def test_every_mode_but_bloom_gives_the_same_programs(case: Case, pool: str) -> None:
    results = {mode: compiled(case[0], POOLS[pool], mode) for mode in FilterMode}
    for mode in (FilterMode.BLOOM_VERIFIED, FilterMode.EXACT):
        assert torch.equal(results[mode].scan, results[FilterMode.DEFAULT].scan)
        assert torch.equal(results[mode].verify, results[FilterMode.DEFAULT].verify)
    bloom = results[FilterMode.BLOOM]
    assert torch.equal(bloom.scan, results[FilterMode.DEFAULT].scan)
    assert len(bloom.verify) == 0
    assert bloom.upper_bound == results[FilterMode.DEFAULT].upper_bound


def test_the_pools_have_the_kinds_of_planes_that_they_are_named_for() -> None:
    assert POOLS["mixed"].dictionary.num_exact_planes > 0
    assert POOLS["mixed"].dictionary.num_bloom_planes > 0
    assert POOLS["bloom only"].dictionary.num_exact_planes == 0
    assert POOLS["exact only"].dictionary.num_bloom_planes == 0


def test_bloom_planes_do_err_here_so_that_verification_has_work() -> None:
    pool = POOLS["mixed"]
    wrong = {tag: len(pool.holds(compiled(f"tag:{tag}", pool).scan)) for tag in TAGS}
    right = {tag: sum(tag in item.tag for item in ITEMS) for tag in TAGS}
    assert sum(wrong.values()) > sum(right.values()) * 1.2
    lost = [
        tag
        for tag in TAGS
        if not pool.holds(torch.cat([compiled(f"tag:{tag}", pool).scan, NOT_ROW]))
        >= {row for row, item in enumerate(ITEMS) if tag not in item.tag}
    ]
    assert lost, "complementing a Bloom result should lose items, or polarity is not tested"


NOT_ROW = torch.tensor([[FilterOp.NOT, 0, 0, 0]], dtype=torch.int64)
SMALL = PlaneDictionary(
    dtypes={item.name: item.dtype for item in SCHEMA.attributes},
    exact_planes={"genre": {"Comedy": 1, "Drama": 2}},
    first_bloom_plane=3,
    num_bloom_planes=50,
    num_hashes=2,
    seed=0,
    columns={"year": 0, "rating": 1},
    terms_width=4,
    false_positive_rate=0.01,
)
TAG_X = SMALL.term_key("tag", "x")
PLANE, COMPARE, AND, OR, NOT, TERM = (
    FilterOp.PLANE,
    FilterOp.COMPARE,
    FilterOp.AND,
    FilterOp.OR,
    FilterOp.NOT,
    FilterOp.TERM,
)
X1, X2 = sorted(
    SMALL.first_bloom_plane + position
    for position in bloom_positions(
        torch.tensor(TAG_X), num_planes=50, num_hashes=2, seed=0
    ).tolist()
)


def rows(program: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in program.tolist()]


@pytest.mark.parametrize(
    ("text", "scan", "verify"),
    [
        ("", [], []),
        ("genre:Comedy", [(PLANE, 1, 0, 0)], []),
        ("NOT genre:Comedy", [(PLANE, 1, 0, 0), (NOT, 0, 0, 0)], []),
        ("year >= 1990", [(COMPARE, 0, 4, 1990)], []),
        ("year > 1990.5", [(COMPARE, 0, 4, 1991)], []),
        ("NOT year < 0", [(COMPARE, 0, 1, -1), (NOT, 0, 0, 0)], []),
        (
            "tag:x",
            [(PLANE, X1, 0, 0), (PLANE, X2, 0, 0), (AND, 0, 0, 0)],
            [(TERM, 0, 0, TAG_X)],
        ),
        ("NOT tag:x", [], [(TERM, 0, 0, TAG_X), (NOT, 0, 0, 0)]),
        (
            "genre:Drama AND NOT tag:x",
            [(PLANE, 2, 0, 0)],
            [(TERM, 0, 0, TAG_X), (NOT, 0, 0, 0), (PLANE, 2, 0, 0), (AND, 0, 0, 0)],
        ),
        (
            "genre:Drama OR tag:x",
            [
                (PLANE, X1, 0, 0),
                (PLANE, X2, 0, 0),
                (AND, 0, 0, 0),
                (PLANE, 2, 0, 0),
                (OR, 0, 0, 0),
            ],
            [(PLANE, 2, 0, 0), (TERM, 0, 0, TAG_X), (OR, 0, 0, 0)],
        ),
        ("year = 1990.5", [(FilterOp.FALSE, 0, 0, 0)], []),
    ],
)
def test_programs_are_these_by_hand(
    text: str, scan: list[tuple[int, ...]], verify: list[tuple[int, ...]]
) -> None:
    result = compile_filter(parse_filter(text, {}, SCHEMA), SMALL, SCHEMA, FilterMode.DEFAULT)
    assert rows(result.scan) == scan
    assert rows(result.verify) == verify
    assert result.scan.dtype == result.verify.dtype == torch.int64
    assert result.scan.shape[1:] == result.verify.shape[1:] == (4,)


def test_a_scan_program_never_reads_terms() -> None:
    result = compile_filter(
        parse_filter("NOT (tag:x AND NOT tag:y) OR tag:z", {}, SCHEMA),
        SMALL,
        SCHEMA,
        FilterMode.DEFAULT,
    )
    assert TERM not in result.scan[:, 0].tolist()
    assert TERM in result.verify[:, 0].tolist()


def test_equal_canonical_texts_give_equal_programs() -> None:
    left = parse_filter("NOT (tag:x OR genre:Drama) AND year < 1990", {}, SCHEMA)
    right = parse_filter("year <= 1989 AND NOT genre:Drama AND NOT tag:x", {}, SCHEMA)
    assert canonical(left) == canonical(right)
    one, two = (compile_filter(expr, SMALL, SCHEMA, FilterMode.DEFAULT) for expr in (left, right))
    assert torch.equal(one.scan, two.scan)
    assert torch.equal(one.verify, two.verify)


def test_without_bloom_planes_an_unknown_value_is_held_by_no_item() -> None:
    pool = POOLS["exact only"]
    assert pool.holds(compiled("tag:unheard", pool).scan) == set()
    assert len(pool.holds(compiled("NOT tag:unheard", pool).scan)) == NUM_ITEMS
    assert not compiled("tag:unheard", pool).upper_bound


def test_a_value_added_after_the_planes_were_chosen_is_found_by_its_filter() -> None:
    pool = make_pool(max_exact_planes=0, target_false_positive_rate=0.1)
    slot = int(pool.slots[0])
    keys = torch.full((1, pool.dictionary.terms_width), PAD_TERM, dtype=torch.int64)
    keys[0, 0] = pool.dictionary.term_key("genre", "Brand New")
    bloom_build(
        pool.planes,
        torch.tensor([slot]),
        keys,
        first_plane=pool.dictionary.first_bloom_plane,
        num_planes=pool.dictionary.num_bloom_planes,
        num_hashes=pool.dictionary.num_hashes,
        seed=pool.dictionary.seed,
    )
    pool.terms.view(-1, pool.dictionary.terms_width)[slot] = keys[0]
    result = compiled('genre:"Brand New"', pool)
    assert pool.holds(result.scan) & pool.holds(result.verify) == {0}
    result = compiled('NOT genre:"Brand New"', pool)
    assert 0 not in pool.holds(result.scan) & pool.holds(result.verify)


def test_a_thousand_values_compile_and_hold_for_the_right_items() -> None:
    pool = POOLS["mixed"]
    wanted = TAGS[::2]
    values = [*wanted, *(f"none{number}" for number in range(1000 - len(wanted)))]
    text = " OR ".join(f"tag:{value}" for value in values)
    check(text, lambda item: not item.tag.isdisjoint(wanted), pool)
    check(f"NOT ({text})", lambda item: item.tag.isdisjoint(wanted), pool)
    params = {"values": values}
    assert canonical(parse_filter("tag IN $values", params, SCHEMA)) == canonical(
        parse_filter(text, {}, SCHEMA)
    )


def alternating(depth: int, counter: list[int]) -> Expr:
    if depth == 0:
        counter[0] += 1
        return Term("tag", f"t{counter[0]}")
    kind = And if depth % 2 else Or
    return kind((alternating(depth - 1, counter), alternating(depth - 1, counter)))


def stack_of(program: Tensor) -> int:
    depth = deepest = 0
    for op in program[:, 0].tolist():
        depth += -1 if op in (AND, OR) else 0 if op == NOT else 1
        deepest = max(deepest, depth)
    assert depth == 1
    return deepest


def test_the_stack_grows_with_the_logarithm_of_the_leaves_only() -> None:
    result = compile_filter(alternating(10, [0]), SMALL, SCHEMA, FilterMode.DEFAULT)
    assert stack_of(result.verify) == 11
    assert stack_of(result.scan) <= 12
    chain: Expr = Term("tag", "first")
    for number in range(60):
        kind = And if number % 2 else Or
        chain = kind((Term("tag", f"t{number}"), chain))
    assert stack_of(compile_filter(chain, SMALL, SCHEMA, FilterMode.DEFAULT).verify) == 2


def test_a_stack_that_is_too_deep_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_module, "MAX_STACK", 5)
    with pytest.raises(FilterError, match="filter needs a stack of 11 values, the limit is 5"):
        compile_filter(alternating(10, [0]), POOLS["mixed"].dictionary, SCHEMA, FilterMode.DEFAULT)


def test_a_dictionary_of_another_schema_is_refused() -> None:
    other = Schema(attributes=SCHEMA.attributes[:2])
    with pytest.raises(ValueError, match="must have the same attributes"):
        compile_filter(AnyItem(), SMALL, other, FilterMode.DEFAULT)


def test_modes_have_the_numbers_of_the_wire() -> None:
    assert {mode.name: int(mode) for mode in FilterMode} == {
        "DEFAULT": 0,
        "BLOOM": 1,
        "BLOOM_VERIFIED": 2,
        "EXACT": 3,
    }


def test_expressions_survive_pickling() -> None:
    expr = parse_filter("NOT (genre:Comedy OR year < 1990)", {}, SCHEMA)
    assert pickle.loads(pickle.dumps(expr)) == expr == Not(expr.operand)  # type: ignore[union-attr]
