"""How much of an exact search the index finds, measured on the index itself.

Shapes: B requests, H heads, Q = B * H query rows, D embedding dimension, n items, P probes, R
candidates per head.
"""

import torch
from torch import Tensor

from silvershard.kernels import coarse_probe, fixed_dot, quantize_rows, select_topk
from silvershard.model.retriever import Retriever

_CHUNK_ELEMENTS = 1 << 24


class IndexAudit:
    """Exact float32 search over the same items as an index, and what the index finds of it."""

    def __init__(self, retriever: Retriever, item_ids: Tensor, embeddings: Tensor) -> None:
        """Hold the items in the precision they were made in.

        Args:
            retriever: the index to audit, over all its documents.
            item_ids: ``(n,)`` int64, the documents of the index in any order.
            embeddings: ``(n, D)`` float32 of these items, as their tower gave them.

        Raises:
            ValueError: if the items are not those of the index.
        """
        self._retriever = retriever
        self._item_ids, order = torch.sort(item_ids)
        self._embeddings = embeddings[order]
        self._clusters = torch.full_like(item_ids, -1)
        held = 0
        for part in retriever.indexes:
            slots = part.slots_of(self._item_ids)
            found = slots >= 0
            held += int(found.sum())
            owner = _page_owners(part.page_table, part.codes.shape[0])
            pages = slots[found] // max(part.codes.shape[1], 1)
            self._clusters[found] = owner[pages]
        if held != retriever.documents or bool((self._clusters < 0).any()):
            raise ValueError(
                f"item_ids must be the {retriever.documents} documents of the index, "
                f"{held} of {item_ids.shape[0]} are"
            )

    def exact(self, query: Tensor, k: int) -> Tensor:
        """Return the ids of the best k items by float32 inner product, ``(B, H, k)`` int64."""
        rows = self._top(query.flatten(0, 1), None, k)
        return rows.view(*query.shape[:2], k)

    def probed(self, query: Tensor, probes: int) -> Tensor:
        """Return the clusters that the index probes, ``(Q, probes)`` int64."""
        rows = query.flatten(0, 1)
        retriever = self._retriever
        return coarse_probe(
            rows,
            *quantize_rows(rows),
            retriever.centroids,
            retriever.centroid_codes,
            retriever.centroid_scales,
            probes,
        ).long()

    def exact_in_probes(self, query: Tensor, probes: int, k: int) -> Tensor:
        """Return the best k items of the probed clusters, ``(B, H, k)`` int64."""
        chosen = torch.zeros(
            query.shape[0] * query.shape[1], self._retriever.centroids.shape[0], dtype=torch.bool
        )
        chosen.scatter_(1, self.probed(query, probes), value=True)
        rows = self._top(query.flatten(0, 1), chosen, k)
        return rows.view(*query.shape[:2], k)

    def indexed(self, query: Tensor, probes: int, ann_k: int, k: int) -> Tensor:
        """Return the best k items per head by scan and refine alone, ``(B, H, k)`` int64.

        Args:
            query: ``(B, H, D)`` float32.
            probes: P.
            ann_k: R candidates of the scan that are refined.
            k: results per head.
        """
        retriever = self._retriever
        rows = query.flatten(0, 1)  # (Q, D)
        codes, scales = quantize_rows(rows)
        clusters = self.probed(query, probes).to(torch.int32)
        none = torch.zeros(rows.shape[0], 0, 4, dtype=torch.int64)
        exclude = torch.zeros(rows.shape[0], 0, dtype=torch.int64)
        found = [
            part.scan(codes, scales, clusters, none, none, exclude, ann_k)
            for part in retriever.indexes
        ]
        cut = select_topk(
            torch.cat([one.scores for one in found], 1),
            torch.cat([one.item_ids for one in found], 1),
            ann_k,
        )
        refined = torch.full((rows.shape[0], 0), float("-inf"))
        ids = torch.zeros(rows.shape[0], 0, dtype=torch.int64)
        for part in retriever.indexes:
            slots = part.slots_of(cut.item_ids)  # (Q, R), -1 where another part holds the item
            scores = part.refine(rows[:, None, :], slots)[:, :, 0]
            refined = torch.cat([refined, scores], 1)
            ids = torch.cat([ids, torch.where(slots >= 0, cut.item_ids, -1)], 1)
        return select_topk(refined, ids, k).item_ids.view(*query.shape[:2], k)

    def _top(self, rows: Tensor, clusters: Tensor | None, k: int) -> Tensor:
        """Return ids ``(Q, k)`` by float32 product over items whose cluster is chosen."""
        step = max(_CHUNK_ELEMENTS // max(self._embeddings.numel(), 1), 1)
        found = []
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step]
            scores = fixed_dot(chunk[:, None, :], self._embeddings[None])  # (q, n)
            ids = self._item_ids.expand_as(scores)
            if clusters is not None:
                inside = clusters[start : start + step][:, self._clusters]
                ids = torch.where(inside, ids, -1)
            found.append(select_topk(scores, ids.contiguous(), k).item_ids)
        return torch.cat(found)


def _page_owners(page_table: Tensor, num_pages: int) -> Tensor:
    """Return the cluster of every page, ``(N,)`` int64."""
    owner = torch.full((num_pages,), -1, dtype=torch.int64)
    cluster, column = torch.nonzero(page_table >= 0, as_tuple=True)
    owner[page_table[cluster, column].long()] = cluster
    return owner


def recall(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the share of ``wanted`` that was found, ``(...)`` float64; 1 where none is wanted.

    Args:
        found: ``(..., R)`` int64 distinct ids, -1 padding.
        wanted: ``(..., k)`` int64 distinct ids, -1 padding.
    """
    valid = wanted >= 0
    hits = (wanted[..., :, None] == found[..., None, :]).any(-1) & valid
    total = valid.sum(-1)
    return torch.where(total > 0, hits.sum(-1).double() / total.clamp(min=1), 1.0)
