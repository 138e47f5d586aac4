import pytest
import torch

from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_finite,
    check_not_nan,
    check_range,
    check_tensor,
)


def test_tensors_that_meet_every_clause_pass() -> None:
    x = torch.zeros((2, 3))
    check_tensor("x", x, torch.float32, ("Q", 3))
    check_devices(x=x, y=x)
    check_contiguous(x=x)
    check_not_nan("x", torch.full((2,), torch.inf))
    check_finite("x", x)
    check_range("pages", torch.tensor([-1, 4]), -1, 5)
    check_range("pages", torch.empty(0, dtype=torch.int64), 0, 0)


def test_a_message_names_parameter_requirement_and_value() -> None:
    x = torch.zeros((2, 3))
    with pytest.raises(ValueError, match=r"^x must be torch.int64, got torch.float32$"):
        check_tensor("x", x, torch.int64, ("Q", 3))
    with pytest.raises(ValueError, match=r"^x must have shape \(Q, 4\), got \(2, 3\)$"):
        check_tensor("x", x, torch.float32, ("Q", 4))
    with pytest.raises(ValueError, match=r"^x must have shape \(Q\), got \(2, 3\)$"):
        check_tensor("x", x, torch.float32, ("Q",))
    with pytest.raises(ValueError, match=r"^y must be on the device of x \(cpu\), got meta$"):
        check_devices(x=x, y=torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match=r"^x must be contiguous, got strides \(1, 3\)$"):
        check_contiguous(x=x.T)


def test_a_value_outside_its_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"^pages must be in \[-1, 5\), got 5$"):
        check_range("pages", torch.tensor([0, 5]), -1, 5)
    with pytest.raises(ValueError, match=r"^pages must be in \[-1, 5\), got -2$"):
        check_range("pages", torch.tensor([-2, 0]), -1, 5)


def test_nan_and_infinity_are_counted() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf])
    with pytest.raises(ValueError, match=r"^x must not be NaN, got 1 NaN values$"):
        check_not_nan("x", x)
    with pytest.raises(ValueError, match=r"^x must be finite, got 2 NaN or infinite values$"):
        check_finite("x", x)
