import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from silvershard.cluster.coordinator import Coordinator, Query
from silvershard.cluster.fanout import Fanout
from silvershard.cluster.freshness import Seen
from silvershard.cluster.outcome import CoverageLost, CoverageTimedOut
from silvershard.cluster.rounds import Batch, Rounds, Served, owners, shortfall
from silvershard.cluster.shard_link import LinkState
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.shard.errors import (
    CandidatesExpired,
    GenerationError,
    Overloaded,
    ShardUnavailable,
)
from silvershard.shard.load import load_executor
from silvershard.shard.mutations import Delete, ItemValues, Patch
from silvershard.shard.partition import partition_of

HANG = "hang"


@pytest.fixture
def make_fanout(virtual: Any, make_choice: Any) -> Any:
    def make(links: Any, documents: list[int]) -> Fanout:
        return Fanout(
            documents=documents,
            replicas=lambda shard: links[shard],
            choice=make_choice(),
            clock=virtual.time,
            deadline_s=virtual.time() + 1,
            min_coverage=0.0,
        )

    return make


def test_every_partition_has_the_shard_that_serves_it(make_executors: Any, generation: Any) -> None:
    for num_shards in (1, 2, 3, 7):
        owner = owners(num_shards, 64)
        assert owner.shape == (64,)
        assert owner.unique().tolist() == list(range(num_shards))
    shards = owners(3, 64)[partition_of(torch.from_numpy(generation.catalogue.item_ids), 64)]
    documents = [executor.documents for executor in make_executors(3)]
    assert shards.bincount().tolist() == documents


def test_the_minimum_is_a_share_of_the_documents(make_fanout: Any) -> None:
    fanout = make_fanout([[], []], [75, 25])
    assert shortfall(fanout, fanout.coverage(), 1.0) is None
    fanout.lose(1, ShardUnavailable(1, "gone"), 0.0)
    assert shortfall(fanout, fanout.coverage(), 0.75) is None
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.76), CoverageLost)
    fanout.timed_out = True
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.76), CoverageTimedOut)


def test_no_shard_at_all_is_never_enough(make_fanout: Any) -> None:
    fanout = make_fanout([[]], [0])
    assert shortfall(fanout, fanout.coverage(), 0.0) is None
    fanout.lose(0, ShardUnavailable(0, "gone"), 0.0)
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.0), CoverageLost)


@pytest.fixture
def make_rounds(virtual: Any, make_executors: Any, fake_link: Any, make_fanout: Any) -> Any:
    def make(request: Request, num_shards: int = 2) -> tuple[Rounds, list[Any]]:
        executors = make_executors(num_shards, clock=virtual.time)
        links = [fake_link(executor) for executor in executors]
        spec = executors[0].spec
        compiled = compile_request(request, spec)
        plan = compiled.plan(spec, None)
        encoded = executors[0].encode([compiled.features])
        batch = Batch(
            key="key",
            compiled=[compiled],
            plans=[plan],
            eligible=[None],
            warnings=[()],
            minimums=[0.0],
            work=assemble([compiled], [plan], encoded.embedding, encoded.user_state),
            encoder=Seen(0, (), 0.0, executors[0].documents),
        )
        fanout = make_fanout(
            [[link] for link in links], [executor.documents for executor in executors]
        )
        return Rounds(fanout, batch, spec, owners(num_shards, spec.num_partitions)), links

    return make


def test_semantic_candidates_are_cut_again_without_a_shard_that_is_lost(
    virtual: Any, fake_link: Any, semantic_generation: Any, expect: Any
) -> None:
    executors = [
        load_executor(semantic_generation.path, shard, 2, clock=virtual.time) for shard in range(2)
    ]
    links = [fake_link(executor) for executor in executors]
    coordinator = Coordinator(
        executors[0].spec, 2, lambda shard: [links[shard]], clock=virtual.time
    )
    history = semantic_generation.catalogue.item_ids[:6].tolist()
    wanted = Request(features={"history": history}, k=40, ann_k=10, nprobe=2, semantic_k=25)

    def ask() -> Served:
        now_s = virtual.time()
        query = Query(wanted, 0.0, now_s + 2.0, now_s)
        (fate,) = virtual.run_until_complete(coordinator.answer([query]))
        assert isinstance(fate, Served)
        return fate

    whole = ask()
    assert (whole.answer.item_ids.tolist(), whole.answer.scores.tolist()) == expect(
        executors, wanted
    )
    assert whole.answer.counts.semantic_kept == 25
    assert "semantic" in whole.answer.times
    links[0].faults["close"] = [ShardUnavailable(0, "gone")] * 2
    part = ask()
    assert (part.answer.item_ids.tolist(), part.answer.scores.tolist()) == expect(
        executors[1:], wanted
    )
    assert part.answer.counts.semantic_kept == 25
    assert part.answer.item_ids.tolist() != whole.answer.item_ids.tolist()


def test_exhausted_is_said_only_when_every_shard_answered(make_rounds: Any, virtual: Any) -> None:
    wanted = Request(k=700, exact=True)
    rounds, _ = make_rounds(wanted)
    (whole,) = virtual.run_until_complete(rounds.run())
    assert len(whole.answer.item_ids) == 600
    assert whole.answer.exhausted
    rounds, links = make_rounds(wanted)
    links[0].faults["open"] = [ShardUnavailable(0, "gone")]
    (part,) = virtual.run_until_complete(rounds.run())
    assert len(part.answer.item_ids) < 600
    assert not part.answer.exhausted


def test_unchanged_cutoffs_do_not_repeat_round_two(make_rounds: Any, virtual: Any) -> None:
    # The first loss leaves room for every candidate; after it, the cutoffs let all pass.
    rounds, links = make_rounds(Request(k=5, exact=True, return_fields=("title",)), 3)
    links[2].faults["fields"] = [ShardUnavailable(2, "gone")]
    links[1].faults["fields"] = [None, ShardUnavailable(1, "gone")]
    (fate,) = virtual.run_until_complete(rounds.run())
    assert isinstance(fate, Served)
    assert links[0].calls == ["open", "close", "fields", "close", "fields", "fields"]


def test_fields_come_from_the_shard_that_owns_the_item(
    make_rounds: Any, virtual: Any, generation: Any
) -> None:
    rounds, links = make_rounds(Request(k=40, return_fields=("year", "title")), 3)
    (fate,) = virtual.run_until_complete(rounds.run())
    row = {item: at for at, item in enumerate(generation.catalogue.item_ids.tolist())}
    rows = [row[item] for item in fate.answer.item_ids.tolist()]
    assert fate.fields["title"] == [f"Film {at}" for at in rows]
    assert fate.fields["year"] == [int(generation.catalogue.fields["year"][at]) for at in rows]
    assert all(link.calls.count("fields") == 1 for link in links)


def test_without_fields_nobody_is_asked_for_them(make_rounds: Any, virtual: Any) -> None:
    rounds, links = make_rounds(Request(k=4))
    (fate,) = virtual.run_until_complete(rounds.run())
    assert fate.fields == {}
    assert all("fields" not in link.calls for link in links)


def test_large_merges_leave_the_event_loop_free(
    make_rounds: Any, virtual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[Any] = []

    async def to_thread(compute: Any) -> Any:
        threads.append(compute)
        return compute()

    monkeypatch.setattr("silvershard.cluster.rounds.asyncio.to_thread", to_thread)
    rounds, _ = make_rounds(Request(k=4))
    virtual.run_until_complete(rounds.run())
    assert threads == []
    monkeypatch.setattr("silvershard.cluster.rounds._LARGE_MERGE", 10)
    rounds, _ = make_rounds(replace(Request(), k=20))
    virtual.run_until_complete(rounds.run())
    assert len(threads) == 2


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
    make_bench: Any, expect: Any, op: str, error: Any, reason: str, code: str
) -> None:
    bench = make_bench(3)
    wanted = bench.request(filter="year >= 1980", return_fields=("title", "year"), ann_k=30)
    lost = bench.links[1][0]
    lost.faults[op] = [error] * 3
    fate = bench.ask(wanted)
    # The plan is an input of the answer: it was made while the shard was still counted.
    pinned = replace(wanted, plan=str(fate.answer.plan), nprobe=0, ann_k=0, exact=False)
    bench.assert_is(fate, expect([bench.executors[0], bench.executors[2]], pinned))
    coverage = fate.coverage
    assert coverage.documents == bench.share([0, 2])
    assert (coverage.shards_total, coverage.shards_full, coverage.shards_failed) == (3, 2, 1)
    assert coverage.reasons == (reason,)
    (outcome,) = coverage.shards
    assert (outcome.shard, outcome.replica, outcome.code) == (1, "0", code)
    assert outcome.documents == bench.executors[1].documents
    assert outcome.reasons == (reason,)
    assert len(fate.fields["title"]) == len(fate.answer.item_ids)
    bench.assert_nothing_is_open()


def test_the_cutoffs_are_computed_again_without_a_shard_lost_in_round_two(
    make_bench: Any, expect: Any
) -> None:
    bench = make_bench(2)
    # With so few candidates kept, the cutoffs of both shards together cut deep into each.
    wanted = bench.request(k=30, ann_k=30, nprobe=16)
    bench.links[0][0].faults["close"] = [ShardUnavailable(0, "gone")] * 2
    fate = bench.ask(wanted)
    bench.assert_is(fate, expect([bench.executors[1]], wanted))
    assert len(fate.answer.item_ids) == 30
    assert bench.links[1][0].calls.count("close") == 2
    assert bench.links[1][0].calls.count("open") == 1


def test_shards_may_be_lost_one_after_the_other(make_bench: Any, expect: Any) -> None:
    bench = make_bench(3)
    wanted = bench.request(ann_k=15)
    bench.links[0][0].faults["open"] = [ShardUnavailable(0, "gone")] * 2
    bench.links[2][0].faults["close"] = [None, HANG]
    bench.links[2][0].faults["fields"] = [ShardUnavailable(2, "gone")] * 2
    fate = bench.ask(replace(wanted, return_fields=("title",)))
    bench.assert_is(fate, expect([bench.executors[1]], wanted))
    assert fate.coverage.documents == bench.share([1])
    assert fate.coverage.shards_failed == 2
    bench.assert_nothing_is_open()


def test_a_shard_that_never_came_up_counts_with_its_documents(make_bench: Any, expect: Any) -> None:
    bench = make_bench(2)
    bench.links[0] = []
    wanted = bench.request()
    fate = bench.ask(wanted)
    bench.assert_is(fate, expect([bench.executors[1]], wanted))
    assert fate.coverage.documents == bench.share([1])
    assert fate.coverage.shards[0].replica == ""
    assert fate.coverage.shards[0].attempts == 0


def test_below_the_minimum_there_is_an_error_with_the_coverage(make_bench: Any) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.DOWN
    minimum = bench.share([1])
    assert isinstance(bench.ask(bench.request(), min_coverage=minimum), Served)
    error = bench.ask(bench.request(), min_coverage=minimum + 1e-9)
    assert isinstance(error, CoverageLost)
    assert error.coverage.documents == minimum
    assert error.coverage.reasons == ("SHARD_UNAVAILABLE",)
    assert error.minimum == minimum + 1e-9


@pytest.mark.parametrize("op", ["encode", "open", "close", "fields"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_without_any_shard_there_is_an_error_and_never_an_empty_list(
    make_bench: Any, num_shards: int, op: str
) -> None:
    bench = make_bench(num_shards)
    for link in bench.all_links:
        link.faults[op] = [ShardUnavailable(link.shard, "gone")] * 9
    error = bench.ask(bench.request(return_fields=("title",)), min_coverage=0.0)
    assert isinstance(error, CoverageLost)
    assert error.coverage.documents == 0.0
    assert error.coverage.shards_failed == num_shards
    assert error.coverage.reasons == ("SHARD_UNAVAILABLE",)
    bench.assert_nothing_is_open()


@pytest.mark.parametrize("op", ["encode", "count", "open", "close", "fields"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_hung_shard_never_takes_more_than_the_deadline(
    make_bench: Any, virtual: Any, num_shards: int, op: str
) -> None:
    bench = make_bench(num_shards)
    bench.links[0][0].faults[op] = [HANG] * 9
    wanted = bench.request(filter="year > 1960", return_fields=("title",))
    before_s = virtual.time()
    fate = bench.ask(wanted, min_coverage=0.0, deadline_s=2.0)
    assert virtual.time() - before_s < 2.0
    if num_shards == 2 and op == "encode":
        # Another shard encodes as well.
        assert fate.coverage.documents == 1.0
        assert virtual.time() - before_s < 0.2
    elif num_shards == 2:
        assert fate.coverage.documents == bench.share([1])
        assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    else:
        assert isinstance(fate, CoverageTimedOut)
        assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    bench.assert_nothing_is_open()


def test_a_straggler_is_waited_for_only_as_long_as_it_is_needed(
    make_bench: Any, virtual: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["open"] = [1.2, 1.2]
    before_s = virtual.time()
    fate = bench.ask(bench.request(), min_coverage=0.0, deadline_s=2.0)
    assert fate.coverage.shards_failed == 1
    assert virtual.time() - before_s < 1.1
    fate = bench.ask(bench.request(), min_coverage=0.9, deadline_s=2.0)
    assert isinstance(fate, Served)
    assert fate.coverage.documents == 1.0


def test_too_late_for_the_minimum_is_a_deadline_error_with_the_coverage(make_bench: Any) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["open"] = [HANG]
    error = bench.ask(bench.request(), min_coverage=0.9)
    assert isinstance(error, CoverageTimedOut)
    assert error.coverage.documents == bench.share([1])


def test_an_ejected_shard_is_asked_but_waited_for_only_where_it_is_needed(
    make_bench: Any, virtual: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].state = LinkState.EJECTED
    bench.links[0][0].faults = {op: [HANG] * 2 for op in ("encode", "open")}
    before_s = virtual.time()
    fate = bench.ask(bench.request(), min_coverage=0.0)
    assert fate.coverage.reasons == ("SHARD_TIMEOUT",)
    assert virtual.time() - before_s <= 0.11
    assert isinstance(bench.ask(bench.request(), min_coverage=0.9), CoverageTimedOut)
    assert virtual.time() - before_s <= 1.2
    # It may answer after all.
    assert bench.ask(bench.request(), min_coverage=0.9).coverage.documents == 1.0
    assert "encode" not in bench.links[0][0].calls


@pytest.mark.parametrize("op", ["count", "open", "close", "fields"])
def test_a_second_replica_takes_over_and_nothing_is_missing(
    make_bench: Any, ask_whole: Any, op: str
) -> None:
    bench = make_bench(2, replicas=2)
    bench.links[1][0].faults[op] = [ShardUnavailable(1, "gone")] * 9
    wanted = bench.request(filter="year > 1960", return_fields=("title",))
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert not fate.coverage.degraded
    # What the others did in round two stays: the second replica gives the same cuts.
    assert bench.links[0][0].calls.count("close") == 1
    if op != "count":
        assert [one for one in bench.links[1][1].calls if one != "encode"] == (
            ["open", "close", "fields"]
        )
    bench.assert_nothing_is_open()


def test_a_shard_that_came_back_in_between_runs_both_rounds_again(
    make_bench: Any, ask_whole: Any
) -> None:
    bench = make_bench(2)
    bench.links[0][0].faults["close"] = [CandidatesExpired("key")]
    wanted = bench.request()
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert bench.links[0][0].calls[-3:] == ["close", "open", "close"]


def test_the_other_replica_is_asked_while_one_is_suspect(make_bench: Any) -> None:
    bench = make_bench(1, replicas=2)
    bench.links[0][0].state = LinkState.SUSPECT
    assert isinstance(bench.ask(bench.request()), Served)
    assert bench.links[0][0].calls == []
    bench.links[0][1].state = LinkState.DOWN
    assert isinstance(bench.ask(bench.request()), Served)
    assert bench.links[0][0].calls == ["encode", "open", "close"]


def test_fields_of_candidates_that_expired_come_from_rounds_run_again(make_bench: Any) -> None:
    bench = make_bench(1)
    (link,) = bench.links[0]
    link.faults["fields"] = [CandidatesExpired("key")]
    fate = bench.ask(bench.request(return_fields=("title",)))
    assert len(fate.fields["title"]) == 20
    assert link.calls[-4:] == ["fields", "open", "close", "fields"]
    bench.assert_nothing_is_open()


def test_a_replica_that_keeps_nothing_open_is_lost_at_last(make_bench: Any, virtual: Any) -> None:
    bench = make_bench(1, replicas=2)
    for link in bench.all_links:
        link.faults["close"] = [CandidatesExpired("key")] * 99
    before_s = virtual.time()
    error = bench.ask(bench.request())
    assert isinstance(error, CoverageLost)
    assert error.coverage.reasons == ("SHARD_UNAVAILABLE",)
    assert sum(link.calls.count("open") for link in bench.all_links) == 3
    assert virtual.time() == before_s
    bench.assert_nothing_is_open()


# ---- replicas at different cuts

KEPT = 30
SCORE_OF_ALL = "all_pages(probes=16,ann_k=40)"


class Diverged:
    """Shards of a generation before and after updates that leave few of its items, all changed."""

    def __init__(self, generation: Any, virtual: Any, fake_link: Any, make_choice: Any) -> None:
        self.make_choice = make_choice
        self.generation = generation
        self.virtual = virtual
        self.fake_link = fake_link
        history = generation.catalogue.item_ids[:6].tolist()
        self.wanted = Request(
            features={"history": history},
            k=2 * KEPT,
            plan=SCORE_OF_ALL,
            return_fields=("title",),
        )
        (everything,) = self.ask([[self.load(0, 1)]], replace(self.wanted, plan="", exact=True))
        ranked = everything.answer.item_ids.tolist()
        # Those that are left ranked lowest, so that no cut over the others lets any of them pass.
        left = set(ranked[-KEPT:])
        self.updates: list[Any] = [
            Patch(one, 1, ItemValues(signals={"popularity": 0.5}, fields={"title": "late"}))
            if one in left
            else Delete(one, 1)
            for one in generation.catalogue.item_ids.tolist()
        ]

    def load(self, shard: int, num_shards: int) -> Any:
        return load_executor(
            self.generation.path, shard, num_shards, headroom=0.5, clock=self.virtual.time
        )

    def update(self, executor: Any) -> None:
        rejected = executor.apply(executor.updater.prepare(self.updates), (len(self.updates),))
        assert not rejected

    def late(self, shard: int, num_shards: int) -> Any:
        executor = self.load(shard, num_shards)
        self.update(executor)
        return executor

    def links(self, shards: list[list[Any]]) -> list[list[Any]]:
        return [
            [self.fake_link(executor, copy) for copy, executor in enumerate(replicas)]
            for replicas in shards
        ]

    def ask(self, shards: list[list[Any]], *requests: Request) -> list[Any]:
        return self.ask_links(self.links(shards), *requests)

    def ask_links(self, links: list[list[Any]], *requests: Request) -> list[Any]:
        coordinator = Coordinator(
            links[0][0].executor.spec,
            len(links),
            lambda shard: links[shard],
            choice=self.make_choice(),
            clock=self.virtual.time,
        )
        now_s = self.virtual.time()
        queries = [Query(one, 1.0, now_s + 2.0, now_s) for one in requests]
        fates = self.virtual.run_until_complete(coordinator.answer(queries))
        assert all(isinstance(one, Served) for one in fates), fates
        assert all(one.executor.num_open == 0 for replicas in links for one in replicas)
        return fates  # type: ignore[no-any-return]


@pytest.fixture
def diverged(generation: Any, virtual: Any, fake_link: Any, make_choice: Any) -> Diverged:
    return Diverged(generation, virtual, fake_link, make_choice)


def told(fate: Any) -> tuple[Any, ...]:
    """Everything that an answer says of the catalogue, bit for bit."""
    answer = fate.answer
    return (
        answer.item_ids.tolist(),
        answer.scores.tolist(),
        answer.refined.tolist(),
        {task: scores.tolist() for task, scores in answer.task_scores.items()},
        answer.exhausted,
        answer.counts,
        answer.warnings,
        fate.fields,
        fate.coverage.reasons,
    )


@pytest.mark.parametrize("op", ["close", "fields"])
@pytest.mark.parametrize("moved", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("expired", [False, True])
def test_an_answer_of_a_replica_that_took_over_is_of_its_cut_alone(
    diverged: Diverged, op: str, moved: tuple[int, ...], expired: bool
) -> None:
    (wanted,) = diverged.ask([[diverged.late(0, 1)]], diverged.wanted)
    assert len(wanted.answer.item_ids) == KEPT
    assert wanted.answer.exhausted
    assert set(wanted.fields["title"]) == {"late"}
    if expired:
        # The same process, which has gone on and lost what was open.
        shards = [
            [diverged.load(shard, 2) if shard in moved else diverged.late(shard, 2)]
            for shard in range(2)
        ]
    else:
        shards = [
            [*([diverged.load(shard, 2)] if shard in moved else []), diverged.late(shard, 2)]
            for shard in range(2)
        ]
    links = diverged.links(shards)

    def go_on(link: Any) -> Any:
        def expire() -> Exception:
            link.executor.release(link.opened[-1])
            diverged.update(link.executor)
            return CandidatesExpired(link.opened[-1])

        return expire

    for shard in moved:
        link = links[shard][0]
        lost = [go_on(link)] if expired else [ShardUnavailable(shard, "gone")] * 9
        link.faults[op] = lost
    (fate,) = diverged.ask_links(links, diverged.wanted)
    assert told(fate) == told(wanted)
    assert all(links[shard][0].calls.count("open") == 1 + expired for shard in moved)


def test_nobody_is_asked_again_when_the_replica_that_took_over_has_the_same_state(
    diverged: Diverged,
) -> None:
    shards = [[diverged.late(0, 2)], [diverged.late(1, 2), diverged.late(1, 2)]]
    links = diverged.links(shards)
    links[1][0].faults["close"] = [ShardUnavailable(1, "gone")]
    (fate,) = diverged.ask_links(links, diverged.wanted)
    assert fate.answer.exhausted
    assert links[0][0].calls[-2:] == ["close", "fields"]
    assert links[0][0].calls.count("close") == 1


def test_a_change_that_moves_no_cut_is_not_overlooked(diverged: Diverged) -> None:
    diverged.updates = [
        Patch(one, 1, ItemValues(signals={"popularity": one % 97 / 97}, fields={"title": "late"}))
        for one in diverged.generation.catalogue.item_ids.tolist()
    ]
    (wanted,) = diverged.ask([[diverged.late(0, 1)]], diverged.wanted)
    links = diverged.links([[diverged.late(0, 2)], [diverged.load(1, 2), diverged.late(1, 2)]])
    links[1][0].faults["fields"] = [ShardUnavailable(1, "gone")]
    (fate,) = diverged.ask_links(links, diverged.wanted)
    assert told(fate) == told(wanted)
    assert set(fate.fields["title"]) == {"late"}
    assert links[0][0].calls.count("close") == 1


# ---- hedges


@pytest.mark.parametrize("op", ["count", "open", "close", "fields"])
def test_another_replica_answers_for_one_that_hangs_and_the_answer_is_the_same(
    make_bench: Any, ask_whole: Any, virtual: Any, op: str
) -> None:
    bench = make_bench(2, replicas=2)
    hung, other = bench.links[1]
    hung.faults[op] = [HANG] * 9
    released: list[str] = []
    other.faults["fields"] = [lambda: released.extend(hung.released)]
    wanted = bench.request(filter="year > 1960", return_fields=("title",))
    answer = ask_whole(wanted)
    before_s = virtual.time()
    fate = bench.ask(wanted, min_coverage=1.0)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    assert not fate.coverage.degraded
    # One hedge: what is unknown of the shard is 0.1 s.
    assert virtual.time() - before_s == pytest.approx(0.1)
    assert bench.links[0][0].calls.count("close") == 1
    assert [one for one in other.calls if one not in ("encode", "count")] == (
        ["open", "close", "fields"]
    )
    if op != "count":
        # As soon as it is outrun, and once.
        assert hung.released == hung.opened == released
    bench.assert_nothing_is_open()
    assert asyncio.all_tasks(virtual) == set()


def test_a_hedge_of_round_two_runs_both_rounds_at_once(make_bench: Any, virtual: Any) -> None:
    bench = make_bench(3, replicas=2)
    hung, other = bench.links[1]
    hung.faults["close"] = [HANG]
    other.faults = {"open": [0.04], "close": [0.03]}
    before_s = virtual.time()
    fate = bench.ask(bench.request(), min_coverage=1.0)
    assert virtual.time() - before_s == pytest.approx(0.17)
    assert fate.coverage.documents == 1.0
    # The same cutoffs came out again, so that nobody was asked for anything else.
    assert [link.calls.count("close") for link in bench.all_links] == [1, 0, 1, 1, 1, 0]
    # Once to encode, and every shard in either round.
    assert bench.coordinator._choice.extra.counts.calls == 1 + 3 + 3
    bench.assert_nothing_is_open()


@pytest.mark.parametrize("late", ["open", "close"])
def test_a_hedge_that_loses_leaves_no_trace(
    make_bench: Any, ask_whole: Any, virtual: Any, late: str
) -> None:
    bench = make_bench(2, replicas=2)
    slow, other = bench.links[1]
    for link, position in ((bench.links[0][0], 9), (slow, 7), (other, 3)):
        link.seen = Seen(5, (position,), 0.0, link.executor.documents)
    slow.faults["close"] = [0.15]
    other.faults[late] = [HANG]
    wanted = bench.request()
    answer = ask_whole(wanted)
    fate = bench.ask(wanted, min_coverage=1.0)
    bench.assert_is(fate, (answer.item_ids.tolist(), answer.scores.tolist()))
    # The other one had begun to open its candidates, and had seen less.
    assert fate.freshness.cut[0].position == 7
    assert other.calls == (["open"] if late == "open" else ["open", "close"])
    assert other.released == other.opened
    bench.assert_nothing_is_open()
    assert asyncio.all_tasks(virtual) == set()


def test_a_replica_at_another_cut_that_takes_over_by_a_hedge_answers_by_its_own(
    diverged: Diverged,
) -> None:
    (wanted,) = diverged.ask([[diverged.late(0, 1)]], diverged.wanted)
    links = diverged.links([[diverged.late(0, 2)], [diverged.load(1, 2), diverged.late(1, 2)]])
    links[1][0].faults["close"] = [HANG]
    (fate,) = diverged.ask_links(links, diverged.wanted)
    assert told(fate) == told(wanted)
    assert links[1][1].calls == ["open", "close", "close", "fields"]
