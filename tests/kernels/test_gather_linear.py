import pytest
import torch
from torch import Tensor

from silvershard.kernels import gather_linear

pytestmark = pytest.mark.usefixtures("implementation")


def random_arguments(
    dim: int, num_outputs: int, *, batch: int = 3, candidates: int = 37
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim * 1000 + num_outputs)
    slots = torch.randint(0, 192, (batch, candidates), generator=generator)
    slots[:, 3::7] = -1
    return (
        torch.randn((3, 64, dim), generator=generator).half(),
        slots,
        torch.randn((batch, dim, num_outputs), generator=generator),
        torch.randn((batch, num_outputs), generator=generator),
    )


def test_hand_computed_case() -> None:
    cache = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [-0.5, 8.0]]]).half()
    weight = torch.tensor([[[1.0, 10.0, 0.0], [2.0, -1.0, 0.0]], [[0.0, 1.0, 1.0]] * 2])
    bias = torch.tensor([[0.5, 0.0, 7.0], [-1.0, 1.0, 2.0]])
    out = gather_linear(cache, torch.tensor([[3, -1, 0], [0, 2, 2]]), weight, bias)
    assert out.tolist() == [
        [[16.0, -13.0, 7.0], [0.0, 0.0, 0.0], [5.5, 8.0, 7.0]],
        [[-1.0, 4.0, 5.0], [-1.0, 12.0, 13.0], [-1.0, 12.0, 13.0]],
    ]


@pytest.mark.parametrize(
    ("dim", "num_outputs"),
    [(1, 1), (16, 8), (33, 7), (63, 65), (64, 64), (100, 131), (128, 200), (1024, 72)],
)
def test_outputs_are_exact_to_the_rounding_of_each_step(dim: int, num_outputs: int) -> None:
    cache, slots, weight, bias = random_arguments(dim, num_outputs)
    out = gather_linear(cache, slots, weight, bias)
    assert out.shape == (3, 37, num_outputs)
    rows = cache.view(-1, dim)[slots.clamp_min(0)].double()
    expected = rows @ weight.double() + bias.double()[:, None]
    # Each of the D steps rounds a partial sum, and maybe its product, once.
    magnitude = rows.abs() @ weight.double().abs() + bias.double().abs()[:, None]
    bound = 2 * (dim + 1) * 2.0**-24 * magnitude
    assert torch.where((slots < 0)[:, :, None], 0.0, (out - expected).abs() - bound).max() <= 0
    assert torch.equal(out[slots < 0], torch.zeros_like(out[slots < 0]))


@pytest.mark.parametrize(("dim", "num_outputs"), [(33, 7), (64, 80)])
def test_a_row_does_not_depend_on_its_neighbours(dim: int, num_outputs: int) -> None:
    cache, slots, weight, bias = random_arguments(dim, num_outputs, candidates=300)
    whole = gather_linear(cache, slots, weight, bias)
    for request in range(3):
        one = slice(request, request + 1)
        for start in (0, 1, 127, 128, 299):
            part = slots[one, start : start + 5]
            alone = gather_linear(cache, part, weight[one], bias[one])
            assert torch.equal(alone[0], whole[request, start : start + 5])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gather_linear(cache, slots[:, order], weight, bias), whole[:, order])


def test_an_output_depends_on_its_own_column_of_weights_only() -> None:
    cache, slots, weight, bias = random_arguments(40, 83)
    whole = gather_linear(cache, slots, weight, bias)
    for output in range(83):
        column = slice(output, output + 1)
        alone = gather_linear(cache, slots, weight[:, :, column], bias[:, column])
        # Where the reference multiplies and the native operators fuse, each does so everywhere.
        assert torch.equal(alone[:, :, 0], whole[:, :, output])


def test_inputs_other_than_the_cache_may_have_any_strides() -> None:
    cache, slots, weight, bias = random_arguments(33, 7)
    expected = gather_linear(cache, slots, weight, bias)
    got = gather_linear(
        cache,
        slots.T.contiguous().T,
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((bias, bias), dim=2)[:, :, 0],
    )
    assert torch.equal(got, expected)


def test_special_values_follow_ieee_arithmetic_and_stay_in_their_row() -> None:
    cache, slots, weight, bias = random_arguments(20, 9)
    slots[0, :3] = torch.tensor([0, 1, 2])
    cache[0, 1, 5] = torch.nan
    cache[0, 2, 5] = torch.inf
    expected = gather_linear(torch.nan_to_num(cache, nan=0.0, posinf=0.0), slots, weight, bias)
    out = gather_linear(cache, slots, weight, bias)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, 2], torch.where(weight[0, 5] > 0, torch.inf, -torch.inf))
    clean = (slots != 1) & (slots != 2)
    assert torch.equal(out[clean], expected[clean])
    subnormal = torch.full((1, 64, 20), 2.0**-24).half()
    tiny = gather_linear(subnormal, slots[:1, :1], torch.ones(1, 20, 9), torch.zeros(1, 9))
    assert (tiny == 20 * 2.0**-24).all()


def test_nothing_gives_nothing() -> None:
    weight, bias = torch.ones(2, 4, 3), torch.ones(2, 3)
    empty = torch.empty((0, 64, 4), dtype=torch.float16)
    absent = torch.full((2, 5), -1)
    assert torch.equal(gather_linear(empty, absent, weight, bias), torch.zeros(2, 5, 3))
    assert gather_linear(empty, absent[:, :0], weight, bias).shape == (2, 0, 3)
    assert gather_linear(empty, absent[:0], weight[:0], bias[:0]).shape == (0, 5, 3)


def test_bad_input_is_refused() -> None:
    good_cache, good_slots, good_weight, good_bias = random_arguments(4, 3, batch=2, candidates=5)

    def refuses(
        message: str,
        *,
        cache: Tensor = good_cache,
        slots: Tensor = good_slots,
        weight: Tensor = good_weight,
        bias: Tensor = good_bias,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            gather_linear(cache, slots, weight, bias)

    refuses("cache must be torch.float16", cache=good_cache.float())
    refuses(r"cache must have shape \(N, G, D\)", cache=good_cache[0])
    refuses("cache must have D >= 1", cache=good_cache[..., :0], weight=good_weight[:, :0])
    refuses("cache must be contiguous", cache=good_cache.transpose(0, 1))
    refuses("slots must be torch.int64", slots=good_slots.int())
    refuses(r"slots must have shape \(B, U\)", slots=good_slots[0])
    refuses("slots must be on the device", slots=good_slots.to("meta"))
    refuses(r"slots must be in \[-1, 192\), got 192", slots=good_slots * 0 + 192)
    refuses(r"slots must be in \[-1, 192\), got -2", slots=good_slots * 0 - 2)
    refuses("weight must be torch.float32", weight=good_weight.double())
    refuses(r"weight must have shape \(2, 4, O\)", weight=good_weight[:1])
    refuses("weight must have O >= 1", weight=good_weight[..., :0], bias=good_bias[:, :0])
    refuses("bias must be torch.float32", bias=good_bias.half())
    refuses(r"bias must have shape \(2, 3\)", bias=good_bias[:, :2])
