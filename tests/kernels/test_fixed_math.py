import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import fixed_dot, fixed_exp, fixed_log, fixed_sigmoid, fixed_sqrt
from silvershard.kernels.fixed_math import (
    fixed_exp_reference,
    fixed_log_reference,
    fixed_sigmoid_reference,
    fixed_sqrt_reference,
)

pytestmark = pytest.mark.usefixtures("implementation")

ELEMENTWISE = [fixed_exp, fixed_log, fixed_sigmoid, fixed_sqrt]
REFERENCES = {
    fixed_exp: fixed_exp_reference,
    fixed_log: fixed_log_reference,
    fixed_sigmoid: fixed_sigmoid_reference,
    fixed_sqrt: fixed_sqrt_reference,
}
SMALLEST_NORMAL = 2.0**-126
LARGEST = float(torch.finfo(torch.float32).max)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def largest_ulp(got: Tensor, exact: Tensor) -> float:
    """The largest error among results in the normal range, in units of the last place."""
    normal = (exact.abs() >= SMALLEST_NORMAL) & (exact.abs() <= LARGEST)
    assert normal.sum() > 1000
    unit = np.spacing(exact[normal].abs().float().numpy()).astype(np.float64)
    return float(((got[normal].double() - exact[normal]).abs().numpy() / unit).max())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def random_floats(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_every_implementation_gives_the_bits_of_the_reference(
    function: Callable[[Tensor], Tensor],
) -> None:
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.7229, -87.3366, -104.1, 90.0]
    subnormal = [SMALLEST_NORMAL / 2, -SMALLEST_NORMAL / 2, 1e-45, SMALLEST_NORMAL, 2.0]
    ordinary = torch.linspace(-110, 110, 70_001)
    x = torch.cat([torch.tensor(special + subnormal), random_floats(3, 300_000), ordinary])
    expected = REFERENCES[function](x)
    got = function(x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    wide = x[: 4 * 50 * 7].view(4, 50, 7)
    for view in (wide.transpose(0, 2), wide[:, ::3], wide[:, :, 2], x[:1][0], x[:0]):
        assert same_bits(function(view).nan_to_num(7.0), REFERENCES[function](view).nan_to_num(7.0))
        assert function(view).stride() == torch.empty_like(view).stride()


def test_exp_is_within_half_an_ulp() -> None:
    x = torch.cat([torch.linspace(-87.3, 88.7, 400_001), torch.linspace(-1e-3, 1e-3, 50_001)])
    assert largest_ulp(fixed_exp(x), x.double().exp()) < 0.51


def test_log_is_within_half_an_ulp() -> None:
    x = torch.cat(
        [
            torch.linspace(0.9, 1.1, 200_001),
            torch.logspace(-37, 38, 200_001),
            random_floats(0, 100_000).nan_to_num(1.0, 1.0, 1.0).abs(),
        ]
    )
    assert largest_ulp(fixed_log(x), x.double().log()) < 0.51


def test_sigmoid_is_within_half_an_ulp() -> None:
    x = torch.cat([torch.linspace(-87.3, 30.0, 400_001), torch.linspace(-1e-3, 1e-3, 50_001)])
    exact = 1.0 / (1.0 + (-x.double()).exp())
    assert largest_ulp(fixed_sigmoid(x), exact) < 0.51


def test_exp_overflows_to_infinity_and_flushes_subnormals_to_zero() -> None:
    x = torch.tensor([88.72, 88.73, 1e30, torch.inf, -87.33, -87.34, -103.0, -1e30, -torch.inf])
    y = fixed_exp(x).tolist()
    assert math.isfinite(y[0])
    assert y[1:4] == [math.inf] * 3
    assert y[4] >= SMALLEST_NORMAL
    assert y[5:] == [0.0] * 4
    assert fixed_exp(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_log_of_zero_negative_infinite_and_subnormal_numbers_is_defined() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, torch.inf, 1e-45, 1e-40])
    assert fixed_log(x).tolist() == [
        -math.inf,
        -math.inf,
        0.0,
        math.inf,
        float(np.float32(math.log(float(x[4])))),
        float(np.float32(math.log(float(x[5])))),
    ]
    assert fixed_log(torch.tensor([-1.0, -1e-45, -torch.inf])).isnan().all()


def test_sigmoid_reaches_its_limits() -> None:
    x = torch.tensor([0.0, -87.33, -87.34, -1e30, -torch.inf, 20.0, 1e30, torch.inf])
    y = fixed_sigmoid(x).tolist()
    assert y[0] == 0.5
    assert y[1] >= SMALLEST_NORMAL
    assert y[2:5] == [0.0] * 3
    assert y[5:] == [1.0] * 3


def test_sqrt_is_correctly_rounded() -> None:
    x = torch.cat(
        [
            torch.linspace(0.0, 4.0, 500_001),
            random_floats(3, 200_000).nan_to_num(1.0, 1.0, 1.0).abs(),
            torch.tensor([0.0, -0.0, 1e-45, 1e-40, torch.inf, LARGEST]),
        ]
    )
    assert same_bits(fixed_sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))
    assert fixed_sqrt(torch.tensor([-1.0, -1e-45, -torch.inf])).isnan().all()


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_nan_stays_nan_wherever_it_stands(function: Callable[[Tensor], Tensor]) -> None:
    for size in (1, 7, 33):
        for position in range(size):
            x = torch.ones(size)
            x[position] = torch.nan
            assert function(x).isnan().nonzero().flatten().tolist() == [position]


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_bits_depend_on_nothing_but_the_element(
    function: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    x = torch.cat([random_floats(1, 400), torch.linspace(-90, 90, 400)]).nan_to_num(0.5)
    x = x.to(device)
    whole = function(x)
    for size in range(1, 131):
        start = size * 37 % 600
        assert same_bits(function(x[start : start + size]), whole[start : start + size])
    for stride in (2, 3, 17):
        assert same_bits(function(x[::stride]), whole[::stride])
        assert same_bits(function(x[1::stride].clone()), whole[1::stride])
    table = x.view(20, 40)
    assert same_bits(function(table.T), whole.view(20, 40).T)
    assert function(table.T).shape == (40, 20)
    one_by_one = torch.stack([function(x[place]) for place in range(0, 800, 7)])
    assert same_bits(one_by_one, whole[::7])


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_bits_do_not_depend_on_the_number_of_threads(function: Callable[[Tensor], Tensor]) -> None:
    x = random_floats(2, 1_000_003).nan_to_num(0.5)
    with threads(1):
        single = function(x)
    with threads(2):
        double = function(x)
    assert same_bits(single, double)


def folded(a: list[float], b: list[float]) -> np.float32:
    values = [np.float32(x) * np.float32(y) for x, y in zip(a, b, strict=True)]
    width = 1
    while width < len(values):
        width *= 2
    values += [np.float32(0.0)] * (width - len(values))
    while width > 1:
        width //= 2
        values = [values[place] + values[place + width] for place in range(width)]
    return values[0]


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 63, 64, 100, 1024])
def test_dot_folds_halves_in_one_fixed_order(dim: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(dim)
    a = torch.randn((5, dim), generator=generator)
    b = torch.randn((5, dim), generator=generator)
    got = fixed_dot(a.to(device), b.to(device)).cpu()
    assert got.tolist() == [
        float(folded(x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]


def test_dot_of_a_hand_computed_case_shows_the_order() -> None:
    a = torch.tensor([[1e8, 1.0, -1e8, 1.0]])
    # (1e8 - 1e8) + (1 + 1), whereas adding from left to right would lose the first 1.
    assert fixed_dot(a, torch.ones(1, 4)).tolist() == [2.0]


def test_dot_has_the_same_bits_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((257, 48), generator=generator)
    b = torch.randn((257, 48), generator=generator)
    whole = fixed_dot(a, b)
    singles = torch.stack([fixed_dot(a[row], b[row]) for row in range(257)])
    assert same_bits(whole, singles)
    assert same_bits(fixed_dot(a[3:100:7], b[3:100:7]), whole[3:100:7])
    wide = torch.randn((257, 96), generator=generator)
    wide[:, ::2] = a
    assert same_bits(fixed_dot(wide[:, ::2], b), whole)


def test_dot_broadcasts_leading_dimensions() -> None:
    a = torch.arange(12.0).view(2, 1, 6)
    b = torch.arange(18.0).view(3, 6)
    got = fixed_dot(a, b)
    assert got.shape == (2, 3)
    assert torch.equal(got, (a * b).sum(-1))
    assert fixed_dot(torch.ones(0, 6), b[0]).shape == (0,)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3).half(), torch.ones(2, 3), "a must be torch.float32"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), "b must be torch.float32"),
        (torch.ones(2, 3), torch.ones(2, 4), "the same D, got 3 and 4"),
        (torch.ones(()), torch.ones(2, 4), "a must have shape"),
        (torch.ones(2, 0), torch.ones(2, 0), "D >= 1"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), "b must be on the device of a"),
    ],
)
def test_dot_refuses_bad_input(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_dot(a, b)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_elementwise_functions_refuse_other_dtypes(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"x must be torch.float32, got torch.float64"):
        function(torch.ones(2).double())
