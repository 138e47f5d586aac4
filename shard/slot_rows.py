"""Writing whole items into slots of the tensors of an index.

A slot is written while it is dead and shown by the live bit afterwards, so that nobody ever sees a
part of an item.

Shapes: n items, N pages of G slots, W = G / 64 words, J planes, V columns, F term slots, S signals.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels import bloom_build
from silvershard.model.index import LIVE_PLANE, ItemIndex
from silvershard.model.planes import FIRST_EXACT_PLANE, PlaneDictionary
from silvershard.shard.changes import NewItems
from silvershard.shard.page_pool import slot_bits

_Ints = NDArray[np.int64]


class SlotRows:
    """The rows of the slots of an index, on the CPU.

    Args:
        index: changed in place, never reallocated.
        planes: the dictionary that its items are encoded with.
    """

    def __init__(self, index: ItemIndex, planes: PlaneDictionary) -> None:
        self._planes = planes
        self._plane_words = index.planes
        words = index.planes.numpy().view(np.uint64)
        self._words = words.reshape(len(words), -1)  # (J, N * W)
        exact = slice(FIRST_EXACT_PLANE, FIRST_EXACT_PLANE + planes.num_exact_planes)
        self._exact = self._words[exact]
        self.item_ids: _Ints = index.item_ids.flatten().numpy()
        """``(N * G,)`` int64."""
        self.columns: _Ints = index.columns.flatten(1).numpy()
        """``(V, N * G)`` int64."""
        self.terms: _Ints = index.terms.flatten(0, 1).numpy()
        """``(N * G, F)`` int64."""
        self.signals: NDArray[np.float32] = index.signals.flatten(0, 1).numpy()
        """``(N * G, S)`` float32."""
        self._codes = index.codes.flatten(0, 1).numpy()
        self._scales = index.scales.flatten().numpy()
        self._cache = index.cache.flatten(0, 1).numpy()
        codes = index.semantic_codes
        self._semantic = None if codes is None else codes.flatten(0, 1).numpy()

    def write(self, slots: _Ints, items: NewItems) -> None:
        """Write all of some items but their planes."""
        self.item_ids[slots] = items.item_ids.numpy()
        self._codes[slots] = items.codes.numpy()
        self._scales[slots] = items.scales.numpy()
        self._cache[slots] = items.cache.numpy()
        self.columns[:, slots] = items.bits.columns.numpy().T
        self.terms[slots] = items.bits.terms.numpy()
        self.signals[slots] = items.signals.numpy()
        if self._semantic is not None and items.semantic_codes is not None:
            self._semantic[slots] = items.semantic_codes.numpy()

    def copy(self, old: _Ints, new: _Ints) -> None:
        """Write all of some slots but their planes to others."""
        rows: list[NDArray[Any]] = [self.item_ids, self._codes, self._scales, self._cache]
        rows += [self.terms, self.signals]
        if self._semantic is not None:
            rows.append(self._semantic)
        for one in rows:
            one[new] = one[old]
        self.columns[:, new] = self.columns[:, old]

    def exact_bits(self, slots: _Ints) -> NDArray[np.bool_]:
        """Return the bits of the exact planes of some slots, ``(num_exact_planes, n)`` bool."""
        shift = (slots & 63).astype(np.uint64)
        bits: NDArray[np.bool_] = (self._exact[:, slots >> 6] >> shift & np.uint64(1)).view(
            np.int64
        ) != 0
        return bits

    def write_planes(self, slots: _Ints, exact: NDArray[np.bool_]) -> None:
        """Set the exact planes of some slots, and their Bloom planes to those of their terms.

        Args:
            slots: ``(n,)`` int64, distinct.
            exact: ``(num_exact_planes, n)`` bool.
        """
        if not len(slots):
            return
        if len(exact):
            words, column = np.unique(slots >> 6, return_inverse=True)
            bits = slot_bits(slots)
            touched = np.zeros(len(words), dtype=np.uint64)
            np.bitwise_or.at(touched, column, bits)
            plane, item = np.nonzero(exact)
            fresh = self._exact[:, words] & ~touched
            np.bitwise_or.at(fresh, (plane, column[item]), bits[item])
            self._exact[:, words] = fresh
        planes = self._planes
        if planes.num_bloom_planes:
            bloom_build(
                self._plane_words,
                torch.from_numpy(slots),
                torch.from_numpy(self.terms[slots]),
                first_plane=planes.first_bloom_plane,
                num_planes=planes.num_bloom_planes,
                num_hashes=planes.num_hashes,
                seed=planes.seed,
            )

    def show(self, shown: _Ints, hidden: _Ints) -> None:
        """Make some slots live and others not."""
        live = self._words[LIVE_PLANE]
        np.bitwise_or.at(live, shown >> 6, slot_bits(shown))
        np.bitwise_and.at(live, hidden >> 6, ~slot_bits(hidden))


def exact_columns(bits: Tensor) -> NDArray[np.bool_]:
    """Return exact bits ``(n, num_exact_planes)`` plane by plane, as planes are written."""
    return np.ascontiguousarray(bits.numpy().T)
