"""Bloom planes on CUDA, in two kernels over slots in ascending order.

One program of the first clears the Bloom bits of a block of slots in a group of planes; the first
slot of a 64-slot word clears the whole word's share, so that a word is written by one lane. One
program of the second hashes one term slot of a block of items and sets the bits atomically.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.filter_ops import PAD_TERM

BLOCK = 128
_PLANES_PER_PROGRAM = 32
_PAD_TERM = tl.constexpr(PAD_TERM)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_MASK_63 = tl.constexpr((1 << 63) - 1)


@triton.jit
def _mixed(value):
    """The finaliser of splitmix64, modulo 2**64; shifts are logical."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _MIX_1
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _MIX_2
    return value ^ ((value >> 31) & ((1 << 33) - 1))


@triton.jit
def _clear_kernel(
    planes_ptr,
    ordered_ptr,
    num_slots,
    plane_size,
    first_plane,
    num_planes,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_slots
    slot = tl.load(ordered_ptr + place, mask=inside, other=-1)
    word = slot >> 6
    previous = tl.load(ordered_ptr + place - 1, mask=inside & (place > 0), other=-1)
    # Slots outside of the planes are left alone, so that no foreign memory is touched.
    leads = inside & (previous >> 6 != word) & (word >= 0) & (word < plane_size)
    one = tl.full([1], 1, tl.int64)
    touched = one << (slot & 63)
    ahead = place + 1
    follows = leads & (ahead < num_slots)
    while tl.max(follows.to(tl.int32)) > 0:
        other = tl.load(ordered_ptr + ahead, mask=follows, other=-1)
        follows &= (other >> 6) == word
        touched |= tl.where(follows, one << (other & 63), 0)
        ahead += 1
        follows &= ahead < num_slots
    plane = tl.program_id(1).to(tl.int64) * GROUP
    last = tl.minimum(plane + GROUP, num_planes)
    while plane < last:
        word_ptr = planes_ptr + (first_plane + plane) * plane_size + word
        words = tl.load(word_ptr, mask=leads, other=0)
        tl.store(word_ptr, words & ~touched, mask=leads)
        plane += 1


@triton.jit
def _set_kernel(
    planes_ptr,
    slots_ptr,
    terms_ptr,
    num_slots,
    num_terms,
    plane_size,
    first_plane,
    num_planes,
    num_hashes,
    seed,
    BLOCK: tl.constexpr,
):
    field = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_slots
    slot = tl.load(slots_ptr + row, mask=inside, other=-1)
    key = tl.load(terms_ptr + row * num_terms + field, mask=inside, other=_PAD_TERM)
    word = slot >> 6
    set_bits = inside & (key != _PAD_TERM) & (word >= 0) & (word < plane_size)
    bit = tl.full([1], 1, tl.int64) << (slot & 63)
    number = tl.full([], 1, tl.int64)
    while number <= num_hashes:
        salt = _mixed(number * _GOLDEN + seed)
        plane = first_plane + (_mixed(key ^ salt) & _MASK_63) % num_planes
        tl.atomic_or(planes_ptr + plane * plane_size + word, bit, mask=set_bits)
        number += 1


@on_device_of_operands
def bloom_build_triton(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    num_hashes: int,
    seed: int,
) -> None:
    """The CUDA implementation of ``bloom_build``; same contract, no validation."""
    num_slots, num_terms = terms.shape
    plane_size = planes.shape[1] * planes.shape[2]
    if num_slots * plane_size == 0:
        return
    num_blocks = triton.cdiv(num_slots, BLOCK)
    _clear_kernel[num_blocks, triton.cdiv(num_planes, _PLANES_PER_PROGRAM)](
        planes,
        slots.sort().values,
        num_slots,
        plane_size,
        first_plane,
        num_planes,
        GROUP=_PLANES_PER_PROGRAM,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    if num_terms:
        _set_kernel[num_blocks, num_terms](
            planes,
            slots.contiguous(),
            terms.contiguous(),
            num_slots,
            num_terms,
            plane_size,
            first_plane,
            num_planes,
            num_hashes,
            seed,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
