from typing import Any

import pytest
import torch

from silvershard.model.initial_weights import fill_weights
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
