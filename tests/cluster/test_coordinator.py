import asyncio
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from silvershard.cluster.coordinator import Coordinator, CountCache, Query
from silvershard.cluster.outcome import CoverageLost, CoverageTimedOut, Served
from silvershard.cluster.shard_link import LinkState
from silvershard.model.request import Request, RequestError, compile_request
from silvershard.shard.errors import (
    CandidatesExpired,
    DeadlineExceeded,
    GenerationError,
    Overloaded,
    ShardUnavailable,
)

HANG = "hang"


class Bench:
    """A coordinator over fake links, on a loop whose time passes only while everybody waits."""

    def __init__(self, loop: Any, executors: Any, link: Any, replicas: int, **options: Any) -> None:
        self.loop = loop
        self.executors = executors
        self.links = [[link(executor, copy) for copy in range(replicas)] for executor in executors]
        self.coordinator = Coordinator(
            executors[0].spec,
            len(executors),
            lambda shard: self.links[shard],
            clock=loop.time,
            **options,
        )

    @property
    def all_links(self) -> list[Any]:
        return list(itertools.chain.from_iterable(self.links))

    def query(
        self, request: Request, *, min_coverage: float = 0.0, deadline_s: float = 2.0
    ) -> Query:
        now_s = self.loop.time()
        return Query(request, min_coverage, now_s + deadline_s, now_s)

    def ask_all(self, requests: list[Request], **objective: Any) -> list[Any]:
        queries = [self.query(request, **objective) for request in requests]
        return self.loop.run_until_complete(self.coordinator.answer(queries))

    def ask(self, request: Request, **objective: Any) -> Any:
        return self.ask_all([request], **objective)[0]

    def assert_nothing_is_open(self) -> None:
        assert [executor.num_open for executor in self.executors] == [0] * len(self.executors)
        for link in self.all_links:
            assert set(link.opened) <= set(link.released)


@pytest.fixture
def make_bench(virtual: Any, make_executors: Any, fake_link: Any) -> Callable[..., Bench]:
    def make(num_shards: int, replicas: int = 1, **options: Any) -> Bench:
        executors = make_executors(num_shards, clock=virtual.time)
        return Bench(virtual, executors, fake_link, replicas, **options)

    return make


def request(generation: Any, **more: Any) -> Request:
    history = generation.catalogue.item_ids[:6].tolist()
    return Request(**{"features": {"history": history}, "k": 20, **more})


def share(bench: Bench, shards: list[int]) -> float:
    documents = [bench.executors[shard].documents for shard in shards]
    return sum(documents) / bench.executors[0].spec.documents


def assert_is(fate: Any, expected: tuple[list[int], list[float]]) -> None:
    assert isinstance(fate, Served), fate
    assert fate.answer.item_ids.tolist() == expected[0]
    assert fate.answer.scores.tolist() == expected[1]


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_the_answer_is_that_of_one_process_alone_and_in_a_batch(
    make_bench: Any, generation: Any, request_maker: Any, ask_whole: Any, num_shards: int
) -> None:
    bench = make_bench(num_shards)
    requests = request_maker(generation, 40, seed=5)
    expected = [ask_whole(one) for one in requests]
    batch = bench.ask_all(requests)
    alone = [bench.ask(one) for one in requests]
    for fate, again, answer in zip(batch, alone, expected, strict=True):
        assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
        assert_is(again, (answer.item_ids.tolist(), answer.scores.tolist()))
        for one in (fate, again):
            assert one.answer.plan == answer.plan
            assert one.answer.counts == answer.counts
            assert one.answer.exhausted == answer.exhausted
            assert one.answer.warnings == answer.warnings
            assert one.coverage.documents == 1.0
            assert not one.coverage.degraded
    bench.assert_nothing_is_open()


@pytest.mark.parametrize(
    ("op", "error", "reason", "code"),
    [
        ("open", ShardUnavailable(1, "gone"), "SHARD_UNAVAILABLE", "UNAVAILABLE"),
        ("close", ShardUnavailable(1, "gone"), "SHARD_UNAVAILABLE", "UNAVAILABLE"),
        ("fields", ShardUnavailable(1, "gone"), "SHARD_UNAVAILABLE", "UNAVAILABLE"),
        ("count", ShardUnavailable(1, "gone"), "SHARD_UNAVAILABLE", "UNAVAILABLE"),
        ("open", GenerationError(1, 2), "VERSION_MISMATCH_DROPPED", "FAILED_PRECONDITION"),
        ("close", GenerationError(1, 2), "VERSION_MISMATCH_DROPPED", "FAILED_PRECONDITION"),
        ("open", Overloaded("full", 0.1), "SHARD_OVERLOADED", "RESOURCE_EXHAUSTED"),
        ("open", HANG, "SHARD_TIMEOUT", "DEADLINE_EXCEEDED"),
        ("close", HANG, "SHARD_TIMEOUT", "DEADLINE_EXCEEDED"),
        ("fields", HANG, "SHARD_TIMEOUT", "DEADLINE_EXCEEDED"),
        ("count", HANG, "SHARD_TIMEOUT", "DEADLINE_EXCEEDED"),
    ],
)
def test_without_a_lost_shard_the_answer_is_exactly_that_of_the_others(
    make_bench: Any, generation: Any, expect: Any, op: str, error: Any, reason: str, code: str
) -> None:
    bench = make_bench(3)
    wanted = request(generation, filter="year >= 1980", return_fields=("title", "year"), ann_k=30)
    lost = bench.links[1][0]
    lost.faults[op] = [error] * 3
    fate = bench.ask(wanted)
    # The plan is an input of the answer: it was made while the shard was still counted.
    pinned = replace(wanted, plan=str(fate.answer.plan), nprobe=0, ann_k=0, exact=False)
    assert_is(fate, expect([bench.executors[0], bench.executors[2]], pinned))
    coverage = fate.coverage
    assert coverage.documents == share(bench, [0, 2])
    assert (coverage.shards_total, coverage.shards_full, coverage.shards_failed) == (3, 2, 1)
    assert coverage.reasons == (reason,)
    (outcome,) = coverage.shards
    assert (outcome.shard, outcome.replica, outcome.code) == (1, "0", code)
    assert outcome.documents == bench.executors[1].documents
    assert outcome.reasons == (reason,)
    assert len(fate.fields["title"]) == len(fate.answer.item_ids)
    bench.assert_nothing_is_open()


def test_the_cutoffs_are_computed_again_without_a_shard_lost_in_round_two(
    make_bench: Any, generation: Any, expect: Any
) -> None:
    bench = make_bench(2)
    # With so few candidates kept, the cutoffs of both shards together cut deep into each.
    wanted = request(generation, k=30, ann_k=30, nprobe=16)
    bench.links[0][0].faults["close"] = [ShardUnavailable(0, "gone")] * 2
    fate = bench.ask(wanted)
    assert_is(fate, expect([bench.executors[1]], wanted))
    assert len(fate.answer.item_ids) == 30
    assert bench.links[1][0].calls.count("close") == 2
    assert bench.links[1][0].calls.count("open") == 1


def test_shards_may_be_lost_one_after_the_other(
    make_bench: Any, generation: Any, expect: Any
) -> None:
    bench = make_bench(3)
    wanted = request(generation, ann_k=15)
    bench.links[0][0].faults["open"] = [ShardUnavailable(0, "gone")] * 2
    bench.links[2][0].faults["close"] = [None, HANG]
    bench.links[2][0].faults["fields"] = [ShardUnavailable(2, "gone")] * 2
    fate = bench.ask(replace(wanted, return_fields=("title",)))
    assert_is(fate, expect([bench.executors[1]], wanted))
    assert fate.coverage.documents == share(bench, [1])
    assert fate.coverage.shards_failed == 2
    bench.assert_nothing_is_open()


def test_a_shard_that_never_came_up_counts_with_its_documents(
    make_bench: Any, generation: Any, expect: Any
) -> None:
    bench = make_bench(2)
    bench.links[0] = []
    wanted = request(generation)
    fate = bench.ask(wanted)
    assert_is(fate, expect([bench.executors[1]], wanted))
    assert fate.coverage.documents == share(bench, [1])
    assert fate.coverage.shards[0].replica == ""
    assert fate.coverage.shards[0].attempts == 0


def test_below_the_minimum_there_is_an_error_with_the_coverage(
    make_bench: Any, generation: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.DOWN
    minimum = share(bench, [1])
    assert isinstance(bench.ask(request(generation), min_coverage=minimum), Served)
    error = bench.ask(request(generation), min_coverage=minimum + 1e-9)
    assert isinstance(error, CoverageLost)
    assert error.coverage.documents == minimum
    assert error.coverage.reasons == ("SHARD_UNAVAILABLE",)
    assert error.minimum == minimum + 1e-9


@pytest.mark.parametrize("op", ["encode", "open", "close", "fields"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_without_any_shard_there_is_an_error_and_never_an_empty_list(
    make_bench: Any, generation: Any, num_shards: int, op: str
) -> None:
    bench = make_bench(num_shards)
    for link in bench.all_links:
        link.faults[op] = [ShardUnavailable(link.shard, "gone")] * 9
    error = bench.ask(request(generation, return_fields=("title",)), min_coverage=0.0)
    assert isinstance(error, CoverageLost)
    assert error.coverage.documents == 0.0
    assert error.coverage.shards_failed == num_shards
    assert error.coverage.reasons == ("SHARD_UNAVAILABLE",)
    bench.assert_nothing_is_open()


@pytest.mark.parametrize("op", ["encode", "count", "open", "close", "fields"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_hung_shard_never_takes_more_than_the_deadline(
    make_bench: Any, virtual: Any, generation: Any, num_shards: int, op: str
) -> None:
    bench = make_bench(num_shards)
    bench.links[0][0].faults[op] = [HANG] * 9
    wanted = request(generation, filter="year > 1960", return_fields=("title",))
    before_s = virtual.time()
    fate = bench.ask(wanted, min_coverage=0.0, deadline_s=2.0)
    assert virtual.time() - before_s < 2.0
    if num_shards == 2:
        assert fate.coverage.documents == share(bench, [1])
        assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    else:
        assert isinstance(fate, CoverageTimedOut)
        assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    bench.assert_nothing_is_open()


def test_a_straggler_is_waited_for_only_as_long_as_it_is_needed(
    make_bench: Any, virtual: Any, generation: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["open"] = [1.2, 1.2]
    before_s = virtual.time()
    fate = bench.ask(request(generation), min_coverage=0.0, deadline_s=2.0)
    assert fate.coverage.shards_failed == 1
    assert virtual.time() - before_s < 1.1
    fate = bench.ask(request(generation), min_coverage=0.9, deadline_s=2.0)
    assert isinstance(fate, Served)
    assert fate.coverage.documents == 1.0


def test_too_late_for_the_minimum_is_a_deadline_error_with_the_coverage(
    make_bench: Any, generation: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["open"] = [HANG]
    error = bench.ask(request(generation), min_coverage=0.9)
    assert isinstance(error, CoverageTimedOut)
    assert error.coverage.documents == share(bench, [1])


def test_an_ejected_shard_costs_no_time_and_is_no_deadline_error(
    make_bench: Any, virtual: Any, generation: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.EJECTED
    bench.links[0][0].faults = {op: [HANG] * 9 for op in ("encode", "open")}
    before_s = virtual.time()
    fate = bench.ask(request(generation), min_coverage=0.0)
    assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    assert isinstance(bench.ask(request(generation), min_coverage=0.9), CoverageLost)
    assert virtual.time() == before_s
    assert bench.links[0][0].calls == []


@pytest.mark.parametrize("op", ["count", "open", "close", "fields"])
def test_a_second_replica_takes_over_and_nothing_is_missing(
    make_bench: Any, generation: Any, ask_whole: Any, op: str
) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[1][0].faults[op] = [ShardUnavailable(1, "gone")] * 9
    wanted = request(generation, filter="year > 1960", return_fields=("title",))
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0)
    assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert not fate.coverage.degraded
    second = bench.links[1][1].calls
    assert ("open_and_close" in second) == (op == "close")
    bench.assert_nothing_is_open()


def test_a_shard_that_came_back_in_between_runs_both_rounds_again(
    make_bench: Any, generation: Any, ask_whole: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["close"] = [CandidatesExpired("key")]
    wanted = request(generation)
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0)
    assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert bench.links[0][0].calls[-2:] == ["close", "open_and_close"]


def test_the_other_replica_is_asked_while_one_is_suspect(make_bench: Any, generation: Any) -> None:
    bench = make_bench(1, replicas=2)
    bench.links[0][0].state = LinkState.SUSPECT
    assert isinstance(bench.ask(request(generation)), Served)
    assert bench.links[0][0].calls == []
    bench.links[0][1].state = LinkState.DOWN
    assert isinstance(bench.ask(request(generation)), Served)
    assert bench.links[0][0].calls == ["encode", "open", "close"]


def test_one_replica_of_any_shard_encodes_and_they_take_turns(
    make_bench: Any, generation: Any
) -> None:
    bench = make_bench(3)
    for _ in range(6):
        bench.ask(request(generation))
    assert [link.calls.count("encode") for link in bench.all_links] == [2, 2, 2]


@pytest.mark.parametrize("error", [ShardUnavailable(0, "gone"), HANG, GenerationError(1, 2)])
def test_another_shard_encodes_when_one_cannot(
    make_bench: Any, generation: Any, ask_whole: Any, error: Any
) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[0][0].faults["encode"] = [error]
    bench.links[0][1].faults["encode"] = [error]
    wanted = request(generation)
    fate = bench.ask(wanted, min_coverage=0.0)
    assert isinstance(fate, Served)
    if error != HANG:
        answer = ask_whole(wanted)
        assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))


def test_a_filter_is_counted_once_a_second_and_only_while_all_shards_answer(
    make_bench: Any, virtual: Any, generation: Any
) -> None:
    bench = make_bench(2)
    wanted = request(generation, filter="year > 1990")

    def counted() -> int:
        return sum(link.calls.count("count") for link in bench.all_links)

    bench.links[0][0].faults["count"] = [ShardUnavailable(0, "gone")]
    bench.ask(wanted)
    partial = counted()
    bench.ask(wanted)
    assert counted() == partial + 2
    first = bench.ask(replace(wanted, k=7))
    assert counted() == partial + 2
    assert first.answer.counts.eligible is not None
    virtual.now_s += 0.99
    bench.ask(wanted)
    assert counted() == partial + 2
    virtual.now_s += 0.02
    bench.ask(wanted)
    assert counted() == partial + 4
    bench.ask(replace(wanted, filter="year > 1991"))
    assert counted() == partial + 6


def test_the_count_cache_keeps_the_newest_thousand(generation: Any, whole: Any) -> None:
    cache = CountCache(lambda: 0.0)
    compiled = [
        compile_request(Request(filter=f"maker:{maker}"), whole.spec) for maker in range(1025)
    ]
    for count, one in enumerate(compiled):
        cache.put(one, count)
    assert cache.get(compiled[0]) is None
    assert cache.get(compiled[1]) == 1
    assert cache.get(compiled[1024]) == 1024


def test_requests_without_a_filter_or_with_a_pinned_plan_are_not_counted(
    make_bench: Any, generation: Any
) -> None:
    bench = make_bench(2)
    bench.ask(request(generation))
    pinned = bench.ask(request(generation, filter="year > 1990", plan="probe(probes=3,ann_k=17)"))
    assert str(pinned.answer.plan) == "probe(probes=3,ann_k=17)"
    assert all("count" not in link.calls for link in bench.all_links)


def test_a_bad_request_fails_alone(make_bench: Any, generation: Any, ask_whole: Any) -> None:
    bench = make_bench(2)
    good = request(generation)
    bad = [
        request(generation, filter="nobody:1"),
        request(generation, k=0),
        request(generation, features={"unknown": [1]}),
        request(generation, filter="year > $y", params={"y": object()}),
    ]
    fates = bench.ask_all([bad[0], good, bad[1], bad[2], good, bad[3]])
    assert [type(fate) for fate in fates] == [
        RequestError,
        Served,
        RequestError,
        RequestError,
        Served,
        RequestError,
    ]
    assert fates[0].field == "filter"
    assert "position 0" in fates[0].message
    answer = ask_whole(good)
    for at in (1, 4):
        assert_is(fates[at], (answer.item_ids.tolist(), answer.scores.tolist()))


def test_a_bug_in_compiling_one_request_does_not_reach_its_neighbours(
    make_bench: Any, generation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(1)

    def compile_with_bug(one: Request, spec: Any) -> Any:
        if one.k == 13:
            raise ZeroDivisionError("a bug")
        return compile_request(one, spec)

    monkeypatch.setattr("silvershard.cluster.coordinator.compile_request", compile_with_bug)
    fates = bench.ask_all([request(generation, k=13), request(generation)])
    assert [type(fate) for fate in fates] == [ZeroDivisionError, Served]


def test_requests_of_a_batch_have_their_own_minimum(make_bench: Any, generation: Any) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.DOWN
    queries = [
        bench.query(request(generation), min_coverage=minimum) for minimum in (0.0, 1.0, 0.1)
    ]
    fates = bench.loop.run_until_complete(bench.coordinator.answer(queries))
    assert [type(fate) for fate in fates] == [Served, CoverageLost, Served]


def test_a_request_that_waited_too_long_is_not_run(make_bench: Any, generation: Any) -> None:
    bench = make_bench(1)
    queries = [bench.query(request(generation), deadline_s=0.0), bench.query(request(generation))]
    fates = bench.loop.run_until_complete(bench.coordinator.answer(queries))
    assert [type(fate) for fate in fates] == [DeadlineExceeded, Served]
    assert bench.links[0][0].sizes == [1]


def test_a_batch_larger_than_the_maximum_is_cut(
    make_bench: Any, generation: Any, request_maker: Any, ask_whole: Any
) -> None:
    bench = make_bench(2, max_batch=4)
    requests = request_maker(generation, 11, seed=8)
    fates = bench.ask_all(requests)
    assert bench.links[0][0].sizes == [4, 4, 3]
    for fate, one in zip(fates, requests, strict=True):
        answer = ask_whole(one)
        assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))


def test_requests_with_many_candidates_do_not_share_a_message_with_others(
    make_bench: Any, generation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.coordinator._BATCH_BYTES", 12 * 2 * 1000 * 2)
    bench = make_bench(1)
    requests = [request(generation, ann_k=ann_k) for ann_k in (900, 20, 900, 30, 900, 20)]
    fates = bench.ask_all(requests)
    assert sum(bench.links[0][0].sizes) == 6
    assert max(bench.links[0][0].sizes) <= 4
    assert len(bench.links[0][0].sizes) >= 3
    plans = [fate.answer.plan.ann_k for fate in fates]
    assert plans == [900, 20, 900, 30, 900, 20]


@pytest.mark.parametrize("op", ["encode", "count", "open", "close", "fields"])
def test_cancelling_stops_the_work_and_releases_the_shards(
    make_bench: Any, virtual: Any, generation: Any, op: str
) -> None:
    bench = make_bench(2)
    reached = asyncio.Event()

    def hang() -> str:
        reached.set()
        return HANG

    for link in bench.all_links:
        link.faults[op] = [hang]
    wanted = request(generation, filter="year > 1960", return_fields=("title",))

    async def cancel() -> None:
        task = asyncio.ensure_future(bench.coordinator.answer([bench.query(wanted)]))
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        own = asyncio.current_task()
        assert [one for one in asyncio.all_tasks() if one is not own] == []

    before_s = virtual.time()
    virtual.run_until_complete(cancel())
    assert virtual.time() == before_s
    bench.assert_nothing_is_open()


def test_the_times_of_the_stages_are_told(make_bench: Any, virtual: Any, generation: Any) -> None:
    bench = make_bench(2)
    query = bench.query(request(generation, filter="year > 1960"))
    virtual.now_s += 0.25
    bench.links[0][0].faults["open"] = [0.125]
    (fate,) = virtual.run_until_complete(bench.coordinator.answer([query]))
    times = fate.answer.times
    assert set(times) == {
        *("queue", "tower", "filter", "probe", "ann", "refine", "rerank", "value"),
        *("merge", "network", "total"),
    }
    assert times["queue"] == 250_000
    assert times["total"] == 375_000


@pytest.mark.parametrize(("size", "elsewhere"), [(10, False), (1000, True)])
def test_a_large_filter_is_compiled_off_the_event_loop(
    whole: Any, monkeypatch: pytest.MonkeyPatch, size: int, elsewhere: bool
) -> None:
    threads: list[threading.Thread] = []

    def watched(one: Request, spec: Any) -> Any:
        threads.append(threading.current_thread())
        return compile_request(one, spec)

    monkeypatch.setattr("silvershard.cluster.coordinator.compile_request", watched)
    text = " OR ".join(f"maker:{maker}" for maker in range(size))
    coordinator = Coordinator(whole.spec, 1, lambda shard: [])

    async def compile_one() -> Any:
        now_s = asyncio.get_running_loop().time()
        return await coordinator._compile(Query(Request(filter=text), 0.0, now_s + 60, now_s))

    assert asyncio.run(compile_one()).filter_key
    assert (threads[0] is not threading.main_thread()) == elsewhere
