"""Launching on the device where the operands lie.

Triton launches on the current device of the thread, whichever device the tensors are on.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_operands(launcher: Callable[P, R]) -> Callable[P, R]:
    """The launcher, run while the device of its first tensor is the current one.

    Args:
        launcher: a function with at least one positional tensor. On the CPU nothing changes.

    Returns:
        A function with the same signature.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(one for one in args if isinstance(one, Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return launch
