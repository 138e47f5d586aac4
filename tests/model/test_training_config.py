import math
from typing import Any

import pytest
from pydantic import ValidationError

from silvershard.model.training_config import TrainingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"half_life": math.inf}, "finite number"),
        ({"min_rating": {"liked": math.nan}}, "finite number"),
        ({"encoder": {"kind": "hstu", "heads": 3}}, "encoder.heads must divide dim=64, got 3"),
        (
            {"ranker": {"kind": "self_attention", "attention_heads": 3}},
            "ranker.attention_heads must divide dim 64, got 3",
        ),
        ({"pooled": ("genres", "genres")}, "pooled must name each feature once"),
        ({"threads": 10**10}, "less than or equal to 1024"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    TrainingConfig()
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate(settings)


def test_a_ranker_is_not_held_to_a_history_that_only_the_schema_knows() -> None:
    ranker = {"kind": "self_attention", "attention_heads": 4, "session_rows": 1024}
    config = TrainingConfig.model_validate({"ranker": ranker})
    assert config.ranker.model_dump().items() >= ranker.items()
