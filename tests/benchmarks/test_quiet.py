from collections.abc import Callable, Iterator

import pytest

from benchmarks.quiet import Guard, Series, interleave, ratio


class Machine:
    """A clock, a count of lost cores and a count of runnable threads that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lost = 0
        self.busy_until = 0.0
        self.calls: list[tuple[str, int]] = []

    def guard(self, **options: float) -> Guard:
        return Guard(
            max_tries=int(options.get("max_tries", 6)),
            max_wait_s=options.get("max_wait_s", 0.25),
            budget_s=options.get("budget_s", 1.0),
            runnable=lambda: 2 if self.now < self.busy_until else 1,
            switches=lambda: self.lost,
            clock=lambda: self.now,
            sleep=self.pass_time,
        )

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def side(
        self, name: str, seconds: Callable[[int], float], loses: Callable[[int], bool]
    ) -> Callable[[int], None]:
        def call(at: int) -> None:
            self.calls.append((name, at))
            self.now += seconds(at)
            self.lost += loses(at)

        return call


@pytest.fixture
def machine() -> Iterator[Machine]:
    return Machine()


def test_sides_are_measured_in_turn_and_no_input_comes_twice(machine: Machine) -> None:
    sides = {name: machine.side(name, lambda _: 0.1, lambda _: False) for name in ("ours", "peer")}
    found = interleave(sides, rounds=3, guard=machine.guard())
    assert machine.calls[4:] == [
        ("ours", 2), ("peer", 2), ("ours", 3), ("peer", 3), ("ours", 4), ("peer", 4),
    ]  # fmt: skip
    assert found["ours"].seconds == pytest.approx([0.1] * 3)
    assert (found["ours"].tries, found["ours"].disturbed) == (3, 0)


def test_a_short_call_is_repeated_within_a_sample(machine: Machine) -> None:
    call = machine.side("ours", lambda _: 0.0005, lambda _: False)
    found = interleave({"ours": call}, rounds=1, guard=machine.guard(), sample_s=0.002)
    assert len(machine.calls) == 2 + 4
    assert found["ours"].seconds == pytest.approx([0.0005])


def test_a_try_that_lost_its_core_is_taken_again_and_does_not_count(machine: Machine) -> None:
    call = machine.side("ours", lambda at: 0.9 if at == 2 else 0.1, lambda at: at == 2)
    series = interleave({"ours": call}, rounds=1, guard=machine.guard())["ours"]
    assert series.seconds == pytest.approx([0.1])
    assert (series.tries, series.disturbed, series.unsettled) == (2, 1, 0)


def test_an_undisturbed_try_counts_even_if_a_disturbed_one_was_shorter(machine: Machine) -> None:
    call = machine.side("ours", lambda at: 0.01 if at == 2 else 0.1, lambda at: at == 2)
    series = interleave({"ours": call}, rounds=1, guard=machine.guard())["ours"]
    assert series.seconds == pytest.approx([0.1])


def test_the_shortest_try_is_kept_and_reported_if_all_were_disturbed(machine: Machine) -> None:
    call = machine.side("ours", lambda at: 0.1 + 0.01 * (at != 4), lambda _: True)
    guard = machine.guard(max_tries=4, budget_s=100.0)
    series = interleave({"ours": call}, rounds=1, guard=guard)["ours"]
    assert series.seconds == pytest.approx([0.1])
    assert (series.tries, series.disturbed, series.unsettled) == (4, 4, 1)


def test_a_sample_begins_when_the_machine_is_quiet(machine: Machine) -> None:
    call = machine.side("ours", lambda _: 0.1, lambda _: False)
    machine.busy_until = 0.3
    series = interleave({"ours": call}, rounds=1, guard=machine.guard())["ours"]
    assert (series.tries, series.disturbed) == (1, 0)
    assert machine.now >= 0.3 + 0.1


def test_a_try_on_a_busy_machine_counts_as_disturbed(machine: Machine) -> None:
    call = machine.side("ours", lambda _: 0.1, lambda _: False)
    machine.busy_until = 1e9
    series = interleave({"ours": call}, rounds=1, guard=machine.guard(budget_s=0.1))["ours"]
    assert (series.tries, series.disturbed, series.unsettled) == (1, 1, 1)


@pytest.mark.parametrize(("budget_s", "rounds"), [(100.0, 50), (2.0, 3), (0.3, 2), (0.1, 1)])
def test_rounds_end_with_the_budget(machine: Machine, budget_s: float, rounds: int) -> None:
    call = machine.side("ours", lambda _: 1.0, lambda _: False)
    found = interleave({"ours": call}, rounds=50, guard=machine.guard(), budget_s=budget_s)
    assert len(found["ours"].seconds) == rounds


def test_a_ratio_is_the_median_over_rounds_of_the_best_mode() -> None:
    ours = Series([1.0, 2.0, 1.0])
    assert ratio(ours, [Series([3.0, 9.0, 8.0]), Series([4.0, 4.0, 9.0])]) == 3.0
