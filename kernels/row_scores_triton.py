"""Scores of int8 rows on CUDA with dp4a, and the rank keys of the rows that pass.

A lane is one slot of the pool. The bytes of a row are read as 32-bit words, so that a row of 64 is
four 16-byte loads, and four products take one instruction.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from silvershard.kernels.filter_ops_triton import truth_bits
from silvershard.kernels.ranking_triton import rank_keys

# The interpreter knows no inline assembly; there a twin with shifts gives the same integers.
USE_ASSEMBLY = not triton.knobs.runtime.interpret


@triton.jit
def dp4a(a, b, total, ASSEMBLY: tl.constexpr):
    """``total`` plus the inner product of four int8 in each int32 of ``a`` and ``b``."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total


@triton.jit
def integer_dots(
    codes_ptr,
    query_ptr,
    slots,
    active,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Inner products of the query and the int8 rows at ``slots``; 0 where not active.

    ``CHUNK`` columns are taken at a time: words of four codes if D is a multiple of 4, else codes.
    """
    dots = tl.zeros([ROWS], tl.int32)
    if DIM % 4 == 0:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        query_words_ptr = query_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        for first in tl.static_range(0, DIM // 4, CHUNK):
            column = first + tl.arange(0, CHUNK)
            row_words = tl.load(
                words_ptr + slots[:, None] * (DIM // 4) + column[None, :],
                mask=active[:, None] & (column < DIM // 4)[None, :],
                other=0,
            )
            query_words = tl.load(query_words_ptr + column, mask=column < DIM // 4, other=0)
            query_words = tl.broadcast_to(query_words[None, :], [ROWS, CHUNK])
            products = dp4a(
                row_words, query_words, tl.zeros([ROWS, CHUNK], tl.int32), ASSEMBLY=ASSEMBLY
            )
            dots += tl.sum(products, axis=1)
    else:
        for first in tl.static_range(0, DIM, CHUNK):
            column = first + tl.arange(0, CHUNK)
            row_codes = tl.load(
                codes_ptr + slots[:, None] * DIM + column[None, :],
                mask=active[:, None] & (column < DIM)[None, :],
                other=0,
            ).to(tl.int32)
            query_codes = tl.load(query_ptr + column, mask=column < DIM, other=0).to(tl.int32)
            dots += tl.sum(row_codes * query_codes[None, :], axis=1)
    return dots


@triton.jit
def candidate_keys(
    codes_ptr,
    scales_ptr,
    ids_ptr,
    query_ptr,
    query_scale,
    verify_ptr,
    verify_length,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    slots,
    active,
    cut_head,
    cut_tail,
    num_slots,
    num_planes,
    num_columns,
    num_terms,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    VERIFY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Rank keys of slots, and which of them pass the cut and the verify program.

    The id is read only where the score alone reaches the cut, and the program runs only if some
    slot of the block got that far.
    """
    dots = integer_dots(codes_ptr, query_ptr, slots, active, DIM, CHUNK, ROWS, ASSEMBLY)
    scales = tl.load(scales_ptr + slots, mask=active, other=0.0)
    scores = dots.to(tl.float32) * scales * query_scale
    hits = active & (scores > float("-inf"))
    nearest, _ = rank_keys(scores, tl.zeros_like(slots), slots)
    hits &= nearest <= cut_head
    item_ids = tl.load(ids_ptr + slots, mask=hits, other=0)
    head, tail = rank_keys(scores, item_ids, slots)
    hits &= (head < cut_head) | ((head == cut_head) & (tail <= cut_tail))
    if VERIFY:  # noqa: SIM102  a constant, decided when the kernel is compiled
        if tl.max(hits.to(tl.int32)) > 0:
            hits = truth_bits(
                verify_ptr,
                verify_length,
                planes_ptr,
                columns_ptr,
                terms_ptr,
                slots,
                hits,
                num_slots,
                num_planes,
                num_columns,
                num_terms,
            )
    return head, tail, hits


@triton.jit
def nth_set_bit(words, number):
    """Position of the set bit that ``number`` set bits precede, as int32."""
    low = (words & 0xFFFFFFFF).to(tl.int32)
    high = ((words >> 32) & 0xFFFFFFFF).to(tl.int32)
    below = _popcount(low)
    upper = number >= below
    bits = tl.where(upper, high, low)
    number = tl.where(upper, number - below, number)
    position = tl.where(upper, 32, 0)
    for step in tl.static_range(5):
        width = 16 >> step
        below = _popcount(bits & ((1 << width) - 1))
        upper = number >= below
        bits = tl.where(upper, bits >> width, bits)
        number = tl.where(upper, number - below, number)
        position = tl.where(upper, position + width, position)
    return position


@triton.jit
def _popcount(bits):
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (fours + (fours >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24) & 0xFF


def row_tile(dim: int) -> tuple[int, int]:
    """Columns (words or codes) and rows that a program holds at a time: at most 4,096 words."""
    columns = triton.next_power_of_2(-(-dim // 4) if dim % 4 == 0 else dim)
    chunk = min(64, columns)
    return chunk, max(32, min(256, 4096 // chunk))
