import importlib

import pytest

LAYERS = ("kernels", "model", "shard", "cluster", "deploy")


@pytest.mark.parametrize("layer", LAYERS)
def test_public_names_are_sorted_unique_and_exist(layer: str) -> None:
    module = importlib.import_module(f"silvershard.{layer}")
    names = getattr(module, "__all__", [])
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(module, name)] == []
