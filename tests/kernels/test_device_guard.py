import inspect
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands


def test_the_device_of_the_first_tensor_is_current_during_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[object] = []

    @contextmanager
    def recorded(tensor: Tensor):  # type: ignore[no-untyped-def]
        events.append(tensor)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", recorded)

    @on_device_of_operands
    def add(scale: int, a: Tensor, b: Tensor) -> Tensor:
        events.append("called")
        return scale * a + b

    first = torch.ones(2)
    assert add(3, first, torch.ones(2)).tolist() == [4.0, 4.0]
    assert events[0] is first
    assert events[1:] == ["called", "left"]
    assert add.__name__ == "add"


def test_every_launcher_is_guarded() -> None:
    folder = Path(inspect.getfile(on_device_of_operands)).parent
    unguarded = []
    for path in folder.glob("*_triton.py"):
        module = import_module(f"silvershard.kernels.{path.stem}")
        for name, function in vars(module).items():
            if name.endswith("_triton") and inspect.isfunction(function):
                unguarded += [name] if not hasattr(function, "__wrapped__") else []
    assert unguarded == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one_are_served() -> None:
    quantize = import_module("silvershard.kernels.quantize_triton").quantize_rows_triton
    x = torch.randn(5, 8)
    with torch.cuda.device(0):
        codes, _ = quantize(x.to("cuda:1"))
    assert torch.equal(codes.cpu(), quantize(x.to("cuda:0"))[0].cpu())
