import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from silvershard.cluster.admission import Dropped
from silvershard.cluster.codec import Refusal
from silvershard.cluster.config import DegradeFloors, DegradeSection
from silvershard.cluster.consistency import ANY, Consistency, Freshness, UpdateToken
from silvershard.cluster.coordinator import Coordinator, Query
from silvershard.cluster.degrade import Ladder
from silvershard.cluster.degrade_policy import DegradeMode, DegradePolicy
from silvershard.cluster.freshness import Seen
from silvershard.cluster.outcome import CoverageLost
from silvershard.cluster.rounds import Served
from silvershard.cluster.shard_link import LinkState
from silvershard.model.compiled_request import RequestCompiler
from silvershard.model.request import Request, RequestError
from silvershard.shard.errors import (
    DeadlineExceeded,
    GenerationError,
    ReplicaStale,
    ShardUnavailable,
)

HANG = "hang"


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
        bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
        bench.assert_is(again, (answer.item_ids.tolist(), answer.scores.tolist()))
        for one in (fate, again):
            assert one.answer.plan == answer.plan
            assert one.answer.counts == answer.counts
            assert one.answer.exhausted == answer.exhausted
            assert one.answer.warnings == answer.warnings
            assert one.coverage.documents == 1.0
            assert not one.coverage.degraded
    bench.assert_nothing_is_open()


def test_one_replica_of_any_shard_encodes_and_they_take_turns(make_bench: Any) -> None:
    bench = make_bench(3)
    for _ in range(6):
        bench.ask(bench.request())
    assert [link.calls.count("encode") for link in bench.all_links] == [2, 2, 2]


@pytest.mark.parametrize("error", [ShardUnavailable(0, "gone"), HANG, GenerationError(1, 2)])
def test_another_shard_encodes_when_one_cannot(make_bench: Any, ask_whole: Any, error: Any) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[0][0].faults["encode"] = [error]
    bench.links[0][1].faults["encode"] = [error]
    wanted = bench.request()
    fate = bench.ask(wanted, min_coverage=0.0)
    assert isinstance(fate, Served)
    if error != HANG:
        answer = ask_whole(wanted)
        bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))


def test_an_encoder_that_hangs_is_hedged_by_another_shard(
    make_bench: Any, ask_whole: Any, virtual: Any
) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[0][0].faults["encode"] = [HANG]
    wanted = bench.request()
    answer = ask_whole(wanted)
    before_s = virtual.time()
    fate = bench.ask(wanted, min_coverage=1.0)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert virtual.time() - before_s == pytest.approx(0.1)
    assert fate.answer.times["tower"] == pytest.approx(100_000, abs=2)
    assert bench.links[1][0].calls[0] == "encode"
    assert asyncio.all_tasks(virtual) == set()


def test_a_count_that_was_hedged_is_complete_and_remembered(make_bench: Any) -> None:
    bench = make_bench(2, replicas=2)
    for link in bench.links[0]:
        link.faults["count"] = [HANG] if link.replica else []
    wanted = bench.request(filter="year > 1960")
    first = bench.ask(wanted)
    again = bench.ask(wanted)
    assert first.answer.counts.eligible == again.answer.counts.eligible
    assert [link.calls.count("count") for link in bench.all_links] == [1, 1, 1, 0]
    # The one that encoded was busy when the count was sent.
    assert bench.links[0][1].faults["count"] == []


def test_without_a_choice_a_coordinator_makes_its_own(
    make_executors: Any, fake_link: Any, virtual: Any
) -> None:
    executors = make_executors(1, clock=virtual.time)
    links = [fake_link(executors[0], copy) for copy in range(2)]
    links[0].faults["open"] = links[1].faults["open"] = [ShardUnavailable(0, "gone")] * 2
    coordinator = Coordinator(executors[0].spec, 1, lambda shard: links, clock=virtual.time)
    for expected in (CoverageLost, Served):
        query = Query(Request(k=3), 0.0, virtual.time() + 1, virtual.time())
        (fate,) = virtual.run_until_complete(coordinator.answer([query]))
        assert isinstance(fate, expected)


def test_a_request_whose_embedding_fell_back_says_so_and_its_neighbours_do_not(
    make_bench: Any,
) -> None:
    bench = make_bench(2)
    for executor in bench.executors:
        encode = executor.encode
        executor.encode = lambda users, encode=encode: encode(users)._replace(
            fallback=tuple(not one.get("history") for one in users)
        )
    known, unknown = bench.request(), bench.request(features={})
    fates = bench.ask_all([known, unknown, known])
    assert [one.coverage.reasons for one in fates] == [(), ("EMBEDDING_FALLBACK",), ()]
    assert [one.coverage.documents for one in fates] == [1.0] * 3
    lost = [ShardUnavailable(1, "gone")]
    bench.links[1][0].faults["open"] = lost
    (fate,) = bench.ask_all([unknown])
    assert fate.coverage.reasons == ("EMBEDDING_FALLBACK", "SHARD_UNAVAILABLE")


def test_a_filter_is_counted_once_a_second_and_only_while_all_shards_answer(
    make_bench: Any, virtual: Any
) -> None:
    bench = make_bench(2)
    wanted = bench.request(filter="year > 1990")

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


def test_requests_without_a_filter_or_with_a_pinned_plan_are_not_counted(make_bench: Any) -> None:
    bench = make_bench(2)
    bench.ask(bench.request())
    pinned = bench.ask(bench.request(filter="year > 1990", plan="probe(probes=3,ann_k=17)"))
    assert str(pinned.answer.plan) == "probe(probes=3,ann_k=17)"
    assert all("count" not in link.calls for link in bench.all_links)


def test_a_bad_request_fails_alone(make_bench: Any, ask_whole: Any) -> None:
    bench = make_bench(2)
    good = bench.request()
    bad = [
        bench.request(filter="nobody:1"),
        bench.request(k=0),
        bench.request(features={"unknown": [1]}),
        bench.request(filter="year > $y", params={"y": object()}),
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
        bench.assert_is(fates[at], (answer.item_ids.tolist(), answer.scores.tolist()))


def test_a_bug_in_compiling_one_request_does_not_reach_its_neighbours(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(1)

    real = RequestCompiler.compile

    def compile_with_bug(self: RequestCompiler, one: Request) -> Any:
        if one.k == 13:
            raise ZeroDivisionError("a bug")
        return real(self, one)

    monkeypatch.setattr(
        "silvershard.model.compiled_request.RequestCompiler.compile", compile_with_bug
    )
    fates = bench.ask_all([bench.request(k=13), bench.request()])
    assert [type(fate) for fate in fates] == [ZeroDivisionError, Served]


def test_requests_of_a_batch_have_their_own_minimum(make_bench: Any) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.DOWN
    queries = [bench.query(bench.request(), min_coverage=minimum) for minimum in (0.0, 1.0, 0.1)]
    fates = bench.loop.run_until_complete(bench.coordinator.answer(queries))
    assert [type(fate) for fate in fates] == [Served, CoverageLost, Served]


def test_a_request_that_waited_too_long_is_not_run(make_bench: Any) -> None:
    bench = make_bench(1)
    queries = [bench.query(bench.request(), deadline_s=0.0), bench.query(bench.request())]
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
        bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))


def test_requests_with_many_candidates_do_not_share_a_message_with_others(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.coordinator._BATCH_BYTES", 12 * 2 * 1000 * 2)
    bench = make_bench(1)
    requests = [bench.request(ann_k=ann_k) for ann_k in (900, 20, 900, 30, 900, 20)]
    fates = bench.ask_all(requests)
    assert sum(bench.links[0][0].sizes) == 6
    assert max(bench.links[0][0].sizes) <= 4
    assert len(bench.links[0][0].sizes) >= 3
    plans = [fate.answer.plan.ann_k for fate in fates]
    assert plans == [900, 20, 900, 30, 900, 20]


@pytest.mark.parametrize("op", ["encode", "count", "open", "close", "fields"])
def test_cancelling_stops_the_work_and_releases_the_shards(
    make_bench: Any, virtual: Any, op: str
) -> None:
    bench = make_bench(2)
    reached = asyncio.Event()

    def hang() -> str:
        reached.set()
        return HANG

    for link in bench.all_links:
        link.faults[op] = [hang]
    wanted = bench.request(filter="year > 1960", return_fields=("title",))

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


def test_the_times_of_the_stages_are_told(make_bench: Any, virtual: Any) -> None:
    bench = make_bench(2)
    query = bench.query(bench.request(filter="year > 1960"))
    virtual.now_s += 0.25
    bench.links[0][0].faults["open"] = [0.125]
    (fate,) = virtual.run_until_complete(bench.coordinator.answer([query]))
    times = fate.answer.times
    assert set(times) == {
        *("queue", "tower", "filter", "ann", "refine", "rerank", "value"),
        *("merge", "network", "total"),
    }
    assert times["queue"] == 250_000
    assert times["total"] == 375_000


@pytest.mark.parametrize(("size", "elsewhere"), [(10, False), (1000, True)])
def test_a_large_filter_is_compiled_off_the_event_loop(
    whole: Any, monkeypatch: pytest.MonkeyPatch, size: int, elsewhere: bool
) -> None:
    threads: list[threading.Thread] = []

    real = RequestCompiler.compile

    def watched(self: RequestCompiler, one: Request) -> Any:
        threads.append(threading.current_thread())
        return real(self, one)

    monkeypatch.setattr("silvershard.model.compiled_request.RequestCompiler.compile", watched)
    text = " OR ".join(f"maker:{maker}" for maker in range(size))
    coordinator = Coordinator(whole.spec, 1, lambda shard: [])

    async def compile_one() -> Any:
        now_s = asyncio.get_running_loop().time()
        return await coordinator._compile(Query(Request(filter=text), 0.0, now_s + 60, now_s))

    assert asyncio.run(compile_one()).filter_key
    assert (threads[0] is not threading.main_thread()) == elsewhere


# ---- freshness

TOKENS = Consistency((UpdateToken(9, 0, 5),))


def see(bench: Any, *cuts: tuple[int, ...], staleness_s: float = 0.0) -> None:
    for link, cut in zip(bench.all_links, cuts, strict=True):
        link.seen = Seen(9, cut, staleness_s, link.executor.documents)


def test_an_answer_tells_the_cut_and_the_staleness_of_its_slowest_shard(make_bench: Any) -> None:
    bench = make_bench(3)
    see(bench, (7, 1), (6, 3), (9, 2))
    bench.links[1][0].seen = bench.links[1][0].seen._replace(staleness_s=0.5)
    fate = bench.ask(bench.request())
    assert fate.freshness == Freshness((UpdateToken(9, 0, 6), UpdateToken(9, 1, 1)), 0.5)
    # The slowest of those that answered, and of no other.
    bench.links[1][0].faults["encode"] = [ShardUnavailable(1, "gone")]
    bench.links[1][0].faults["open"] = [ShardUnavailable(1, "gone")]
    fate = bench.ask(bench.request())
    assert fate.freshness == Freshness((UpdateToken(9, 0, 7), UpdateToken(9, 1, 1)), 0.0)


def test_who_encoded_the_users_counts_among_those_that_answered(make_bench: Any) -> None:
    bench = make_bench(1, replicas=2, lagging_s=1.0)
    behind, ahead = bench.links[0]
    behind.seen = Seen(9, (4,), 1.5, behind.executor.documents)
    ahead.seen = Seen(9, (6,), 0.0, ahead.executor.documents)
    # It may have made the embeddings from rows of tables that have changed since.
    ahead.state = LinkState.SUSPECT
    behind.faults["open"] = [ShardUnavailable(0, "gone")]
    fate = bench.ask(bench.request())
    assert behind.calls[0] == "encode"
    assert "open" in ahead.calls
    assert fate.freshness == Freshness((UpdateToken(9, 0, 4),), 1.5)
    assert fate.coverage.reasons == ("UPDATES_LAGGING",)


def test_a_generation_without_a_log_tells_none(make_bench: Any) -> None:
    assert make_bench(2).ask(Request(k=3)).freshness is None


def test_a_demand_reaches_every_stage_and_no_neighbour(make_bench: Any) -> None:
    bench = make_bench(2)
    see(bench, (5,), (5,))
    queries = [
        bench.query(bench.request(filter="year > 1960"), consistency=consistency)
        for consistency in (ANY, TOKENS, ANY)
    ]
    fates = bench.loop.run_until_complete(bench.coordinator.answer(queries))
    assert [len(fate.answer.item_ids) for fate in fates] == [20, 20, 20]
    demanded = [
        one for link in bench.all_links for one in link.demands if one.consistency == TOKENS
    ]
    # One encode, and count and open on either shard.
    assert len(demanded) == 5
    assert all(one.wait_s > 0 for one in demanded)
    # Two batches: those that demand nothing share one.
    assert sorted(bench.links[0][0].sizes) == [1, 2]


def test_a_demand_never_uses_a_remembered_count(make_bench: Any) -> None:
    bench = make_bench(2)
    see(bench, (5,), (5,))
    wanted = bench.request(filter="year > 1960")
    for _ in range(2):
        bench.ask(wanted)
    assert bench.links[0][0].calls.count("count") == 1
    for _ in range(2):
        bench.ask(wanted, consistency=TOKENS)
    assert bench.links[0][0].calls.count("count") == 3


def test_another_replica_answers_for_one_that_is_behind(make_bench: Any, ask_whole: Any) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[0][0].faults["open"] = [ReplicaStale(0, "behind")]
    wanted = bench.request()
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0, consistency=TOKENS)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert not fate.coverage.degraded


def test_a_shard_that_is_behind_is_missing_with_the_reason(make_bench: Any) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["open"] = [ReplicaStale(0, "behind")] * 2
    fate = bench.ask(bench.request(), consistency=TOKENS)
    assert fate.coverage.documents == bench.share([1])
    assert fate.coverage.reasons == ("STALE_REPLICA_DROPPED",)
    refused = bench.ask(bench.request(), consistency=TOKENS, min_coverage=1.0)
    assert isinstance(refused, CoverageLost)


def test_when_no_shard_is_fresh_the_reason_is_that(make_bench: Any) -> None:
    bench = make_bench(2)
    for link in bench.all_links:
        link.faults["encode"] = [ReplicaStale(link.shard, "behind")]
    refused = bench.ask(bench.request(), consistency=TOKENS)
    assert isinstance(refused, CoverageLost)
    assert refused.coverage.reasons == ("STALE_REPLICA_DROPPED",)


@pytest.mark.parametrize("op", ["encode", "count", "open"])
@pytest.mark.parametrize(
    "foreign",
    [
        Refusal("FAILED_PRECONDITION", "of another log", "FOREIGN_TOKEN"),
        RequestError("consistency.after", "beyond the log"),
    ],
)
def test_tokens_that_no_shard_can_meet_refuse_their_requests_alone(
    make_bench: Any, op: str, foreign: Exception
) -> None:
    bench = make_bench(2)

    def refuse(link: Any) -> Any:
        return lambda: foreign if link.demands[-1].consistency == TOKENS else None

    for link in bench.all_links:
        link.faults[op] = [refuse(link)] * 4
    queries = [
        bench.query(bench.request(filter="year > 1960"), consistency=consistency)
        for consistency in (TOKENS, ANY, TOKENS)
    ]
    first, second, third = bench.loop.run_until_complete(bench.coordinator.answer(queries))
    assert first is foreign
    assert third is foreign
    assert isinstance(second, Served)


def test_a_shard_that_lags_is_served_and_named(make_bench: Any) -> None:
    bench = make_bench(2, lagging_s=10.0)
    see(bench, (5,), (5,), staleness_s=10.0)
    assert bench.ask(bench.request()).coverage.reasons == ()
    see(bench, (5,), (5,), staleness_s=10.5)
    fate = bench.ask(bench.request(), min_coverage=1.0)
    assert fate.coverage.reasons == ("UPDATES_LAGGING",)
    assert (fate.coverage.documents, fate.coverage.shards_full) == (1.0, 2)


def test_coverage_weighs_documents_as_the_shards_count_them_now(make_bench: Any) -> None:
    bench = make_bench(2, replicas=2)
    published = list(bench.coordinator.documents)
    for link, (cut, documents) in zip(
        bench.all_links, ((5, None), (5, None), (5, 700), (6, 900)), strict=True
    ):
        link.seen = None if documents is None else Seen(9, (cut,), 0.0, documents)
    for link in bench.links[0]:
        link.faults["open"] = [ShardUnavailable(0, "gone")]
    # A shard that has not said yet how many it has counts as published, the other as its replica
    # that is furthest says.
    assert bench.coordinator.documents == [published[0], 900]
    fate = bench.ask(bench.request())
    assert fate.coverage.documents == 700 / (700 + published[0])
    bench.links[0][0].seen = Seen(9, (5,), 0.0, 100)
    assert bench.ask(bench.request()).answer.counts.addressed == 800
    # What a shard said last is what is missing without it.
    bench.links[0] = []
    fate = bench.ask(bench.request())
    assert fate.coverage.documents == 700 / (700 + 100)
    assert bench.coordinator.documents == [100, 900]


# ---- overload


@pytest.mark.parametrize("level", range(6))
def test_less_work_is_named_and_repeated_byte_for_byte_by_pinning_the_plan(
    make_bench: Any, virtual: Any, generation: Any, request_maker: Any, ask_whole: Any, level: int
) -> None:
    floors = DegradeFloors(nprobe=1, ann_k=10)
    ladder = Ladder(DegradeSection(floors=floors), virtual.time)
    bench = make_bench(3, ladder=ladder)
    requests = [
        replace(one, value=("", "score", "liked")[at % 3])
        for at, one in enumerate(request_maker(generation, 30, seed=31))
    ]
    usual = bench.ask_all(requests)
    ladder._level = level
    fates = bench.ask_all(requests)
    expected = ["NPROBE_REDUCED"] if level > 0 else []
    expected += ["RERANK_DEPTH_REDUCED"] if level > 2 else []
    expected += ["TASKS_SKIPPED"] if level > 4 else []
    assert {name for fate in fates for name in fate.coverage.reasons} == set(expected)
    for fate, before, request in zip(fates, usual, requests, strict=True):
        assert fate.coverage.documents == 1.0
        assert fate.coverage.degraded == (fate.answer.plan != before.answer.plan)
        free = {"nprobe": 0, "ann_k": 0, "exact": False, "semantic_k": None}
        pinned = replace(request, plan=str(fate.answer.plan), **free)
        answer = ask_whole(pinned)
        bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
        assert fate.answer.exhausted == answer.exhausted
        assert {name: one.tolist() for name, one in fate.answer.task_scores.items()} == {
            name: one.tolist() for name, one in answer.task_scores.items()
        }
        # At the lowest level, too, whoever pins a plan gets that plan and no reason.
        repeated = bench.ask(pinned)
        bench.assert_is(repeated, (answer.item_ids.tolist(), answer.scores.tolist()))
        assert repeated.answer.plan == fate.answer.plan
        assert repeated.coverage.reasons == ()
    bench.assert_nothing_is_open()


def test_neighbours_of_a_degraded_request_keep_what_they_demand(
    make_bench: Any, virtual: Any
) -> None:
    ladder = Ladder(DegradeSection(floors=DegradeFloors(nprobe=1, ann_k=10)), virtual.time)
    bench = make_bench(2, ladder=ladder)
    ladder._level = ladder.lowest
    policies = [DegradePolicy(), DegradePolicy(DegradeMode.NEVER), DegradePolicy(min_nprobe=3)]
    queries = [replace(bench.query(bench.request()), degrade=policy) for policy in policies]
    some, whole, bounded = virtual.run_until_complete(bench.coordinator.answer(queries))
    assert some.coverage.degraded
    assert not whole.coverage.degraded
    assert some.answer.plan.probes < bounded.answer.plan.probes == 3
    assert bounded.answer.plan.probes < whole.answer.plan.probes


def test_a_policy_that_cannot_be_met_is_refused_and_its_neighbours_are_not(
    make_bench: Any, virtual: Any
) -> None:
    bench = make_bench(1)
    queries = [
        replace(bench.query(bench.request()), degrade=DegradePolicy(required_tasks=(name,)))
        for name in ("bought", "liked")
    ]
    refused, served = virtual.run_until_complete(bench.coordinator.answer(queries))
    assert isinstance(refused, RequestError)
    assert refused.field == "degrade.required_tasks"
    assert isinstance(served, Served)


def test_a_request_whose_time_ran_out_between_two_stages_is_dropped_and_its_neighbour_is_not(
    make_bench: Any, virtual: Any
) -> None:
    dropped = Dropped()
    bench = make_bench(1, dropped=dropped)
    executor = bench.executors[0]
    encode = executor.encode

    def stall(users: Any) -> Any:
        virtual.now_s += 0.15
        return encode(users)

    executor.encode = stall
    queries = [bench.query(bench.request(), deadline_s=limit_s) for limit_s in (0.1, 2.0)]
    late, served = virtual.run_until_complete(bench.coordinator.answer(queries))
    assert isinstance(late, DeadlineExceeded)
    assert isinstance(served, Served)
    assert bench.links[0][0].sizes == [1]
    assert dropped.expired == {"rounds": 1}
