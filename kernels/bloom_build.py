"""Bloom planes of items from their term keys, in place and for any subset of slots.

The bit matrix is transposed: one plane per hash position, one bit per slot, so that a term is the
AND of a few planes.

Shapes: J planes, N pages, W mask words per page, n slots to build, F term slots per item.

Source: Goodwin et al., BitFunnel: Revisiting Signatures for Search, SIGIR 2017, section 4.
Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.1 (transposed bit matrix).
"""

import torch
from torch import Tensor

from silvershard.kernels.bits import pack_bits_reference
from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_range,
    check_tensor,
)
from silvershard.kernels.filter_ops import PAD_TERM
from silvershard.kernels.native_library import run_on_cpu
from silvershard.kernels.native_operators import bloom_build_native

_MASK_64 = (1 << 64) - 1
_MASK_63 = (1 << 63) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Bits set at a time, which bounds the scratch table whatever the number of slots.
_CHUNK_ELEMENTS = 1 << 24


def bloom_build(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    *,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    """Set the Bloom bits of some slots to exactly those of the given terms, in place.

    The bits of every other slot and every other plane stay as they are.

    Args:
        planes: ``(J, N, W)`` int64, contiguous; changed in place.
        slots: ``(n,)`` int64 in [0, 64 N W), distinct.
        terms: ``(n, F)`` int64 keys >= 0; ``PAD_TERM`` where an item has fewer terms.
        first_plane: first of the Bloom planes, >= 1 because plane 0 is the live plane.
        num_planes: number of Bloom planes, ``1 <= num_planes <= J - first_plane``.
        num_hashes: positions per term, >= 1.
        seed: seed of the hash functions; must be the one that programs are compiled with.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges are wrong or a slot is given twice.
    """
    check_tensor("planes", planes, torch.int64, ("J", "N", "W"))
    check_contiguous(planes=planes)
    check_tensor("slots", slots, torch.int64, ("n",))
    check_tensor("terms", terms, torch.int64, (slots.shape[0], "F"))
    check_devices(planes=planes, slots=slots, terms=terms)
    if first_plane < 1:
        raise ValueError(f"first_plane must be at least 1, got {first_plane}")
    _check_hashing(num_planes, num_hashes)
    if first_plane + num_planes > planes.shape[0]:
        raise ValueError(
            f"first_plane + num_planes must be at most J = {planes.shape[0]}, "
            f"got {first_plane} + {num_planes}"
        )
    _bloom_build(planes, slots, terms, first_plane, num_planes, num_hashes, _signed(seed))


def bloom_build_reference(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    """The definition of ``bloom_build``; same contract, plain PyTorch, no validation."""
    flat = planes[first_plane : first_plane + num_planes].flatten(1)  # (num_planes, N * W), a view
    step = max(1, _CHUNK_ELEMENTS // max(64 * num_planes, terms.shape[1] * num_hashes, 1))
    for start in range(0, slots.shape[0], step):
        part = slots[start : start + step]
        words, column = torch.unique(part >> 6, return_inverse=True)  # (m,), (n,)
        offset = part & 63
        touched = torch.zeros((words.shape[0], 64), dtype=torch.bool, device=planes.device)
        touched[column, offset] = True
        keys = terms[start : start + step]
        row, slot_of_term = (keys != PAD_TERM).nonzero().unbind(1)
        positions = bloom_positions_reference(
            keys[row, slot_of_term], num_planes, num_hashes, seed
        )  # (t, num_hashes)
        table = torch.zeros(
            (num_planes, words.shape[0], 64), dtype=torch.bool, device=planes.device
        )
        table[positions, column[row, None], offset[row, None]] = True
        clear = pack_bits_reference(touched).squeeze(1)  # (m,)
        fresh = pack_bits_reference(table).squeeze(2)  # (num_planes, m)
        flat[:, words] = (flat[:, words] & ~clear) | fresh


def bloom_positions(keys: Tensor, *, num_planes: int, num_hashes: int, seed: int) -> Tensor:
    """Hash term keys to plane positions, relative to the first Bloom plane.

    Positions of one key may coincide. The result is the same on every platform.

    Args:
        keys: any shape, int64.
        num_planes: number of Bloom planes, >= 1.
        num_hashes: positions per key, >= 1.
        seed: seed of the hash functions.

    Returns:
        ``(..., num_hashes)`` int64 in [0, num_planes).

    Raises:
        ValueError: if ``keys`` is not int64 or a count is below 1.
    """
    if keys.dtype != torch.int64:
        raise ValueError(f"keys must be torch.int64, got {keys.dtype}")
    _check_hashing(num_planes, num_hashes)
    answer: Tensor = _bloom_positions(keys, num_planes, num_hashes, _signed(seed))
    return answer


def bloom_positions_reference(keys: Tensor, num_planes: int, num_hashes: int, seed: int) -> Tensor:
    """The definition of ``bloom_positions``; same contract, plain PyTorch, no validation."""
    salts = _salts(num_hashes, seed)
    mixed = keys[..., None] ^ torch.tensor(salts, dtype=torch.int64, device=keys.device)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(_MIX_1)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(_MIX_2)
    mixed = mixed ^ _shift_right(mixed, 31)
    return ((mixed & _MASK_63) % num_planes).contiguous()


def _checked_bloom_build(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    check_range("slots", slots, 0, planes.shape[1] * planes.shape[2] * 64)
    check_range("terms", terms, 0, 1 << 63)
    ordered = slots.sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("slots must be distinct, got a slot more than once")
    bloom_build_reference(planes, slots, terms, first_plane, num_planes, num_hashes, seed)


def _native_bloom_build(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    salts = _salts(num_hashes, seed)
    bloom_build_native(planes, slots, terms, first_plane, num_planes, salts)


def _salts(num_hashes: int, seed: int) -> list[int]:
    return [_signed(_mix(seed + number * _GOLDEN)) for number in range(1, num_hashes + 1)]


def _check_hashing(num_planes: int, num_hashes: int) -> None:
    if num_planes < 1:
        raise ValueError(f"num_planes must be at least 1, got {num_planes}")
    if num_hashes < 1:
        raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value &= _MASK_64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK_64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK_64
    return value ^ (value >> 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_bloom_build = torch.library.custom_op(
    "silvershard::bloom_build", bloom_build_reference, mutates_args=("planes",)
)
_bloom_build.register_kernel("cpu")(run_on_cpu(_native_bloom_build, _checked_bloom_build))
_bloom_positions = torch.library.custom_op(
    "silvershard::bloom_positions", bloom_positions_reference, mutates_args=()
)


@_bloom_build.register_kernel("cuda")
def _(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    from silvershard.kernels.bloom_build_triton import bloom_build_triton

    bloom_build_triton(planes, slots, terms, first_plane, num_planes, num_hashes, seed)


@_bloom_build.register_fake
def _(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    return None


@_bloom_positions.register_fake
def _(keys: Tensor, num_planes: int, num_hashes: int, seed: int) -> Tensor:
    return keys.new_empty((*keys.shape, num_hashes))
