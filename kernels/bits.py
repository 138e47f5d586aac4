"""Bit masks of page slots as 64-bit words, least significant bit first.

Bit ``j`` of word ``w`` is slot ``w * 64 + j`` of the page. Everything is integer arithmetic, modulo
2**64 and little endian, as on every platform that torch supports.

Shapes: G slots per page, a multiple of 64; W = G / 64 words.
"""

import torch
from torch import Tensor

_ONES = 0x0101010101010101
# Multiplying eight bytes of 0 or 1 by this gathers them as the eight bits of the highest byte.
_GATHER = 0x0102040810204080
# Byte i keeps only bit i of a byte that was copied into all eight.
_DIAGONAL = 0x8040201008040201 - (1 << 64)
_SEVEN_F = 0x7F7F7F7F7F7F7F7F


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans into 64-bit words.

    Args:
        bits: ``(..., G)`` bool, G a multiple of 64.

    Returns:
        ``(..., W)`` int64.

    Raises:
        ValueError: if ``bits`` is not bool or G is not a multiple of 64.
    """
    if bits.dtype != torch.bool:
        raise ValueError(f"bits must be torch.bool, got {bits.dtype}")
    if bits.dim() == 0 or bits.shape[-1] % 64:
        raise ValueError(
            f"bits must have shape (..., G) with G a multiple of 64, got {tuple(bits.shape)}"
        )
    answer: Tensor = _pack_bits(bits)
    return answer


def pack_bits_reference(bits: Tensor) -> Tensor:
    """The definition of ``pack_bits``; same contract, plain PyTorch, no validation."""
    shape = (*bits.shape[:-1], bits.shape[-1] // 64)
    eights = bits.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.int64)
    return ((eights * _GATHER) >> 56).to(torch.uint8).view(torch.int64).reshape(shape)


def unpack_bits(words: Tensor) -> Tensor:
    """Unpack 64-bit words into booleans, the inverse of ``pack_bits``.

    Args:
        words: ``(..., W)`` int64.

    Returns:
        ``(..., G)`` bool with G = 64 W.

    Raises:
        ValueError: if ``words`` is not int64 or has no dimension.
    """
    if words.dtype != torch.int64:
        raise ValueError(f"words must be torch.int64, got {words.dtype}")
    if words.dim() == 0:
        raise ValueError("words must have shape (..., W), got ()")
    answer: Tensor = _unpack_bits(words)
    return answer


def unpack_bits_reference(words: Tensor) -> Tensor:
    """The definition of ``unpack_bits``; same contract, plain PyTorch, no validation."""
    shape = (*words.shape[:-1], words.shape[-1] * 64)
    octets = words.reshape(-1).contiguous().view(torch.uint8).to(torch.int64)
    chosen = (octets * _ONES) & _DIAGONAL
    return (((chosen + _SEVEN_F) >> 7) & _ONES).view(torch.bool).reshape(shape)


def popcount(words: Tensor) -> Tensor:
    """Count the set bits of every word.

    Args:
        words: any shape, int64.

    Returns:
        Same shape, int64 in [0, 64].

    Raises:
        ValueError: if ``words`` is not int64.
    """
    if words.dtype != torch.int64:
        raise ValueError(f"words must be torch.int64, got {words.dtype}")
    answer: Tensor = _popcount(words)
    return answer


def popcount_reference(words: Tensor) -> Tensor:
    """The definition of ``popcount``; same contract, plain PyTorch, no validation."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((octets * _ONES) >> 56) & 0xFF


_pack_bits = torch.library.custom_op("silvershard::pack_bits", pack_bits_reference, mutates_args=())
_unpack_bits = torch.library.custom_op(
    "silvershard::unpack_bits", unpack_bits_reference, mutates_args=()
)
_popcount = torch.library.custom_op("silvershard::popcount", popcount_reference, mutates_args=())


@_pack_bits.register_fake
def _(bits: Tensor) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], bits.shape[-1] // 64), dtype=torch.int64)


@_unpack_bits.register_fake
def _(words: Tensor) -> Tensor:
    return words.new_empty((*words.shape[:-1], words.shape[-1] * 64), dtype=torch.bool)


@_popcount.register_fake
def _(words: Tensor) -> Tensor:
    return torch.empty_like(words)
