import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest

from silvershard.cluster.config import HedgingSection, RetriesSection
from silvershard.cluster.races import Race, Races
from silvershard.cluster.shard_link import LinkState
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    Overloaded,
    RetrievalError,
    ShardUnavailable,
)

HANG = "hang"
LOSSES = (ShardUnavailable, CandidatesExpired, DeadlineExceeded, Overloaded)
GONE = ShardUnavailable(0, "gone")


class Replica:
    """A replica that answers with its index."""

    def __init__(self, replica: int, *faults: Any) -> None:
        self.shard, self.replica = 0, replica
        self.state = LinkState.UP
        self.faults = list(faults)
        self.asked = 0
        self.cancelled = 0

    async def answer(self) -> int:
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else 0.008
        if isinstance(fault, Exception):
            raise fault
        try:
            await (asyncio.Event().wait() if fault == HANG else asyncio.sleep(fault))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.replica


class Scene:
    """One race at a time over replicas that are asked in order."""

    def __init__(self, loop: Any, choice: Any, replicas: list[Any]) -> None:
        self.loop = loop
        self.choice = choice
        self.counts = choice.extra.counts
        self.replicas = replicas
        self.hung: list[Any] = []
        self.outrun: list[Any] = []
        self.latencies = choice.latencies(0, "open")
        for _ in range(20):
            self.latencies.add(0.01)

    def choose(self, tried: Collection[Any], *, hedge: bool) -> Any:
        for link in self.replicas:
            if link not in tried:
                return link
        raise ShardUnavailable(0, "none is left")

    def run(self, until_s: float = 2.0, max_attempts: int = 2) -> tuple[Any, float]:
        """Return the race when it is over, and how long that took."""

        async def scene() -> Any:
            started_s = self.loop.time()
            races: Races[int] = Races(
                self.choice,
                self.loop.time,
                lambda link: link.answer(),
                LOSSES,
                on_hang=self.hung.append,
                on_outrun=self.outrun.append,
            )
            race: Race[int] = Race(
                0, self.latencies, self.choose, len(self.replicas) > 1, max_attempts, started_s
            )
            over = []
            try:
                races.start(race)
                while races.open and self.loop.time() < started_s + until_s - 1e-6:
                    await races.advance(started_s + until_s)
                over = races.take_over()
                races.give_up()
            finally:
                await races.close()
            assert [one for one in asyncio.all_tasks() if one is not asyncio.current_task()] == []
            assert all(self.choice._of(link).in_flight == 0 for link in self.replicas)
            assert over in ([race], []), over
            return race

        began_s = self.loop.time()
        race = self.loop.run_until_complete(scene())
        return race, round(self.loop.time() - began_s, 4)


@pytest.fixture
def make_scene(virtual: Any, make_choice: Any) -> Callable[..., Scene]:
    return lambda *replicas, **options: Scene(virtual, make_choice(**options), list(replicas))


def test_an_answer_in_time_is_that_of_the_first_replica_alone(make_scene: Any) -> None:
    scene = make_scene(Replica(0), Replica(1))
    race, took_s = scene.run()
    assert (race.winner[1], took_s, race.hedged) == (0, 0.008, False)
    assert scene.replicas[1].asked == 0
    assert scene.counts.calls == 1


def test_a_slow_call_is_hedged_and_the_first_answer_counts(make_scene: Any) -> None:
    scene = make_scene(Replica(0, HANG), Replica(1, 0.003))
    race, took_s = scene.run()
    assert (race.winner[1], took_s, race.hedged, len(race.tried)) == (1, 0.013, True, 2)
    assert scene.outrun == [scene.replicas[0]]
    assert scene.replicas[0].cancelled == 1
    assert (scene.counts.hedges_won, scene.counts.hedges_lost) == (1, 0)
    # The hedge may come second as well.
    scene = make_scene(Replica(0, 0.012), Replica(1, HANG))
    race, took_s = scene.run()
    assert (race.winner[1], took_s) == (0, 0.012)
    assert scene.outrun == [scene.replicas[1]]
    assert scene.replicas[1].cancelled == 1
    assert (scene.counts.hedges_won, scene.counts.hedges_lost) == (0, 1)


def test_there_is_one_hedge_and_no_more(make_scene: Any) -> None:
    scene = make_scene(*(Replica(at, HANG) for at in range(4)))
    race, took_s = scene.run(until_s=1.5)
    assert race.winner is None
    assert took_s == 1.5
    assert [one.asked for one in scene.replicas] == [1, 1, 0, 0]
    assert scene.hung == scene.replicas[:2]
    assert scene.counts.hedges_lost == 1


def test_answers_at_the_same_moment_leave_nothing_behind(make_scene: Any) -> None:
    scene = make_scene(Replica(0, 0.025), Replica(1, 0.015))
    race, _ = scene.run()
    assert race.winner is not None
    assert len(scene.outrun) == 1
    scene = make_scene(Replica(0, 0.025), Replica(1, GONE))
    assert scene.run()[0].winner[1] == 0


def test_a_failure_is_repaired_by_another_replica_at_once(make_scene: Any) -> None:
    for error in (GONE, CandidatesExpired("key"), Overloaded("full", 0.1)):
        scene = make_scene(Replica(0, error), Replica(1), Replica(2))
        race, took_s = scene.run()
        assert (race.winner[1], took_s, race.hedged) == (1, 0.008, False)
        assert scene.counts.retries == 1


def test_there_are_no_more_attempts_than_allowed(make_scene: Any) -> None:
    for most in (1, 2, 3):
        scene = make_scene(*(Replica(at, GONE) for at in range(5)))
        race, _ = scene.run(max_attempts=most)
        assert [one.asked for one in scene.replicas] == [1] * most + [0] * (5 - most)
        assert race.failure is GONE


def test_time_that_ran_out_is_never_tried_again(make_scene: Any) -> None:
    late = DeadlineExceeded("late")
    scene = make_scene(Replica(0, late), Replica(1))
    race, _ = scene.run()
    assert race.failure is late
    assert scene.replicas[1].asked == 0
    assert scene.hung == [scene.replicas[0]]


def test_without_budget_a_failure_stays_one(make_scene: Any) -> None:
    scene = make_scene(
        Replica(0, GONE, GONE), Replica(1), retry_burst=1, retries=RetriesSection(budget=0.0)
    )
    assert scene.run()[0].winner[1] == 1
    assert scene.run()[0].failure is GONE
    assert (scene.counts.retries, scene.counts.retries_suppressed) == (1, 1)
    assert scene.replicas[1].asked == 1


def test_a_failure_waits_for_the_other_replica_that_was_asked(make_scene: Any) -> None:
    class Late(Replica):
        async def answer(self) -> int:
            self.asked += 1
            await asyncio.sleep(0.012)
            raise GONE

    scene = make_scene(Late(0), Replica(1, 0.02), Replica(2))
    race, took_s = scene.run()
    assert (race.winner[1], took_s) == (1, 0.03)
    assert scene.replicas[2].asked == 0
    assert scene.counts.hedges_won == 1
    # Both fail: that was two attempts.
    scene = make_scene(Late(0), Late(1), Replica(2))
    race, took_s = scene.run()
    assert (race.failure, took_s) == (GONE, 0.022)
    assert scene.replicas[2].asked == 0


def test_a_retry_may_be_hedged_like_a_first_call(make_scene: Any) -> None:
    scene = make_scene(Replica(0, GONE), Replica(1, HANG), Replica(2))
    race, took_s = scene.run()
    assert (race.winner[1], took_s, race.hedged, len(race.tried)) == (2, 0.018, True, 3)


def test_without_budget_only_a_replica_that_shows_no_life_is_hedged(make_scene: Any) -> None:
    scene = make_scene(Replica(0), Replica(1))
    while scene.choice.extra.may_hedge(suspect=False, silent=False):
        pass
    scene.replicas[0].faults = [0.025]
    race, took_s = scene.run()
    assert (race.winner[1], took_s, race.hedged) == (0, 0.025, False)
    assert scene.counts.hedges_suppressed == 1
    # It is silent for three times as long as nearly all calls take.
    scene.replicas[0].faults = [HANG]
    race, took_s = scene.run()
    assert (race.winner[1], race.hedged) == (1, True)
    assert took_s == 0.038
    assert (scene.counts.hedges_free, scene.counts.hedges_suppressed) == (1, 2)


def test_a_replica_that_turns_suspect_is_hedged_soon(make_scene: Any, virtual: Any) -> None:
    scene = make_scene(Replica(0, HANG), Replica(1), is_hot=lambda: True)

    def suspect() -> None:
        scene.replicas[0].state = LinkState.SUSPECT

    virtual.call_later(0.2, suspect)
    race, took_s = scene.run()
    assert race.winner[1] == 1
    assert 0.2 < took_s <= 0.27


def test_nobody_is_hedged_by_a_replica_in_a_worse_state(make_scene: Any) -> None:
    for state in (LinkState.SUSPECT, LinkState.EJECTED, LinkState.DOWN):
        scene = make_scene(Replica(0, 0.5), Replica(1))
        scene.replicas[1].state = state
        race, took_s = scene.run()
        assert (race.winner[1], took_s) == (0, 0.5)
        assert scene.replicas[1].asked == 0
        assert scene.counts.hedges_suppressed == 0


def test_hedging_can_be_switched_off(make_scene: Any) -> None:
    scene = make_scene(Replica(0, 0.5), Replica(1), hedging=HedgingSection(enabled=False))
    assert scene.run()[1] == 0.5
    assert scene.replicas[1].asked == 0


def test_nobody_to_ask_is_a_loss_without_an_attempt(make_scene: Any) -> None:
    race, took_s = make_scene().run()
    assert isinstance(race.failure, ShardUnavailable)
    assert (race.replica, race.tried, took_s) == ("", [], 0.0)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RetrievalError("a bug")])
def test_an_error_that_is_no_loss_ends_everything_and_leaves_nothing(
    make_scene: Any, virtual: Any, error: Exception
) -> None:
    scene = make_scene(Replica(0, HANG), Replica(1, error))
    with pytest.raises(type(error)):
        scene.run()
    assert asyncio.all_tasks(virtual) == set()
    assert all(scene.choice._of(link).in_flight == 0 for link in scene.replicas)
    assert scene.replicas[0].cancelled == 1


def test_whoever_leaves_teaches_nothing(make_scene: Any, virtual: Any) -> None:
    scene = make_scene(Replica(0, HANG), Replica(1, HANG))

    async def leave() -> None:
        races: Races[int] = Races(
            scene.choice,
            virtual.time,
            lambda link: link.answer(),
            LOSSES,
            on_hang=scene.hung.append,
            on_outrun=scene.outrun.append,
        )
        races.start(Race(0, scene.latencies, scene.choose, True, 2, virtual.time()))
        await races.advance(virtual.time() + 0.05)
        await races.close()

    virtual.run_until_complete(leave())
    assert (scene.hung, scene.outrun) == ([], [])
    assert scene.latencies.typical_s == 0.01
    assert not scene.choice.set_aside


def test_many_waits_share_a_timer_which_is_set_anew_for_an_earlier_moment(
    make_scene: Any, virtual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(*(Replica(at, 0.01 * (at + 1)) for at in range(5)))
    woken_s: list[float] = []
    set_for_s: list[float] = []
    call_later = virtual.call_later

    def noted(delay_s: float, callback: Any, *arguments: Any, **more: Any) -> Any:
        if getattr(callback, "__func__", None) is Races._ring:
            set_for_s.append(round(virtual.time() + delay_s - 1000.0, 6))
        return call_later(delay_s, callback, *arguments, **more)

    monkeypatch.setattr(virtual, "call_later", noted)

    async def ask() -> None:
        races: Races[int] = Races(
            scene.choice,
            virtual.time,
            lambda link: link.answer(),
            LOSSES,
            on_hang=scene.hung.append,
            on_outrun=scene.outrun.append,
        )
        for link in scene.replicas:
            races.start(
                Race(0, scene.latencies, lambda _, hedge, own=link: own, False, 1, virtual.time())
            )
        limits_s = iter([2.0, 1.0, 3.0, 3.0, 3.0])
        while races.open:
            await races.advance(1000.0 + next(limits_s))
            woken_s.append(round(virtual.time() - 1000.0, 6))
        await races.close()

    virtual.run_until_complete(ask())
    assert woken_s == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert set_for_s == [2.0, 1.0]


def test_a_timer_of_an_earlier_wait_ends_no_call(make_scene: Any, virtual: Any) -> None:
    scene = make_scene(Replica(0, 0.5))

    async def ask() -> list[float]:
        races: Races[int] = Races(
            scene.choice,
            virtual.time,
            lambda link: link.answer(),
            LOSSES,
            on_hang=scene.hung.append,
            on_outrun=scene.outrun.append,
        )
        races.start(Race(0, scene.latencies, scene.choose, False, 1, virtual.time()))
        looks_s = []
        for limit_s in (0.1, 2.0):
            while races.open and virtual.time() < 1000.0 + limit_s:
                await races.advance(1000.0 + limit_s)
                looks_s.append(round(virtual.time() - 1000.0, 6))
        (race,) = races.take_over()
        assert race.winner == (scene.replicas[0], 0)
        await races.close()
        return looks_s

    assert virtual.run_until_complete(ask()) == [0.1, 0.5]
    assert scene.hung == []
