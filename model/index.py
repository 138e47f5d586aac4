"""The paged int8 index of a set of documents, with everything that is known of each document.

Shapes: N pages of G slots, W = G / 64 mask words, J planes, V columns, F term slots per item, S
signals, L semantic codes, C clusters owning at most X pages each, Q = B * H query rows.

Slots live in pages of one pool and each cluster owns a list of pages, as a paged KV cache does, so
that items can come and go without a rebuild.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023, section 4 (the page table).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from silvershard.kernels import ScanResult, count_eligible, ivf_scan, popcount, refine
from silvershard.model.id_map import IdMap

LIVE_PLANE = 0


class IndexTensors(NamedTuple):
    """The buffers of an ``ItemIndex``."""

    page_table: Tensor
    """``(C, X)`` int32 pages of every cluster, -1 where there is none."""
    codes: Tensor
    """``(N, G, D)`` int8."""
    scales: Tensor
    """``(N, G)`` float32 scale of every item."""
    item_ids: Tensor
    """``(N, G)`` int64, -1 in a dead slot."""
    planes: Tensor
    """``(J, N, W)`` int64 bit planes; plane 0 is the live plane."""
    columns: Tensor
    """``(V, N, G)`` int64 order keys of the numeric attributes."""
    terms: Tensor
    """``(N, G, F)`` int64 keys of the terms that have no exact plane, padded."""
    cache: Tensor
    """``(N, G, D)`` float16 embeddings for refine and rerank."""
    signals: Tensor
    """``(N, G, S)`` float32."""
    semantic_codes: Tensor | None = None
    """``(N, G, L)`` int16 semantic ids; None where the generation has none."""


class SlotChange(NamedTuple):
    """Slots of an index that no longer hold a live item, and others that now do."""

    retired: Tensor
    """``(r,)`` int64."""
    taken: Tensor
    """``(t,)`` int64."""
    sources: Tensor
    """``(t,)`` int64 the retired slot of the same item where its embedding stayed as it was, else
    -1."""


class ItemIndex(nn.Module):
    """Documents of one device: paged lists, planes, columns, fp16 cache, signals and codes."""

    page_table: Tensor
    codes: Tensor
    scales: Tensor
    item_ids: Tensor
    planes: Tensor
    columns: Tensor
    terms: Tensor
    cache: Tensor
    signals: Tensor
    semantic_codes: Tensor | None

    def __init__(self, tensors: IndexTensors) -> None:
        super().__init__()
        for name, tensor in zip(IndexTensors._fields, tensors, strict=True):
            self.register_buffer(name, tensor)
        flat = tensors.item_ids.flatten().numpy(force=True)
        slots = np.flatnonzero(flat >= 0)
        # A dict would cost 100 bytes per item.
        self.id_map = IdMap(flat[slots], slots)
        self.watchers: list[Callable[[SlotChange], None]] = []
        """Told of every change of a live index, once it is made."""

    @property
    def documents(self) -> int:
        """Return the number of live documents."""
        return int(popcount(self.planes[LIVE_PLANE]).sum())

    def slots_of(self, item_ids: Tensor) -> Tensor:
        """Return the slot of every item id, -1 where this index does not hold it.

        Args:
            item_ids: int64 of any shape; negative ids are held by no index.
        """
        if not item_ids.numel():
            return torch.empty_like(item_ids)
        slots = self.id_map.locate(item_ids.flatten().numpy(force=True)).slots
        return torch.from_numpy(slots).view(item_ids.shape).to(item_ids.device)

    def count(self, scan: Tensor) -> Tensor:
        """Return how many live documents pass each scan program, ``(B,)`` int64."""
        return count_eligible(self.planes, self.columns, self.terms, scan)

    def scan(
        self,
        codes: Tensor,
        scales: Tensor,
        clusters: Tensor,
        programs: Tensor,
        verify: Tensor,
        exclude: Tensor,
        num_results: int,
    ) -> ScanResult:
        """Return the exact best ``num_results`` slots of each query row on its probed clusters.

        Args:
            codes: ``(Q, D)`` int8 query codes.
            scales: ``(Q,)`` float32 query scales.
            clusters: ``(Q, P)`` int32, -1 where there is none.
            programs: ``(Q, L, 4)`` int64 scan programs.
            verify: ``(Q, Lv, 4)`` int64 exact programs.
            exclude: ``(Q, E)`` int64 item ids, -1 where there is none.
            num_results: R.
        """
        return ivf_scan(
            codes,
            scales,
            clusters,
            self.page_table,
            self.codes,
            self.scales,
            self.item_ids,
            self.planes,
            self.columns,
            self.terms,
            programs,
            verify,
            self.slots_of(exclude),
            num_results,
        )

    def refine(self, query: Tensor, slots: Tensor) -> Tensor:
        """Return fp16-storage scores ``(B, U, H)`` float32 of ``slots`` ``(B, U)``."""
        return refine(query, self.cache, slots)

    def items_at(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids ``(B, U)`` and signals ``(B, U, S)`` of ``slots`` ``(B, U)``.

        Where a slot is -1 the id is -1 and the signals are zero.
        """
        padding = slots < 0
        if not self.item_ids.numel():
            return torch.full_like(slots, -1), self.signals.new_zeros(
                *slots.shape, self.signals.shape[2]
            )
        at = slots.clamp(min=0)
        return (
            self.item_ids.flatten()[at].masked_fill_(padding, -1),
            self.signals.flatten(0, 1)[at].masked_fill_(padding[..., None], 0.0),
        )
