import torch
import triton
import triton.language as tl

from silvershard.kernels import NULL_KEY, Relation, popcount
from silvershard.kernels.filter_ops import compare_keys as compare_keys_reference
from silvershard.kernels.filter_ops_triton import compare_keys, deep_levels, popcount_words


@triton.jit
def _compare_kernel(out_ptr, keys_ptr, relation_ptr, key_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + place)
    truth = compare_keys(keys, tl.load(relation_ptr), tl.load(key_ptr))
    tl.store(out_ptr + place, truth.to(tl.int32))


@triton.jit
def _popcount_kernel(out_ptr, words_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, popcount_words(tl.load(words_ptr + place)))


def test_keys_compare_as_in_the_reference(device: torch.device) -> None:
    ends = [NULL_KEY, NULL_KEY + 1, -1, 0, 1, 2, (1 << 63) - 2, (1 << 63) - 1]
    keys = torch.tensor(ends)
    out = torch.empty(8, dtype=torch.int32, device=device)
    for relation in Relation:
        for key in ends:
            given = (torch.tensor([number], device=device) for number in (int(relation), key))
            _compare_kernel[1,](out, keys.to(device), *given, BLOCK=8, enable_fp_fusion=False)
            expected = compare_keys_reference(keys, relation, key)
            assert out.cpu().bool().tolist() == expected.tolist()


def test_set_bits_are_counted(device: torch.device) -> None:
    words = torch.randint(-(1 << 62), 1 << 62, (256,)) * 2
    words[:4] = torch.tensor([0, -1, 1, -(1 << 63)])
    out = torch.empty(256, dtype=torch.int64, device=device)
    _popcount_kernel[1,](out, words.to(device), BLOCK=256, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), popcount(words))


def test_the_stack_holds_whatever_a_program_of_that_length_can_need() -> None:
    for length in range(200):
        deepest = min(32, (length + 1) // 2)
        assert deep_levels(length) + 2 >= deepest
        assert deep_levels(length) in (0, 1, 2, 4, 8, 16, 32)
