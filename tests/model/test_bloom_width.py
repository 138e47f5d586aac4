import random
from collections import Counter

import pytest

from silvershard.model.bloom_width import choose_width, false_positive_rate


def test_the_rate_is_that_of_drawn_positions() -> None:
    draw = random.Random(0)
    planes, hashes, trials = 11, 3, 40_000
    passed = 0
    for trial in range(trials):
        terms = (0, 2, 3)[trial % 3]
        covered = {draw.randrange(planes) for _ in range(terms * hashes)}
        passed += {draw.randrange(planes) for _ in range(hashes)} <= covered
    rate = false_positive_rate(Counter({0: 5, 2: 5, 3: 5}), hashes, planes)
    assert rate == pytest.approx(passed / trials, rel=0.05)


def test_items_without_rare_values_and_no_items_never_err() -> None:
    assert false_positive_rate(Counter({0: 7}), 5, 1) == 0
    assert false_positive_rate(Counter(), 5, 1) == 0


@pytest.mark.parametrize("target", [0.2, 0.01, 1e-6])
@pytest.mark.parametrize("items", [{1: 9, 4: 1}, {0: 990, 2: 10}, {0: 3}, {}])
def test_the_width_is_the_fewest_planes_that_meet_the_target_today_and_for_one_value(
    items: dict[int, int], target: float
) -> None:
    width, rate = choose_width(Counter(items), 5, target, 4096)
    assert rate == false_positive_rate(Counter(items), 5, width) <= target
    one = Counter({1: 1})
    assert false_positive_rate(one, 5, width) <= target
    fewer = [false_positive_rate(each, 5, width - 1) for each in (Counter(items), one)]
    assert max(fewer) > target


def test_the_room_for_values_to_come_ends_with_the_planes_there_may_be() -> None:
    assert choose_width(Counter({0: 4}), 5, 1e-6, 30) == (30, 0.0)
    with pytest.raises(ValueError, match="1 rare values on 1 items, at most 1 on one, give"):
        choose_width(Counter({1: 1}), 5, 1e-6, 30)
