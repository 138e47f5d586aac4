"""The semantic ids of a part that changes while it is searched.

One trie holds the items as they were when it was built; items keep their place there while only
their slots change. Those that came later, or came again with another embedding, are in a second,
small trie. The best of both are the best of all, bit for bit. When the second one has grown, a new
first one is built on a thread of its own.

Shapes: N pages of G slots, L levels, V codes of a level.

Source: O'Neil et al., "The Log-Structured Merge-Tree (LSM-Tree)", Acta Informatica 33, 1996.
"""

import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from silvershard.kernels import unpack_bits
from silvershard.model.index import LIVE_PLANE, ItemIndex, SlotChange
from silvershard.model.semantic_trie import CodeTrie

# The second trie is built again by the first search after a change. Among a million slots: 3 ms for
# as few items, 16 ms for a sixteenth of them. To follow a commit of 2,000 changes takes 1 ms.
_FEW_ITEMS = 4096
_SMALLER = 16


class LiveTrie(nn.Module):
    """The tries of one part; they follow its changes.

    Args:
        part: the items.
        codes: ``(N, G, L)`` int16 their codes.
        width: V.

    Raises:
        ValueError: if codes are out of range.
    """

    def __init__(self, part: ItemIndex, codes: Tensor, width: int) -> None:
        super().__init__()
        self._part = [part]  # Not as a module: its tensors are the retriever's.
        self._codes = codes
        self._width = width
        self.base = CodeTrie(codes, part.item_ids, width)
        self.recent: CodeTrie | None = None
        self._is_recent = torch.zeros(part.item_ids.numel(), dtype=torch.bool)
        """``(N * G,)`` slots whose items are not in ``base``."""
        self._building: Future[CodeTrie] | None = None
        self._since: list[SlotChange] = []
        """Changes since what is being built was read."""
        # Weak: the part goes with its last user, which no collection has to find out.
        owner = weakref.ref(self)

        def follow(change: SlotChange) -> None:
            trie = owner()
            if trie is not None:
                trie._changed(change)

        part.watchers.append(follow)

    def tries(self) -> list[CodeTrie]:
        """Return tries that hold every live item once, and perhaps some that are not live."""
        self._take_over(wait=False)
        if self.recent is None and bool(self._is_recent.any()):
            slots = torch.nonzero(self._is_recent).flatten()
            self.recent = CodeTrie(self._codes, self._part[0].item_ids, self._width, slots)
        return [self.base] if self.recent is None else [self.base, self.recent]

    def settle(self) -> None:
        """Wait until a trie that is being built is in use."""
        self._take_over(wait=True)

    def _changed(self, change: SlotChange) -> None:
        if self._building is not None:
            self._since.append(change)
        _follow(self.base, self._is_recent, change)
        self.recent = None
        self._take_over(wait=False)
        few = max(_FEW_ITEMS, self.base.num_items // _SMALLER)
        if self._building is None and int(self._is_recent.sum()) > few:
            self._build()

    def _build(self) -> None:
        """Begin to build a trie of what is live now."""
        part = self._part[0]
        slots = torch.nonzero(unpack_bits(part.planes[LIVE_PLANE]).flatten()).flatten()
        codes, item_ids = self._codes.clone(), part.item_ids.clone()
        thread = ThreadPoolExecutor(1, thread_name_prefix="trie")
        self._building = thread.submit(CodeTrie, codes, item_ids, self._width, slots)
        thread.shutdown(wait=False)

    @torch.inference_mode(mode=False)  # What a search made in that mode no commit could change.
    def _take_over(self, *, wait: bool) -> None:
        """Use the trie that was built, if it is done."""
        if self._building is None or not (wait or self._building.done()):
            return
        base, is_recent = self._building.result(), torch.zeros_like(self._is_recent)
        for change in self._since:
            _follow(base, is_recent, change)
        self.base, self._is_recent, self.recent = base, is_recent, None
        self._building, self._since = None, []


def _follow(base: CodeTrie, is_recent: Tensor, change: SlotChange) -> None:
    """Make a trie, and what is not in it, follow a change."""
    copied = change.sources >= 0
    stays = copied & base.holds(change.sources.clamp(min=0))
    base.move(change.sources[stays], change.taken[stays])
    base.drop(change.retired[base.holds(change.retired)])
    is_recent[change.retired] = False
    is_recent[change.taken[~stays]] = True
