from typing import Any

import pytest
from pydantic import ValidationError

from silvershard.model.two_tower_config import TwoTowerConfig

NUM_FILMS = 120
GENRES = ("Comedy", "Drama", "Horror", "Noir")


def config(**changes: Any) -> TwoTowerConfig:
    settings: dict[str, Any] = {
        "dim": 24,
        "heads": ("rated", "liked"),
        "tasks": ("rated", "liked"),
        "signals": ("popularity", "recency", "length"),
        "history": "history",
        "item": "film",
        "tables": (
            {"name": "film", "dtype": "int", "size": NUM_FILMS},
            {"name": "genres", "dtype": "string", "size": len(GENRES)},
            {"name": "year", "dtype": "int", "size": 10},
        ),
        "pooled": ({"feature": "genres", "width": 3},),
        "max_history": 20,
        "bands": 5,
    }
    return TwoTowerConfig.model_validate({**settings, **changes})


def test_the_widths_of_a_tower_follow_from_its_parts() -> None:
    plain = config()
    assert list(plain.user_tables) == ["history", "recent", "history_genres"]
    assert plain.profile_dim == plain.state_dim == 3 * 24
    assert plain.session_length == 0
    encoded = config(
        encoder={"kind": "hstu", "max_length": 8},
        ranker={"kind": "self_attention", "session_rows": 5},
    )
    assert encoded.profile_dim == 4 * 24
    assert encoded.state_dim == 4 * 24 + 5 * 24 + 1
    assert encoded.session_length == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"kind": "attention", "heads": 5}}, "heads must divide dim=24, got 5"),
        (
            {"encoder": {"kind": "hstu"}},
            "encoder.max_length must be at most max_history=20, got 50",
        ),
        ({"encoder": {"kind": "gru"}}, "does not match any of the expected tags"),
    ],
)
def test_an_encoder_that_does_not_fit_the_tower_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_width_that_quantised_tables_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of 8 for int4 tables, got 12"):
        config(dim=12, table_precision="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranker": {"kind": "self_attention", "attention_heads": 5}}, "attention_heads .* 24"),
        ({"ranker": {"kind": "self_attention"}}, r"session_rows .* 20 .*max_history"),
        ({"ranker": {"kind": "forest"}}, "ranker"),
        ({"item": "series"}, "item must be one of the tables"),
        ({"pooled": ({"feature": "actors", "width": 1},)}, "pooled must be one of the tables"),
        ({"tables": ({"name": "popularity_band", "dtype": "int", "size": 1},)}, "distinct names"),
        ({"heads": ()}, "heads"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_further_user_features_widen_the_profile() -> None:
    made = config(
        user_ids=({"name": "tags", "dtype": "string", "size": 7},),
        user_numbers=({"name": "age", "width": 1}, {"name": "taste", "width": 5}),
        encoder={"kind": "hstu", "max_length": 8},
    )
    assert made.user_tables["user_tags"] == 8
    assert made.encoder_column == (4 + 2) * 24
    assert made.profile_dim == (4 + 2 + 1) * 24
    assert made.item_tables == config().item_tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_numbers": ({"name": "history", "width": 1},)}, "must have distinct names"),
        (
            {
                "user_ids": ({"name": "a", "dtype": "int", "size": 1},),
                "user_numbers": ({"name": "a", "width": 1},),
            },
            r"text.query must have distinct names, got .*'a', 'a'",
        ),
        ({"item_numbers": ({"name": "film", "width": 1},)}, "tables and item_numbers must have"),
        ({"item_numbers": ({"name": "popularity_band", "width": 1},)}, "other than 'popularity_b"),
        ({"item_numbers": ({"name": "price", "width": 0},)}, "greater than or equal to 1"),
    ],
)
def test_features_of_one_name_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)
