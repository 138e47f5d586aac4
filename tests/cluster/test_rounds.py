from dataclasses import replace
from typing import Any

import pytest
import torch

from silvershard.cluster.fanout import Fanout
from silvershard.cluster.outcome import CoverageLost, CoverageTimedOut, Served
from silvershard.cluster.rounds import Batch, Rounds, owners, shortfall
from silvershard.model.request import Request, compile_request
from silvershard.model.retriever import assemble
from silvershard.shard.errors import ShardUnavailable
from silvershard.shard.partition import partition_of


def make_fanout(virtual: Any, links: Any, documents: list[int]) -> Fanout:
    return Fanout(
        documents=documents,
        replicas=lambda shard: links[shard],
        clock=virtual.time,
        deadline_s=virtual.time() + 1,
        min_coverage=0.0,
    )


def test_every_partition_has_the_shard_that_serves_it(make_executors: Any, generation: Any) -> None:
    for num_shards in (1, 2, 3, 7):
        owner = owners(num_shards, 64)
        assert owner.shape == (64,)
        assert owner.unique().tolist() == list(range(num_shards))
    shards = owners(3, 64)[partition_of(torch.from_numpy(generation.catalogue.item_ids), 64)]
    documents = [executor.documents for executor in make_executors(3)]
    assert shards.bincount().tolist() == documents


def test_the_minimum_is_a_share_of_the_documents(virtual: Any) -> None:
    fanout = make_fanout(virtual, [[], []], [75, 25])
    assert shortfall(fanout, fanout.coverage(), 1.0) is None
    fanout.lose(1, ShardUnavailable(1, "gone"), 0.0)
    assert shortfall(fanout, fanout.coverage(), 0.75) is None
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.76), CoverageLost)
    fanout.timed_out = True
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.76), CoverageTimedOut)


def test_no_shard_at_all_is_never_enough(virtual: Any) -> None:
    fanout = make_fanout(virtual, [[]], [0])
    assert shortfall(fanout, fanout.coverage(), 0.0) is None
    fanout.lose(0, ShardUnavailable(0, "gone"), 0.0)
    assert isinstance(shortfall(fanout, fanout.coverage(), 0.0), CoverageLost)


@pytest.fixture
def make_rounds(virtual: Any, make_executors: Any, fake_link: Any) -> Any:
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
        )
        fanout = make_fanout(
            virtual, [[link] for link in links], [executor.documents for executor in executors]
        )
        return Rounds(fanout, batch, spec, owners(num_shards, spec.num_partitions)), links

    return make


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
