import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from silvershard.cluster.consistency import ANY, Consistency, UpdateToken
from silvershard.cluster.fanout import Fanout, Wait
from silvershard.cluster.freshness import ANYTHING, Seen
from silvershard.cluster.shard_link import LinkState
from silvershard.shard.errors import DeadlineExceeded, ReplicaStale, ShardUnavailable

HANG = "hang"
WAIT = Wait(soft=0.5, hard=0.875)


class Replica:
    """A replica that answers with its own name."""

    def __init__(self, shard: int, replica: int, *faults: Any) -> None:
        self.shard, self.replica = shard, replica
        self.state = LinkState.UP
        self.seen: Seen | None = None
        self.faults = list(faults)
        self.asked = 0

    async def answer(self, remaining_s: float) -> tuple[int, int]:
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == HANG:
            await asyncio.Event().wait()
        if fault:
            await asyncio.sleep(fault)
        return self.shard, self.replica


Make = Callable[..., Fanout]


@pytest.fixture
def make(virtual: Any) -> Make:
    def make(
        *shards: list[Replica], documents: list[int] | None = None, minimum: float = 0.0
    ) -> Fanout:
        return Fanout(
            documents=documents or [10] * len(shards),
            replicas=lambda shard: shards[shard],  # type: ignore[arg-type, return-value]
            clock=virtual.time,
            deadline_s=virtual.time() + 8.0,
            min_coverage=minimum,
        )

    return make


@pytest.fixture
def ask(virtual: Any) -> Callable[..., dict[int, tuple[int, int]]]:
    def ask(fanout: Fanout, shards: list[int] | None = None) -> dict[int, tuple[int, int]]:
        replies = virtual.run_until_complete(
            fanout.ask(
                fanout.alive if shards is None else shards,
                lambda link, remaining_s: link.answer(remaining_s),
                WAIT,
            )
        )
        return {shard: reply.value for shard, reply in replies.items()}

    return ask


def test_every_shard_is_asked_once(make: Make, ask: Any) -> None:
    first, second = Replica(0, 0), Replica(1, 0)
    fanout = make([first], [second])
    assert ask(fanout) == {0: (0, 0), 1: (1, 0)}
    assert (first.asked, second.asked) == (1, 1)
    assert fanout.coverage().documents == 1.0


def test_the_first_replica_that_is_up_is_chosen(make: Make) -> None:
    replicas = [Replica(0, copy) for copy in range(4)]
    fanout = make(replicas)
    assert fanout.choose(0).replica == 0
    assert fanout.choose(0, first=replicas[2]).replica == 2
    replicas[0].state = LinkState.DOWN
    replicas[1].state = LinkState.SUSPECT
    replicas[2].state = LinkState.EJECTED
    assert fanout.choose(0).replica == 3
    assert fanout.choose(0, first=replicas[2]).replica == 3
    assert fanout.choose(0, tried=[replicas[3]]).replica == 1
    fanout.hung.add(replicas[1])
    with pytest.raises(DeadlineExceeded):
        fanout.choose(0, tried=[replicas[3]])
    replicas[2].state = LinkState.DOWN
    fanout.hung.clear()
    with pytest.raises(ShardUnavailable):
        fanout.choose(0, tried=[replicas[3], replicas[1]])


def test_a_failing_replica_is_replaced_once(make: Make, ask: Any) -> None:
    error = ShardUnavailable(0, "gone")
    replicas = [Replica(0, 0, error), Replica(0, 1, error), Replica(0, 2)]
    fanout = make(replicas)
    assert ask(fanout) == {}
    assert [one.asked for one in replicas] == [1, 1, 0]
    assert fanout.lost[0].attempts == 2
    assert fanout.lost[0].replica == "1"
    assert ask(make([Replica(0, 0, error), Replica(0, 1)])) == {0: (0, 1)}


def test_the_error_of_the_replica_counts_and_not_that_none_is_left(make: Make, ask: Any) -> None:
    replicas = [Replica(0, 0, ShardUnavailable(0, "gone")), Replica(0, 1)]
    replicas[1].state = LinkState.EJECTED
    fanout = make(replicas)
    ask(fanout)
    assert fanout.lost[0].code == "UNAVAILABLE"


def test_a_hung_replica_is_not_replaced_because_its_time_is_gone(
    make: Make, ask: Any, virtual: Any
) -> None:
    replicas = [Replica(0, 0, HANG), Replica(0, 1)]
    fanout = make(replicas, [Replica(1, 0)])
    before_s = virtual.time()
    assert ask(fanout) == {1: (1, 0)}
    assert virtual.time() - before_s == 4.0
    assert fanout.timed_out
    assert fanout.lost[0].latency_us == 4_000_000
    # The next round of the same batch asks the other one.
    fanout.lost.clear()
    assert ask(fanout)[0] == (0, 1)


def test_stragglers_are_waited_for_until_enough_documents_answered(
    make: Make, ask: Any, virtual: Any
) -> None:
    def shards() -> list[list[Replica]]:
        return [[Replica(0, 0)], [Replica(1, 0, 5.0)], [Replica(2, 0, 6.0)]]

    documents = [50, 30, 20]
    for minimum, answered, spent_s in [
        (0.5, {0}, 4.0),
        (0.8, {0, 1}, 5.0),
        (0.9, {0, 1, 2}, 6.0),
    ]:
        before_s = virtual.time()
        fanout = make(*shards(), documents=documents, minimum=minimum)
        assert set(ask(fanout)) == answered
        assert virtual.time() - before_s == spent_s


def test_nothing_is_waited_for_beyond_the_hard_limit(make: Make, ask: Any, virtual: Any) -> None:
    before_s = virtual.time()
    assert ask(make([Replica(0, 0, 7.5)], minimum=1.0)) == {}
    assert virtual.time() - before_s == 7.0


def test_shards_that_are_not_asked_again_count_as_answered(
    make: Make, ask: Any, virtual: Any
) -> None:
    fanout = make([Replica(0, 0)], [Replica(1, 0, HANG)], documents=[90, 10], minimum=0.9)
    before_s = virtual.time()
    assert ask(fanout, [1]) == {}
    assert virtual.time() - before_s == 4.0


def test_with_no_time_left_nobody_is_waited_for(make: Make, ask: Any, virtual: Any) -> None:
    fanout = make([Replica(0, 0)])
    virtual.now_s += 9
    before_s = virtual.time()
    assert ask(fanout) == {}
    assert fanout.lost[0].reasons == ("SHARD_TIMEOUT",)
    assert virtual.time() == before_s


def test_coverage_counts_documents_and_not_shards(make: Make) -> None:
    fanout = make([], [], [], documents=[70, 20, 10])
    fanout.lose(0, ShardUnavailable(0, "gone"), fanout.clock())
    coverage = fanout.coverage()
    assert coverage.documents == 0.3
    assert (coverage.shards_full, coverage.shards_failed) == (2, 1)
    assert fanout.alive == [1, 2]


def test_an_empty_catalogue_is_covered_by_whoever_answers(make: Make) -> None:
    fanout = make([], [], documents=[0, 0])
    assert fanout.coverage_of([0]) == 1.0
    assert fanout.coverage_of([]) == 0.0


def test_a_lost_shard_without_documents_leaves_nothing_out(make: Make) -> None:
    fanout = make([], [], documents=[0, 5])
    fanout.lose(0, ShardUnavailable(0, "gone"), fanout.clock())
    assert fanout.coverage().documents == 1.0
    assert fanout.coverage().degraded


def test_a_fork_knows_the_losses_so_far_and_keeps_its_own(make: Make) -> None:
    fanout = make([], [])
    fanout.lose(0, ShardUnavailable(0, "gone"), fanout.clock())
    fork = fanout.fork(0.7)
    assert fork.alive == [1]
    assert fork.min_coverage == 0.7
    fork.lose(1, ShardUnavailable(1, "gone"), fanout.clock())
    assert fanout.alive == [1]


def test_an_error_that_is_no_loss_is_not_swallowed(make: Make, ask: Any, virtual: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(make([Replica(0, 0, ZeroDivisionError())], [Replica(1, 0, HANG)]))
    assert asyncio.all_tasks(virtual) == set()


TOKEN = UpdateToken(9, 0, 5)


def seen(position: int, staleness_s: float = 0.0) -> Seen:
    return Seen(9, (position,), staleness_s, 10)


def test_a_replica_that_was_fresh_enough_is_preferred(make: Make) -> None:
    replicas = [Replica(0, copy) for copy in range(3)]
    fanout = make(replicas)
    fanout.consistency = Consistency((TOKEN,))
    # A replica that has not said anything may be as fresh as any.
    assert fanout.choose(0).replica == 0
    replicas[0].seen, replicas[1].seen, replicas[2].seen = seen(4), seen(5), seen(6)
    assert fanout.choose(0).replica == 1
    assert fanout.choose(0, first=replicas[0]).replica == 0
    replicas[1].state = LinkState.SUSPECT
    assert fanout.choose(0).replica == 2
    fanout.consistency = ANY
    assert fanout.choose(0).replica == 0
    fanout.lagging_s = 3.0
    replicas[0].seen = seen(4, 3.5)
    assert fanout.choose(0).replica == 2


def test_a_demand_leaves_time_for_another_replica(make: Make) -> None:
    first, second = Replica(0, 0), Replica(0, 1)
    fanout = make([first, second])
    assert fanout.demand(first, 8.0) == ANYTHING  # type: ignore[arg-type]
    fanout.consistency = Consistency((TOKEN,))
    both = fanout.demand(first, 8.0)  # type: ignore[arg-type]
    second.state = LinkState.DOWN
    alone = fanout.demand(first, 8.0)  # type: ignore[arg-type]
    assert both.consistency == alone.consistency == fanout.consistency
    assert alone.wait_s == 2 * both.wait_s
    # Below the soft limit of a round, at which it would be a timeout.
    assert alone.wait_s < 8.0 * WAIT.soft


def test_a_stale_replica_is_replaced_and_named_where_there_is_no_other(
    make: Make, ask: Any
) -> None:
    behind = ReplicaStale(0, "behind")
    assert ask(make([Replica(0, 0, behind), Replica(0, 1)])) == {0: (0, 1)}
    fanout = make([Replica(0, 0, behind)], [Replica(1, 0)])
    assert ask(fanout) == {1: (1, 0)}
    assert fanout.lost[0].reasons == ("STALE_REPLICA_DROPPED",)
    assert not fanout.timed_out


def test_a_part_of_a_batch_counts_documents_for_itself(make: Make) -> None:
    fanout = make([Replica(0, 0)], [Replica(1, 0)])
    part = fanout.fork(0.5)
    part.documents[0] = 90
    assert fanout.documents == [10, 10]
    assert part.coverage_of([0]) == 0.9
