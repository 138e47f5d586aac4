from typing import Any

import pytest
from pydantic import ValidationError

from silvershard.model.text_config import TextTowerConfig, TextTrainingConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_text": ()}, "at least 1 item"),
        ({"item_text": ("title",)}, "one {feature} in each part, got 'title'"),
        ({"item_text": ("{title} {genres}",)}, "one {feature} in each part"),
        ({"item_text": ("{title}}",)}, "one {feature} in each part"),
        ({"item_text": ("{title.__class__}",)}, "one {feature} in each part"),
        ({"heads": ("a", "b")}, "at most 1 item"),
        ({"tasks": ("liked",)}, "at most 0 items"),
        ({"pooling": "max"}, "'mean' or 'cls'"),
        ({"max_tokens": 0}, "greater than or equal to 8"),
        ({"dim": 2048}, "less than or equal to 1024"),
        ({"path": "/models/one"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_setting_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("{", r"\{").replace("}", r"\}")):
        TextTowerConfig.model_validate(
            {"encoder": {"model_type": "bert"}, "tokenizer_bytes": 9, **change}
        )


def test_the_features_of_an_items_text_are_known_by_name() -> None:
    config = TextTowerConfig(encoder={}, tokenizer_bytes=9, item_text=("{title}", "By: {maker}"))
    assert config.item_features == ("title", "maker")


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": ""},
        {"query_share": 0.0},
        {"query_share": 1.0},
        {"alone_share": 1.5},
        {"query_texts": ()},
        {"path": "x"},
    ],
)
def test_a_wrong_setting_of_training_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TextTrainingConfig.model_validate({"encoder": "a folder", **change})
