import pytest
from pydantic import ValidationError

from silvershard.model.semantic_config import (
    SemanticConfig,
    SemanticSpec,
    SemanticTrainingConfig,
)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="width \\*\\* levels must be at most 2 \\*\\* 62"):
        SemanticConfig(levels=8, width=256)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SemanticConfig(levels=0)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        SemanticConfig(width=1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        SemanticConfig(depth=3)
    with pytest.raises(ValidationError, match="state_dim"):
        SemanticSpec(decoder=SemanticConfig(), state_dim=0)


def test_training_settings_out_of_range_are_refused() -> None:
    for field, value in (("steps", 0), ("batch", 0), ("learning_rate", 0), ("dropout", 1.0)):
        with pytest.raises(ValidationError, match=field):
            SemanticTrainingConfig(**{field: value})
