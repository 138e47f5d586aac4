"""The paged index of some partitions: which item goes into which slot.

Shapes: n items, N pages of G slots, C clusters, D embedding dimension.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from silvershard.kernels import PAD_TERM, bloom_build
from silvershard.model.catalogue import NULL_INT
from silvershard.model.index import LIVE_PLANE, IndexTensors, ItemIndex
from silvershard.model.planes import FIRST_EXACT_PLANE
from silvershard.model.spec import ServingSpec
from silvershard.shard.page_pool import TABLE_MULTIPLE
from silvershard.shard.partition import hash_ids
from silvershard.shard.snapshot import PartitionData

_SHUFFLE_SEED = 1
# A list may grow to so many times the longest one before the table is widened. Rows are no wider,
# since the scan reads their empty ends: at 64 probes a width of 64 costs 2 us a query, one of 256
# 10 to 15 us.
_GROWTH = 2


def build_index(
    partitions: Sequence[PartitionData], spec: ServingSpec, *, headroom: float = 0.0
) -> ItemIndex:
    """Lay the items of some partitions into pages, cluster by cluster.

    Inside a cluster the items are ordered by a seeded hash of their ids, so that scores are
    shuffled; a cluster's pages lie side by side.

    Args:
        partitions: any number of partitions, none included.
        spec: of the generation they belong to.
        headroom: free pages for updates, as a share of those in use; with any there is one more
            for every cluster, so that small pools work too. 0 leaves none.

    Raises:
        ValueError: if ``headroom`` is negative or not finite.
    """
    if not 0 <= headroom < float("inf"):
        raise ValueError(f"headroom must be at least 0 and finite, got {headroom}")
    slots_per_page = spec.page_slots
    if partitions:
        clusters = torch.cat([one.clusters for one in partitions]).long()  # (n,)
        item_ids = torch.from_numpy(np.concatenate([one.catalogue.item_ids for one in partitions]))
    else:
        clusters = torch.zeros(0, dtype=torch.int64)
        item_ids = torch.zeros(0, dtype=torch.int64)
    sizes = torch.bincount(clusters, minlength=spec.num_clusters)  # (C,)
    pages = (sizes + slots_per_page - 1) // slots_per_page  # (C,)
    num_used = int(pages.sum())
    spare = spare_pages(num_used, spec.num_clusters, headroom)
    num_pages = num_used + spare
    first_page = pages.cumsum(0) - pages
    by_hash = torch.argsort(hash_ids(item_ids, _SHUFFLE_SEED), stable=True)
    order = by_hash[torch.argsort(clusters[by_hash], stable=True)]  # (n,)
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[clusters[order]]
    slots = torch.empty(len(order), dtype=torch.int64)
    slots[order] = first_page[clusters[order]] * slots_per_page + rank

    def lay(parts: list[Tensor], fill: float, width: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        laid = torch.full((num_pages * slots_per_page, *width), fill, dtype=dtype)
        if parts:
            laid[slots] = torch.cat(parts)
        return laid.view(num_pages, slots_per_page, *width)

    schema, planes = spec.item_schema, spec.planes
    terms = [one.bits.terms for one in partitions]
    tensors = IndexTensors(
        page_table=_page_table(pages, first_page, grows=spare > 0),
        codes=lay([one.codes for one in partitions], 0, (spec.dim,), torch.int8),
        scales=lay([one.scales for one in partitions], 0, (), torch.float32),
        item_ids=lay([item_ids] if partitions else [], -1, (), torch.int64),
        planes=_build_planes(partitions, slots, num_pages, spec),
        columns=lay(
            [one.bits.columns for one in partitions], NULL_INT, (planes.num_columns,), torch.int64
        )
        .permute(2, 0, 1)
        .contiguous(),
        terms=lay(terms, PAD_TERM, (planes.terms_width,), torch.int64),
        cache=lay([one.cache for one in partitions], 0, (spec.dim,), torch.float16),
        signals=lay(
            [torch.from_numpy(one.catalogue.signals) for one in partitions],
            0,
            (len(schema.signals),),
            torch.float32,
        ),
        semantic_codes=None
        if spec.semantic is None
        else lay(
            [one.semantic_codes for one in partitions if one.semantic_codes is not None],
            0,
            (spec.semantic.decoder.levels,),
            torch.int16,
        ),
    )
    return ItemIndex(tensors)


def spare_pages(used: int, num_clusters: int, headroom: float) -> int:
    """Return the free pages beside those in use."""
    return math.ceil(headroom * used) + num_clusters if headroom else 0


def table_width(longest: int, *, grows: bool) -> int:
    """Return the columns of a page table.

    Args:
        longest: pages of the cluster with the most.
        grows: whether rows have room to grow.
    """
    width = max(longest, 1)
    return -(-_GROWTH * width // TABLE_MULTIPLE) * TABLE_MULTIPLE if grows else width


def _page_table(pages: Tensor, first_page: Tensor, *, grows: bool) -> Tensor:
    """Return the pages of every cluster, ``(C, X)`` int32 with X at least 1.

    Args:
        pages: ``(C,)`` int64 pages of every cluster.
        first_page: ``(C,)`` int64 the first of them.
        grows: whether rows have room to grow.
    """
    width = table_width(int(pages.max()), grows=grows)
    column = torch.arange(width)
    table = first_page[:, None] + column
    return torch.where(column < pages[:, None], table, -1).to(torch.int32)


def _build_planes(
    partitions: Sequence[PartitionData], slots: Tensor, num_pages: int, spec: ServingSpec
) -> Tensor:
    """Return the live, exact and Bloom planes, ``(J, N, W)`` int64."""
    dictionary = spec.planes
    words = spec.page_slots // 64
    planes = torch.zeros(dictionary.num_planes, num_pages, words, dtype=torch.int64)
    flat = planes.view(dictionary.num_planes, num_pages * words)

    def set_bits(plane: int | Tensor, holders: Tensor) -> None:
        # No slot comes twice for one plane, so that adding its bit sets it.
        where = plane * flat.shape[1] + (holders >> 6)
        flat.view(-1).index_add_(0, where, torch.ones_like(holders) << (holders & 63))

    set_bits(LIVE_PLANE, slots)
    if not partitions:
        return planes
    own_slots = slots.split([len(one.catalogue) for one in partitions])
    for one, own in zip(partitions, own_slots, strict=True):
        item, column = one.bits.exact.nonzero(as_tuple=True)
        set_bits(FIRST_EXACT_PLANE + column, own[item])
    if dictionary.num_bloom_planes:
        bloom_build(
            planes,
            slots,
            torch.cat([one.bits.terms for one in partitions]),
            first_plane=dictionary.first_bloom_plane,
            num_planes=dictionary.num_bloom_planes,
            num_hashes=dictionary.num_hashes,
            seed=dictionary.seed,
        )
    return planes
