"""Nothing ineligible is returned, nothing eligible is lost, against sets of plain Python."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from silvershard.model.catalogue import NULL_INT
from silvershard.model.request import FilterMode, Request
from silvershard.model.retriever import Retriever
from silvershard.shard.load import load_retriever

Items = frozenset[int]


class FilterMaker:
    """Random filters as text, each with the set of items it selects, found without our code."""

    def __init__(self, catalogue: Any, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.everything: Items = frozenset(catalogue.item_ids.tolist())
        self.rows = [
            {
                "item": int(catalogue.item_ids[row]),
                "genre": set(catalogue.categories["genre"].row(row).tolist()),
                "maker": set(catalogue.categories["maker"].row(row).tolist()),
                "year": int(catalogue.numbers["year"][row]),
                "price": float(catalogue.numbers["price"][row]),
            }
            for row in range(len(catalogue))
        ]

    def where(self, holds: Callable[[dict[str, Any]], bool]) -> Items:
        return frozenset(row["item"] for row in self.rows if holds(row))

    def leaf(self) -> tuple[str, Items]:
        kind = int(self.generator.integers(5))
        if kind == 0:
            genre = str(self.generator.choice(["Action", "Comedy", "Drama", "Horror", "Western"]))
            return f"genre:{genre}", self.where(lambda row: genre in row["genre"])
        if kind == 1:
            maker = int(self.generator.integers(0, 210))
            return f"maker:{maker}", self.where(lambda row: maker in row["maker"])
        if kind == 2:
            makers = set(self.generator.integers(0, 210, 8).tolist())
            text = ", ".join(map(str, sorted(makers)))
            return f"maker IN ({text})", self.where(lambda row: bool(makers & row["maker"]))
        sign, compare = [
            ("<", lambda a, b: a < b),
            ("<=", lambda a, b: a <= b),
            ("=", lambda a, b: a == b),
            ("!=", lambda a, b: a != b),
            (">=", lambda a, b: a >= b),
            (">", lambda a, b: a > b),
        ][int(self.generator.integers(6))]
        if kind == 3:
            year = int(self.generator.integers(1945, 2030))
            text = f"{year}.5" if self.generator.random() < 0.2 else str(year)
            return f"year {sign} {text}", self.where(
                lambda row: row["year"] != NULL_INT and compare(row["year"], float(text))
            )
        price = round(float(self.generator.uniform(-6, 21)), 1)
        return f"price {sign} {price}", self.where(
            lambda row: not math.isnan(row["price"]) and compare(row["price"], price)
        )

    def make(self, depth: int) -> tuple[str, Items]:
        kind = int(self.generator.integers(0, 4)) if depth else 0
        if kind == 0:
            return self.leaf()
        text, items = self.make(depth - 1)
        if kind == 1:
            return f"NOT ({text})", self.everything - items
        other_text, other = self.make(depth - 1)
        if kind == 2:
            return f"({text}) AND ({other_text})", items & other
        return f"({text}) | ({other_text})", items | other


@pytest.fixture(scope="module")
def whole(generation) -> Retriever:
    return load_retriever(generation.path)[0]


def test_bloom_planes_do_err_here_so_that_verification_matters(generation, whole) -> None:
    maker = FilterMaker(generation.catalogue, 0)
    wrong = 0
    for number in range(60):
        request = Request(filter=f"maker:{number}", k=600, exact=True, filter_mode=FilterMode.BLOOM)
        got = set(whole([request])[0].item_ids.tolist())
        truth = maker.where(lambda row, number=number: number in row["maker"])
        assert truth <= got, "a Bloom filter lost an eligible item"
        wrong += len(got - truth)
    assert wrong > 20


@pytest.mark.parametrize("seed", range(6))
def test_answers_hold_exactly_the_eligible_items_when_all_clusters_are_probed(
    generation, whole: Retriever, seed: int
) -> None:
    maker = FilterMaker(generation.catalogue, seed)
    made = [maker.make(6) for _ in range(50)]
    answers = whole([Request(filter=text, k=600, exact=True) for text, _ in made])
    for (text, truth), answer in zip(made, answers, strict=True):
        got = answer.item_ids.tolist()
        assert len(got) == len(set(got)), text
        assert set(got) == truth, text
        assert answer.exhausted == (len(truth) < 600), text
    sizes = {len(truth) for _, truth in made}
    assert len(sizes) > 10, "the filters are not varied"


@pytest.mark.parametrize("mode", [FilterMode.DEFAULT, FilterMode.BLOOM_VERIFIED, FilterMode.EXACT])
def test_every_mode_but_bloom_returns_nothing_ineligible_whatever_the_plan(
    generation, whole: Retriever, mode: FilterMode
) -> None:
    maker = FilterMaker(generation.catalogue, 99)
    for _ in range(40):
        text, truth = maker.make(4)
        for plan in ({}, {"nprobe": 2}, {"ann_k": 5}):
            answer = whole([Request(filter=text, k=30, filter_mode=mode, **plan)])[0]
            assert set(answer.item_ids.tolist()) <= truth, text
            if answer.exhausted:
                assert len(answer.item_ids) == len(truth), text
            elif answer.plan.kind == "all_pages" and "ann_k" not in plan:
                assert len(answer.item_ids) == 30, text


def test_excluded_items_never_come_back_and_nothing_else_is_lost(
    generation, whole: Retriever
) -> None:
    maker = FilterMaker(generation.catalogue, 7)
    generator = np.random.default_rng(7)
    ids = generation.catalogue.item_ids
    for _ in range(40):
        text, truth = maker.make(3)
        gone = generator.choice(ids, size=int(generator.integers(0, 400))).tolist()
        answer = whole([Request(filter=text, k=600, exact=True, exclude_ids=[*gone, 7, *gone])])[0]
        assert set(answer.item_ids.tolist()) == truth - set(gone), text


def test_excluding_everything_leaves_an_exhausted_empty_answer(generation, whole) -> None:
    answer = whole([Request(k=5, exclude_ids=generation.catalogue.item_ids.tolist(), exact=True)])[
        0
    ]
    assert answer.item_ids.tolist() == []
    assert answer.exhausted
