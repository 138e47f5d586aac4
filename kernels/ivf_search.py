"""From float queries to the best slots of an inverted file: code, probe and scan in one step.

Shapes: Q query rows, P probes, C clusters, X pages a cluster may own, N pages in the pool, G slots
per page, D embedding dimension, J planes, V columns, F term slots, R results per row, L and Lv
program lengths, E exclusions per query.
"""

import torch
from torch import Tensor

from silvershard.kernels.coarse_probe import MAX_CODE_DIM, coarse_probe, shortlist
from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_tensor,
)
from silvershard.kernels.eligibility import check_pool
from silvershard.kernels.ivf_scan import ScanResult, ivf_scan
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import ivf_search_native
from silvershard.kernels.quantize import quantize_rows


class IvfIndex:
    """Centroids and the paged inverted lists of some items, checked once.

    The values of the tensors may change between searches, their shapes and dtypes may not.

    Args:
        centroids: ``(C, D)`` float32, contiguous, finite, 1 <= D <= 1024.
        centroid_codes: ``(C, D)`` int8 in [-127, 127], contiguous.
        centroid_scales: ``(C,)`` float32, contiguous, finite.
        page_table: ``(C, X)`` int32 in [-1, N), contiguous; -1 is no page. A page stands in
            it once.
        codes: ``(N, G, D)`` int8 in [-127, 127], contiguous.
        scales: ``(N, G)`` float32, contiguous; finite and >= 0 at live slots.
        item_ids: ``(N, G)`` int64, contiguous; distinct and >= 0 at live slots.
        planes: ``(J, N, W)`` int64, contiguous, J >= 1; plane 0 is the live plane.
        columns: ``(V, N, G)`` int64 order keys, contiguous.
        terms: ``(N, G, F)`` int64 term keys, contiguous.

    Raises:
        ValueError: naming the tensor that does not fit, and the clause.
    """

    def __init__(
        self,
        *,
        centroids: Tensor,
        centroid_codes: Tensor,
        centroid_scales: Tensor,
        page_table: Tensor,
        codes: Tensor,
        scales: Tensor,
        item_ids: Tensor,
        planes: Tensor,
        columns: Tensor,
        terms: Tensor,
    ) -> None:
        check_tensor("centroids", centroids, torch.float32, ("C", "D"))
        num_clusters, dim = centroids.shape
        if not 1 <= dim <= MAX_CODE_DIM:
            raise ValueError(f"centroids must have D in [1, {MAX_CODE_DIM}], got {dim}")
        check_tensor("centroid_codes", centroid_codes, torch.int8, (num_clusters, dim))
        check_tensor("centroid_scales", centroid_scales, torch.float32, (num_clusters,))
        check_tensor("page_table", page_table, torch.int32, (num_clusters, "X"))
        check_pool(planes, columns, terms)
        num_pages, page_size = terms.shape[:2]
        check_tensor("codes", codes, torch.int8, (num_pages, page_size, dim))
        check_tensor("scales", scales, torch.float32, (num_pages, page_size))
        check_tensor("item_ids", item_ids, torch.int64, (num_pages, page_size))
        checked = {
            "centroids": centroids,
            "centroid_codes": centroid_codes,
            "centroid_scales": centroid_scales,
            "page_table": page_table,
            "codes": codes,
            "scales": scales,
            "item_ids": item_ids,
        }
        check_devices(**checked, planes=planes)
        check_contiguous(**checked)
        self.dim = dim
        self.num_clusters = num_clusters
        # Aliases with sizes of their own: whoever resizes or replaces the originals leaves these.
        self.centroids = (
            centroids.detach(),
            centroid_codes.detach(),
            centroid_scales.detach(),
        )
        self.lists = (
            page_table.detach(),
            codes.detach(),
            scales.detach(),
            item_ids.detach(),
            planes.detach(),
            columns.detach(),
            terms.detach(),
        )

    def search(
        self,
        query: Tensor,
        programs: Tensor,
        verify: Tensor,
        excluded: Tensor,
        probes: int,
        num_results: int,
    ) -> ScanResult:
        """Find the exact best slots among the eligible ones of the clusters nearest to each query.

        The result is that of ``quantize_rows``, ``coarse_probe`` and ``ivf_scan``, one after the
        other, bit for bit; with ``probes`` = C every cluster is scanned.

        Args:
            query: ``(Q, D)`` float32, finite.
            programs: ``(Q, L, 4)`` int64, as of ``ivf_scan``.
            verify: ``(Q, Lv, 4)`` int64, as of ``ivf_scan``.
            excluded: ``(Q, E)`` int64 slots in [-1, N G); -1 is no slot.
            probes: P, ``1 <= P <= C``.
            num_results: R, >= 1; may exceed the number of slots.

        Returns:
            Scores, ids and slots ``(Q, R)``, and two counts ``(Q,)`` int64.

        Raises:
            ValueError: if shapes, dtypes, devices or ranges disagree, a value is not finite, a
                program is malformed or the score of a result is not finite.
        """
        check_tensor("query", query, torch.float32, ("Q", self.dim))
        num_queries = query.shape[0]
        check_tensor("programs", programs, torch.int64, (num_queries, "L", 4))
        check_tensor("verify", verify, torch.int64, (num_queries, "Lv", 4))
        check_tensor("excluded", excluded, torch.int64, (num_queries, "E"))
        check_devices(
            centroids=self.centroids[0],
            query=query,
            programs=programs,
            verify=verify,
            excluded=excluded,
        )
        if not 1 <= probes <= self.num_clusters:
            raise ValueError(f"probes must be in [1, {self.num_clusters}], got {probes}")
        if num_results < 1:
            raise ValueError(f"num_results must be at least 1, got {num_results}")
        search = _search_cpu if is_plain_cpu(query) else _search_in_steps
        return search(self, query, programs, verify, excluded, probes, num_results)


def _search_in_steps(
    index: IvfIndex,
    query: Tensor,
    programs: Tensor,
    verify: Tensor,
    excluded: Tensor,
    probes: int,
    num_results: int,
) -> ScanResult:
    codes, scales = quantize_rows(query)
    if probes == index.num_clusters:
        every = torch.arange(probes, dtype=torch.int32, device=query.device)
        clusters = every.expand(query.shape[0], -1).contiguous()
    else:
        clusters = coarse_probe(query, codes, scales, *index.centroids, probes)
    return ivf_scan(codes, scales, clusters, *index.lists, programs, verify, excluded, num_results)


def _search_native(
    index: IvfIndex,
    query: Tensor,
    programs: Tensor,
    verify: Tensor,
    excluded: Tensor,
    probes: int,
    num_results: int,
) -> ScanResult:
    few = shortlist(probes, index.num_clusters)
    return ScanResult(
        *ivf_search_native(
            query, *index.centroids, *index.lists, programs, verify, excluded, probes, few,
            num_results,
        )
    )  # fmt: skip


_search_cpu = run_on_cpu(_search_native, _search_in_steps)
