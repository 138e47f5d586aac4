"""Choice of clusters on CUDA.

One program multiplies a tile of int8 queries with a tile of int8 centroids on tensor cores;
``select_topk`` keeps the likely clusters; one program scores a block of them again for one query in
the order of ``fixed_dot``; ``select_topk`` ranks them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from silvershard.kernels.device_guard import on_device_of_operands
from silvershard.kernels.fixed_math_triton import fixed_dots, slice_width
from silvershard.kernels.select_topk_triton import select_topk_triton

_BLOCK_CLUSTERS = 128
# Clusters x columns of a slice that a program holds: four for each of its threads.
_RESCORE_TILE = 512


@triton.jit
def _coarse_scores_kernel(
    scores_ptr,
    query_codes_ptr,
    query_scales_ptr,
    centroid_codes_ptr,
    centroid_scales_ptr,
    num_queries,
    num_clusters,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cluster = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = query < num_queries
    exists = cluster < num_clusters
    dots = tl.zeros([BLOCK_Q, BLOCK_C], tl.int32)
    for first in range(0, DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        queries = tl.load(
            query_codes_ptr + query[:, None] * DIM + column[None, :],
            mask=there[:, None] & (column < DIM)[None, :],
            other=0,
        )
        centroids = tl.load(
            centroid_codes_ptr + cluster[:, None] * DIM + column[None, :],
            mask=exists[:, None] & (column < DIM)[None, :],
            other=0,
        )
        dots = tl.dot(queries, tl.trans(centroids), dots, out_dtype=tl.int32)
    centroid_scales = tl.load(centroid_scales_ptr + cluster, mask=exists, other=0.0)
    query_scales = tl.load(query_scales_ptr + query, mask=there, other=0.0)
    scores = dots.to(tl.float32) * centroid_scales[None, :] * query_scales[:, None]
    tl.store(
        scores_ptr + query[:, None] * num_clusters + cluster[None, :],
        scores,
        mask=there[:, None] & exists[None, :],
    )


@triton.jit
def _rescore_kernel(
    scores_ptr,
    query_ptr,
    centroids_ptr,
    likely_ptr,
    kept,
    num_clusters,
    ALL: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < kept
    cluster = place
    if not ALL:
        cluster = tl.load(likely_ptr + query * kept + place, mask=inside, other=-1)
    active = inside & (cluster >= 0) & (cluster < num_clusters)
    offsets = tl.where(active, cluster, 0) * DIM
    found = fixed_dots(
        query_ptr + query * DIM, centroids_ptr, offsets, active, DIM, WIDTH, SLICE, ROWS
    )
    tl.store(scores_ptr + query * kept + place, tl.where(active, found, float("-inf")), mask=inside)


@on_device_of_operands
def coarse_probe_triton(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    """The CUDA implementation of ``coarse_probe``; same contract, no validation."""
    num_queries, dim = query.shape
    num_clusters = centroids.shape[0]
    kept = min(num_clusters, probes + max(16, probes // 4))
    if num_queries == 0:
        return torch.empty((0, probes), dtype=torch.int32, device=query.device)
    likely = torch.arange(num_clusters, device=query.device).expand(num_queries, -1)
    if kept < num_clusters:
        coarse = torch.empty((num_queries, num_clusters), dtype=torch.float32, device=query.device)
        block_q = 16 if num_queries <= 16 else 64
        grid = (triton.cdiv(num_clusters, _BLOCK_CLUSTERS), triton.cdiv(num_queries, block_q))
        _coarse_scores_kernel[grid](
            coarse,
            query_codes.contiguous(),
            query_scales.contiguous(),
            centroid_codes.contiguous(),
            centroid_scales.contiguous(),
            num_queries,
            num_clusters,
            DIM=dim,
            BLOCK_Q=block_q,
            BLOCK_C=_BLOCK_CLUSTERS,
            BLOCK_K=max(32, min(128, triton.next_power_of_2(dim))),
            enable_fp_fusion=False,
        )
        likely = select_topk_triton(coarse, likely, kept)[1]
    exact = torch.empty((num_queries, kept), dtype=torch.float32, device=query.device)
    width, slice_columns = slice_width(dim)
    rows = min(64, _RESCORE_TILE // slice_columns)
    _rescore_kernel[triton.cdiv(kept, rows), num_queries](
        exact,
        query.contiguous(),
        centroids.contiguous(),
        likely,
        kept,
        num_clusters,
        ALL=kept == num_clusters,
        DIM=dim,
        WIDTH=width,
        SLICE=slice_columns,
        ROWS=rows,
        enable_fp_fusion=False,
    )
    return select_topk_triton(exact, likely, probes)[1].to(torch.int32)
