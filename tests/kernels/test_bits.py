import pytest
import torch

from silvershard.kernels import pack_bits, popcount, unpack_bits


def test_bit_zero_is_the_least_significant() -> None:
    bits = torch.zeros((1, 128), dtype=torch.bool)
    bits[0, [0, 3, 63, 64, 127]] = True
    words = pack_bits(bits)
    assert words.tolist() == [[(1 | 1 << 3 | 1 << 63) - (1 << 64), (1 | 1 << 63) - (1 << 64)]]
    assert popcount(words).tolist() == [[3, 2]]


@pytest.mark.parametrize("shape", [(64,), (128,), (7, 64), (3, 5, 128), (0, 64), (2, 0, 128)])
def test_pack_and_unpack_agree_with_integers(shape: tuple[int, ...], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    bits = torch.rand(shape, generator=generator) < 0.5
    words = pack_bits(bits.to(device))
    assert words.shape == (*shape[:-1], shape[-1] // 64)
    assert torch.equal(unpack_bits(words).cpu(), bits)
    numbers = [
        sum(int(bit) << place for place, bit in enumerate(row))
        for row in bits.reshape(-1, 64).tolist()
    ]
    assert [word % (1 << 64) for word in words.flatten().tolist()] == numbers
    assert popcount(words).flatten().tolist() == [number.bit_count() for number in numbers]


def test_strided_input_gives_the_same_words() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand((64, 6), generator=generator) < 0.5
    assert torch.equal(pack_bits(bits.T), pack_bits(bits.T.contiguous()))
    words = torch.randint(-(1 << 62), 1 << 62, (4, 6), generator=generator)
    assert torch.equal(unpack_bits(words[:, ::2]), unpack_bits(words[:, ::2].contiguous()))
    assert torch.equal(popcount(words.T), popcount(words).T)


def test_popcount_of_extreme_words() -> None:
    words = torch.tensor([0, -1, 1, -(1 << 63), (1 << 63) - 1])
    assert popcount(words).tolist() == [0, 64, 1, 1, 63]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be torch.bool, got torch.int64"):
        pack_bits(torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"multiple of 64, got \(2, 65\)"):
        pack_bits(torch.zeros((2, 65), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"multiple of 64, got \(\)"):
        pack_bits(torch.zeros((), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"words must be torch.int64, got torch.int32"):
        unpack_bits(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"words must have shape"):
        unpack_bits(torch.zeros((), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"words must be torch.int64, got torch.bool"):
        popcount(torch.zeros(1, dtype=torch.bool))
