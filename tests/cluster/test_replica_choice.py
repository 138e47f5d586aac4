import gc
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from silvershard.cluster.config import HealthSection
from silvershard.cluster.replica_choice import (
    Cause,
    Latencies,
    ReplicaChoice,
    Standing,
    kind_of,
)
from silvershard.cluster.shard_link import LinkState


class Replica:
    def __init__(self, replica: int) -> None:
        self.shard, self.replica = 0, replica
        self.state = LinkState.UP
        self.latency_s = 0.01


class Scene:
    """Calls to replicas that take as long as they say."""

    def __init__(self, clock: Any, choice: ReplicaChoice, num_replicas: int) -> None:
        self.clock = clock
        self.choice = choice
        self.replicas: list[Any] = [Replica(at) for at in range(num_replicas)]
        self.latencies = choice.latencies(0, "open")

    def pick(self, **options: Any) -> Any:
        return self.choice.pick(self.replicas, self.replicas, **options)

    def answer(self, link: Any, times: int = 1) -> None:
        for _ in range(times):
            call = self.choice.begin(link, self.latencies)
            self.clock.now_s += link.latency_s
            self.choice.answered(call)

    def answer_at_once(self, link: Any, times: int) -> None:
        """Let many calls end at this moment."""
        calls = [self.choice.begin(link, self.latencies) for _ in range(times)]
        for call in calls:
            call.started_s -= link.latency_s
            self.choice.answered(call)

    def fail(self, link: Any) -> None:
        self.choice.failed(self.choice.begin(link, self.latencies))

    def leave(self, link: Any, waited_s: float) -> None:
        call = self.choice.begin(link, self.latencies)
        self.clock.now_s += waited_s
        self.choice.gave_up(call)

    def learn(self) -> None:
        for _ in range(20):
            for link in self.replicas:
                self.answer(link)


@pytest.fixture
def make_scene(virtual: Any, make_choice: Any) -> Callable[..., Scene]:
    return lambda num_replicas, **options: Scene(virtual, make_choice(**options), num_replicas)


def shares(scene: Scene, picks: int = 1000) -> list[float]:
    found = Counter(scene.pick().replica for _ in range(picks))
    return [found[link.replica] / picks for link in scene.replicas]


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * len(values) + 0.499999) - 1]


def test_the_delay_is_the_quantile_of_the_newest_latencies() -> None:
    latencies = Latencies(0.95)
    values = random.Random(3).choices([at / 1000 for at in range(5, 500)], k=700)
    for count, value in enumerate(values, 1):
        latencies.add(value)
        newest = values[max(count - 256, 0) : count]
        if count >= 20:
            assert latencies.delay_s == quantile(newest, 0.95)
            assert latencies.typical_s == sorted(newest)[len(newest) // 2]
        else:
            assert (latencies.delay_s, latencies.typical_s) == (0.1, None)


def test_the_delay_is_never_below_two_milliseconds() -> None:
    latencies = Latencies(0.95)
    for _ in range(20):
        latencies.add(0.0001)
    assert latencies.delay_s == 0.002


def test_each_kind_of_call_to_each_shard_has_latencies_of_its_own(make_choice: Any) -> None:
    choice = make_choice()
    one = choice.latencies(0, "open")
    assert choice.latencies(0, "open") is one
    assert choice.latencies(1, "open") is not one
    assert choice.latencies(0, "close") is not one


def test_calls_on_similar_amounts_are_of_one_kind() -> None:
    assert kind_of("open", 1) == kind_of("open", 3)
    assert kind_of("open", 1) != kind_of("open", 4)
    assert kind_of("open", 16, 200) == kind_of("open", 63, 130)
    assert len({kind_of("open", amount) for amount in range(1, 65)}) == 4
    assert kind_of("open", 8) != kind_of("close", 8)


def test_equal_replicas_share_the_calls(make_scene: Any) -> None:
    scene = make_scene(3, rng=random.Random(1))
    scene.learn()
    assert all(0.27 < share < 0.4 for share in shares(scene))


def test_the_less_loaded_of_two_is_asked(make_scene: Any) -> None:
    scene = make_scene(2, rng=random.Random(1))
    for _ in range(3):
        scene.choice.begin(scene.replicas[0], scene.latencies)
    assert shares(scene) == [0.0, 1.0]
    for _ in range(3):
        scene.choice.begin(scene.replicas[1], scene.latencies)
    assert all(0.4 < share < 0.6 for share in shares(scene))


def test_a_slow_replica_is_weighted_down_and_found_well_again_later(make_scene: Any) -> None:
    scene = make_scene(2, rng=random.Random(1))
    scene.learn()
    slow, fast = scene.replicas
    slow.latency_s = 0.03
    scene.answer(slow, 10)
    # Two replicas: none of them may be ejected, so that it is asked for less, but asked.
    assert scene.choice.standing(slow) is Standing.WELL
    assert shares(scene) == [0.0, 1.0]
    for _ in range(2):
        scene.choice.begin(fast, scene.latencies)
    assert shares(scene)[0] > 0
    for _ in range(2):
        scene.choice.abandoned(scene.choice.begin(slow, scene.latencies))
    scene.clock.now_s += 20
    assert scene.pick() is slow


def test_an_outlier_is_ejected_as_far_as_the_cap_allows(make_scene: Any) -> None:
    for num_replicas, most in ((2, 0), (3, 1), (5, 1), (6, 2)):
        scene = make_scene(num_replicas, rng=random.Random(1))
        scene.learn()
        for link in scene.replicas[:3]:
            link.latency_s = 0.2
            scene.answer_at_once(link, 20)
            scene.pick()
        away = [link for link in scene.replicas if scene.choice.standing(link) is Standing.AVOIDED]
        assert away == scene.replicas[:most]
        assert scene.choice.set_aside[Cause.SLOWNESS] == most


def test_an_outlier_comes_back_when_a_call_shows_that_it_is_fast(make_scene: Any) -> None:
    scene = make_scene(3, rng=random.Random(1))
    scene.learn()
    slow = scene.replicas[0]
    slow.latency_s = 0.2
    scene.answer(slow, 20)
    assert scene.pick() is not slow
    backoffs = []
    for _ in range(3):
        waited_s = 0.0
        while scene.pick() is not slow:
            scene.clock.now_s += 0.01
            waited_s += 0.01
        backoffs.append(waited_s)
        scene.answer(slow)
    assert backoffs == pytest.approx([0.1, 0.2, 0.4], abs=0.02)
    scene.clock.now_s += 0.8
    slow.latency_s = 0.01
    scene.answer(slow)
    assert scene.choice.standing(slow) is Standing.WELL
    assert shares(scene)[0] > 0.2


def test_a_replica_that_fails_is_set_aside_twice_as_long_each_time(make_scene: Any) -> None:
    scene = make_scene(2)
    bad, good = scene.replicas
    for backoff_s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0):
        # One call at a time tries it, and the others do not wait for that.
        assert scene.pick() is bad
        trial = scene.choice.begin(bad, scene.latencies)
        if backoff_s > 0.1:
            assert scene.pick() is good
        scene.choice.failed(trial)
        scene.clock.now_s += 0.99 * backoff_s
        assert scene.pick() is good
        scene.clock.now_s += 0.02 * backoff_s
    scene.answer(bad)
    scene.fail(bad)
    scene.clock.now_s += 0.11
    assert scene.choice.standing(bad) is Standing.WELL


def test_calls_that_fail_together_count_once(make_scene: Any) -> None:
    scene = make_scene(2)
    bad = scene.replicas[0]
    calls = [scene.choice.begin(bad, scene.latencies) for _ in range(8)]
    for call in calls:
        scene.clock.now_s += 0.001
        scene.choice.failed(call)
    assert scene.choice.set_aside == {Cause.FAILURE: 1}
    scene.clock.now_s += 0.1
    assert scene.choice.standing(bad) is Standing.WELL


def test_a_refusal_is_a_sign_of_life(make_scene: Any) -> None:
    scene = make_scene(2)
    call = scene.choice.begin(scene.replicas[0], scene.latencies)
    scene.choice.refused(call)
    assert scene.choice.standing(scene.replicas[0]) is Standing.WELL
    assert not scene.choice.set_aside


def test_three_calls_left_unanswered_in_a_row_set_a_replica_aside(make_scene: Any) -> None:
    scene = make_scene(2)
    scene.learn()
    bad = scene.replicas[0]
    for _ in range(5):
        scene.leave(bad, 0.02)
        scene.leave(bad, 0.02)
        scene.answer(bad)
    assert not scene.choice.set_aside
    for _ in range(3):
        scene.leave(bad, 0.02)
    assert scene.choice.set_aside == {Cause.SILENCE: 1}
    assert scene.pick() is scene.replicas[1]


def test_a_call_left_early_says_nothing(make_scene: Any) -> None:
    scene = make_scene(2)
    scene.learn()
    for _ in range(9):
        scene.leave(scene.replicas[0], 0.005)
    assert not scene.choice.set_aside
    # Neither does it pass for a fast one.
    assert scene.latencies.typical_s == pytest.approx(0.01)


def test_long_silence_is_told_from_one_slow_call(make_scene: Any) -> None:
    scene = make_scene(2)
    scene.learn()
    one = scene.choice.begin(scene.replicas[0], scene.latencies)
    scene.clock.now_s += 0.029
    assert not scene.choice.is_silent(one)
    other = scene.choice.begin(scene.replicas[0], scene.latencies)
    scene.clock.now_s += 0.002
    assert scene.choice.is_silent(one)
    scene.choice.answered(other)
    assert not scene.choice.is_silent(one)
    scene.clock.now_s += 0.031
    assert scene.choice.is_silent(one)
    scene.choice.gave_up(one)
    assert scene.choice.set_aside == {Cause.SILENCE: 1}


def test_states_decide_before_everything_else(make_scene: Any) -> None:
    scene = make_scene(4)
    down, hung, suspect, well = scene.replicas
    down.state, hung.state, suspect.state = LinkState.DOWN, LinkState.EJECTED, LinkState.SUSPECT
    for _ in range(50):
        scene.choice.begin(well, scene.latencies)
    assert scene.pick() is well
    assert scene.pick(first=suspect) is well
    assert scene.choice.pick(scene.replicas, [down, hung, suspect]) is suspect
    assert scene.choice.pick(scene.replicas, [down, hung]) is hung
    assert scene.choice.pick(scene.replicas, [down]) is None
    # Those that were too slow for the same request come after others.
    suspect.state = LinkState.UP
    assert scene.pick(outrun=[suspect]) is well
    assert scene.pick(first=suspect) is suspect
    assert scene.pick(is_fresh=lambda link: link is well) is well


@pytest.mark.parametrize(
    ("num_replicas", "cap", "ejected"),
    [(1, 0.34, 0), (2, 0.34, 0), (3, 0.34, 1), (6, 0.34, 2), (4, 1.0, 4), (3, 0.0, 0)],
)
def test_no_more_than_the_share_is_ejected_and_of_the_others_the_least_bad_is_asked(
    make_scene: Any, num_replicas: int, cap: float, ejected: int
) -> None:
    scene = make_scene(num_replicas, health=HealthSection(max_ejected=cap))
    for at, link in enumerate(scene.replicas):
        for _ in range(num_replicas - at):
            scene.clock.now_s += 20
            scene.fail(link)
        scene.answer(link)
    for at, link in enumerate(scene.replicas):
        for _ in range(num_replicas - at):
            scene.clock.now_s += 0.001
            scene.fail(link)
            scene.clock.now_s = max(scene.clock.now_s, scene.choice._of(link).aside_until_s)
    for link in scene.replicas:
        link.state = LinkState.EJECTED
    left = list(scene.replicas)
    asked = []
    while (link := scene.choice.pick(scene.replicas, left)) is not None:
        asked.append(link.replica)
        left.remove(link)
    # The later ones have failed less often.
    assert asked == list(range(num_replicas))[::-1][: num_replicas - ejected]


def test_replicas_that_are_down_count_among_the_ejected(make_scene: Any) -> None:
    scene = make_scene(3)
    down, hung, well = scene.replicas
    hung.state = LinkState.EJECTED
    assert scene.choice.pick(scene.replicas, [hung]) is None
    down.state = LinkState.DOWN
    assert scene.choice.pick(scene.replicas, [hung]) is hung
    assert scene.pick() is well


def test_a_hedge_does_not_try_out_whether_a_replica_is_well_again(make_scene: Any) -> None:
    scene = make_scene(2)
    bad, good = scene.replicas
    scene.fail(bad)
    scene.clock.now_s += 0.11
    assert scene.pick(proven=True) is good
    assert scene.pick() is bad


def test_what_is_known_of_a_replica_goes_with_it(make_scene: Any) -> None:
    scene = make_scene(2)
    scene.learn()
    assert len(scene.choice._known) == 2
    scene.replicas.pop()
    gc.collect()
    assert len(scene.choice._known) == 1
