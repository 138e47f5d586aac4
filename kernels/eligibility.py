"""Filter programs evaluated on pages of the pool, one bit per slot.

Shapes: Q query rows, M pages per query, J planes, N pages in the pool, G slots per page (64 or
128), W = G / 64 words, V columns, F term slots per item, L program length, E exclusions per query.

Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.1 (filters on the probed pages).
"""

import torch
from torch import Tensor

from silvershard.kernels.bits import popcount_reference
from silvershard.kernels.contract import (
    check_contiguous,
    check_devices,
    check_range,
    check_tensor,
)
from silvershard.kernels.filter_ops import PageLeaves, Program, evaluate, parse_programs
from silvershard.kernels.native_library import is_plain_cpu, run_on_cpu
from silvershard.kernels.native_operators import count_eligible_native, eligibility_native

LIVE_PLANE = 0
PAGE_SIZES = (64, 128)
# Implementations number slots with 32 bits, and one number more marks their end.
MAX_SLOTS = (1 << 32) - 1
# Slots x term slots that one pass looks at, which bounds its scratch memory.
_CHUNK_ELEMENTS = 1 << 24


def eligibility(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    """Decide for every slot of the given pages whether a query may return it.

    A slot is eligible if the program of the query accepts it, its live bit (plane 0) is set and it
    is not excluded. A slot of page -1 never is.

    Args:
        planes: ``(J, N, W)`` int64, contiguous, J >= 1; plane 0 is the live plane.
        columns: ``(V, N, G)`` int64 order keys, contiguous; ``NULL_KEY`` where there is no value.
        terms: ``(N, G, F)`` int64 term keys, contiguous; ``PAD_TERM`` where there is none.
        programs: ``(Q, L, 4)`` int64, see ``FilterOp``; an empty program accepts everything.
        pages: ``(Q, M)`` int32 in [-1, N); -1 is no page. A page may occur more than once.
        excluded: ``(Q, E)`` int64 slots in [-1, N G); -1 is no slot. Duplicates do no harm.

    Returns:
        ``(Q, M, W)`` int64; bit ``j`` of word ``w`` is slot ``w * 64 + j`` of the page.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges disagree, or a program is malformed.
    """
    check_pool(planes, columns, terms)
    check_tensor("programs", programs, torch.int64, ("Q", "L", 4))
    check_tensor("pages", pages, torch.int32, (programs.shape[0], "M"))
    check_tensor("excluded", excluded, torch.int64, (programs.shape[0], "E"))
    check_devices(planes=planes, programs=programs, pages=pages, excluded=excluded)
    decide = _eligibility_cpu if is_plain_cpu(planes) else _eligibility
    answer: Tensor = decide(planes, columns, terms, programs, pages, excluded)
    return answer


def eligibility_reference(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    """The definition of ``eligibility``; same contract, plain PyTorch, no validation."""
    num_queries, num_slots = pages.shape
    num_pages, num_words = planes.shape[1:]
    distinct, numbers = parse_programs(programs, planes, columns, terms)
    if num_queries * num_slots * num_pages == 0:
        return planes.new_zeros((num_queries, num_slots, num_words))
    present = pages >= 0
    safe = pages.clamp_min(0).long()
    if num_queries == 1:
        pool, column = safe[0], torch.arange(num_slots, device=pages.device)[None]
    else:
        # Pages that several queries ask for are evaluated once.
        asked = torch.zeros(num_pages, dtype=torch.bool, device=pages.device)
        asked[safe.flatten()] = True
        pool = asked.nonzero().squeeze(1)
        column = (asked.cumsum(0) - 1).index_select(0, safe.flatten()).view_as(safe)  # (Q, M)
    words = accepted_words(distinct, planes, columns, terms, pool)
    if len(distinct) > 1:
        which = torch.tensor(numbers, dtype=torch.int64, device=pages.device)
        column = column + which[:, None] * pool.shape[0]
    answer = words.view(-1, num_words).index_select(0, column.flatten())
    answer = answer.view(num_queries, num_slots, num_words)
    answer = torch.where(present[:, :, None], answer, 0)
    if excluded.shape[1]:
        barred = excluded_words(excluded, num_pages, num_words)  # (Q, N, W)
        answer &= ~barred.gather(1, safe[:, :, None].expand(-1, -1, num_words))
    return answer


def accepted_words(
    distinct: list[Program], planes: Tensor, columns: Tensor, terms: Tensor, pages: Tensor
) -> Tensor:
    """The live slots of some pages that each program accepts: ``(len(distinct), M, W)``."""
    step = _pages_per_pass(columns, terms)
    words = planes.new_empty((len(distinct), len(pages), planes.shape[2]))
    for start in range(0, len(pages), step):
        leaves = PageLeaves(planes, columns, terms, pages[start : start + step])
        live = leaves.plane(LIVE_PLANE)
        for number, program in enumerate(distinct):
            words[number, start : start + step] = evaluate(program, leaves) & live
    return words


def excluded_words(excluded: Tensor, num_pages: int, num_words: int) -> Tensor:
    """The exclusions of every query as bits of the whole pool: ``(Q, N, W)`` int64."""
    ordered = excluded.sort(dim=1).values
    # A bit may be added only once, so all but the first of equal slots are dropped.
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    counted = (ordered >= 0) & ~again
    bits = torch.where(counted, torch.ones_like(ordered) << (ordered & 63), 0)
    words = excluded.new_zeros((excluded.shape[0], num_pages * num_words))
    words.scatter_add_(1, ordered.clamp_min(0) >> 6, bits)
    return words.view(-1, num_pages, num_words)


def count_eligible(planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor) -> Tensor:
    """Count the live slots of the whole pool that each program accepts.

    Args:
        planes: ``(J, N, W)`` int64, contiguous, J >= 1; plane 0 is the live plane.
        columns: ``(V, N, G)`` int64 order keys, contiguous.
        terms: ``(N, G, F)`` int64 term keys, contiguous.
        programs: ``(Q, L, 4)`` int64.

    Returns:
        ``(Q,)`` int64. An upper bound of the matches if the program holds Bloom planes.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, or a program is malformed.
    """
    check_pool(planes, columns, terms)
    check_tensor("programs", programs, torch.int64, ("Q", "L", 4))
    check_devices(planes=planes, programs=programs)
    count = _count_eligible_cpu if is_plain_cpu(planes) else _count_eligible
    answer: Tensor = count(planes, columns, terms, programs)
    return answer


def count_eligible_reference(
    planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor
) -> Tensor:
    """The definition of ``count_eligible``; same contract, plain PyTorch, no validation."""
    distinct, numbers = parse_programs(programs, planes, columns, terms)
    counts = planes.new_zeros(len(distinct))
    step = _pages_per_pass(columns, terms)
    for start in range(0, planes.shape[1], step):
        leaves = PageLeaves(planes, columns, terms, slice(start, start + step))
        for number, program in enumerate(distinct):
            words = evaluate(program, leaves) & leaves.plane(LIVE_PLANE)
            counts[number] += popcount_reference(words).sum()
    return counts[torch.tensor(numbers, dtype=torch.int64, device=planes.device)]


def _checked_eligibility(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    check_range("pages", pages, -1, columns.shape[1])
    check_range("excluded", excluded, -1, columns.shape[1] * columns.shape[2])
    return eligibility_reference(planes, columns, terms, programs, pages, excluded)


def check_pool(planes: Tensor, columns: Tensor, terms: Tensor) -> None:
    """Refuse filter tensors of a page pool that do not fit together.

    Raises:
        ValueError: naming the tensor and the clause.
    """
    check_tensor("planes", planes, torch.int64, ("J", "N", "W"))
    num_pages, num_words = planes.shape[1:]
    page_size = num_words * 64
    if planes.shape[0] == 0:
        raise ValueError("planes must hold the live plane, got J = 0")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"planes must have W = G / 64 with G in {PAGE_SIZES}, got W = {num_words}")
    if num_pages * page_size > MAX_SLOTS:
        raise ValueError(
            f"planes must hold at most {MAX_SLOTS} slots, got N G = {num_pages * page_size}"
        )
    check_tensor("columns", columns, torch.int64, ("V", num_pages, page_size))
    check_tensor("terms", terms, torch.int64, (num_pages, page_size, "F"))
    check_devices(planes=planes, columns=columns, terms=terms)
    check_contiguous(planes=planes, columns=columns, terms=terms)


def _pages_per_pass(columns: Tensor, terms: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // (columns.shape[2] * max(1, terms.shape[2])))


_eligibility = torch.library.custom_op(
    "silvershard::eligibility", eligibility_reference, mutates_args=()
)
_count_eligible = torch.library.custom_op(
    "silvershard::count_eligible", count_eligible_reference, mutates_args=()
)
_eligibility_cpu = run_on_cpu(eligibility_native, _checked_eligibility)
_eligibility.register_kernel("cpu")(_eligibility_cpu)
_count_eligible_cpu = run_on_cpu(count_eligible_native, count_eligible_reference)
_count_eligible.register_kernel("cpu")(_count_eligible_cpu)


@_eligibility.register_kernel("cuda")
def _(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    from silvershard.kernels.eligibility_triton import eligibility_triton

    return eligibility_triton(planes, columns, terms, programs, pages, excluded)


@_eligibility.register_fake
def _(
    planes: Tensor,
    columns: Tensor,
    terms: Tensor,
    programs: Tensor,
    pages: Tensor,
    excluded: Tensor,
) -> Tensor:
    return planes.new_empty((*pages.shape, planes.shape[2]))


@_count_eligible.register_kernel("cuda")
def _(planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor) -> Tensor:
    from silvershard.kernels.eligibility_triton import count_eligible_triton

    return count_eligible_triton(planes, columns, terms, programs)


@_count_eligible.register_fake
def _(planes: Tensor, columns: Tensor, terms: Tensor, programs: Tensor) -> Tensor:
    return planes.new_empty(programs.shape[:1])
