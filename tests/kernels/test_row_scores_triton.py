import pytest
import torch
import triton
import triton.language as tl

from silvershard.kernels.row_scores_triton import (
    USE_ASSEMBLY,
    integer_dots,
    nth_set_bit,
    row_tile,
)


@triton.jit
def _dots_kernel(
    out_ptr,
    codes_ptr,
    query_ptr,
    slots_ptr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    lane = tl.arange(0, ROWS)
    slots = tl.load(slots_ptr + lane)
    active = slots >= 0
    slots = tl.where(active, slots, 0)
    dots = integer_dots(codes_ptr, query_ptr, slots, active, DIM, CHUNK, ROWS, ASSEMBLY)
    tl.store(out_ptr + lane, dots)


@triton.jit
def _nth_kernel(out_ptr, word_ptr, BLOCK: tl.constexpr):
    number = tl.arange(0, BLOCK)
    words = tl.zeros([BLOCK], tl.int64) + tl.load(word_ptr)
    tl.store(out_ptr + number, nth_set_bit(words, number))


@pytest.mark.parametrize("dim", [1, 3, 4, 16, 33, 64, 96, 300, 1024])
def test_dots_are_exact_at_the_ends_of_the_range(dim: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(dim)
    codes = torch.randint(-128, 128, (40, dim), generator=generator).to(torch.int8)
    codes[0], codes[1] = -128, 127
    query = torch.randint(-128, 128, (dim,), generator=generator).to(torch.int8)
    for codes_of_query in (query, torch.full_like(query, -128)):
        chunk, rows = row_tile(dim)
        slots = torch.randint(-1, 40, (rows,), generator=generator)
        slots[:3] = torch.tensor([0, 1, -1])
        out = torch.empty(rows, dtype=torch.int32, device=device)
        _dots_kernel[1,](
            out,
            codes.to(device),
            codes_of_query.to(device),
            slots.to(device),
            DIM=dim,
            CHUNK=chunk,
            ROWS=rows,
            ASSEMBLY=USE_ASSEMBLY,
            enable_fp_fusion=False,
        )
        expected = (codes.long()[slots.clamp_min(0)] * codes_of_query.long()).sum(1)
        assert torch.equal(out.cpu().long(), torch.where(slots >= 0, expected, 0))


@pytest.mark.parametrize("word", [1, -(1 << 63), -1, 0x5555000000000001, 0x0123456789ABCDEF])
def test_the_nth_set_bit_is_found(word: int, device: torch.device) -> None:
    places = [place for place in range(64) if word >> place & 1]
    out = torch.empty(64, dtype=torch.int32, device=device)
    _nth_kernel[1,](out, torch.tensor([word], device=device), BLOCK=64, enable_fp_fusion=False)
    assert out[: len(places)].tolist() == places
