"""Exact best slots of the probed clusters: filter first, then int8 scores, then verification.

The inverted lists are paged: slots lie in pages of one pool, and a cluster owns a list of pages.

Shapes: Q query rows, P probes, C clusters, X pages a cluster may own, N pages in the pool, G slots
per page, D embedding dimension, R results per row, L and Lv program lengths, E exclusions per
query, T eligible slots of all rows together, M pages per row.

Source: Kwon et al., Efficient Memory Management (...) with PagedAttention, SOSP 2023, section 4.
Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.3 (probe, then filter).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.kernels.bits import popcount_reference, unpack_bits_reference
from silvershard.kernels.coarse_probe import MAX_CODE_DIM
from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_finite,
    check_range,
    check_tensor,
)
from silvershard.kernels.eligibility import LIVE_PLANE, check_pool, eligibility_reference
from silvershard.kernels.filter_ops import Program, SlotLeaves, evaluate, parse_programs
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import ivf_scan_native
from silvershard.kernels.select_topk import best_positions

# Query rows x slots handled at a time, which bounds the scratch memory.
_CHUNK_ELEMENTS = 1 << 22


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
        query_codes: ``(Q, D)`` int8, 1 <= D <= 1024.
        query_scales: ``(Q,)`` float32, finite and >= 0.
        clusters: ``(Q, P)`` int32 in [-1, C); -1 is no cluster. Duplicates count once.
        page_table: ``(C, X)`` int32 in [-1, N); -1 is no page. A page belongs to one cluster.
        codes: ``(N, G, D)`` int8, contiguous.
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
    """The definition of ``ivf_scan``; same contract, plain PyTorch, no validation."""
    num_queries = query_codes.shape[0]
    shape = (num_queries, num_results)
    out_scores = scales.new_full(shape, -torch.inf)
    out_slots = item_ids.new_full(shape, -1)
    probed = item_ids.new_zeros(num_queries)
    eligible = item_ids.new_zeros(num_queries)
    step = max(1, _CHUNK_ELEMENTS // max(1, scales.numel()))
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        checks = parse_programs(verify[rows], planes, columns, terms)
        pages = _probed_pages(clusters[rows], page_table, scales.shape[0])  # (Q, M)
        words = eligibility_reference(planes, columns, terms, programs[rows], pages, excluded[rows])
        live = planes[LIVE_PLANE].index_select(0, pages.clamp_min(0).flatten()).view_as(words)
        live = torch.where(pages[:, :, None] >= 0, live, 0)
        bits = popcount_reference(torch.stack((live, words))).sum(dim=(2, 3))  # (2, Q)
        probed[rows], eligible[rows] = bits
        counts = bits[1]
        slots = _set_slots(words, pages)  # (T,)
        if not slots.shape[0]:
            continue
        dots = _integer_dots(query_codes[rows], codes, slots, counts)
        found = dots * scales.view(-1).index_select(0, slots)
        found *= query_scales[rows].repeat_interleave(counts)
        found, slots = _by_row(found, slots, counts)  # (Q, max count)
        out_scores[rows], out_slots[rows] = _select_verified(
            found, slots, item_ids, planes, columns, terms, *checks, num_results
        )
    out_ids = torch.full_like(out_slots, -1)
    if item_ids.numel():
        known = item_ids.view(-1).index_select(0, out_slots.clamp_min(0).flatten()).view(shape)
        out_ids = torch.where(out_slots >= 0, known, -1)
    return out_scores, out_ids, out_slots, probed, eligible


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


def _check_scores(result: ScanResult, *, verified: bool) -> None:
    found = result.item_ids >= 0
    if not bool(result.scores[found].isfinite().all()):
        raise ValueError("scales must be finite at live slots, got a NaN or infinite score")
    if not verified:
        width = result.scores.shape[1]
        if not torch.equal(found.sum(dim=1), result.eligible.clamp_max(width)):
            raise ValueError("scales must be finite at live slots, got a score of -inf")


def _probed_pages(clusters: Tensor, page_table: Tensor, num_pages: int) -> Tensor:
    """The pages of every row, ascending and each once: ``(Q, M)`` int64, padded with -1."""
    num_queries = clusters.shape[0]
    if clusters.numel() * page_table.numel() * num_pages == 0:
        return clusters.new_empty((num_queries, 0), dtype=torch.int64)
    pages = page_table.index_select(0, clusters.clamp_min(0).flatten()).long()
    pages = torch.where(clusters.reshape(-1, 1) >= 0, pages, -1).view(num_queries, -1)
    asked = torch.zeros((num_queries, num_pages + 1), dtype=torch.bool, device=clusters.device)
    asked = asked.scatter_(1, pages + 1, value=True)[:, 1:]
    page = asked.nonzero()[:, 1]
    if num_queries == 1:
        return page[None]
    source, valid = _row_layout(asked.sum(dim=1))
    return torch.where(valid, page.index_select(0, source.flatten()).view_as(source), -1)


def _row_layout(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where each cell of ``(Q, max count)`` is found in values that lie row after row.

    Returns the index of the value and whether the cell holds one.
    """
    offset = torch.arange(int(counts.max()), device=counts.device)
    valid = offset < counts[:, None]
    return torch.where(valid, offset + (counts.cumsum(0) - counts)[:, None], 0), valid


def _set_slots(words: Tensor, pages: Tensor) -> Tensor:
    """The slot of every set bit, row after row: ``(T,)`` int64."""
    page_size = words.shape[2] * 64
    flat = unpack_bits_reference(words).flatten().nonzero().squeeze(1)
    shift = page_size.bit_length() - 1
    first = pages.flatten() << shift
    return first.index_select(0, flat >> shift) + (flat & (page_size - 1))


def _integer_dots(query_codes: Tensor, codes: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
    """Exact inner products of the int8 rows as float32: ``(T,)``.

    Every partial sum is an integer below 2**24, which float32 holds in any order of summation.
    """
    queries = query_codes.float()
    vectors = codes.view(-1, codes.shape[2])  # (N * G, D)
    num_rows, num_slots = queries.shape[0], vectors.shape[0]
    if num_rows == 1:
        return torch.mv(vectors.index_select(0, slots).float(), queries[0])
    # Where rows share enough slots, one product over the shared slots is cheaper than one per row:
    # multiplying a row for one more query costs about a sixteenth of fetching the int8 row.
    weight = 16 + num_rows
    if 16 * slots.shape[0] >= weight * int(counts.max()):
        asked = torch.zeros(num_slots, dtype=torch.bool, device=slots.device)
        asked[slots] = True
        shared = asked.nonzero().squeeze(1)
        if 16 * slots.shape[0] >= weight * shared.shape[0]:
            products = queries @ vectors.index_select(0, shared).float().T  # (Q, shared)
            place = (asked.cumsum(0) - 1).index_select(0, slots)
            row = torch.arange(num_rows, device=slots.device) * shared.shape[0]
            return products.view(-1).index_select(0, place + row.repeat_interleave(counts))
    dots = queries.new_empty(slots.shape[0])
    start = 0
    for number, count in enumerate(counts.tolist()):
        mine = slice(start, start + count)
        torch.mv(vectors.index_select(0, slots[mine]).float(), queries[number], out=dots[mine])
        start += count
    return dots


def _by_row(found: Tensor, slots: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and slots as ``(Q, max count)``, padded with ``-inf`` and -1."""
    if counts.shape[0] == 1:
        return found[None], slots[None]
    source, valid = _row_layout(counts)
    scores = found.index_select(0, source.flatten()).view_as(source)
    table = slots.index_select(0, source.flatten()).view_as(source)
    return torch.where(valid, scores, -torch.inf), torch.where(valid, table, -1)


def _select_verified(
    scores: Tensor,
    slots: Tensor,
    item_ids: Tensor,
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    distinct: list[Program],
    numbers: list[int],
    num_results: int,
) -> tuple[Tensor, Tensor]:
    """Scores and slots ``(Q, R)`` of the best candidates that pass their verify program."""
    flat_ids = item_ids.view(-1)

    def ids_at(rows: Tensor, positions: Tensor) -> Tensor:
        return flat_ids[slots[rows].gather(1, positions)]

    width = scores.shape[1]
    if distinct == [()]:
        best, positions = best_positions(scores, num_results, ids_at)
        return best, _slots_at(slots, positions)
    # Only the best candidates are verified; more of them while a row is short of results.
    taken = 2 * num_results
    while True:
        taken = min(taken, width)
        best, positions = best_positions(scores, taken, ids_at)
        best_slots = _slots_at(slots, positions)
        passed = best_slots >= 0
        for number, program in enumerate(distinct):
            if program:
                mine = torch.tensor([other == number for other in numbers], device=slots.device)
                asked = passed & mine[:, None]
                leaves = SlotLeaves(planes, columns, terms, best_slots[asked])
                passed[asked] = evaluate(program, leaves)
        if taken == width or bool((passed.sum(dim=1) >= num_results).all()):
            break
        taken *= 4
    # Those that passed move to the front in the order that they have.
    front = passed.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices[:, :num_results]
    kept = passed.gather(1, front)
    padding = (0, num_results - front.shape[1])
    best = torch.where(kept, best.gather(1, front), -torch.inf)
    best_slots = torch.where(kept, best_slots.gather(1, front), -1)
    return (
        torch.nn.functional.pad(best, padding, value=-torch.inf),
        torch.nn.functional.pad(best_slots, padding, value=-1),
    )


def _slots_at(slots: Tensor, positions: Tensor) -> Tensor:
    return torch.where(positions >= 0, slots.gather(1, positions.clamp_min(0)), -1)


_ivf_scan = torch.library.custom_op("silvershard::ivf_scan", ivf_scan_reference, mutates_args=())
_ivf_scan_cpu = run_on_cpu(ivf_scan_native, _checked_ivf_scan)
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
