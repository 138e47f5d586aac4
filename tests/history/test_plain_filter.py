from typing import Any

import numpy as np
import pytest
from history.plain_filter import compiled

from silvershard.model.brute_force import matches
from silvershard.model.catalogue import NULL_INT
from silvershard.model.filter import parse_filter

ITEM = {"genre": ["Drama", "Sci-Fi"], "lang": "en", "year": 1990, "rating": 3.5}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("  ", True),
        ("genre:Drama", True),
        ('genre:"Sci-Fi" & lang:en', True),
        ("genre:Sci-Fi", True),
        ("genre:Horror | year = 1990", True),
        ("genre:Horror OR NOT year = 1990", False),
        ("NOT genre:Horror AND genre:Drama", True),
        ("not (genre:Drama or genre:Horror)", False),
        ("!genre:Horror & !(year < 1990)", True),
        ("genre IN (Horror, Drama)", True),
        ("genre IN (Horror, $none)", False),
        ("genre IN $some", True),
        ("genre:$some AND year:$years", True),
        ("year IN (1989, 1990)", True),
        ("year >= 1989.5", True),
        ("year > 1990", False),
        ("rating != 3.5", False),
        ("rating <= 35e-1", True),
        ("absent = 1", False),
        ("absent != 1", False),
        ("NOT absent != 1", True),
        ('genre:"\\u0044rama"', True),
    ],
)
def test_a_filter_means_what_its_page_says(text: str, holds: bool) -> None:
    params = {"none": [], "some": ["x", "Drama"], "years": 1990}
    assert compiled(text, params)(ITEM) is holds


@pytest.mark.parametrize("text", ["genre", "genre:", "(genre:a", "genre:a)", "year ~ 3", "AND"])
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"filter|expected|no token"):
        compiled(text)


def test_it_agrees_with_the_other_two_ways_to_read_a_filter(
    generation: Any, request_maker: Any
) -> None:
    catalogue = generation.catalogue
    rows: list[dict[str, Any]] = [{} for _ in range(len(catalogue))]
    for name, ragged in catalogue.categories.items():
        for at, row in enumerate(rows):
            row[name] = ragged.row(at).tolist()
    for name, column in catalogue.numbers.items():
        for value, row in zip(column.tolist(), rows, strict=True):
            row[name] = None if value == NULL_INT or value != value else value
    texts = 0
    for request in request_maker(generation, 150, seed=9):
        expr = parse_filter(request.filter, request.params, generation.schema)
        holds = compiled(request.filter, request.params)
        assert np.array([holds(row) for row in rows]).tolist() == matches(expr, catalogue).tolist()
        texts += bool(request.filter)
    assert texts > 50
