import pytest
import torch
from torch import Tensor

from silvershard.kernels import pack_bits
from silvershard.model.semantic_trie import CodeTrie


def make_codes(num_items: int, levels: int, width: int, page: int = 64) -> tuple[Tensor, Tensor]:
    """Codes and ids of items in the slots of an index, a fifth of which are dead."""
    generator = torch.Generator().manual_seed(num_items)
    num_pages = -(-5 * num_items // (4 * page)) + 1
    slots = torch.randperm(num_pages * page, generator=generator)[:num_items]
    item_ids = torch.full((num_pages * page,), -1)
    item_ids[slots] = torch.randperm(1 << 20, generator=generator)[:num_items]
    codes = torch.randint(width, (num_pages * page, levels), generator=generator).short()
    return codes.view(num_pages, page, levels), item_ids.view(num_pages, page)


def test_a_trie_numbers_prefixes_level_by_level() -> None:
    codes = torch.zeros(1, 64, 3, dtype=torch.int16)
    item_ids = torch.full((1, 64), -1)
    for slot, item_id, code in (
        (9, 50, (1, 0, 2)),
        (3, 20, (0, 1, 1)),
        (60, 10, (1, 0, 2)),
        (0, 30, (0, 1, 0)),
        (7, 40, (1, 2, 0)),
    ):
        item_ids[0, slot] = item_id
        codes[0, slot] = torch.tensor(code)
    trie = CodeTrie(codes, item_ids, 3)
    assert trie.num_items == 5
    assert trie.order.tolist() == [0, 3, 60, 9, 7]
    assert trie.item_ids.tolist() == [30, 20, 10, 50, 40]
    assert trie.bounds == (0, 1, 3, 6)
    # The empty prefix; (0), (1); (0, 1), (1, 0), (1, 2).
    assert trie.starts.tolist() == [0, 0, 2, 0, 2, 4]
    assert trie.stops.tolist() == [5, 2, 5, 2, 4, 5]
    assert trie.longer.tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("num_items", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("share", [0.0, 0.005, 0.3, 0.99, 1.0])
def test_bits_of_slots_become_bits_of_items_in_code_order(num_items: int, share: float) -> None:
    codes, item_ids = make_codes(num_items, 2, 5, page=128)
    generator = torch.Generator().manual_seed(2)
    flags = torch.rand(3, *item_ids.shape, generator=generator) < share
    trie = CodeTrie(codes, item_ids, 5)
    words = trie.in_code_order(pack_bits(flags))
    want = torch.zeros(3, words.shape[1] * 64, dtype=torch.bool)
    want[:, :num_items] = flags.flatten(1)[:, trie.order.long()]
    assert torch.equal(words, pack_bits(want))


def test_codes_that_do_not_fit_an_index_are_refused() -> None:
    codes, item_ids = make_codes(50, 3, 6)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\), got 5"):
        CodeTrie(codes.clamp(min=5), item_ids, 5)
    with pytest.raises(ValueError, match="codes must have shape"):
        CodeTrie(codes[:1], item_ids, 6)
    with pytest.raises(ValueError, match="L at least 1"):
        CodeTrie(codes[:, :, :0], item_ids, 6)
    dead = torch.where(item_ids[..., None] < 0, 99, codes).short()
    assert CodeTrie(dead, item_ids, 6).num_items == 50
