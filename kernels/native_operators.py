"""CPU implementations in the native library; contracts are those of the references.

Each function takes what its reference takes and gives the same bits, but it also checks the values
that it reads. It prepares contiguous inputs, allocates the outputs and calls the library with as
many threads as torch uses.

Shapes: as in the contracts.
"""

import ctypes
from struct import Struct
from typing import NamedTuple, Self

import torch
from torch import Tensor

from silvershard.kernels.native_library import call

# The structures of abi.h hold pointers and 64-bit integers only, so they are packed as such.
_IVF_SCAN = Struct("33q")
_IVF_SEARCH = Struct("38q")
_ELIGIBILITY = Struct("18q")
_COARSE_PROBE = Struct("13q")
_SELECT_TOPK = Struct("10q")
_REFINE = Struct("10q")
_GATHER_LINEAR = Struct("11q")
_QUANTIZE_ROWS = Struct("6q")
_FIXED_MAP = Struct("5q")
_VALUE_PROGRAM = Struct("10q")
_BLOOM_BUILD = Struct("11q")


def _filter_pool(planes: Tensor, columns: Tensor, terms: Tensor) -> tuple[int, ...]:
    return (
        planes.data_ptr(),
        columns.data_ptr(),
        terms.data_ptr(),
        *planes.shape,
        columns.shape[0],
        terms.shape[2],
    )


class _Outputs(NamedTuple):
    """Where a scan writes its results."""

    scores: Tensor
    item_ids: Tensor
    slots: Tensor
    probed: Tensor
    eligible: Tensor

    @classmethod
    def of(cls, scales: Tensor, item_ids: Tensor, num_queries: int, num_results: int) -> Self:
        """Allocate them, with separate sizes, which is the fastest way."""
        return cls(
            scales.new_empty(num_queries, num_results),
            item_ids.new_empty(num_queries, num_results),
            item_ids.new_empty(num_queries, num_results),
            item_ids.new_empty(num_queries),
            item_ids.new_empty(num_queries),
        )


def ivf_scan_native(
    query_codes: Tensor,
    query_scales: Tensor,
    clusters: Tensor,
    page_table: Tensor,
    codes: Tensor,
    scales: Tensor,
    item_ids: Tensor,
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    verify: Tensor,
    excluded: Tensor,
    num_results: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Native ``ivf_scan``."""
    query_codes, query_scales = query_codes.contiguous(), query_scales.contiguous()
    clusters, page_table = clusters.contiguous(), page_table.contiguous()
    programs, verify, excluded = programs.contiguous(), verify.contiguous(), excluded.contiguous()
    out = _Outputs.of(scales, item_ids, len(query_codes), num_results)
    queries = query_codes.data_ptr(), query_scales.data_ptr(), clusters.data_ptr()
    lists = page_table, codes, scales, item_ids, planes, columns, terms
    filters = programs, verify, excluded
    sizes = (*query_codes.shape, clusters.shape[1])
    call("ivf_scan", _IVF_SCAN.pack(*_scan(queries, lists, filters, out, sizes)))
    return out


def ivf_search_native(
    query: Tensor,
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
    programs: Tensor,
    verify: Tensor,
    excluded: Tensor,
    probes: int,
    shortlist: int,
    num_results: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Native ``quantize_rows``, ``coarse_probe`` and ``ivf_scan`` in one call."""
    query, programs = query.contiguous(), programs.contiguous()
    verify, excluded = verify.contiguous(), excluded.contiguous()
    out = _Outputs.of(scales, item_ids, len(query), num_results)
    lists = page_table, codes, scales, item_ids, planes, columns, terms
    filters = programs, verify, excluded
    call(
        "ivf_search",
        _IVF_SEARCH.pack(
            *_scan((0, 0, 0), lists, filters, out, (*query.shape, probes)),
            query.data_ptr(),
            centroids.data_ptr(),
            centroid_codes.data_ptr(),
            centroid_scales.data_ptr(),
            shortlist,
        ),
    )
    return out


def _scan(
    queries: tuple[int, int, int],
    lists: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    filters: tuple[Tensor, Tensor, Tensor],
    out: _Outputs,
    sizes: tuple[int, ...],
) -> tuple[int, ...]:
    """The fields of ``IvfScanArgs``: pointers of codes, scales and clusters, and ``(Q, D, P)``."""
    page_table, codes, scales, item_ids, *pool = lists
    programs, verify, excluded = filters
    return (
        *_filter_pool(*pool),
        *queries,
        page_table.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        item_ids.data_ptr(),
        programs.data_ptr(),
        verify.data_ptr(),
        excluded.data_ptr(),
        out.scores.data_ptr(),
        out.item_ids.data_ptr(),
        out.slots.data_ptr(),
        out.probed.data_ptr(),
        out.eligible.data_ptr(),
        *sizes,
        *page_table.shape,
        programs.shape[1],
        verify.shape[1],
        excluded.shape[1],
        out.scores.shape[1],
        torch.get_num_threads(),
    )


def eligibility_native(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    """Native ``eligibility``."""
    programs, pages, excluded = programs.contiguous(), pages.contiguous(), excluded.contiguous()
    words = torch.empty((*pages.shape, planes.shape[2]), dtype=torch.int64)
    call(
        "eligibility",
        _ELIGIBILITY.pack(
            *_filter_pool(planes, columns, terms),
            programs.data_ptr(),
            pages.data_ptr(),
            excluded.data_ptr(),
            words.data_ptr(),
            0,
            *pages.shape,
            programs.shape[1],
            excluded.shape[1],
            torch.get_num_threads(),
        ),
    )
    return words


def count_eligible_native(
    planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor
) -> Tensor:
    """Native ``count_eligible``."""
    programs = programs.contiguous()
    counts = torch.empty(programs.shape[0], dtype=torch.int64)
    call(
        "eligibility",
        _ELIGIBILITY.pack(
            *_filter_pool(planes, columns, terms),
            programs.data_ptr(),
            0,
            0,
            0,
            counts.data_ptr(),
            programs.shape[0],
            0,
            programs.shape[1],
            0,
            torch.get_num_threads(),
        ),
    )
    return counts


def coarse_probe_native(
    query: Tensor,
    query_codes: Tensor,
    query_scales: Tensor,
    centroids: Tensor,
    centroid_codes: Tensor,
    centroid_scales: Tensor,
    probes: int,
    shortlist: int,
) -> Tensor:
    """Native ``coarse_probe`` with the length of the int8 shortlist."""
    query, query_codes = query.contiguous(), query_codes.contiguous()
    query_scales, centroids = query_scales.contiguous(), centroids.contiguous()
    centroid_codes = centroid_codes.contiguous()
    centroid_scales = centroid_scales.contiguous()
    clusters = torch.empty(query.shape[0], probes, dtype=torch.int32)
    call(
        "coarse_probe",
        _COARSE_PROBE.pack(
            query.data_ptr(),
            query_codes.data_ptr(),
            query_scales.data_ptr(),
            centroids.data_ptr(),
            centroid_codes.data_ptr(),
            centroid_scales.data_ptr(),
            clusters.data_ptr(),
            *query.shape,
            centroids.shape[0],
            probes,
            shortlist,
            torch.get_num_threads(),
        ),
    )
    return clusters


def merge_topk_native(scores: Tensor, item_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Native ``merge_topk``, and ``select_topk`` for a single list ``(1, Q, M)``."""
    scores, item_ids = scores.contiguous(), item_ids.contiguous()
    num_queries = scores.shape[1]
    best = scores.new_empty(num_queries, k)
    ids = item_ids.new_empty(num_queries, k)
    positions = item_ids.new_empty(num_queries, k)
    call(
        "select_topk",
        _SELECT_TOPK.pack(
            scores.data_ptr(),
            item_ids.data_ptr(),
            best.data_ptr(),
            ids.data_ptr(),
            positions.data_ptr(),
            *scores.shape,
            k,
            torch.get_num_threads(),
        ),
    )
    return best, ids, positions


def refine_native(query: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Native ``refine``."""
    query, slots = query.contiguous(), slots.contiguous()
    scores = query.new_empty(*slots.shape, query.shape[1])
    call(
        "refine",
        _REFINE.pack(
            query.data_ptr(),
            cache.data_ptr(),
            slots.data_ptr(),
            scores.data_ptr(),
            *query.shape,
            slots.shape[1],
            cache.shape[0] * cache.shape[1],
            torch.get_num_threads(),
        ),
    )
    return scores


def gather_linear_native(cache: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Native ``gather_linear``."""
    slots, weight, bias = slots.contiguous(), weight.contiguous(), bias.contiguous()
    out = weight.new_empty(*slots.shape, weight.shape[2])
    call(
        "gather_linear",
        _GATHER_LINEAR.pack(
            cache.data_ptr(),
            slots.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            *slots.shape,
            *weight.shape[1:],
            cache.shape[0] * cache.shape[1],
            torch.get_num_threads(),
        ),
    )
    return out


def quantize_rows_native(x: Tensor) -> tuple[Tensor, Tensor]:
    """Native ``quantize_rows``."""
    x = x.contiguous()
    codes = torch.empty(*x.shape, dtype=torch.int8)
    scales = x.new_empty(x.shape[0])
    call(
        "quantize_rows",
        _QUANTIZE_ROWS.pack(
            x.data_ptr(), codes.data_ptr(), scales.data_ptr(), *x.shape, torch.get_num_threads()
        ),
    )
    return codes, scales


def fixed_map_native(x: Tensor, function: int) -> Tensor:
    """Native ``fixed_exp`` (0), ``fixed_log`` (1), ``fixed_sigmoid`` (2) or ``fixed_sqrt`` (3)."""
    out = torch.empty_like(x)
    # Dense memory of any order of dimensions is one run of floats for both.
    source = x if x.stride() == out.stride() else out.copy_(x)
    call(
        "fixed_map",
        _FIXED_MAP.pack(
            source.data_ptr(), out.data_ptr(), x.numel(), function, torch.get_num_threads()
        ),
    )
    return out


def value_program_native(
    columns: Tensor, request: Tensor, programs: Tensor, constants: Tensor
) -> Tensor:
    """Native ``value_program``."""
    columns, request = columns.contiguous(), request.contiguous()
    programs, constants = programs.contiguous(), constants.contiguous()
    values = columns.new_empty(columns.shape[0])
    call(
        "value_program",
        _VALUE_PROGRAM.pack(
            columns.data_ptr(),
            request.data_ptr(),
            programs.data_ptr(),
            constants.data_ptr(),
            values.data_ptr(),
            *columns.shape,
            *constants.shape,
            torch.get_num_threads(),
        ),
    )
    return values


def bloom_build_native(
    planes: Tensor,
    slots: Tensor,
    terms: Tensor,
    first_plane: int,
    num_planes: int,
    salts: list[int],
) -> None:
    """Native ``bloom_build`` with the salts of its hash functions."""
    slots, terms = slots.contiguous(), terms.contiguous()
    salt_array = (ctypes.c_int64 * len(salts))(*salts)
    call(
        "bloom_build",
        _BLOOM_BUILD.pack(
            planes.data_ptr(),
            slots.data_ptr(),
            terms.data_ptr(),
            ctypes.addressof(salt_array),
            planes.shape[1] * planes.shape[2],
            *terms.shape,
            first_plane,
            num_planes,
            len(salts),
            torch.get_num_threads(),
        ),
    )
