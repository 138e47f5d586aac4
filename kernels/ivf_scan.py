"""Exact best slots of the probed clusters: filter first, then int8 scores, then verification.

The inverted lists are paged: slots lie in pages of one pool, and a cluster owns a list of pages.

Shapes: Q query rows, P probes, C clusters, X pages a cluster may own, N pages in the pool, G slots
per page, D embedding dimension, R results per row, L and Lv program lengths, E exclusions per
query, T eligible slots of all rows together, M pages per row.

Source: Kwon et al., Efficient Memory Management (...) with PagedAttention, SOSP 2023, section 4.
Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.3 (probe, then filter).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels.bits import unpack_bits
from silvershard.kernels.coarse_probe import MAX_CODE_DIM
from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_finite,
    check_range,
    check_tensor,
)
from silvershard.kernels.eligibility import (
    LIVE_PLANE,
    accepted_words,
    check_pool,
    excluded_words,
)
from silvershard.kernels.filter_ops import Program, SlotLeaves, evaluate, parse_programs
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import ivf_scan_native
from silvershard.kernels.select_topk import best_positions

# Codes converted to float32 at a time, 1 MiB: of more, every step would go through memory.
_CHUNK_ELEMENTS = 1 << 18

SlotsAt = Callable[[NDArray[np.int64]], NDArray[np.int64]]


class ScanResult(NamedTuple):
    """Best slots per query row: scores descending, ties by ascending item id.

    Padding has score ``-inf``, item id -1 and slot -1. ``probed`` counts the live slots of the
    probed pages, ``eligible`` those of them that passed program and exclusions, before
    verification.
    """

    scores: Tensor
    item_ids: Tensor
    slots: Tensor
    probed: Tensor
    eligible: Tensor


def ivf_scan(
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
) -> ScanResult:
    """Find the exact best slots among the eligible ones of the probed clusters.

    The score is ``(float32(integer dot) * item scale) * query scale``, each product rounded to
    float32. Ties go to the smaller item id. Results exclude what ``verify`` rejects and still
    number R where that many slots pass.

    Args:
        query_codes: ``(Q, D)`` int8 in [-127, 127], 1 <= D <= 1024.
        query_scales: ``(Q,)`` float32, finite and >= 0.
        clusters: ``(Q, P)`` int32 in [-1, C); -1 is no cluster. Duplicates count once.
        page_table: ``(C, X)`` int32 in [-1, N); -1 is no page. A page stands in it once.
        codes: ``(N, G, D)`` int8 in [-127, 127], contiguous.
        scales: ``(N, G)`` float32, contiguous; finite and >= 0 at live slots.
        item_ids: ``(N, G)`` int64, contiguous; distinct and >= 0 at live slots.
        planes: ``(J, N, W)`` int64, contiguous, J >= 1; plane 0 is the live plane.
        columns: ``(V, N, G)`` int64 order keys, contiguous.
        terms: ``(N, G, F)`` int64 term keys, contiguous.
        programs: ``(Q, L, 4)`` int64: filters that may let false positives pass.
        verify: ``(Q, Lv, 4)`` int64: the same filters stated exactly; empty where ``programs`` is
            exact already.
        excluded: ``(Q, E)`` int64 slots in [-1, N G); -1 is no slot.
        num_results: R, >= 1; may exceed the number of slots.

    Returns:
        Scores, ids and slots ``(Q, R)``, and two counts ``(Q,)`` int64. Every row is the same, bit
        for bit, alone and in any batch.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges disagree, a program is malformed, or the
            score of a result is not finite.
    """
    check_tensor("query_codes", query_codes, torch.int8, ("Q", "D"))
    num_queries, dim = query_codes.shape
    if not 1 <= dim <= MAX_CODE_DIM:
        raise ValueError(f"query_codes must have D in [1, {MAX_CODE_DIM}], got {dim}")
    check_tensor("query_scales", query_scales, torch.float32, (num_queries,))
    check_tensor("clusters", clusters, torch.int32, (num_queries, "P"))
    check_tensor("page_table", page_table, torch.int32, ("C", "X"))
    check_pool(planes, columns, terms)
    num_pages, page_size = terms.shape[:2]
    check_tensor("codes", codes, torch.int8, (num_pages, page_size, dim))
    check_tensor("scales", scales, torch.float32, (num_pages, page_size))
    check_tensor("item_ids", item_ids, torch.int64, (num_pages, page_size))
    check_tensor("programs", programs, torch.int64, (num_queries, "L", 4))
    check_tensor("verify", verify, torch.int64, (num_queries, "Lv", 4))
    check_tensor("excluded", excluded, torch.int64, (num_queries, "E"))
    check_devices(
        query_codes=query_codes,
        query_scales=query_scales,
        clusters=clusters,
        page_table=page_table,
        codes=codes,
        scales=scales,
        item_ids=item_ids,
        planes=planes,
        programs=programs,
        verify=verify,
        excluded=excluded,
    )
    check_contiguous(codes=codes, scales=scales, item_ids=item_ids)
    if num_results < 1:
        raise ValueError(f"num_results must be at least 1, got {num_results}")
    scan = _ivf_scan_cpu if is_plain_cpu(codes) else _ivf_scan
    return ScanResult(
        *scan(
            query_codes,
            query_scales,
            clusters,
            page_table,
            codes,
            scales,
            item_ids,
            planes,
            columns,
            terms,
            programs,
            verify,
            excluded,
            num_results,
        )
    )


def ivf_scan_reference(
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
    """The definition of ``ivf_scan``; same contract, plain PyTorch and NumPy, no validation."""
    # NumPy fetches and partitions on a CPU several times as fast as torch does.
    num_queries = query_codes.shape[0]
    out_scores = np.full((num_queries, num_results), -np.inf, dtype=np.float32)
    out_slots = np.full((num_queries, num_results), -1, dtype=np.int64)
    probed = np.zeros(num_queries, dtype=np.int64)
    eligible = np.zeros(num_queries, dtype=np.int64)
    queries = query_codes.numpy(force=True).astype(np.float32)
    multipliers, probes = query_scales.numpy(force=True), clusters.numpy(force=True)
    table, flat_ids = page_table.numpy(force=True), item_ids.numpy(force=True).reshape(-1)
    host_codes, host_scales = codes.numpy(force=True), scales.numpy(force=True)
    filters, filter_numbers = parse_programs(programs, planes, columns, terms)
    checks, check_numbers = parse_programs(verify, planes, columns, terms)
    for row in range(num_queries):
        pages = _probed_pages(probes[row], table, planes.shape[1])  # (M,)
        asked = torch.from_numpy(pages).to(planes.device)
        live = planes[LIVE_PLANE].index_select(0, asked)
        words = accepted_words([filters[filter_numbers[row]]], planes, columns, terms, asked)[0]
        if excluded.shape[1]:
            barred = excluded_words(excluded[row : row + 1], *planes.shape[1:])[0]
            words &= ~barred.index_select(0, asked)
        bits = _bits(words)
        probed[row], eligible[row] = np.count_nonzero(_bits(live)), np.count_nonzero(bits)
        found, slots_at = _scores(
            queries[row], multipliers[row], pages, bits, host_codes, host_scales
        )
        check = checks[check_numbers[row]]
        passes = partial(_passes, check, planes, columns, terms) if check else None
        best = _best_verified(found, slots_at, flat_ids, passes, num_results)
        # Adding 0.0 turns -0.0 into 0.0.
        out_scores[row, : len(best)] = found[best] + np.float32(0.0)
        out_slots[row, : len(best)] = slots_at(best)
    out_ids = np.full_like(out_slots, -1)
    out_ids[out_slots >= 0] = flat_ids[out_slots[out_slots >= 0]]

    def on_device(result: NDArray[Any]) -> Tensor:
        return torch.from_numpy(result).to(scales.device)

    return (
        on_device(out_scores),
        on_device(out_ids),
        on_device(out_slots),
        on_device(probed),
        on_device(eligible),
    )


def _checked_ivf_scan(
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
    check_finite("query_scales", query_scales)
    check_range("clusters", clusters, -1, page_table.shape[0])
    check_range("page_table", page_table, -1, scales.shape[0])
    check_range("excluded", excluded, -1, scales.numel())
    result = ivf_scan_reference(
        query_codes,
        query_scales,
        clusters,
        page_table,
        codes,
        scales,
        item_ids,
        planes,
        columns,
        terms,
        programs,
        verify,
        excluded,
        num_results,
    )
    _check_scores(ScanResult(*result), verified=verify.shape[1] > 0)
    return result


def _explain(
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
) -> None:
    """Refuse a pool that the reference can do with, although its contract does not allow it."""
    pages = page_table[page_table >= 0]
    if pages.unique().numel() < pages.numel():
        raise ValueError("page_table must hold each page once, got a page more than once")
    live = unpack_bits(planes[LIVE_PLANE])
    if not bool(scales[live].isfinite().all()):
        raise ValueError("scales must be finite at live slots, got a NaN or infinite scale")


def _check_scores(result: ScanResult, *, verified: bool) -> None:
    if bool((result.item_ids[result.slots >= 0] < 0).any()):
        raise ValueError("item_ids must be at least 0 at live slots, got a negative id")
    found = result.item_ids.numpy() >= 0
    if not np.isfinite(result.scores.numpy()[found]).all():
        raise ValueError("scales must be finite at live slots, got a NaN or infinite score")
    expected = np.minimum(result.eligible.numpy(), found.shape[1])
    if not verified and (np.count_nonzero(found, axis=1) != expected).any():
        raise ValueError("scales must be finite at live slots, got a score of -inf")


def _probed_pages(
    clusters: NDArray[np.int32], page_table: NDArray[np.int32], num_pages: int
) -> NDArray[np.int64]:
    """The pages of some clusters, ascending and each once: ``(M,)``."""
    asked = np.zeros(num_pages + 1, dtype=np.bool_)
    # What is no page, -1, marks the entry behind the last one.
    asked[page_table[clusters[clusters >= 0]]] = True
    return np.flatnonzero(asked[:-1])


def _bits(words: Tensor) -> NDArray[np.bool_]:
    """One truth value per slot: ``(M, W)`` to ``(M * G,)``."""
    octets = words.numpy(force=True).view(np.uint8)
    return np.unpackbits(octets, bitorder="little").view(np.bool_)


def _scores(
    query: NDArray[np.float32],
    multiplier: np.float32,
    pages: NDArray[np.int64],
    bits: NDArray[np.bool_],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
) -> tuple[NDArray[np.float32], SlotsAt]:
    """Scores of slots of some pages, and the slots at positions among them.

    Slots whose bit is not set are left out or have ``-inf``.
    """
    page_size, dim = codes.shape[1:]
    # Whole pages are fetched faster than half as many slots one by one.
    by_page = 2 * np.count_nonzero(bits) > len(bits)
    chosen = None if by_page else np.flatnonzero(bits)

    def slots_at(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if chosen is not None:
            positions = chosen[positions]
        slots: NDArray[np.int64] = pages[positions // page_size] * page_size + positions % page_size
        return slots

    if chosen is None:
        dots, factors = _integer_dots(query, codes, pages), scales[pages]  # (M, G)
    else:
        slots = slots_at(np.arange(len(chosen)))
        dots = _integer_dots(query, codes.reshape(-1, dim), slots)
        factors = scales.reshape(-1)[slots]
    # Scores that are not finite are found by the check of the results.
    with np.errstate(over="ignore", invalid="ignore"):
        found = (dots * factors).reshape(-1) * multiplier
    if chosen is None:
        found[~bits] = -np.inf
    return found, slots_at


def _integer_dots(
    query: NDArray[np.float32], codes: NDArray[np.int8], places: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Exact inner products of a query and the int8 rows at some places of the first axis.

    Every partial sum is an integer below 2**24, which float32 holds in any order of summation.
    """
    dots = np.empty((len(places), *codes.shape[1:-1]), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // (codes[:1].size or 1))
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        dots[part] = codes.take(places[part], axis=0).astype(np.float32) @ query
    return dots


def _passes(
    program: Program, planes: Tensor, columns: Tensor, terms: Tensor, slots: NDArray[np.int64]
) -> NDArray[np.bool_]:
    asked = torch.from_numpy(slots).to(planes.device)
    passed = evaluate(program, SlotLeaves(planes, columns, terms, asked))
    return passed.numpy(force=True)


def _best_verified(
    scores: NDArray[np.float32],
    slots_at: SlotsAt,
    item_ids: NDArray[np.int64],
    passes: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None,
    num_results: int,
) -> NDArray[np.int64]:
    """Positions of the best scores whose slots pass, best first."""
    # Only the best are verified; more of them while there are too few results.
    taken = 2 * num_results if passes else num_results
    while True:
        best = best_positions(scores, taken, lambda positions: item_ids[slots_at(positions)])
        if passes is None:
            return best
        passed = passes(slots_at(best))
        if taken >= len(scores) or np.count_nonzero(passed) >= num_results:
            return best[passed][:num_results]
        taken *= 4


_ivf_scan = torch.library.custom_op("silvershard::ivf_scan", ivf_scan_reference, mutates_args=())
_ivf_scan_cpu = run_on_cpu(ivf_scan_native, _checked_ivf_scan, _explain)
_ivf_scan.register_kernel("cpu")(_ivf_scan_cpu)


@_ivf_scan.register_kernel("cuda")
def _(
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
    from silvershard.kernels.ivf_scan_triton import ivf_scan_triton

    return ivf_scan_triton(
        query_codes,
        query_scales,
        clusters,
        page_table,
        codes,
        scales,
        item_ids,
        planes,
        columns,
        terms,
        programs,
        verify,
        excluded,
        num_results,
    )


@_ivf_scan.register_fake
def _(
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
    num_queries = query_codes.shape[0]
    shape = (num_queries, num_results)
    return (
        scales.new_empty(shape),
        item_ids.new_empty(shape),
        item_ids.new_empty(shape),
        item_ids.new_empty(num_queries),
        item_ids.new_empty(num_queries),
    )
