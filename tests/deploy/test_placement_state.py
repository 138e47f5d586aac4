import numpy as np
import pytest

from silvershard.deploy.placement_state import (
    NEVER,
    NOWHERE,
    SHARED_HOST,
    SHARED_ZONE,
    Problem,
    State,
)


@pytest.fixture
def problem() -> Problem:
    """Two copies of shard 0 and one of shard 1; hosts 0 and 1 are in one zone, 2 in another."""
    return Problem(
        shards=np.array([0, 0, 1]),
        needs=np.array([[2, 1], [2, 0], [3, 1]]),
        weights=np.array([10, 10, 30]),
        rooms=np.array([[4, 1], [4, 2], [3, 1]]),
        strengths=np.ones(3),
        zones=np.array([0, 0, 1]),
        zones_count=True,
        usable=np.array([[True, True, True], [True, True, True], [False, True, True]]),
        costs=np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]]),
        at=np.array([0, 0, 1]),
    )


def test_what_is_kept_takes_room_and_counts(problem: Problem) -> None:
    state = State(problem, problem.at)
    assert state.is_complete
    assert state.free.tolist() == [[0, 0], [1, 1], [3, 1]]
    assert state.on_host.tolist() == [[2, 0, 0], [0, 1, 0]]
    assert state.in_zone.tolist() == [[2, 0], [1, 0]]
    assert state.load.tolist() == [20, 30, 0]
    assert state.violations() == state.cost() == SHARED_HOST + SHARED_ZONE
    apart = State(problem._replace(zones_count=False), problem.at)
    assert apart.violations() == SHARED_HOST


def test_what_has_no_room_is_left_out_the_largest_first(problem: Problem) -> None:
    state = State(problem, np.array([1, NOWHERE, 1]))
    assert state.at.tolist() == [1, NOWHERE, NOWHERE]
    assert not state.is_complete


def test_a_move_and_its_way_back_change_nothing(problem: Problem) -> None:
    state, same = State(problem, problem.at), State(problem, problem.at)
    state.move(0, 2)
    assert state.at.tolist() == [2, 0, 1]
    assert state.violations() == 0
    assert state.cost() == 1
    state.move(0, NOWHERE)
    state.move(0, 0)
    for name in ("at", "free", "on_host", "in_zone", "load"):
        assert getattr(state, name).tolist() == getattr(same, name).tolist()


def test_steps_cost_what_they_change(problem: Problem) -> None:
    state = State(problem, problem.at)
    steps = state.step_costs()
    before = state.cost()
    for copy in range(3):
        for host in range(3):
            if not problem.usable[copy, host] or state.at[copy] == host:
                assert steps[copy, host] == NEVER
                continue
            other = State(problem, problem.at)
            other.move(copy, host)
            assert steps[copy, host] == other.cost() - before
    only_pairs = state.step_costs(with_places=False)
    assert only_pairs[0, 2] == steps[0, 2] - 1


def test_steps_of_a_copy_without_a_host_cost_what_comes(problem: Problem) -> None:
    state = State(problem, np.array([0, NOWHERE, NOWHERE]))
    assert state.step_costs()[1].tolist() == [SHARED_HOST + SHARED_ZONE, SHARED_ZONE, 0]


def test_room_is_wanted_in_every_unit(problem: Problem) -> None:
    state = State(problem, np.array([NOWHERE, 2, NOWHERE]))
    assert state.fits().tolist() == [[True, True, False], [True, True, False], [True, True, False]]
    no_device = problem._replace(rooms=np.array([[4, 0], [4, 2], [3, 1]]))
    fits = State(no_device, np.full(3, NOWHERE)).fits()
    assert fits[:, 0].tolist() == [False, True, False]


def test_the_move_that_evens_most_is_found_where_it_is_allowed(problem: Problem) -> None:
    everywhere = np.ones(3, dtype=np.bool_)
    state = State(problem, np.array([1, NOWHERE, 2]))
    assert state.evening_move(everywhere, everywhere) is None
    state = State(problem, np.array([0, 0, NOWHERE]))
    assert state.evening_move(everywhere, everywhere) == (0, 1)
    assert state.evening_move(everywhere, np.array([False, False, True])) == (0, 2)
    assert state.evening_move(np.array([False, True, True]), everywhere) is None
