import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from silvershard.cluster.config import HedgingSection, RetriesSection
from silvershard.cluster.consistency import ANY, Consistency, UpdateToken
from silvershard.cluster.fanout import Fanout, Wait
from silvershard.cluster.freshness import ANYTHING, Seen
from silvershard.cluster.shard_link import LinkState
from silvershard.shard.errors import (
    DeadlineExceeded,
    Overloaded,
    ReplicaStale,
    ShardUnavailable,
)

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
def make(virtual: Any, make_choice: Any) -> Make:
    def make(
        *shards: list[Replica],
        documents: list[int] | None = None,
        minimum: float = 0.0,
        choice: Any = None,
    ) -> Fanout:
        return Fanout(
            documents=documents or [10] * len(shards),
            replicas=lambda shard: shards[shard],  # type: ignore[arg-type, return-value]
            choice=choice or make_choice(),
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
                kind="open",
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
    assert fanout.choose(0, tried=[replicas[3]]).replica == 2
    replicas[2].state = LinkState.DOWN
    with pytest.raises(DeadlineExceeded):
        fanout.choose(0, tried=[replicas[3]])
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
    replicas = [Replica(0, 0, Overloaded("full", 0.1)), Replica(0, 1)]
    replicas[1].state = LinkState.DOWN
    fanout = make(replicas)
    ask(fanout)
    assert fanout.lost[0].code == "RESOURCE_EXHAUSTED"


def test_without_hedging_a_hung_replica_is_not_replaced_because_its_time_is_gone(
    make: Make, ask: Any, virtual: Any, make_choice: Any
) -> None:
    replicas = [Replica(0, 0, HANG), Replica(0, 1)]
    choice = make_choice(hedging=HedgingSection(enabled=False))
    fanout = make(replicas, [Replica(1, 0)], choice=choice)
    before_s = virtual.time()
    assert ask(fanout) == {1: (1, 0)}
    assert virtual.time() - before_s == 4.0
    assert fanout.timed_out
    assert fanout.lost[0].latency_us == 4_000_000
    assert (fanout.lost[0].attempts, fanout.lost[0].hedged) == (1, False)
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


# ---- slow, hung and ejected replicas


def test_a_hung_replica_is_hedged_and_this_batch_prefers_the_other_from_then_on(
    make: Make, ask: Any, virtual: Any
) -> None:
    replicas = [Replica(0, 0, HANG), Replica(0, 1)]
    fanout = make(replicas, [Replica(1, 0)], minimum=1.0)
    before_s = virtual.time()
    assert ask(fanout) == {0: (0, 1), 1: (1, 0)}
    # Nothing is known of the shard yet.
    assert round(virtual.time() - before_s, 6) == 0.1
    assert not fanout.timed_out
    assert fanout.choose(0) is replicas[1]
    part = fanout.fork(1.0)
    assert part.choose(0) is replicas[1]
    part.outrun.clear()
    assert fanout.outrun == {replicas[0]}
    assert asyncio.all_tasks(virtual) == set()


def test_whoever_was_outrun_is_let_go(make: Make, virtual: Any) -> None:
    replicas = [Replica(0, 0, HANG), Replica(0, 1)]
    let_go: list[Any] = []
    fanout = make(replicas)
    virtual.run_until_complete(
        fanout.ask(
            [0],
            lambda link, remaining_s: link.answer(remaining_s),  # type: ignore[attr-defined]
            WAIT,
            kind="open",
            let_go=let_go.append,
        )
    )
    assert let_go == [replicas[0]]


def test_a_shard_that_was_hedged_in_vain_says_so(make: Make, ask: Any) -> None:
    fanout = make([Replica(0, 0, HANG), Replica(0, 1, HANG)], [Replica(1, 0)])
    assert ask(fanout) == {1: (1, 0)}
    lost = fanout.lost[0]
    assert (lost.replica, lost.attempts, lost.hedged) == ("1", 2, True)
    assert (lost.code, lost.latency_us) == ("DEADLINE_EXCEEDED", 4_000_000)


def test_a_hedge_goes_to_another_replica_that_is_as_fresh_as_demanded(make: Make, ask: Any) -> None:
    fanout = make([Replica(0, 0, HANG), Replica(0, 1), Replica(0, 0)])
    fanout.consistency = Consistency((TOKEN,))
    first, second, same = fanout.replicas(0)
    second.seen, same.seen = seen(4), seen(9)  # type: ignore[misc]
    assert fanout.choose(0, [first], hedge=False) is same
    # Another incarnation of the same replica is no other replica, and the other one is behind.
    with pytest.raises(ShardUnavailable):
        fanout.choose(0, [first], hedge=True)
    assert ask(fanout) == {}
    assert (fanout.lost[0].attempts, fanout.lost[0].hedged) == (1, False)
    fanout.hung.clear()
    second.seen, same.state = seen(5), LinkState.DOWN  # type: ignore[misc]
    assert fanout.choose(0, [first], hedge=True) is second


def test_of_ejected_replicas_the_least_bad_is_asked_and_no_query_fails_for_it_at_once(
    make: Make, ask: Any
) -> None:
    replicas = [Replica(0, 0), Replica(0, 1)]
    for link in replicas:
        link.state = LinkState.EJECTED
    fanout = make(replicas, minimum=1.0)
    worse = fanout.choice.begin(replicas[0], fanout.choice.latencies(0, "open"))  # type: ignore[arg-type]
    fanout.choice.failed(worse)
    assert ask(fanout) == {0: (0, 1)}
    assert [one.asked for one in replicas] == [0, 1]


def test_an_ejected_replica_is_waited_for_as_long_as_it_is_needed(
    make: Make, ask: Any, virtual: Any
) -> None:
    for minimum, spent_s in ((0.5, 0.1), (0.9, 4.0)):
        hung = Replica(0, 0, HANG)
        hung.state = LinkState.EJECTED
        fanout = make([hung], [Replica(1, 0)], minimum=minimum)
        before_s = virtual.time()
        assert ask(fanout) == {1: (1, 0)}
        assert round(virtual.time() - before_s, 6) == spent_s
        assert fanout.lost[0].reasons == ("SHARD_TIMEOUT",)


def test_one_of_any_shard_answers_and_another_shard_repairs(make: Make, virtual: Any) -> None:
    def ask_any(fanout: Fanout, order: list[int]) -> Any:
        return virtual.run_until_complete(
            fanout.ask_any(
                order,
                lambda link, remaining_s: link.answer(remaining_s),  # type: ignore[attr-defined]
                0.25,
                kind="encode",
                max_attempts=3,
            )
        )

    gone = ShardUnavailable(0, "gone")
    shards = [[Replica(0, 0), Replica(0, 1)], [Replica(1, 0)]]
    reply, errors = ask_any(make(*shards), [1, 0])
    assert (reply.value, errors) == ((1, 0), {})
    shards[0][0].faults = [gone]
    reply, errors = ask_any(make(*shards), [0, 1])
    assert (reply.value, errors) == ((1, 0), {0: gone})
    # A hung one is hedged, on another shard first.
    shards[0][0].faults = [HANG]
    reply, errors = ask_any(make(*shards), [0, 1])
    assert (reply.value, errors) == ((1, 0), {})
    shards[1][0].state = LinkState.SUSPECT
    assert ask_any(make(*shards), [1, 0])[0].value == (0, 0)
    for link in (shards[0][0], shards[1][0]):
        link.faults = [HANG]
    shards[0][1].state = LinkState.DOWN
    shards[1][0].state = LinkState.UP
    before_s = virtual.time()
    fanout = make(*shards)
    reply, errors = ask_any(fanout, [0, 1])
    assert reply is None
    assert {shard: type(error) for shard, error in errors.items()} == {
        0: DeadlineExceeded,
        1: DeadlineExceeded,
    }
    assert virtual.time() - before_s == 2.0
    assert fanout.timed_out
    assert asyncio.all_tasks(virtual) == set()
    assert ask_any(make([], []), [0, 1]) == (None, {})


class Machine(Replica):
    """A replica with latencies of its own that can hang, be slow or die."""

    def __init__(self, shard: int, replica: int, loop: Any) -> None:
        super().__init__(shard, replica)
        self.loop = loop
        self.rng = random.Random(f"{shard}/{replica}")
        self.slowness = 1.0
        self.hangs = False
        self.waiting: dict[asyncio.Future[None], Any] = {}

    async def serve(self, services: int) -> None:
        self.asked += 1
        if self.state is LinkState.DOWN:
            raise ShardUnavailable(self.shard, "no connection")
        future: asyncio.Future[None] = self.loop.create_future()
        spent_s = 0.005 * self.slowness * math.exp(self.rng.gauss(0.0, 0.4)) * services
        timer = self.loop.call_later(spent_s, lambda: future.done() or future.set_result(None))
        self.waiting[future] = timer
        if self.hangs:
            timer.cancel()
        try:
            await future
        finally:
            timer.cancel()
            del self.waiting[future]

    def hang(self) -> None:
        """Stop, as pings notice by and by."""
        self.hangs = True
        for timer in self.waiting.values():
            timer.cancel()
        self.loop.call_later(0.2, setattr, self, "state", LinkState.SUSPECT)
        self.loop.call_later(0.5, setattr, self, "state", LinkState.EJECTED)

    def die(self) -> None:
        """Break the connection, and every call on it."""
        self.state = LinkState.DOWN
        for future in self.waiting:
            future.set_exception(ShardUnavailable(self.shard, "connection reset"))


class Result(NamedTuple):
    began_s: float
    took_s: float
    complete: bool


class Load:
    """Requests of two rounds at constant load, each a fan-out to all shards."""

    def __init__(self, loop: Any, choice: Any, num_shards: int, num_replicas: int) -> None:
        self.loop = loop
        self.choice = choice
        self.machines = [
            [Machine(shard, copy, loop) for copy in range(num_replicas)]
            for shard in range(num_shards)
        ]

    async def request(self, began_s: float) -> Result:
        shards = list(range(len(self.machines)))
        holders: dict[int, Any] = {}
        fanout = Fanout(
            documents=[10] * len(shards),
            replicas=lambda shard: self.machines[shard],  # type: ignore[arg-type, return-value]
            choice=self.choice,
            clock=self.loop.time,
            deadline_s=began_s + 2.0,
            min_coverage=0.9,
        )

        async def ask_one(link: Any, _: float) -> None:
            # A replica that takes over in round two runs both.
            await link.serve(1 if holders.get(link.shard, link) is link else 2)

        for op in ("open", "close"):
            found = await fanout.ask(shards, ask_one, WAIT, kind=op, first=holders)
            holders |= {shard: reply.link for shard, reply in found.items()}
        return Result(began_s, self.loop.time() - began_s, not fanout.lost)

    def run(self, rate: int, seconds: float, faults: dict[float, Callable[[], None]]) -> list[Any]:
        async def generate() -> list[Result]:
            start_s = self.loop.time()
            for after_s, fault in faults.items():
                self.loop.call_later(after_s, fault)
            tasks = []
            for at in range(int(rate * seconds)):
                await asyncio.sleep(start_s + at / rate - self.loop.time())
                tasks.append(asyncio.ensure_future(self.request(start_s + at / rate)))
            return [
                one._replace(began_s=one.began_s - start_s) for one in await asyncio.gather(*tasks)
            ]

        results: list[Result] = self.loop.run_until_complete(generate())
        assert asyncio.all_tasks(self.loop) == set()
        assert not any(link.waiting for replicas in self.machines for link in replicas)
        return results


def p99(results: list[Result], from_s: float, to_s: float) -> float:
    took = sorted(one.took_s for one in results if from_s <= one.began_s < to_s)
    return took[math.ceil(0.99 * len(took)) - 1]


@pytest.fixture
def make_load(virtual: Any, make_choice: Any) -> Callable[..., Load]:
    def make(num_shards: int = 4, num_replicas: int = 2, **options: Any) -> Load:
        choice = make_choice(rng=random.Random(5), **options)
        return Load(virtual, choice, num_shards, num_replicas)

    return make


@pytest.mark.parametrize("rate", [40, 250])
def test_a_replica_that_hangs_triples_the_slowest_answers_at_most_and_for_a_second(
    make_load: Any, rate: int
) -> None:
    load = make_load()
    results = load.run(rate, 6.0, {3.0: load.machines[0][0].hang})
    assert all(one.complete for one in results)
    normal_s = p99(results, 1.0, 3.0)
    assert p99(results, 3.0, 4.0) <= 3 * normal_s
    assert max(one.took_s for one in results if one.began_s >= 2.9) <= 4 * normal_s
    assert p99(results, 4.0, 6.0) <= 1.2 * normal_s


def test_without_hedging_a_replica_that_hangs_costs_requests_their_time(make_load: Any) -> None:
    load = make_load(hedging=HedgingSection(enabled=False))
    results = load.run(250, 4.0, {3.0: load.machines[0][0].hang})
    assert max(one.took_s for one in results) >= 1.0


@pytest.mark.parametrize("rate", [40, 250, 1000])
def test_a_host_that_is_killed_fails_no_request(make_load: Any, rate: int) -> None:
    load = make_load()

    def kill() -> None:
        for replicas in load.machines:
            replicas[0].die()

    results = load.run(rate, 4.0, {2.0: kill})
    assert all(one.complete for one in results)
    counts = load.choice.extra.counts
    assert counts.retries_suppressed == 0
    assert p99(results, 2.0, 3.0) <= 2 * p99(results, 1.0, 2.0)
    # Of two replicas one is left, and so nobody to hedge with.
    assert p99(results, 3.0, 4.0) <= 1.5 * p99(results, 1.0, 2.0)


def test_a_budget_without_a_burst_would_fail_what_was_on_its_way_to_a_killed_host(
    make_load: Any,
) -> None:
    load = make_load(retry_burst=1)

    def kill() -> None:
        for replicas in load.machines:
            replicas[0].die()

    results = load.run(1000, 1.5, {1.0: kill})
    assert not all(one.complete for one in results)


def test_a_slow_replica_gets_fewer_requests_and_is_not_ejected_beyond_the_cap(
    make_load: Any,
) -> None:
    load = make_load(num_shards=1)
    slow, well = load.machines[0]
    slow.slowness = 6.0
    results = load.run(250, 4.0, {})
    assert all(one.complete for one in results)
    assert 0 < slow.asked < 0.25 * well.asked
    # It is asked as often as the other again, once it is well.
    slow.slowness = 1.0
    load.run(250, 8.0, {})
    before = slow.asked, well.asked
    load.run(250, 4.0, {})
    assert slow.asked - before[0] > 0.5 * (well.asked - before[1])


def test_the_budgets_hold_over_ten_thousand_calls(
    virtual: Any, make: Make, make_choice: Any
) -> None:
    rng = random.Random(11)
    choice = make_choice(retry_burst=8, retries=RetriesSection(budget=0.1))
    gone = ShardUnavailable(0, "gone")

    def fault() -> Any:
        # Far more calls fail and are slow than the budgets are made for.
        return gone if rng.random() < 0.3 else 0.02 if rng.random() < 0.3 else 0.005

    replicas = [Replica(0, copy) for copy in range(2)]
    counts = choice.extra.counts

    async def ask_often() -> None:
        for calls in range(1, 10_001):
            for link in replicas:
                link.faults = [fault(), fault()]
            fanout = make(replicas, choice=choice)
            await fanout.ask([0], lambda link, left: link.answer(left), WAIT, kind="open")  # type: ignore[attr-defined]
            hedges = counts.hedges_won + counts.hedges_lost - counts.hedges_free
            assert counts.calls == calls
            assert hedges <= 16 + 0.05 * calls
            assert counts.retries <= 8 + 0.1 * calls
            assert sum(link.asked for link in replicas) <= (
                calls + hedges + counts.hedges_free + counts.retries
            )

    virtual.run_until_complete(ask_often())
    # They are used up, too.
    hedges = counts.hedges_won + counts.hedges_lost - counts.hedges_free
    assert hedges >= 0.04 * 10_000
    assert counts.retries >= 0.09 * 10_000
    assert counts.retries_suppressed > 0
    assert counts.hedges_suppressed > 0
