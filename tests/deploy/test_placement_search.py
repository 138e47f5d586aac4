import numpy as np
import pytest
from numpy.typing import NDArray

from silvershard.deploy import placement_search
from silvershard.deploy.placement_search import search, spread_load
from silvershard.deploy.placement_state import NOWHERE, SHARED_HOST, STAYS, Problem


def ints(*values: object) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def problem_of(needs: list[int], rooms: list[int], at: list[int] | None = None) -> Problem:
    """Every copy is of a shard of its own, and all hosts are alike but for their room."""
    copies, hosts = len(needs), len(rooms)
    home = ints(*(at or [NOWHERE] * copies))
    costs = (home[:, None] != NOWHERE) & (home[:, None] != np.arange(hosts)[None, :])
    return Problem(
        shards=np.arange(copies),
        needs=ints(*needs)[:, None],
        weights=np.ones(copies, dtype=np.int64),
        rooms=ints(*rooms)[:, None],
        strengths=np.ones(hosts),
        zones=np.arange(hosts),
        zones_count=False,
        usable=np.ones((copies, hosts), dtype=np.bool_),
        costs=costs.astype(np.int64),
        at=home,
    )


def test_a_copy_in_the_way_is_moved_along_a_chain_of_hosts() -> None:
    problem = problem_of([1, 1, 1], [1, 1, 1], [0, 1, NOWHERE])
    # The new copy may only stand on host 0, whose copy may only go to host 1, and so on.
    usable = np.array([[True, True, False], [False, True, True], [True, False, False]])
    found = search(problem._replace(usable=usable))
    assert found.at.tolist() == [1, 2, 0]
    assert found.is_proven


def test_what_does_not_fit_any_more_is_left_out_and_the_rest_stays() -> None:
    found = search(problem_of([1, 1, 1], [1, 1, 1], [0, 0, 1]))
    assert sorted(found.at.tolist()) == [0, 1, 2]
    assert found.at[2] == 1
    assert 0 in found.at[:2]


def test_as_many_as_have_room_are_placed() -> None:
    found = search(problem_of([2, 2, 2], [2, 3]))
    assert sorted(found.at.tolist()) == [NOWHERE, 0, 1]
    assert found.is_proven


def test_a_cycle_of_copies_that_all_gain_is_followed() -> None:
    problem = problem_of([1, 1, 1], [1, 1, 1], [0, 1, 2])
    costs = np.full((3, 3), 1, dtype=np.int64)
    costs[[0, 1, 2], [1, 2, 0]] = 0
    found = search(problem._replace(costs=costs + np.eye(3, dtype=np.int64)))
    assert found.at.tolist() == [1, 2, 0]


def test_copies_of_a_shard_exchange_places_across_zones_too() -> None:
    problem = problem_of([1, 1], [1, 1], [1, 0])
    problem = problem._replace(
        shards=ints(0, 0),
        zones=ints(0, 1),
        zones_count=True,
        costs=1 - np.eye(2, dtype=np.int64),
    )
    assert search(problem).at.tolist() == [0, 1]


def test_unequal_needs_are_packed_even_where_the_largest_first_does_not_do() -> None:
    # 9 = 4 + 3 + 2 and 7 = 5 + 2; with 5 + 4 on the first host a 2 has no room.
    needs = [2, 4, 3, 2, 5]
    found = search(problem_of(needs, [9, 7]))
    assert found.is_proven
    assert np.bincount(found.at, weights=needs).tolist() == [9, 7]


def test_a_search_that_was_cut_off_does_not_claim_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [5, 5, 5, 4, 4, 4, 3, 3, 3]
    assert search(problem_of(needs, [10, 10, 10, 6])).is_proven
    monkeypatch.setattr(placement_search, "_STEPS", 3)
    found = search(problem_of(needs, [10, 10, 10, 6]))
    assert NOWHERE in found.at
    assert not found.is_proven


def test_copies_that_differ_less_than_the_room_of_any_host_are_counted() -> None:
    counted, uniform = placement_search._counted(problem_of([10, 11, 10, 11], [35, 20, 9, 99]))
    assert not uniform
    assert counted.needs.flatten().tolist() == [10, 11, 10, 11]
    counted, uniform = placement_search._counted(problem_of([10, 11, 10, 11], [35, 22, 9, 99]))
    assert uniform
    assert counted.needs.flatten().tolist() == [1, 1, 1, 1]
    assert counted.rooms.flatten().tolist() == [3, 2, 0, 4]
    with_devices = problem_of([10, 11], [30, 30])
    rooms = np.column_stack([with_devices.rooms, ints(1, 0)])
    needs = np.column_stack([with_devices.needs, ints(1, 1)])
    counted, uniform = placement_search._counted(with_devices._replace(rooms=rooms, needs=needs))
    assert uniform
    assert counted.rooms.flatten().tolist() == [1, 0]
    assert not placement_search._counted(
        with_devices._replace(rooms=rooms, needs=needs * [1, 0] + [[0, 0], [0, 1]])
    )[1]


def test_a_copy_leaves_the_host_that_it_shall_leave_before_it_avoids_to_share() -> None:
    problem = problem_of([1, 1], [2, 2], [0, 1])
    costs = problem.costs.copy()
    costs[:, 1] = STAYS
    found = search(problem._replace(shards=ints(0, 0), costs=costs))
    assert found.at.tolist() == [0, 0]
    assert STAYS > SHARED_HOST


def test_load_goes_to_hosts_that_may_receive_from_hosts_that_may_give() -> None:
    problem = problem_of([1] * 6, [6, 6, 6])
    at = ints(0, 0, 0, 0, 1, 1)
    all_hosts = np.ones(3, dtype=np.bool_)
    assert np.bincount(spread_load(problem, at, all_hosts, all_hosts)).tolist() == [2, 2, 2]
    only_last = np.array([False, False, True])
    assert np.bincount(spread_load(problem, at, all_hosts, only_last)).tolist() == [2, 2, 2]
    not_first = np.array([False, True, True])
    assert np.bincount(spread_load(problem, at, not_first, only_last)).tolist() == [4, 1, 1]
    nobody = np.zeros(3, dtype=np.bool_)
    assert spread_load(problem, at, all_hosts, nobody).tolist() == at.tolist()
