import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from silvershard.model.dense import PaddedLinear, padded, padded_product
from silvershard.model.ranker_arithmetic import (
    fixed_exp2,
    group_indicator,
    group_lengths,
    joined,
    linear,
    normed_rows,
    request_product,
    softmax_powers,
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_powers_of_two_are_exact_to_float32_precision() -> None:
    x = torch.cat([torch.linspace(-125.999, 0, 300_001), -torch.rand(10_000) * 1e-3])
    exact = torch.exp2(x.double())
    assert ((fixed_exp2(x).double() - exact) / exact).abs().max() < 2e-7


def test_powers_of_two_end_where_numbers_are_no_longer_normal() -> None:
    x = torch.tensor([0.0, -0.0, -1.0, -30.0, -125.5, -126.0, -127.0, -1e30, -math.inf, math.nan])
    found = fixed_exp2(x)
    assert found[:4].tolist() == [1.0, 1.0, 0.5, 2.0**-30]
    assert found[4] == pytest.approx(2.0**-125.5, rel=1e-6)
    assert found[5:9].tolist() == [0.0] * 4
    assert found[9].isnan()


def test_powers_of_two_leave_their_input_alone_and_fit_any_shape() -> None:
    x = -torch.rand(3, 5, 7).transpose(0, 2)
    before = x.clone()
    assert fixed_exp2(x).shape == (7, 5, 3)
    assert torch.equal(x, before)
    assert fixed_exp2(torch.zeros(0)).shape == (0,)


def test_a_power_of_two_has_the_same_bits_at_any_place(threads: int) -> None:
    x = -torch.rand(70_001, generator=torch.Generator().manual_seed(1)) * 30
    together = fixed_exp2(x)
    for first, last in ((0, 1), (1, 2), (3, 20), (69_990, 70_001), (5, 40_000)):
        assert torch.equal(fixed_exp2(x[first:last]), together[first:last])
        assert torch.equal(fixed_exp2(x[first:last].clone()), together[first:last])


def test_powers_of_two_with_gradients_agree_with_those_without() -> None:
    x = -torch.rand(100) * 20
    tracked = x.clone().requires_grad_()
    found = fixed_exp2(tracked)
    assert torch.allclose(found, fixed_exp2(x), rtol=1e-6, atol=0)
    found.sum().backward()
    assert tracked.grad is not None
    assert torch.allclose(tracked.grad, math.log(2) * torch.exp2(x))


def test_group_lengths_are_those_of_the_parts_of_a_row() -> None:
    x = torch.randn(6, 3 * 5)
    indicator = group_indicator(3, 5)
    assert indicator.shape == (15, padded(3))
    lengths = group_lengths(x, indicator, 3)
    assert torch.allclose(lengths, x.view(6, 3, 5).norm(dim=2))
    assert group_lengths(torch.zeros(1, 15), indicator, 3).tolist() == [[pytest.approx(1e-12)] * 3]


def test_lengths_are_roots_rounded_once() -> None:
    x, indicator = torch.randn(1000, 8), group_indicator(4, 2)
    square = padded_product(x * x, indicator)[:, :4]
    assert torch.equal(group_lengths(x, indicator, 4), square.double().sqrt().float())


def test_softmax_powers_are_a_softmax_before_its_division() -> None:
    x = torch.randn(4, 3, 9) * 40
    x[0, 0, :8] = -torch.inf
    before = x.clone()
    powers = softmax_powers(x)
    assert torch.equal(x, before)
    assert powers[0, 0].tolist() == [0.0] * 8 + [1.0]
    expected = torch.softmax(x.double() * math.log(2), 2)
    assert torch.allclose((powers / powers.sum(2, keepdim=True)).double(), expected, atol=1e-6)
    tracked = softmax_powers(x.clone().requires_grad_())
    assert torch.allclose(tracked, powers, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (64, 5), (21, 16), (37, 50)])
@pytest.mark.parametrize("rows", [1, 16, 33, 160])
def test_products_without_a_copy_have_the_bits_of_those_with_one(
    threads: int, rows: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(3)
    layer = PaddedLinear(inputs, outputs).requires_grad_(requires_grad=False)
    layer.bias.normal_()
    x = torch.randn(rows, inputs)
    expected = layer(x)
    given = joined(x[:, None, :1], x[:, None, 1:])
    assert given.shape == (rows, padded(inputs))
    assert torch.equal(linear(layer, given), expected)
    assert torch.equal(linear(layer, x), expected)
    behind = torch.cat([torch.zeros(1, inputs), x])[1:]
    assert torch.equal(linear(layer, behind), expected)
    assert torch.equal(linear(layer, x.T.contiguous().T), expected)
    tracked = linear(layer, x.clone().requires_grad_())
    assert torch.equal(tracked, expected)


def test_normed_rows_have_a_mean_square_of_one() -> None:
    x = torch.randn(9, 24) * 3
    assert torch.allclose(normed_rows(x).square().mean(1), torch.ones(9), atol=1e-5)
    assert not normed_rows(torch.zeros(2, 24)).any()
    tracked = torch.randn(5, 24, requires_grad=True)
    assert torch.allclose(normed_rows(tracked), normed_rows(tracked.detach()))
    normed_rows(tracked)[:, 0].sum().backward()
    assert tracked.grad is not None
    assert torch.isfinite(tracked.grad).all()


def rows_alone_equal_rows_together(x: Tensor, weight: Tensor) -> None:
    together = request_product(x, weight)
    batch, width, _ = x.shape
    for request in range(batch):
        mine = slice(request, request + 1)
        for columns in (slice(0, 1), slice(2, 9), slice(width - 1, width), slice(0, width)):
            alone = request_product(x[mine, columns], weight[mine])
            assert torch.equal(alone, together[mine, columns])


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (32, 16), (64, 64), (64, 80), (96, 70)])
def test_a_row_times_its_request_has_the_same_bits_in_any_company(
    threads: int, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 130, inputs, generator=generator)
    weight = torch.randn(3, inputs, outputs, generator=generator)
    rows_alone_equal_rows_together(x, weight)
    expected = x.double() @ weight.double()
    assert torch.allclose(request_product(x, weight).double(), expected, atol=1e-4)
    tracked = request_product(x.clone().requires_grad_(), weight)
    assert torch.allclose(tracked, request_product(x, weight), atol=1e-4)
