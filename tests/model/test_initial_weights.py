from collections.abc import Callable
from typing import Any

import pytest
import torch

from silvershard.model.initial_weights import fill_text_weights, fill_weights
from silvershard.model.text_encoder import TextEncoder
from silvershard.model.training_config import TrainingConfig
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import TwoTowerConfig

NUM_FILMS = 12


def tower(**changes: Any) -> TwoTower:
    settings: dict[str, Any] = {
        "dim": 4,
        "heads": ("rated", "liked"),
        "history": "history",
        "item": "film",
        "tables": ({"name": "film", "dtype": "int", "size": NUM_FILMS},),
        "max_history": 5,
        "bands": 3,
    }
    made = TwoTower(TwoTowerConfig.model_validate(settings | changes))
    torch.manual_seed(1)
    fill_weights(
        made,
        torch.randint(NUM_FILMS, (40,)),
        torch.arange(40) // 8,
        torch.arange(NUM_FILMS) + 1,
        TrainingConfig(item="film", dim=4),
    )
    return made


def test_histories_start_where_the_items_of_the_same_users_are() -> None:
    made = tower()
    history = made.user_tables.weight("history")[1:]
    items = made.item_tables.weight("film")[1:]
    assert torch.allclose(history, items, atol=0.2)
    assert torch.equal(history, made.user_tables.weight("recent")[1:])


@pytest.mark.parametrize("encoder", [None, {"kind": "mean", "max_length": 3}])
def test_each_head_starts_as_a_weighted_sum_of_the_parts_of_the_profile(encoder: Any) -> None:
    made = tower(
        encoder=encoder,
        user_ids=({"name": "tags", "dtype": "string", "size": 2},),
        user_numbers=({"name": "age", "width": 2},),
    )
    parts = 4 + (encoder is not None)
    weight = made.user_head.weight[: parts * 4, :8].view(parts, 4, 2, 4)
    for part in range(parts):
        for head in range(2):
            scale = 1.0 if part < 2 else 0.3
            assert torch.equal(weight[part, :, head], scale * torch.eye(4))
    assert not made.user_head.bias.any()


def test_numbers_say_little_of_a_user_and_nothing_of_an_item() -> None:
    made = tower(
        user_numbers=({"name": "age", "width": 2},), item_numbers=({"name": "price", "width": 1},)
    )
    of_user = made.user_features.numbers.projection("age").projection
    of_item = made.item_numbers.projection("price").projection
    assert 0 < of_user.weight[:3, :4].abs().mean() < 0.5
    assert not of_user.weight[3:].any()
    assert not of_user.weight[:, 4:].any()
    assert not of_item.weight.any()
    assert not of_item.bias.any()
    assert not of_user.bias.any()


def test_a_model_without_further_features_starts_as_it_does_with_them() -> None:
    plain, more = tower(), tower(item_numbers=({"name": "price", "width": 1},))
    for name in ("film", "popularity_band"):
        assert torch.equal(plain.item_tables.weight(name), more.item_tables.weight(name))


def test_texts_start_near_the_texts_and_the_items_like_them(
    make_text_encoder: Callable[..., TextEncoder],
) -> None:
    encoder = make_text_encoder()
    made = tower(text=encoder.config)
    assert made.text is not None
    texts = torch.randn(NUM_FILMS, 24)
    made.text.fill(texts, texts)
    items, queries = made.text.item_bags(texts), made.text.query_bags(texts)
    fill_text_weights(made, items, queries, torch.arange(NUM_FILMS) + 1)
    of_item, of_query = made.text.item(items), made.text.query(queries)
    assert torch.allclose(of_item.norm(dim=1).mean(), torch.tensor(1.5), atol=1e-4)
    assert torch.allclose(of_query, 2 * of_item, atol=1e-4)
    inputs = items.weights.view(NUM_FILMS, 25)[:, 1:]
    axes = torch.linalg.svd(inputs).Vh[:4]
    expected = (inputs @ axes.T) @ (inputs @ axes.T).T
    found = of_item @ of_item.T
    assert torch.allclose(found / found[0, 0], expected / expected[0, 0], atol=1e-3)
    # No other turn brings them nearer to the vectors of the items.
    product = of_item.T @ made.item_tables.weight("film")[1:]
    assert torch.allclose(product.trace(), torch.linalg.svdvals(product).sum(), rtol=1e-3)
    begin = made.config.text_column
    assert torch.equal(made.user_head.weight[begin : begin + 4, :4], torch.eye(4))
