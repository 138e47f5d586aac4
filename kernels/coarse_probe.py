"""Choice of the clusters that a query scans.

Shapes: Q query rows, D embedding dimension, C clusters, P probes.
"""

import torch
from torch import Tensor

from silvershard.kernels.contract import check_devices, check_finite, check_tensor
from silvershard.kernels.fixed_math import fixed_dot_reference
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import coarse_probe_native
from silvershard.kernels.select_topk import select_topk_reference

# Above this D the float32 sum of int8 products could pass 2**24 and would no longer be exact.
MAX_CODE_DIM = 1024
_CHUNK_ELEMENTS = 1 << 19


def coarse_probe(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    """Find the clusters whose centroids score best, best first.

    The int8 scores choose ``probes + max(16, probes // 4)`` clusters, which are scored again with
    ``fixed_dot`` in float32. Ties go to the smaller cluster in both steps.

    Args:
        query: ``(Q, D)`` float32, finite, 1 <= D <= 1024.
        query_codes: ``(Q, D)`` int8 in [-127, 127], the codes of ``query``.
        query_scales: ``(Q,)`` float32, finite.
        centroids: ``(C, D)`` float32, finite.
        centroid_codes: ``(C, D)`` int8 in [-127, 127].
        centroid_scales: ``(C,)`` float32, finite.
        probes: P, ``1 <= P <= C``.

    Returns:
        ``(Q, P)`` int32, distinct in each row.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a value is not finite or P is out of
            range.
    """
    check_tensor("query", query, torch.float32, ("Q", "D"))
    num_queries, dim = query.shape
    if not 1 <= dim <= MAX_CODE_DIM:
        raise ValueError(f"query must have D in [1, {MAX_CODE_DIM}], got {dim}")
    check_tensor("query_codes", query_codes, torch.int8, (num_queries, dim))
    check_tensor("query_scales", query_scales, torch.float32, (num_queries,))
    check_tensor("centroids", centroids, torch.float32, ("C", dim))
    num_clusters = centroids.shape[0]
    check_tensor("centroid_codes", centroid_codes, torch.int8, (num_clusters, dim))
    check_tensor("centroid_scales", centroid_scales, torch.float32, (num_clusters,))
    check_devices(
        query=query,
        query_codes=query_codes,
        query_scales=query_scales,
        centroids=centroids,
        centroid_codes=centroid_codes,
        centroid_scales=centroid_scales,
    )
    if not 1 <= probes <= num_clusters:
        raise ValueError(f"probes must be in [1, {num_clusters}], got {probes}")
    probe = _coarse_probe_cpu if is_plain_cpu(query, centroids) else _coarse_probe
    answer: Tensor = probe(
        query, query_codes, query_scales, centroids, centroid_codes, centroid_scales, probes
    )
    return answer


def coarse_probe_reference(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    """The definition of ``coarse_probe``; same contract, plain PyTorch, no validation."""
    num_queries, dim = query.shape
    num_clusters = centroids.shape[0]
    kept = shortlist(probes, num_clusters)
    clusters = torch.arange(num_clusters, device=query.device)
    centroid_floats = centroid_codes.float().T  # (D, C)
    answer = torch.empty((num_queries, probes), dtype=torch.int32, device=query.device)
    step = max(1, _CHUNK_ELEMENTS // max(kept * dim, num_clusters))
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        if kept == num_clusters:
            exact = fixed_dot_reference(query[rows, None], centroids)  # (Q, C)
            answer[rows] = select_topk_reference(exact, clusters.expand_as(exact), probes)[1]
            continue
        dots = query_codes[rows].float() @ centroid_floats  # (Q, C)
        coarse = dots * centroid_scales * query_scales[rows, None]
        likely = select_topk_reference(coarse, clusters.expand_as(coarse), kept)[1]  # (Q, kept)
        # Where too few scores were above -inf the list is padded with -1.
        places = likely.clamp_min(0)
        chosen = centroids.index_select(0, places.flatten()).view(*likely.shape, dim)
        exact = fixed_dot_reference(query[rows, None], chosen)
        exact = torch.where(likely >= 0, exact, -torch.inf)
        answer[rows] = select_topk_reference(exact, likely, probes)[1]
    return answer


def shortlist(probes: int, num_clusters: int) -> int:
    """Return how many clusters are scored exactly."""
    return min(num_clusters, probes + max(16, probes // 4))


def _checked_coarse_probe(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    check_finite("query", query)
    check_finite("query_scales", query_scales)
    check_finite("centroids", centroids)
    check_finite("centroid_scales", centroid_scales)
    answer = coarse_probe_reference(
        query, query_codes, query_scales, centroids, centroid_codes, centroid_scales, probes
    )
    chosen = centroids.index_select(0, answer.clamp_min(0).flatten())
    exact = fixed_dot_reference(query[:, None], chosen.view(*answer.shape, query.shape[1]))
    if bool((answer < 0).any()) or not bool(exact.isfinite().all()):
        raise ValueError("query times centroids must be finite in float32, got an overflow")
    return answer


def _native_coarse_probe(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    return coarse_probe_native(
        query,
        query_codes,
        query_scales,
        centroids,
        centroid_codes,
        centroid_scales,
        probes,
        shortlist(probes, centroids.shape[0]),
    )


_coarse_probe = torch.library.custom_op(
    "silvershard::coarse_probe", coarse_probe_reference, mutates_args=()
)
_coarse_probe_cpu = run_on_cpu(_native_coarse_probe, _checked_coarse_probe)
_coarse_probe.register_kernel("cpu")(_coarse_probe_cpu)


@_coarse_probe.register_kernel("cuda")
def _(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    from silvershard.kernels.coarse_probe_triton import coarse_probe_triton

    return coarse_probe_triton(
        query, query_codes, query_scales, centroids, centroid_codes, centroid_scales, probes
    )


@_coarse_probe.register_fake
def _(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
) -> Tensor:
    return query.new_empty((query.shape[0], probes), dtype=torch.int32)
