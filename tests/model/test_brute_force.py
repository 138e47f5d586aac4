import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from silvershard.model.brute_force import BruteForce, matches
from silvershard.model.catalogue import NULL_INT
from silvershard.model.filter import parse_filter
from silvershard.model.request import Request
from silvershard.shard.load import load_retriever


@pytest.fixture(scope="module")
def whole(generation):
    return load_retriever(generation.path)[0]


@pytest.fixture(scope="module")
def brute_force(generation, whole) -> BruteForce:
    with torch.inference_mode():
        embeddings = generation.model.embed_items(dict(generation.catalogue.features))
    return BruteForce(generation.model, whole.spec, generation.catalogue, embeddings)


def test_exact_requests_of_the_index_are_answered_like_this_bit_for_bit(
    generation, whole, brute_force: BruteForce, request_maker
) -> None:
    filtered = 0
    for made in request_maker(generation, 60, seed=11):
        request = replace(made, exact=True, nprobe=0, ann_k=0)
        (wanted,) = whole([request])
        got = brute_force.answer(request)
        assert got.item_ids.tolist() == wanted.item_ids.tolist(), request
        assert got.scores.tobytes() == wanted.scores.numpy().tobytes(), request
        for task, scores in wanted.task_scores.items():
            assert got.task_scores[task].tobytes() == scores.numpy().tobytes(), request
        assert got.exhausted == wanted.exhausted, request
        filtered += bool(request.filter)
    assert filtered > 20


def test_no_eligible_item_is_an_empty_answer(brute_force: BruteForce) -> None:
    got = brute_force.answer(Request(filter="year > 3000", k=5, exact=True))
    assert got.item_ids.shape == got.scores.shape == (0,)
    assert got.exhausted


@pytest.mark.parametrize(
    "text",
    [
        "",
        'genre:"Comedy"',
        'NOT genre:"Comedy"',
        'genre IN ("Comedy", "Drama") AND maker:7',
        "year >= 1990 OR maker IN (1, 2, 3)",
        "year != 1990",
        "NOT (year < 1990)",
        "price < 2.5 & !(price <= -3)",
        "price = 1.5",
    ],
)
def test_a_filter_holds_for_the_items_that_it_says(generation, text: str) -> None:
    catalogue = generation.catalogue
    genres, makers = catalogue.categories["genre"], catalogue.categories["maker"]

    def has(row: int, column, *values: object) -> bool:
        return bool(set(column.row(row).tolist()) & set(values))

    def year(row: int) -> float:
        value = int(catalogue.numbers["year"][row])
        return math.nan if value == NULL_INT else value

    def price(row: int) -> float:
        return float(catalogue.numbers["price"][row])

    said = {
        "": lambda row: True,
        'genre:"Comedy"': lambda row: has(row, genres, "Comedy"),
        'NOT genre:"Comedy"': lambda row: not has(row, genres, "Comedy"),
        'genre IN ("Comedy", "Drama") AND maker:7': lambda row: (
            has(row, genres, "Comedy", "Drama") and has(row, makers, 7)
        ),
        "year >= 1990 OR maker IN (1, 2, 3)": lambda row: (
            year(row) >= 1990 or has(row, makers, 1, 2, 3)
        ),
        # An item without a year fails the comparison, and passes its negation.
        "year != 1990": lambda row: year(row) < 1990 or year(row) > 1990,
        "NOT (year < 1990)": lambda row: not year(row) < 1990,
        "price < 2.5 & !(price <= -3)": lambda row: price(row) < 2.5 and not price(row) <= -3,
        "price = 1.5": lambda row: price(row) == 1.5,
    }
    got = matches(parse_filter(text, {}, generation.schema), catalogue)
    assert got.tolist() == [said[text](row) for row in range(len(catalogue))]
    assert np.isnan(catalogue.numbers["price"]).any()
