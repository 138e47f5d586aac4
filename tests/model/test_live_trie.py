import gc
import weakref

import pytest
import torch
from torch import Tensor

from silvershard.kernels import LIVE_PLANE, pack_bits
from silvershard.model import live_trie
from silvershard.model.index import IndexTensors, ItemIndex, SlotChange
from silvershard.model.live_trie import LiveTrie

PAGES, LEVELS, WIDTH = 8, 2, 3


def make_part(num_items: int) -> ItemIndex:
    """An index that has nothing but ids, live bits and codes; items are in its first slots."""
    generator = torch.Generator().manual_seed(num_items)
    slots = torch.arange(PAGES * 64).view(PAGES, 64)
    live = slots < num_items
    codes = torch.randint(WIDTH, (PAGES, 64, LEVELS), generator=generator)
    return ItemIndex(
        IndexTensors(
            page_table=torch.arange(PAGES, dtype=torch.int32)[:, None],
            codes=torch.zeros(PAGES, 64, 1, dtype=torch.int8),
            scales=torch.zeros(PAGES, 64),
            item_ids=torch.where(live, slots + 1000, -1),
            planes=pack_bits(live)[None],
            columns=torch.zeros(0, PAGES, 64, dtype=torch.int64),
            terms=torch.zeros(PAGES, 64, 0, dtype=torch.int64),
            cache=torch.zeros(PAGES, 64, 1, dtype=torch.float16),
            signals=torch.zeros(PAGES, 64, 0),
            semantic_codes=codes.short(),
        )
    )


def change(part: ItemIndex, retired: list[int], taken: list[int], sources: list[int]) -> None:
    """Move items, or write new ones where there is no source, and tell the watchers."""
    live = part.planes[LIVE_PLANE]
    ids, codes = part.item_ids.view(-1), part.semantic_codes.view(-1, LEVELS)
    for slot, source in zip(taken, sources, strict=True):
        ids[slot] = ids[source] if source >= 0 else 5000 + slot
        codes[slot] = codes[source] if source >= 0 else (codes[slot] + 1) % WIDTH
        live[slot >> 6] |= torch.ones((), dtype=torch.int64) << (slot & 63)
    for slot in retired:
        live[slot >> 6] &= ~(torch.ones((), dtype=torch.int64) << (slot & 63))
    told = SlotChange(*(torch.tensor(one, dtype=torch.int64) for one in (retired, taken, sources)))
    for watcher in part.watchers:
        watcher(told)


def held(trie: LiveTrie, part: ItemIndex) -> list[tuple[int, int, tuple[int, ...]]]:
    """Slot, id and codes of the live items in all tries, found as a search finds them."""
    found = []
    for one in trie.tries():
        words = one.in_code_order(part.planes[LIVE_PLANE][None])[0]
        for position in range(one.num_items):
            if words[position >> 6] >> (position & 63) & 1:
                slot = int(one.order[position])
                codes = tuple(one.codes[position].tolist())
                found.append((slot, int(one.item_ids[position]), codes))
    return sorted(found)


def wanted(part: ItemIndex) -> list[tuple[int, int, tuple[int, ...]]]:
    live = torch.nonzero(part.planes[LIVE_PLANE].flatten()[:, None] >> torch.arange(64) & 1)
    slots: Tensor = live[:, 0] * 64 + live[:, 1]
    ids, codes = part.item_ids.view(-1), part.semantic_codes.view(-1, LEVELS)
    return [(int(slot), int(ids[slot]), tuple(codes[slot].tolist())) for slot in slots]


@pytest.mark.parametrize("num_items", [0, 1, 200])
@pytest.mark.parametrize("few", [0, 12, 10_000])
def test_the_tries_hold_every_live_item_once_after_any_changes(
    num_items: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_trie, "_FEW_ITEMS", few)
    part = make_part(num_items)
    trie = LiveTrie(part, part.semantic_codes, WIDTH)
    first = trie.base
    generator = torch.Generator().manual_seed(1)
    live, dead = list(range(num_items)), list(range(num_items, PAGES * 64))

    def drawn(some: list[int], count: int) -> list[int]:
        order = torch.randperm(len(some), generator=generator)[:count].tolist()
        return [some[at] for at in order]

    for step in range(60):
        moved = drawn(live, 6)
        gone = [one for one in drawn(live, 3) if one not in moved]
        taken = drawn(dead, len(moved) + 3)
        # Slots are taken again by the very next change.
        change(part, moved + gone, taken, [*moved, *[-1] * (len(taken) - len(moved))])
        live = [one for one in live if one not in moved + gone] + taken
        dead = [one for one in range(PAGES * 64) if one not in live]
        if step % 7 == 0:
            trie.settle()
        if step % 2:
            with torch.inference_mode():
                assert held(trie, part) == wanted(part)
    assert (trie.base is first) == (few == 10_000)


def test_an_item_that_only_moves_stays_in_the_first_trie() -> None:
    part = make_part(100)
    trie = LiveTrie(part, part.semantic_codes, WIDTH)
    change(part, [3, 64], [200, 300], [3, 64])
    change(part, [200], [3], [200])
    assert len(trie.tries()) == 1
    assert held(trie, part) == wanted(part)
    change(part, [], [9 * 32], [-1])
    assert len(trie.tries()) == 2
    assert trie.tries()[1].num_items == 1
    assert trie.tries()[1] is trie.tries()[1]


def test_a_trie_and_its_part_go_with_their_last_user() -> None:
    """No collection has to find them: a process that serves does without one."""
    gc.collect()
    gc.disable()
    try:
        part = make_part(50)
        trie = LiveTrie(part, part.semantic_codes, WIDTH)
        change(part, [], [60], [-1])
        assert held(trie, part) == wanted(part)
        gone = (weakref.ref(part), weakref.ref(trie))
        del trie
        change(part, [], [61], [-1])
        del part
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()
