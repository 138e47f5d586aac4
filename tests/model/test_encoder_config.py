from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from silvershard.model.encoder_config import (
    AttentionEncoderConfig,
    HSTUEncoderConfig,
    MeanEncoderConfig,
    SequenceEncoderConfig,
    check_encoder,
)

Config = MeanEncoderConfig | AttentionEncoderConfig | HSTUEncoderConfig


def test_a_config_says_its_kind() -> None:
    adapter: TypeAdapter[Config] = TypeAdapter(SequenceEncoderConfig)
    for config in (
        MeanEncoderConfig(max_length=7),
        AttentionEncoderConfig(heads=4, feed_forward=2),
        HSTUEncoderConfig(layers=3, relative_bias=False),
    ):
        assert adapter.validate_python(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match="'mean', 'attention', 'hstu'"):
        adapter.validate_python({"kind": "gru"})
    with pytest.raises(ValidationError, match="heads"):
        adapter.validate_python({"kind": "mean", "heads": 2})


@pytest.mark.parametrize("config", [AttentionEncoderConfig, HSTUEncoderConfig])
@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("layers", 0, "greater than or equal to 1"),
        ("layers", 17, "less than or equal to 16"),
        ("heads", 0, "greater than or equal to 1"),
        ("dropout", 1.0, "less than 1"),
        ("dropout", -0.1, "greater than or equal to 0"),
        ("max_length", 0, "greater than or equal to 1"),
        ("max_length", 513, "less than or equal to 512"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(
    config: type[Config], field: str, value: Any, limit: str
) -> None:
    with pytest.raises(ValidationError, match=rf"{field}\n.*{limit}"):
        config.model_validate({field: value})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    check_encoder(MeanEncoderConfig(), dim=1)
    check_encoder(HSTUEncoderConfig(heads=2), dim=64)
    with pytest.raises(ValueError, match="heads must divide dim=64, got 3"):
        check_encoder(HSTUEncoderConfig(heads=3), dim=64)
    with pytest.raises(ValueError, match="heads must divide dim=2, got 4"):
        check_encoder(AttentionEncoderConfig(heads=4), dim=2)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        check_encoder(MeanEncoderConfig(), dim=0)
