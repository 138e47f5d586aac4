from typing import Any

import pytest

from silvershard.model.catalogue import Catalogue
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.spec import ServingSpec
from silvershard.shard import golden_requests
from silvershard.shard.golden_requests import draw_requests
from silvershard.shard.load import load_retriever


@pytest.fixture(scope="module")
def whole(generation):
    return load_retriever(generation.path)[0]


@pytest.fixture(scope="module")
def spec(whole) -> ServingSpec:
    return whole.spec


def with_schema(spec: ServingSpec, **changes: Any) -> ServingSpec:
    schema = Schema.model_validate({**dict(spec.item_schema), **changes})
    return spec.model_copy(update={"item_schema": schema})


def test_every_kind_of_request_comes_and_can_be_served(generation, whole, spec) -> None:
    requests = draw_requests(spec, generation.catalogue, 24, seed=3)
    assert len(requests) == 24
    assert {one.value for one in requests} == {"", "rated", "liked"}
    assert len({one.k for one in requests}) > 3
    for attribute in spec.item_schema.attributes:
        texts = [one.filter for one in requests if attribute.name in one.filter]
        assert any(text.startswith("NOT") for text in texts)
        assert any(not text.startswith("NOT") for text in texts)
    for kind in ("exact", "nprobe", "exclude_ids", "task_weights"):
        assert any(getattr(one, kind) for one in requests), kind
    assert any(one.exact and one.filter for one in requests)
    assert any(not one.features for one in requests)
    histories = [one.features["history"] for one in requests if one.features]
    known = set(generation.catalogue.item_ids.tolist())
    assert set().union(*histories) <= known
    answers = whole(requests)
    assert sum(bool(len(answer.item_ids)) for answer in answers) > 20


def test_the_same_seed_draws_the_same_requests(generation, spec) -> None:
    first, again, other = (
        draw_requests(spec, generation.catalogue, 30, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_what_a_model_does_not_allow_is_not_drawn(generation, spec) -> None:
    closed = with_schema(spec, allow_value=False, allow_task_weights=False)
    requests = draw_requests(closed, generation.catalogue, 30)
    for request in requests:
        assert not request.value
        assert not request.task_weights
        compile_request(request, closed)


def test_features_of_every_kind_are_made_up(generation, spec) -> None:
    features = (
        UserFeature(name="words", kind="text", dtype="string", max_length=2),
        UserFeature(name="likes", dtype="string", max_length=3),
        UserFeature(name="age", kind="numbers", dtype="float", width=2),
    )
    other = with_schema(spec, user_features=features)
    requests = draw_requests(other, generation.catalogue, 24)
    for request in requests:
        other.item_schema.check_features(request.features)
    given = [one.features for one in requests if one.features]
    assert all(one["words"] and len(one["age"]) == 2 for one in given)
    genres = set(generation.catalogue.features["genres"].values.tolist())
    assert set().union(*(one["likes"] for one in given)) <= genres


def test_exact_search_is_not_asked_where_too_many_items_are_eligible(
    generation, spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden_requests, "MAX_EXACT_ITEMS", 60)
    requests = [
        one
        for seed in range(8)
        for one in draw_requests(spec, generation.catalogue, 24, seed=seed)
        if one.exact
    ]
    # Few of the 600 films have one of five makers; most have one of five genres.
    assert requests
    assert {one.filter.split()[0] for one in requests} == {"maker"}


def test_an_empty_catalogue_has_no_requests(generation, spec) -> None:
    empty: Catalogue = generation.catalogue.take([])
    assert draw_requests(spec, empty, 5, users=[Request()]) == []
