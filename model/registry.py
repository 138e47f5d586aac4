"""Builders of models by name: what a snapshot may ask to be constructed."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Builder = Callable[[Mapping[str, Any]], nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register_builder(name: str) -> Callable[[Builder], Builder]:
    """A decorator that makes a function available to ``build`` under this name.

    Raises:
        ValueError: if another builder has the name.
    """

    def register(builder: Builder) -> Builder:
        if _BUILDERS.get(name, builder) is not builder:
            raise ValueError(f"builder {name!r} is registered already")
        _BUILDERS[name] = builder
        return builder

    return register


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The model of that builder, with weights yet to be loaded, in eval mode.

    Only registered builders are constructed, so a snapshot cannot name code to run.

    Args:
        name: of a builder.
        config: what the builder needs, JSON values only.

    Raises:
        ValueError: if there is no such builder, or the config does not fit it.
    """
    if name not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS)) or "none"
        raise ValueError(f"builder must be one of {known}, got {name!r}")
    return _BUILDERS[name](config).eval()


@register_builder("two_tower")
def _two_tower(config: Mapping[str, Any]) -> nn.Module:
    from silvershard.model.two_tower import TwoTower
    from silvershard.model.two_tower_config import TwoTowerConfig

    return TwoTower(TwoTowerConfig.model_validate(config))


@register_builder("text_tower")
def _text_tower(config: Mapping[str, Any]) -> nn.Module:
    from silvershard.model.text_config import TextTowerConfig
    from silvershard.model.text_tower import TextTower

    return TextTower(TextTowerConfig.model_validate(config))
