"""Filter programs on the device: the stack machine of ``filter_ops`` inside a Triton program.

One program evaluates the filter of one query on a block of lanes, where a lane is a word of 64
slots (``truth_words``) or one slot (``truth_bits``). The instructions are read from the device
tensor, so the branches are uniform. An operand out of range is clamped: a malformed program has no
defined result, but never touches foreign memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from silvershard.kernels.filter_ops import MAX_STACK, NULL_KEY, PAD_TERM, FilterOp

_TRUE = tl.constexpr(int(FilterOp.TRUE))
_PLANE = tl.constexpr(int(FilterOp.PLANE))
_COMPARE = tl.constexpr(int(FilterOp.COMPARE))
_AND = tl.constexpr(int(FilterOp.AND))
_OR = tl.constexpr(int(FilterOp.OR))
_NOT = tl.constexpr(int(FilterOp.NOT))
_TERM = tl.constexpr(int(FilterOp.TERM))
_NULL_KEY = tl.constexpr(NULL_KEY)
_PAD_TERM = tl.constexpr(PAD_TERM)
# Which of less (1), equal (2) and greater (4) a relation accepts, one octal digit per relation.
_ACCEPTS = tl.constexpr(0o465231)


def deep_levels(length: int) -> int:
    """Stack levels below the two that live in registers: a power of two, or 0.

    A program that leaves one value needs an operator for every leaf but the first.
    """
    depth = min(MAX_STACK, (length + 1) // 2)
    return 0 if depth <= 2 else 1 << (depth - 3).bit_length()


@triton.jit
def popcount_words(words):
    """Number of set bits of every int64 word; the interpreter has no ``popc``."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((octets * 0x0101010101010101) >> 56) & 0xFF


@triton.jit
def compare_keys(keys, relation, key):
    """Whether order keys stand in ``relation`` to ``key``; the null key never does."""
    accepts = (_ACCEPTS >> (3 * tl.minimum(tl.maximum(relation, 0), 5)).to(tl.int32)) & 7
    standing = tl.where(keys < key, 1, tl.where(keys == key, 2, 4))
    return ((standing & accepts) != 0) & (keys != _NULL_KEY)


@triton.jit
def truth_words(
    program_ptr,
    length,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    page,
    word,
    active,
    num_pages,
    num_planes,
    num_columns,
    num_terms,
    NUM_WORDS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Truth of one program at words ``word`` of pages ``page``: ``(BLOCK,)`` int64."""
    top = tl.full([BLOCK], -1, tl.int64)
    second = tl.full([BLOCK], -1, tl.int64)
    if DEEP > 0:
        deep = tl.zeros([BLOCK, DEEP], tl.int64)
        level = tl.arange(0, DEEP)[None, :]
    depth = tl.full([], 0, tl.int32)
    place = page * NUM_WORDS + word
    plane_size = tl.full([], NUM_WORDS, tl.int64) * num_pages
    eight = tl.arange(0, 8)[None, :].to(tl.int64)
    row = tl.full([], 0, tl.int32)
    while row < length:
        op = tl.load(program_ptr + 4 * row)
        a = tl.load(program_ptr + 4 * row + 1)
        b = tl.load(program_ptr + 4 * row + 2)
        c = tl.load(program_ptr + 4 * row + 3)
        if ((op >= _TRUE) & (op <= _COMPARE)) | (op == _TERM):
            leaf = tl.zeros([BLOCK], tl.int64)
            if op == _TRUE:
                leaf = tl.full([BLOCK], -1, tl.int64)
            elif op == _PLANE:
                plane = tl.minimum(tl.maximum(a, 0), num_planes - 1)
                leaf = tl.load(planes_ptr + plane * plane_size + place, mask=active, other=0)
            elif op == _COMPARE:
                column = tl.minimum(tl.maximum(a, 0), tl.maximum(num_columns - 1, 0))
                keys_ptr = columns_ptr + (column * plane_size + place)[:, None] * 64 + eight
                there = (active & (tl.zeros_like(place) + num_columns > 0))[:, None]
                for first in range(0, 64, 8):
                    keys = tl.load(keys_ptr + first, mask=there, other=_NULL_KEY)
                    truth = compare_keys(keys, b, c).to(tl.int64)
                    leaf |= tl.sum(truth << (first + eight), axis=1)
            elif op == _TERM:
                for first in range(0, 64, 8):
                    slot = place[:, None] * 64 + first + eight
                    found = tl.zeros([BLOCK, 8], tl.int64)
                    for field in range(num_terms):
                        keys = tl.load(
                            terms_ptr + slot * num_terms + field,
                            mask=active[:, None],
                            other=_PAD_TERM,
                        )
                        found |= (keys == c).to(tl.int64)
                    leaf |= tl.sum(found << (first + eight), axis=1)
            if DEEP > 0:  # noqa: SIM102  a constant, decided when the kernel is compiled
                if depth >= 2:
                    deep = tl.where(level == depth - 2, second[:, None], deep)
            second = top
            top = leaf
            depth += 1
        elif op == _NOT:
            top = ~top
        elif (op == _AND) | (op == _OR):
            top = tl.where(op == _AND, top & second, top | second)
            if DEEP > 0:  # noqa: SIM102  a constant, decided when the kernel is compiled
                if depth >= 3:
                    second = tl.sum(tl.where(level == depth - 3, deep, 0), axis=1)
            depth -= 1
        row += 1
    return top


@triton.jit
def truth_bits(
    program_ptr,
    length,
    planes_ptr,
    columns_ptr,
    terms_ptr,
    slots,
    active,
    num_slots,
    num_planes,
    num_columns,
    num_terms,
):
    """Truth of one program at single slots, as bool; loads only where ``active``.

    The stack of a slot is one int32, a bit per level.
    """
    stack = tl.where(active, 1, 1).to(tl.int32)
    row = tl.full([], 0, tl.int32)
    while row < length:
        op = tl.load(program_ptr + 4 * row)
        a = tl.load(program_ptr + 4 * row + 1)
        b = tl.load(program_ptr + 4 * row + 2)
        c = tl.load(program_ptr + 4 * row + 3)
        if ((op >= _TRUE) & (op <= _COMPARE)) | (op == _TERM):
            leaf = tl.zeros_like(stack)
            if op == _TRUE:
                leaf = tl.full(stack.shape, 1, tl.int32)
            elif op == _PLANE:
                plane = tl.minimum(tl.maximum(a, 0), num_planes - 1)
                word_ptr = planes_ptr + plane * (num_slots // 64) + (slots >> 6)
                words = tl.load(word_ptr, mask=active, other=0)
                leaf = ((words >> (slots & 63)) & 1).to(tl.int32)
            elif op == _COMPARE:
                column = tl.minimum(tl.maximum(a, 0), tl.maximum(num_columns - 1, 0))
                there = active & (tl.zeros_like(slots) + num_columns > 0)
                keys = tl.load(
                    columns_ptr + column * num_slots + slots, mask=there, other=_NULL_KEY
                )
                leaf = compare_keys(keys, b, c).to(tl.int32)
            elif op == _TERM:
                for field in range(num_terms):
                    keys = tl.load(
                        terms_ptr + slots * num_terms + field, mask=active, other=_PAD_TERM
                    )
                    leaf |= (keys == c).to(tl.int32)
            stack = (stack << 1) | leaf
        elif op == _NOT:
            stack ^= 1
        elif op == _AND:
            stack = (stack >> 1) & (stack | -2)
        elif op == _OR:
            stack = (stack >> 1) | (stack & 1)
        row += 1
    return active & ((stack & 1) != 0)
