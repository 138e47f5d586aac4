import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from silvershard.model.quality import (
    coverage_at_k,
    hit_rate_at_k,
    ndcg_at_k,
    overlap_at_k,
    paired_bootstrap,
    popularity_ranking,
    recall_at_k,
    same_ranking,
)


class Ranked(NamedTuple):
    item_ids: torch.Tensor
    scores: torch.Tensor


def ranked(ids: list[int], scores: list[float]) -> Ranked:
    return Ranked(torch.tensor(ids), torch.tensor(scores))


RANKED = np.array([[3, 1, 4], [1, 5, 9], [2, 6, -1]])


def test_metrics_of_single_held_out_items_are_as_computed_by_hand() -> None:
    held = np.array([4, 1, 7])
    assert hit_rate_at_k(RANKED, held, 3).tolist() == [1.0, 1.0, 0.0]
    assert hit_rate_at_k(RANKED, held, 2).tolist() == [0.0, 1.0, 0.0]
    assert recall_at_k(RANKED, held, 3).tolist() == [1.0, 1.0, 0.0]
    assert ndcg_at_k(RANKED, held, 3).tolist() == [1 / math.log2(4), 1.0, 0.0]


def test_metrics_of_sets_are_as_computed_by_hand() -> None:
    held = [{3, 4, 8, 9}, {5}, {6, 2}]
    assert recall_at_k(RANKED, held, 3).tolist() == [0.5, 1.0, 1.0]
    assert recall_at_k(RANKED, held, 1).tolist() == [0.25, 0.0, 0.5]
    assert hit_rate_at_k(RANKED, held, 1).tolist() == [1.0, 0.0, 1.0]
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = [(1 + 1 / math.log2(4)) / best, 1 / math.log2(3), 1.0]
    assert ndcg_at_k(RANKED, held, 3) == pytest.approx(expected)


def test_a_set_of_one_counts_as_the_single_item() -> None:
    held = np.array([4, 1, 7])
    sets = [{4}, {1}, {7}]
    for metric in (hit_rate_at_k, ndcg_at_k, recall_at_k):
        assert metric(RANKED, held, 3).tolist() == metric(RANKED, sets, 3).tolist()


def test_padding_is_never_a_hit() -> None:
    assert hit_rate_at_k(RANKED[2:], [{-1}], 3).tolist() == [0.0]


def test_a_user_without_held_out_items_has_no_metric() -> None:
    for metric in (hit_rate_at_k, ndcg_at_k, recall_at_k):
        assert np.isnan(metric(RANKED[:1], [set()], 3)).all()
        assert np.isnan(metric(RANKED[:1], np.array([-1]), 3)).all()


def test_ranks_beyond_the_list_are_empty() -> None:
    assert ndcg_at_k(RANKED[:1], np.array([3]), 10).tolist() == [1.0]
    assert recall_at_k(RANKED[:1], [{3, 7}], 10).tolist() == [0.5]


def test_metrics_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        recall_at_k(RANKED, np.array([1, 2, 3]), 0)
    with pytest.raises(ValueError, match="relevant must have 3 entries, got 2"):
        recall_at_k(RANKED, np.array([1, 2]), 1)
    with pytest.raises(ValueError, match=r"ranked ids must be \(B, K\)"):
        recall_at_k(RANKED[0], np.array([1]), 1)


def test_coverage_is_the_share_of_items_that_any_user_is_shown() -> None:
    # 3, 1, 4, 5, 9, 2 and 6 of ten items, of which 1 comes twice.
    assert coverage_at_k(RANKED, 10, 3) == 0.7
    assert coverage_at_k(RANKED, 10, 1) == 0.3
    assert coverage_at_k(RANKED, 10, 100) == 0.7
    assert coverage_at_k(np.full((2, 3), -1), 10, 3) == 0.0
    assert coverage_at_k(np.zeros((0, 3)), 10, 3) == 0.0


def test_coverage_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="num_items must be at least 1, got 0"):
        coverage_at_k(RANKED, 0, 3)
    with pytest.raises(ValueError, match="must have at most 6 distinct ids, got 7"):
        coverage_at_k(RANKED, 6, 3)


def test_overlap_counts_what_both_have_in_any_order() -> None:
    other = np.array([[4, 3, 7], [9, 1, 5], [6, -1, -1]])
    assert overlap_at_k(RANKED, other, 3) == pytest.approx([2 / 3, 1.0, 1.0])
    assert overlap_at_k(RANKED, other, 1) == pytest.approx([0.0, 0.0, 0.0])
    assert overlap_at_k(RANKED[:1], np.array([[-1, -1, -1]]), 3).tolist() == [1.0]


def test_the_same_ranking_is_the_same() -> None:
    a = ranked([3, 1], [0.5, float("-inf")])
    assert same_ranking(a, ranked([3, 1], [0.5, float("-inf")]))
    assert same_ranking(ranked([], []), ranked([], []))
    nan = ranked([1], [float("nan")])
    assert same_ranking(nan, nan)


@pytest.mark.parametrize(
    ("ids", "scores", "difference"),
    [
        ([1, 3], [0.5, 0.25], "rank 0: item 3 (0.5 = 0x3f000000) and item 1 (0.5 = 0x3f000000)"),
        ([3, 1], [0.5, 0.25 + 2**-25], "rank 1: item 1 has scores 0.25 = 0x3e800000 and"),
        ([3], [0.5], "item_ids have shapes (2,) and (1,)"),
    ],
)
def test_the_first_difference_is_named(
    ids: list[int], scores: list[float], difference: str
) -> None:
    found = same_ranking(ranked([3, 1], [0.5, 0.25]), ranked(ids, scores))
    assert not found
    assert difference in found.difference


def test_zeros_of_other_sign_are_not_the_same() -> None:
    assert not same_ranking(ranked([1], [0.0]), ranked([1], [-0.0]))


def test_the_bootstrap_interval_covers_a_true_difference() -> None:
    generator = np.random.default_rng(1)
    a = (generator.random(600) < 0.12).astype(float)
    b = (generator.random(600) < 0.04).astype(float)
    mean, low, high = paired_bootstrap(a, b, seed=3)
    assert mean == pytest.approx((a - b).mean())
    assert 0 < low < mean < high
    error = (a - b).std() / math.sqrt(600)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert paired_bootstrap(a, b, seed=3) == (mean, low, high)


def test_the_bootstrap_keeps_each_user_together() -> None:
    a = np.random.default_rng(2).random(50)
    mean, low, high = paired_bootstrap(a + 1.0, a, samples=100)
    assert (mean, low, high) == pytest.approx((1.0, 1.0, 1.0))


def test_the_bootstrap_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="B >= 1"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="must be finite"):
        paired_bootstrap([1.0, float("nan")], [0.0, 0.0])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        paired_bootstrap([1.0], [0.0], samples=0)


def test_popularity_ties_go_to_the_smaller_id() -> None:
    assert popularity_ranking([5, 0, 5, 9], [30, 10, 20, 40]).tolist() == [40, 20, 30, 10]
