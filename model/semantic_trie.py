"""The trie of the semantic ids of some items, in the order of which their bits are kept.

Shapes: B requests, n items, N pages of G slots, W = G / 64 words, L levels, V codes of a level, M
prefixes of a trie.
"""

import torch
from torch import Tensor, nn

from silvershard.kernels import pack_bits, popcount, unpack_bits
from silvershard.kernels.contract import check_devices, check_range, check_tensor

# Bits that differ from none or from all are moved one by one up to one in so many items: for a
# million, 0.6 ms at 0.1 % and 1.4 ms at 1 %, where moving every bit takes 2 ms.
_FEW = 64


class CodeTrie(nn.Module):
    """The prefixes of the codes of some items, each with its range in one order of the items.

    Items are ordered by codes, then by id. Prefixes are numbered level by level in that order, the
    empty one first, so that the next longer prefixes of one are neighbours; items lie directly
    below the prefixes of L - 1 codes.

    A delete needs nothing while the live bit of its slot is off, and an item can change its slot.
    Items that come, and codes that change, need another trie: ``live_trie`` holds them beside this
    one. Building one over a million items takes 0.3 s on one core.
    """

    order: Tensor
    place: Tensor
    codes: Tensor
    item_ids: Tensor
    members: Tensor
    every: Tensor
    starts: Tensor
    stops: Tensor
    longer: Tensor

    def __init__(
        self, codes: Tensor, item_ids: Tensor, width: int, slots: Tensor | None = None
    ) -> None:
        """Order the items of an index.

        Args:
            codes: ``(N, G, L)`` int16 in [0, V) where there is an item.
            item_ids: ``(N, G)`` int64, -1 in a dead slot; no id twice.
            width: V.
            slots: ``(n,)`` int64 those of the items to hold; None: all of them.

        Raises:
            ValueError: if shapes, dtypes or ranges disagree.
        """
        super().__init__()
        check_tensor("item_ids", item_ids, torch.int64, ("N", "G"))
        check_tensor("codes", codes, torch.int16, (*item_ids.shape, "L"))
        check_devices(item_ids=item_ids, codes=codes)
        levels = codes.shape[2]
        if not levels or item_ids.shape[1] % 64:
            raise ValueError(
                "codes must be (N, G, L) with G a multiple of 64 and L at least 1, "
                f"got {tuple(codes.shape)}"
            )
        self.levels = levels
        self.width = width
        if slots is None:
            slots = torch.nonzero(item_ids.flatten() >= 0).flatten()
        present = torch.zeros(item_ids.numel(), dtype=torch.bool, device=item_ids.device)
        present[slots] = True
        item_codes = codes.flatten(0, 1)[slots]
        check_range("codes", item_codes, 0, width)
        key = torch.zeros_like(slots)
        for code in item_codes.unbind(1):
            key = key * width + code
        by_id = torch.argsort(item_ids.flatten()[slots])
        order = by_id[torch.argsort(key[by_id], stable=True)]
        slots, key = slots[order], key[order]
        begins = [_run_begins(key // width ** (levels - level)) for level in range(levels)]
        sizes = [len(begin) for begin in begins]
        self.bounds = tuple(sum(sizes[:level]) for level in range(levels + 1))
        """The number of the first prefix of each length, and M."""
        longer = [
            torch.searchsorted(deeper, begin) + first
            for begin, deeper, first in zip(begins, begins[1:], self.bounds[1:], strict=False)
        ]
        last = slots.new_full((1,), self.bounds[levels])
        stops = [torch.cat([begin[1:], torch.full_like(begin[:1], len(slots))]) for begin in begins]
        place = torch.zeros_like(present, dtype=torch.int32)
        place[slots] = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
        self.register_buffer("order", slots.int())
        self.register_buffer("place", place)
        self.register_buffer("codes", item_codes[order])
        self.register_buffer("item_ids", item_ids.flatten()[slots])
        self.register_buffer("members", pack_bits(present))
        every = torch.arange((len(slots) // 64 + 1) * 64, device=slots.device) < len(slots)
        self.register_buffer("every", pack_bits(every))
        self.register_buffer("starts", torch.cat(begins))
        self.register_buffer("stops", torch.cat(stops))
        self.register_buffer("longer", torch.cat([*longer, last]))

    @property
    def num_items(self) -> int:
        """Return the number of items."""
        return len(self.order)

    def holds(self, slots: Tensor) -> Tensor:
        """Return which slots hold an item of the trie, ``(x,)`` bool; of ``slots`` int64 >= 0."""
        return (self.members[slots >> 6] >> (slots & 63) & 1).bool()

    def move(self, old: Tensor, new: Tensor) -> None:
        """Note that items of the trie are in other slots now.

        Args:
            old: ``(x,)`` int64 slots that hold an item of the trie, distinct.
            new: ``(x,)`` int64 slots that hold none, distinct.
        """
        position = self.place[old]
        self.place[new] = position
        self.order[position.long()] = new.int()
        _flip(self.members, old, -1)
        _flip(self.members, new, 1)

    def drop(self, slots: Tensor) -> None:
        """Forget the items of slots, so that others can have these.

        Args:
            slots: ``(x,)`` int64 slots that hold an item of the trie, distinct.
        """
        _flip(self.every, self.place[slots].long(), -1)
        _flip(self.members, slots, -1)

    def in_code_order(self, eligible: Tensor) -> Tensor:
        """Return the bits of slots as bits of items in their order, ``(B, n // 64 + 1)`` int64.

        Args:
            eligible: ``(B, N, W)`` int64; bits of slots that hold no item of the trie are dropped.
        """
        words = eligible.flatten(1) & self.members
        counts = popcount(words).sum(1).tolist()
        rows = [self._moved(row, count) for row, count in zip(words, counts, strict=True)]
        return torch.stack(rows) if rows else words.new_zeros(0, len(self.every))

    def _moved(self, words: Tensor, count: int) -> Tensor:
        """Return one row of ``in_code_order``; ``count`` bits are set in ``words``."""
        size = len(self.every)
        many = 2 * count > self.num_items
        if min(count, self.num_items - count) * _FEW > self.num_items:
            flags = words.new_zeros(size * 64, dtype=torch.bool)
            flags[: self.num_items] = unpack_bits(words).index_select(0, self.order)
            # Items that were dropped may lead to a slot that another one has now.
            return pack_bits(flags) & self.every
        odd = words ^ self.members if many else words
        at = torch.nonzero(odd).flatten()
        bit = torch.nonzero(unpack_bits(odd[at]))[:, 0]
        position = self.place[(at[bit >> 6] << 6) + (bit & 63)].long()
        # A bit of its own each: their sum is their union.
        bits = torch.ones_like(position) << (position & 63)
        moved = words.new_zeros(size).scatter_add_(0, position >> 6, bits)
        if not many:
            return moved
        return self.every ^ moved


def _flip(words: Tensor, bits: Tensor, sign: int) -> None:
    """Set distinct bits of words that are not set (``sign`` 1), or clear some that are (-1)."""
    words.index_add_(0, bits >> 6, sign * (torch.ones_like(bits) << (bits & 63)))


def _run_begins(values: Tensor) -> Tensor:
    """Return where runs of equal neighbours begin, int64."""
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return torch.nonzero(first).flatten()
