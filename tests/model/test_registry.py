from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from silvershard.model import registry
from silvershard.model.registry import build, register_builder
from silvershard.model.two_tower import TwoTower


@pytest.fixture(autouse=True)
def _own_builders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def test_a_registered_builder_is_called_with_its_config() -> None:
    seen: list[Mapping[str, Any]] = []

    @register_builder("mine")
    def _mine(config: Mapping[str, Any]) -> nn.Module:
        seen.append(config)
        return nn.Identity()

    model = build("mine", {"width": 3})
    assert not model.training
    assert seen == [{"width": 3}]


def test_the_two_tower_builder_is_there() -> None:
    config = {
        "dim": 8,
        "heads": ["one"],
        "history": "seen",
        "item": "film",
        "tables": [{"name": "film", "dtype": "int", "size": 3}],
    }
    model = build("two_tower", config)
    assert isinstance(model, TwoTower)
    again = build("two_tower", model.config.model_dump(mode="json"))
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["os.system", "", "Two_Tower"])
def test_an_unknown_builder_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(ValueError, match="builder must be one of text_tower, two_tower, got"):
        build(name, {})


def test_a_config_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="heads"):
        build("two_tower", {"history": "seen"})


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'two_tower' is registered already"):
        register_builder("two_tower")(lambda config: nn.Identity())
