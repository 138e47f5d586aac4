"""User features beside the history, weights of ids, and item features of numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.kernels import fixed_dot
from silvershard.model.catalogue import Ragged
from silvershard.model.registry import build
from silvershard.model.request import FeatureValues, WeightedIds
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import TwoTowerConfig

NUM_FILMS, DIM = 60, 12
TAGS = ("dark", "funny", "heist", "noir")


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "dim": DIM,
        "heads": ("rated", "liked"),
        "tasks": ("rated",),
        "history": "history",
        "item": "film",
        "tables": (
            {"name": "film", "dtype": "int", "size": NUM_FILMS},
            {"name": "genres", "dtype": "string", "size": 2},
        ),
        "pooled": ({"feature": "genres", "width": 1},),
        "max_history": 8,
        "bands": 5,
        "user_ids": (
            {"name": "tags", "dtype": "string", "size": len(TAGS)},
            {"name": "friends", "dtype": "int", "size": 20},
        ),
        "user_numbers": ({"name": "activity", "width": 2}, {"name": "age", "width": 1}),
        "item_numbers": ({"name": "price", "width": 1}, {"name": "colour", "width": 3}),
        **changes,
    }


def filled(**changes: Any) -> TwoTower:
    torch.manual_seed(6)
    made = TwoTower(TwoTowerConfig.model_validate(settings(**changes)))
    made.vocabulary("film").fill(range(NUM_FILMS))
    made.vocabulary("genres").fill(["Drama", "Noir"])
    made.user_features.vocabulary("tags").fill(TAGS)
    made.user_features.vocabulary("friends").fill(range(20))
    made.bands.copy_(torch.randint(5, made.bands.shape))
    made.links("genres").copy_(torch.randint(3, made.links("genres").shape))
    for numbers in (made.user_features.numbers, made.item_numbers):
        for name in numbers.names:
            projection = numbers.projection(name)
            projection.fill(torch.randn(40, projection.width) * 5 + 3)
    made.requires_grad_(requires_grad=False)
    for tables in (made.user_tables, made.item_tables):
        for name in tables.features:
            tables.weight(name).normal_()
    return made.eval()


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return filled()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weighted(rng: np.random.Generator, ids: list[Any]) -> FeatureValues:
    if rng.random() < 0.4:
        return ids
    weights = rng.normal(size=len(ids)).astype(np.float32)
    weights[rng.random(len(ids)) < 0.2] = 0.0
    return WeightedIds(ids, weights.tolist())


def users(count: int) -> list[dict[str, FeatureValues]]:
    """Users with any of the features, with and without weights, known and unknown ids."""
    rng = np.random.default_rng(9)
    made: list[dict[str, FeatureValues]] = [{}]
    while len(made) < count:
        tags = rng.choice([*TAGS, "unheard of"], rng.integers(0, 6)).tolist()
        everything: dict[str, FeatureValues] = {
            "history": weighted(rng, rng.integers(-5, NUM_FILMS, rng.integers(0, 12)).tolist()),
            "tags": weighted(rng, tags),
            "friends": weighted(rng, rng.integers(0, 25, rng.integers(0, 30)).tolist()),
            "activity": rng.normal(size=2).astype(np.float32).tolist(),
            "age": [float(np.float32(rng.integers(9, 90)))],
        }
        made.append({name: one for name, one in everything.items() if rng.random() < 0.8})
    return made


def film_features() -> dict[str, Ragged]:
    rng = np.random.default_rng(4)
    prices = [[float(rng.normal())] if rng.random() < 0.8 else [] for _ in range(NUM_FILMS)]
    return {
        "film": Ragged.from_rows([[film] for film in range(NUM_FILMS)]),
        "genres": Ragged.from_rows([[["Drama", "Noir"][film % 2]] for film in range(NUM_FILMS)]),
        "price": Ragged.from_rows(prices, dtype="float"),
        "colour": Ragged.from_rows(rng.random((NUM_FILMS, 3)).tolist(), dtype="float"),
    }


def parts(model: TwoTower, user: Mapping[str, FeatureValues]) -> list[torch.Tensor]:
    """The parts of the profile of one user."""
    return list(model.encode([user]).user_state[0].split(DIM))


HISTORY, RECENT, GENRES, OF_TAGS, OF_FRIENDS, ACTIVITY, AGE = range(7)


def test_the_profile_has_a_part_for_each_feature(model: TwoTower) -> None:
    assert len(parts(model, {})) == 7
    assert model.config.profile_dim == 7 * DIM
    changed = {
        "history": (HISTORY, RECENT, GENRES),
        "tags": (OF_TAGS,),
        "friends": (OF_FRIENDS,),
        "activity": (ACTIVITY,),
        "age": (AGE,),
    }
    values: dict[str, FeatureValues] = {
        "history": [3],
        "tags": ["noir"],
        "friends": [4],
        "activity": [1.0, 2.0],
        "age": [50.0],
    }
    absent = parts(model, {})
    for name, places in changed.items():
        given = parts(model, {name: values[name]})
        moved = [at for at in range(7) if not torch.equal(given[at], absent[at])]
        assert tuple(moved) == places, name


def test_weighted_ids_are_the_weighted_mean_of_their_rows(model: TwoTower) -> None:
    table = model.user_tables.weight("user_tags")
    noir, dark, funny = model.user_features.vocabulary("tags").rows(["noir", "dark", "funny"])
    found = parts(model, {"tags": WeightedIds(("noir", "dark", "funny"), (3.0, -1.0, 0.0))})
    assert torch.allclose(found[OF_TAGS], (3 * table[noir] - table[dark]) / 4, atol=1e-6)
    plain = parts(model, {"tags": ("noir", "dark", "funny")})
    assert torch.allclose(plain[OF_TAGS], (table[noir] + table[dark] + table[funny]) / 3, atol=1e-6)
    assert torch.equal(parts(model, {})[OF_TAGS], table[0])


def test_numbers_are_projected(model: TwoTower) -> None:
    projection = model.user_features.numbers.projection("activity")
    layer = projection.projection
    standard = (torch.tensor([4.0, -1.0]) - projection.mean) * projection.scale
    inputs = torch.tensor([1.0, *standard.tolist()])
    expected = inputs @ layer.weight[:3, :DIM] + layer.bias
    found = parts(model, {"activity": [4.0, -1.0]})[ACTIVITY]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(parts(model, {})[ACTIVITY], layer.bias)


def test_weights_of_a_history_multiply_its_recency(model: TwoTower) -> None:
    films, weights = [5, 9, 2, 7], [1.0, -2.0, 0.5, 3.0]
    found = parts(model, {"history": WeightedIds(films, weights)})
    rows = torch.tensor(films) + 1
    recency = torch.tensor([0.5 ** ((3 - place) / 10.0) for place in range(4)])
    shares = recency * torch.tensor(weights)
    shares /= shares.abs().sum()
    table = model.user_tables.weight("history")
    assert torch.allclose(found[HISTORY], shares @ table[rows], atol=1e-6)
    newest = torch.tensor(weights[1:]) / 5.5
    recent = model.user_tables.weight("recent")
    assert torch.allclose(found[RECENT], newest @ recent[rows[1:]], atol=1e-6)
    genres = model.user_tables.weight("history_genres")[model.links("genres")[rows, 0]]
    assert torch.allclose(found[GENRES], shares @ genres, atol=1e-6)


def test_weights_of_one_are_no_weights_and_an_id_of_weight_zero_is_not_there(
    model: TwoTower,
) -> None:
    plain = model.encode([{"history": [5, 9], "tags": ["noir"]}])
    ones = WeightedIds((5, 9), (1.0, 1.0))
    with_ones = model.encode([{"history": ones, "tags": WeightedIds(("noir",), (1.0,))}])
    with_zero = WeightedIds((5, 3, 9), (1.0, 0.0, 1.0))
    without = model.encode([{"history": with_zero, "tags": WeightedIds(("noir",), (2.0,))}])
    for other in (with_ones, without):
        assert torch.equal(other.user_state, plain.user_state)
        assert other.warnings == ((),)


def test_weights_of_one_beside_those_of_other_users_leave_the_recency_as_it_is() -> None:
    # Sums of 0.5: whoever were divided by them would show it.
    recency = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.3, 0.2]])
    rows, lengths = torch.tensor([7, 8, 9, 5, 6]), torch.tensor([2, 1, 2])
    factors = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0])
    found = TwoTower._last(rows, lengths, 2, recency, factors)
    assert torch.equal(found.weights[:3], torch.tensor([0.2, 0.3, 0.5]))
    assert torch.allclose(found.weights[3:], torch.tensor([0.4, 0.3]) / 0.7)


def test_only_weights_of_zero_are_an_empty_history(model: TwoTower) -> None:
    none = model.encode([{"history": WeightedIds((5, 9), (0.0, 0.0))}])
    assert torch.equal(none.user_state, model.encode([{}]).user_state)


def test_unknown_values_are_told_of_every_feature(model: TwoTower) -> None:
    encoded = model.encode(
        [{"history": [1, 999], "tags": ["x", "noir"], "friends": WeightedIds((77,), (2.0,))}, {}]
    )
    assert encoded.warnings == (
        (
            "feature history: 1 of 2 values unknown",
            "feature tags: 1 of 2 values unknown",
            "feature friends: 1 of 1 values unknown",
        ),
        (),
    )


def test_an_item_adds_what_its_numbers_project(model: TwoTower) -> None:
    features = {
        "film": Ragged.from_rows([[4]]),
        "genres": Ragged.from_rows([["Noir"]]),
        "price": Ragged.from_rows([[2.5]], dtype="float"),
        "colour": Ragged.from_rows([[]], dtype="float"),
    }
    tables, price = model.item_tables, model.item_numbers.projection("price")
    standard = (2.5 - price.mean) * price.scale
    layer = price.projection
    expected = (
        tables.weight("film")[5]
        + tables.weight("genres")[int(model.vocabulary("genres").rows(["Noir"]))]
        + tables.weight("popularity_band")[model.bands[5]]
        + layer.weight[0, :DIM]
        + standard * layer.weight[1, :DIM]
        + layer.bias
        + model.item_numbers.projection("colour").projection.bias
    )
    found = model.embed_items(features)[0]
    assert torch.allclose(found, expected / expected.norm(), atol=1e-5)
    absent = {name: features[name] for name in ("film", "genres", "price")}
    assert torch.equal(model.embed_items(absent)[0], found)


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_a_user_has_the_same_bits_alone_and_in_any_batch(
    model: TwoTower, threads: int, size: int
) -> None:
    batch = users(34)[-size:]
    together = model.encode(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    permuted = model.encode([batch[at] for at in order.tolist()])
    assert torch.equal(permuted.user_state, together.user_state[order])
    assert torch.equal(permuted.embedding, together.embedding[order])
    for at, user in enumerate(batch):
        alone = model.encode([user])
        assert torch.equal(alone.user_state[0], together.user_state[at])
        assert torch.equal(alone.embedding[0], together.embedding[at])
        assert alone.warnings[0] == together.warnings[at]


def test_an_item_has_the_same_bits_alone_and_in_any_batch(model: TwoTower, threads: int) -> None:
    features = film_features()
    together = model.embed_items(features)
    assert torch.allclose(fixed_dot(together, together), torch.ones(1))
    shuffled = np.random.default_rng(3).permutation(NUM_FILMS)
    for rows in (*np.arange(0, NUM_FILMS, 7)[:, None], shuffled, np.arange(7, 40)):
        taken = {name: column.take(rows) for name, column in features.items()}
        assert torch.equal(model.embed_items(taken), together[torch.from_numpy(rows)])


def test_numbers_of_any_size_give_finite_embeddings(model: TwoTower) -> None:
    largest = float(np.finfo(np.float32).max)
    encoded = model.encode([{"activity": [largest, -largest], "age": [-largest]}])
    assert torch.isfinite(encoded.embedding).all()
    features = film_features()
    features["price"] = Ragged.from_rows([[largest]] * NUM_FILMS, dtype="float")
    assert torch.isfinite(model.embed_items(features)).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_tower_keeps_its_numbers_and_loads_again(
    model: TwoTower, precision: Any
) -> None:
    wide = filled(dim=16)
    small = wide.quantized(precision)
    batch = users(20)
    together = small.encode(batch)
    assert fixed_dot(together.embedding, wide.encode(batch).embedding).min() > 0.5
    numbers = slice(5 * 16, 7 * 16)
    exact = wide.encode(batch).user_state[:, numbers]
    assert torch.equal(together.user_state[:, numbers], exact)
    assert torch.equal(small.encode([batch[7]]).user_state[0], together.user_state[7])
    again = build("two_tower", small.config.model_dump(mode="json"))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.encode(batch).user_state, together.user_state)
    items = film_features()
    assert torch.equal(again.embed_items(items), small.embed_items(items))


def test_further_features_are_trained_with_the_towers(model: TwoTower) -> None:
    trained = {id(one) for one in model.tower_parameters()}
    for numbers in (model.user_features.numbers, model.item_numbers):
        for parameter in numbers.parameters():
            assert id(parameter) in trained
    assert id(model.user_tables.weight("user_friends")) in trained


def test_a_description_of_an_older_version_still_builds_the_same_tower() -> None:
    plain = settings(user_ids=(), user_numbers=(), item_numbers=())
    older = {
        name: one
        for name, one in plain.items()
        if name not in ("user_ids", "user_numbers", "item_numbers")
    }
    first = TwoTower(TwoTowerConfig.model_validate(older))
    second = TwoTower(TwoTowerConfig.model_validate(plain))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert not [name for name in first.state_dict() if "numbers" in name or "user_feat" in name]
