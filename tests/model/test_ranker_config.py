from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from silvershard.model.ranker_config import (
    MixtureOfLogitsConfig,
    MLPConfig,
    RankerConfig,
    SelfAttentionConfig,
    check_ranker,
    session_rows,
)

CONFIGS = (MLPConfig(), SelfAttentionConfig(session_rows=5), MixtureOfLogitsConfig())
ADAPTER: TypeAdapter[RankerConfig] = TypeAdapter(RankerConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_config_survives_json(config: RankerConfig) -> None:
    assert ADAPTER.validate_json(ADAPTER.dump_json(config)) == config


def test_only_self_attention_reads_a_session() -> None:
    assert [session_rows(config) for config in CONFIGS] == [0, 5, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "tree"}, "kind"),
        ({}, "kind"),
        ({"kind": "mlp", "session_rows": 3}, "session_rows"),
        ({"kind": "self_attention", "gate_hidden": 3}, "gate_hidden"),
        ({"kind": "mixture_of_logits", "hidden": 3}, "hidden"),
        ({"kind": "mlp", "hidden": (0, 3)}, "hidden"),
        ({"kind": "self_attention", "layers": 0}, "layers"),
        ({"kind": "self_attention", "session_rows": 0}, "session_rows"),
        ({"kind": "mixture_of_logits", "temperature": 0}, "temperature"),
        ({"kind": "mixture_of_logits", "user_components": 0}, "user_components"),
    ],
)
def test_settings_of_no_ranker_or_of_another_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(given)


def test_a_ranker_that_does_not_fit_the_tower_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ranker.session_rows .* 9 ids \(max_history\), got 31"):
        check_ranker(SelfAttentionConfig(), dim=12, session_length=9)
    with pytest.raises(ValueError, match=r"ranker.attention_heads must divide dim 12, got 8"):
        check_ranker(SelfAttentionConfig(attention_heads=8), dim=12, session_length=50)
    for config in CONFIGS:
        check_ranker(config, dim=12, session_length=5)
