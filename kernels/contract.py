"""Clauses that every operator checks before it runs: dtype, shape, device, layout and value range.

Values are read only on the CPU and outside ``torch.compile``: reading them elsewhere would stall
the device or break the graph. Every implementation must therefore stay memory-safe by itself.
"""

import math

import torch
from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...]
) -> None:
    """Refuse a tensor whose dtype or shape is not the one required.

    Args:
        name: parameter name, used in the message.
        tensor: the argument.
        dtype: required dtype.
        shape: one entry per dimension: a size, or the letter of a free dimension.

    Raises:
        ValueError: naming the parameter, what was required and what was got.
    """
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    got = tensor.shape
    # Checks are a tenth of a small search, so the common case is as short as it can be.
    if got == shape:
        return
    if len(got) == len(shape):
        for want, have in zip(shape, got, strict=True):
            if want.__class__ is not str and want != have:
                break
        else:
            return
    wanted = ", ".join(str(want) for want in shape)
    raise ValueError(f"{name} must have shape ({wanted}), got {tuple(got)}")


def check_devices(**tensors: Tensor) -> None:
    """Refuse tensors that do not all lie on the device of the first one.

    Raises:
        ValueError: naming the first parameter on another device.
    """
    first_name, first = next(iter(tensors.items()))
    device = first.device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on the device of {first_name} ({first.device}), "
                f"got {tensor.device}"
            )


def check_contiguous(**tensors: Tensor) -> None:
    """Refuse tensors that are not contiguous.

    Raises:
        ValueError: naming the first parameter with other strides.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def reads_values(tensor: Tensor) -> bool:
    """Whether a check may look at the values of a tensor: on the CPU and not while compiling."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Refuse integers outside ``[low, high)``.

    Raises:
        ValueError: naming the parameter, the range and the offending value.
    """
    if tensor.numel() == 0 or not reads_values(tensor):
        return
    least, greatest = torch.aminmax(tensor)
    for value in (int(least), int(greatest)):
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_not_nan(name: str, tensor: Tensor) -> None:
    """Refuse floats that hold a NaN, for which no order is defined.

    Raises:
        ValueError: naming the parameter.
    """
    if tensor.numel() and reads_values(tensor) and bool(tensor.isnan().any()):
        raise ValueError(f"{name} must not be NaN, got {int(tensor.isnan().sum())} NaN values")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse floats that hold a NaN or an infinity.

    Raises:
        ValueError: naming the parameter.
    """
    # A sum is finite only if all its terms are, and takes a tenth of the time of looking at each.
    if tensor.numel() == 0 or not reads_values(tensor) or math.isfinite(tensor.sum()):
        return
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values"
        )
