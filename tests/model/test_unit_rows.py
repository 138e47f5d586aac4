import torch

from silvershard.model.unit_rows import unit_rows


def test_unit_rows_leave_zeros_and_have_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    unit_rows(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not unit_rows(torch.zeros(2, 4)).any()
    rows = torch.randn(50, 24)
    assert torch.equal(unit_rows(rows.clone().requires_grad_()), unit_rows(rows))
