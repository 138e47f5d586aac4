"""Texts of items and of requests inside the two towers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import fixed_dot
from silvershard.model.catalogue import Ragged
from silvershard.model.registry import build
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import TwoTowerConfig
from silvershard.shard.load import load_retriever

DIM = 16
WORDS = ("Action", "Comedy", "Drama", "Horror", "Sci-Fi", "unheard of")


@pytest.fixture(scope="module")
def generation(publish_model: Callable[..., Any]) -> Any:
    return publish_model(texts=True)


@pytest.fixture(scope="module")
def model(generation: Any) -> TwoTower:
    found = generation.model
    assert isinstance(found, TwoTower)
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def users(count: int, known: list[int]) -> list[dict[str, Any]]:
    """Users with a history, a text, both or neither; some texts are too long."""
    rng = np.random.default_rng(4)
    made: list[dict[str, Any]] = [{}]
    while len(made) < count:
        both = {
            "history": rng.choice(known, rng.integers(0, 9)).tolist(),
            "query": (" ".join(rng.choice(WORDS, rng.integers(1, 20))),),
        }
        made.append({name: one for name, one in both.items() if rng.random() < 0.7})
    return made


def column(model: TwoTower, user: dict[str, Any]) -> Tensor:
    """The projected text in the profile of a user, ``(D,)``."""
    begin = model.config.text_column
    return model.encode([user]).user_state[0, begin : begin + DIM]


def test_the_profile_has_one_part_for_the_text_and_the_text_moves_only_it(model: TwoTower) -> None:
    assert model.config.profile_dim == model.config.text_column + DIM == 4 * DIM
    absent = model.encode([{}]).user_state[0]
    given = model.encode([{"query": ("Drama",)}]).user_state[0]
    begin = model.config.text_column
    moved = torch.nonzero(absent != given).flatten()
    assert moved.tolist() == list(range(begin, begin + DIM))


def test_the_text_of_a_request_is_encoded_standardised_and_projected(model: TwoTower) -> None:
    assert model.text is not None
    layer = model.text.query.projection
    encoded = model.text.encoder.embed_queries(["Drama Comedy"]).embedding[0]
    expected = layer.weight[0, :DIM] + encoded @ layer.weight[1:25, :DIM] + layer.bias[:DIM]
    assert torch.allclose(column(model, {"query": ("Drama", "Comedy")}), expected, atol=1e-5)
    assert torch.equal(column(model, {}), layer.bias[:DIM])
    assert torch.equal(column(model, {"history": [3]}), layer.bias[:DIM])


def test_an_item_adds_what_its_text_projects(model: TwoTower) -> None:
    assert model.text is not None
    features = {"movie": Ragged.from_rows([[-1]]), "genres": Ragged.from_rows([["Drama"]])}
    encoded = model.text.encoder.embed_texts(["Genres: Drama"]).embedding[0]
    tables, layer = model.item_tables, model.text.item.projection
    expected = (
        tables.weight("movie")[0]
        + tables.weight("genres")[int(model.vocabulary("genres").rows(["Drama"]))]
        + tables.weight("popularity_band")[model.bands[0]]
        + layer.weight[0, :DIM]
        + encoded @ layer.weight[1:25, :DIM]
        + layer.bias[:DIM]
    )
    found = model.embed_items(features)[0]
    assert torch.allclose(found, expected / expected.norm(), atol=1e-5)


def test_an_item_without_a_text_gets_the_bias_alone(model: TwoTower) -> None:
    assert model.text is not None
    nothing = model.text.embed_items({"genres": Ragged.from_rows([[], ["Drama"]])}, 2)
    assert not nothing[0].any()
    assert nothing[1].any()
    assert torch.equal(model.text.embed_items({}, 3), torch.zeros(3, 24))
    bias = model.text.item(model.text.item_bags(nothing))[0]
    assert torch.equal(bias, model.text.item.projection.bias[:DIM])


def test_texts_that_are_given_are_not_encoded_again(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.text is not None
    features = {"movie": Ragged.from_rows([[5]]), "genres": Ragged.from_rows([["Drama"]])}
    texts = model.text.embed_items(features, 1)
    expected = model.embed_items(features)
    monkeypatch.setattr(model.text.encoder, "embed_texts", None)
    assert torch.equal(model.item_embedding(model.item_bags(features, texts)), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_a_user_has_the_same_bits_alone_and_in_any_batch(
    generation: Any, model: TwoTower, threads: int, size: int
) -> None:
    batch = users(40, generation.catalogue.item_ids[:50].tolist())[-size:]
    together = model.encode(batch)
    for at, user in enumerate(batch):
        alone = model.encode([user])
        assert torch.equal(alone.user_state[0], together.user_state[at])
        assert torch.equal(alone.embedding[0], together.embedding[at])
        assert alone.warnings[0] == together.warnings[at]


def test_an_item_has_the_same_bits_alone_and_in_any_batch(
    generation: Any, model: TwoTower, threads: int
) -> None:
    features = {
        name: one.take(np.arange(40)) for name, one in generation.catalogue.features.items()
    }
    together = model.embed_items(features)
    assert torch.allclose(fixed_dot(together, together), torch.ones(1))
    for rows in (*np.arange(0, 40, 7)[:, None], np.arange(40)[::-1].copy(), np.arange(7, 30)):
        taken = {name: one.take(rows) for name, one in features.items()}
        assert torch.equal(model.embed_items(taken), together[torch.from_numpy(rows)])


def test_a_text_that_is_cut_is_told_and_an_absent_one_is_not(model: TwoTower) -> None:
    long = " ".join(["Drama"] * 40)
    encoded = model.encode([{"query": (long,)}, {}, {"query": ("Drama",), "history": [-7]}])
    assert encoded.warnings == (
        ("query: only the first 12 tokens count",),
        (),
        ("feature history: 1 of 1 values unknown",),
    )


def test_a_generation_embeds_a_new_item_by_its_text(generation: Any) -> None:
    served = load_retriever(generation.path)[0].model
    assert isinstance(served, TwoTower)
    new = {
        "movie": Ragged.from_rows([[-3], [-4]]),
        "genres": Ragged.from_rows([["Drama"], ["Horror", "Comedy"]]),
    }
    found = served.embed_items(new)
    assert torch.equal(found, generation.model.embed_items(new))
    assert not torch.equal(found[0], found[1])
    user = {"query": ("Horror Comedy",), "history": generation.catalogue.item_ids[:4].tolist()}
    loaded, own = (one.encode([user]).embedding for one in (served, generation.model))
    assert torch.equal(loaded, own)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_tower_keeps_its_texts(model: TwoTower, precision: Any) -> None:
    small = model.quantized(precision)
    again = build("two_tower", small.config.model_dump(mode="json"))
    again.load_state_dict(small.state_dict())
    assert isinstance(again, TwoTower)
    user = {"query": ("Drama Horror",)}
    assert torch.equal(column(again, user), column(model, user))


def test_the_projections_learn_and_the_encoder_does_not(model: TwoTower) -> None:
    assert model.text is not None
    trained = {id(one) for one in model.tower_parameters()}
    for projection in (model.text.item, model.text.query):
        assert all(id(one) in trained for one in projection.parameters())
    assert not any(id(one) in trained for one in model.text.encoder.parameters())


def test_the_text_has_a_name_of_its_own(model: TwoTower) -> None:
    settings = model.config.model_dump()
    with pytest.raises(ValueError, match=r"text\.query must have distinct names, got \['history'"):
        TwoTowerConfig.model_validate(
            {**settings, "text": {**settings["text"], "query": "history"}}
        )
