"""How wide Bloom signatures must be: the fewest planes that meet a target rate of wrong passes.

Source: Bloom, "Space/Time Trade-offs in Hash Coding with Allowable Errors", CACM 13(7), 1970.
"""

import math
from collections import Counter

MAX_HASHES = 16
LEAST_RATE = 1e-9
"""Rates are sums of alternating sign in float64: below this they are rounding noise."""


def choose_width(
    items_by_terms: Counter[int], num_hashes: int, target: float, max_planes: int
) -> tuple[int, float]:
    """The fewest Bloom planes that meet a target, and the rate that they are expected to give.

    They also meet it for an item with one rare value, or are as many as there may be, so that a
    catalogue without rare values can take some later.

    Args:
        items_by_terms: how many items have 0, 1, ... rare values.
        num_hashes: planes set per value, 1 to 16.
        target: largest rate, in [1e-9, 1).
        max_planes: most planes, at least 1.

    Raises:
        ValueError: if the target needs more planes.
    """
    wanted = _fewest_planes(items_by_terms, num_hashes, target, max_planes)
    if wanted is None:
        total = sum(terms * items for terms, items in items_by_terms.items())
        rate = false_positive_rate(items_by_terms, num_hashes, max_planes)
        best, hashes = min(
            (false_positive_rate(items_by_terms, other, max_planes), other)
            for other in range(1, MAX_HASHES + 1)
        )
        raise ValueError(
            f"a false-positive rate of {target} cannot be reached: {total} rare values on "
            f"{items_by_terms.total()} items, at most {max(items_by_terms)} on one, give "
            f"{rate:.3g} with max_bloom_planes={max_planes} and num_hashes={num_hashes}, and "
            f"at best {best:.3g} with num_hashes={hashes}; raise target_false_positive_rate, "
            "max_bloom_planes or max_exact_planes, or lower min_exact_share"
        )
    least = _fewest_planes(Counter({1: 1}), num_hashes, target, max_planes) or max_planes
    width = max(wanted, least)
    return width, false_positive_rate(items_by_terms, num_hashes, width)


def _fewest_planes(
    items_by_terms: Counter[int], num_hashes: int, target: float, max_planes: int
) -> int | None:
    """The fewest Bloom planes that meet the target; None if ``max_planes`` do not."""
    narrow, wide = 0, min(num_hashes, max_planes)
    while false_positive_rate(items_by_terms, num_hashes, wide) > target:
        if wide >= max_planes:
            return None
        narrow, wide = wide, min(2 * wide, max_planes)
    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        if false_positive_rate(items_by_terms, num_hashes, middle) > target:
            narrow = middle
        else:
            wide = middle
    return wide


def false_positive_rate(items_by_terms: Counter[int], num_hashes: int, num_planes: int) -> float:
    """Expected share of items whose signature holds all positions of a term they do not have.

    Hash positions are taken as independent and uniform, and two of one term may fall together.

    Args:
        items_by_terms: how many items have 0, 1, ... rare values; of no items the rate is 0.
        num_hashes: positions of a term.
        num_planes: of the signature.
    """
    distinct = _distinct_positions(num_hashes, num_planes)
    total = 0.0
    for terms in sorted(items_by_terms):
        balls = terms * num_hashes
        passed = sum(
            share * _all_covered(positions, balls, num_planes)
            for positions, share in distinct.items()
        )
        total += items_by_terms[terms] * passed
    return min(total / max(items_by_terms.total(), 1), 1.0)


def _distinct_positions(num_hashes: int, num_planes: int) -> dict[int, float]:
    """How likely the positions of one term fall on 1, 2, ... distinct planes."""
    shares = {0: 1.0}
    for _ in range(num_hashes):
        following: dict[int, float] = {}
        for count, share in shares.items():
            again = share * count / num_planes
            following[count] = following.get(count, 0.0) + again
            following[count + 1] = following.get(count + 1, 0.0) + share - again
        shares = following
    return {count: share for count, share in shares.items() if share > 0}


def _all_covered(positions: int, balls: int, num_planes: int) -> float:
    """How likely ``balls`` uniform draws cover ``positions`` given planes."""
    covered = sum(
        math.comb(positions, missed)
        * (-1.0 if missed % 2 else 1.0)
        * (1 - missed / num_planes) ** balls
        for missed in range(positions + 1)
    )
    return min(max(covered, 0.0), 1.0)
