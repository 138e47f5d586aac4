import importlib

import pytest

LAYERS = ("kernels", "model", "shard", "cluster", "deploy")


@pytest.mark.parametrize("layer", LAYERS)
def test_public_names_are_unique_and_exist(layer: str) -> None:
    # Their order (constants, classes, functions) is checked by the linter.
    module = importlib.import_module(f"silvershard.{layer}")
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []
