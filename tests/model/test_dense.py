from collections.abc import Iterator

import pytest
import torch

from silvershard.model.dense import PaddedLinear, padded


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(in_features: int, out_features: int) -> PaddedLinear:
    torch.manual_seed(3)
    made = PaddedLinear(in_features, out_features).requires_grad_(requires_grad=False)
    made.bias.normal_()
    return made


def test_sizes_are_padded_to_multiples_of_16() -> None:
    assert [padded(size) for size in (0, 1, 16, 17, 32)] == [16, 16, 16, 32, 32]


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (5, 2), (64, 128), (199, 33)])
def test_the_product_is_that_of_a_linear_layer(in_features: int, out_features: int) -> None:
    made = layer(in_features, out_features)
    x = torch.randn(7, in_features)
    weight = made.weight[:in_features, :out_features]
    expected = x.double() @ weight.double() + made.bias.double()
    assert torch.allclose(made(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("in_features", "out_features"), [(3, 2), (64, 32), (192, 128), (199, 65)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    threads: int, in_features: int, out_features: int
) -> None:
    made = layer(in_features, out_features)
    x = torch.randn(300, in_features, generator=torch.Generator().manual_seed(1))
    together = made(x)
    # Two threads wait for each other on a busy machine, so they try fewer batches.
    step = 1 if threads == 1 else 37
    for row in range(0, 300, step):
        assert torch.equal(made(x[row : row + 1]), together[row : row + 1]), row
    for size in range(1, 301, step):
        assert torch.equal(made(x[:size]), together[:size]), size
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(made(x[shuffled]), together[shuffled])


def test_the_thread_count_does_not_change_a_bit() -> None:
    made = layer(192, 128)
    x = torch.randn(5000, 192)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(made(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][-3:], made(x[-3:]))


def test_batches_beyond_one_chunk_are_whole() -> None:
    made = layer(2, 3)
    x = torch.randn(16384 + 5, 2)
    assert torch.equal(made(x)[-5:], made(x[-5:]))


def test_the_result_is_contiguous_and_unpadded() -> None:
    result = layer(5, 3)(torch.randn(4, 5))
    assert result.shape == (4, 3)
    assert result.is_contiguous()


def test_no_rows_give_no_rows() -> None:
    assert layer(5, 3)(torch.zeros(0, 5)).shape == (0, 3)


def test_the_padding_of_the_weight_stays_zero_in_training() -> None:
    torch.manual_seed(0)
    made = PaddedLinear(5, 3)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
    assert not made.weight[5:].any()
    assert not made.weight[:, 3:].any()
    assert made.weight[:5, :3].all()


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be \(n, 5\), got \(2, 4\)"):
        layer(5, 3)(torch.zeros(2, 4))


def test_a_layer_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        PaddedLinear(0, 3)
