from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.types import Cutoffs, Work
from silvershard.shard import executor as executor_module
from silvershard.shard.errors import CandidatesExpired, PoolExhausted, UpdatesUnsupported
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.mutations import Delete, ItemValues, Mutation, Patch, RowChange, Upsert


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def executor(generation, clock: Clock) -> ShardExecutor:
    retriever, fields = load_retriever(generation.path, shard=1, num_shards=2)
    return ShardExecutor(retriever, fields, shard=1, num_shards=2, clock=clock)


@pytest.fixture
def work(executor: ShardExecutor, request_maker, generation) -> Work:
    compiled = [compile_request(one, executor.spec) for one in request_maker(generation, 4, seed=2)]
    encoded = executor.encode([one.features for one in compiled])
    plans = [one.plan(executor.spec, 600 if one.needs_count else None) for one in compiled]
    return assemble(compiled, plans, encoded.embedding, encoded.user_state)


def everything(work: Work) -> Cutoffs:
    shape = work.embedding.shape[:2]
    return Cutoffs(
        torch.full(shape, float("-inf")), torch.full(shape, torch.iinfo(torch.int64).max)
    )


def test_candidates_stay_open_until_they_are_released(executor: ShardExecutor, work: Work) -> None:
    executor.open("q", work, 101.0)
    once = executor.close("q", everything(work))
    again = executor.close("q", everything(work))
    assert torch.equal(once.item_ids, again.item_ids)
    assert executor.num_open == 1
    executor.release("q")
    executor.release("q")
    assert executor.num_open == 0
    with pytest.raises(CandidatesExpired, match="query q has no open candidates"):
        executor.close("q", everything(work))


def test_candidates_are_given_up_at_their_deadline(
    executor: ShardExecutor, work: Work, clock: Clock
) -> None:
    executor.open("early", work, 101.0)
    executor.open("late", work, 102.0)
    clock.now_s = 101.0
    with pytest.raises(CandidatesExpired, match="early"):
        executor.close("early", everything(work))
    executor.close("late", everything(work))
    clock.now_s = 103.0
    assert executor.expire() == 1
    assert executor.num_open == 0


def test_opening_gives_up_what_expired_so_that_abandoned_queries_do_not_pile_up(
    executor: ShardExecutor, work: Work, clock: Clock
) -> None:
    for number in range(5):
        executor.open(f"q{number}", work, clock.now_s + 1)
        clock.now_s += 2
    assert executor.num_open == 1


def test_a_stricter_cutoff_lets_fewer_candidates_through(
    executor: ShardExecutor, work: Work
) -> None:
    first = executor.open("q", work, 200.0)
    best = Cutoffs(first.scores[:, :, 0], first.item_ids[:, :, 0])
    strict = executor.close("q", best)
    loose = executor.close("q", everything(work))
    assert (strict.kept <= work.embedding.shape[1]).all()
    assert (loose.kept >= strict.kept).all()
    assert int(loose.kept.sum()) > int(strict.kept.sum())


def test_counting_two_shards_gives_the_whole(generation, executor: ShardExecutor) -> None:
    other = ShardExecutor(
        *load_retriever(generation.path, shard=0, num_shards=2), shard=0, num_shards=2
    )
    whole = load_retriever(generation.path)[0]
    scan = compile_request(Request(filter="year >= 1990 AND NOT genre:Horror"), whole.spec).scan
    parts = [int(one.count(scan[None])) for one in (executor, other)]
    assert sum(parts) == int(whole.count(scan[None]))
    assert min(parts) > 0


def test_fields_are_those_of_the_shards_own_items(generation, executor: ShardExecutor) -> None:
    row_of = {item: row for row, item in enumerate(generation.catalogue.item_ids.tolist())}
    held = [
        int(one)
        for part in executor._retriever.indexes
        for one in part.item_ids.flatten()
        if one >= 0
    ]
    got = executor.fields(held[:20], ["title", "year"])
    assert got["title"] == [f"Film {row_of[item]}" for item in held[:20]]
    assert got["year"] == [
        int(generation.catalogue.fields["year"][row_of[item]]) for item in held[:20]
    ]


def test_warming_runs_every_batch_size_twice_and_leaves_nothing_open(
    executor: ShardExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[str, int]] = []
    retriever = executor._retriever
    opened, closed = retriever.open, retriever.close

    def open_(work: Work, *others: Any) -> Any:
        rounds.append(("one", len(work.embedding)))
        return opened(work, *others)

    def close(work: Work, *others: Any) -> Any:
        rounds.append(("two", len(work.embedding)))
        return closed(work, *others)

    monkeypatch.setattr(retriever, "open", open_)
    monkeypatch.setattr(retriever, "close", close)
    executor.warm(lambda: rounds.append(("way", 0)))
    assert rounds[:3] == [("way", 0), ("one", 1), ("two", 1)]
    assert rounds.count(("way", 0)) == 14
    rounds = [one for one in rounds if one != ("way", 0)]
    assert Counter(rounds) == {(name, 2**power): 2 for name in ("one", "two") for power in range(7)}
    assert executor.num_open == 0


@pytest.fixture
def load_live(generation, clock: Clock) -> Callable[..., ShardExecutor]:
    def load(*, devices: Sequence[str] = ("cpu",), headroom: float = 0.5) -> ShardExecutor:
        return load_executor(generation.path, 0, 1, devices=devices, headroom=headroom, clock=clock)

    return load


@pytest.mark.parametrize("headroom", [0.0, 0.5])
def test_loading_gives_way_at_every_part(generation, headroom: float) -> None:
    ways: list[None] = []

    def way() -> None:
        ways.append(None)

    executor = load_executor(generation.path, 0, 1, headroom=headroom, give_way=way)
    # Before every partition, and before every run that warms it.
    assert len(ways) >= executor.spec.num_partitions + 14


def commit(
    executor: ShardExecutor, *mutations: Mutation, cut: int | None = 1
) -> list[tuple[int, str]]:
    return executor.apply(executor.updater.prepare(mutations), None if cut is None else (cut,))


def titled(item_id: int, version: int, title: str) -> Patch:
    return Patch(item_id, version, ItemValues(fields={"title": title}))


def test_a_shard_that_was_loaded_to_stay_takes_no_updates(
    executor: ShardExecutor, load_live: Callable[..., ShardExecutor]
) -> None:
    prepared = load_live().updater.prepare([Delete(1, 1)])
    for use in (
        lambda: executor.updater,
        lambda: executor.apply(prepared, (1,)),
        executor.usage,
    ):
        with pytest.raises(UpdatesUnsupported, match="without room for updates"):
            use()
    assert executor.cut == ()


def test_a_commit_moves_the_cut_and_counts_the_documents(
    generation, load_live: Callable[..., ShardExecutor]
) -> None:
    executor = load_live()
    first, second = generation.catalogue.item_ids[:2].tolist()
    assert executor.cut == ()
    assert commit(executor, Delete(first, 1), Delete(second, 2), Upsert(5, 3, ItemValues())) == []
    assert executor.cut == (1,)
    assert executor.documents == 599
    refused = commit(executor, titled(first, 4, "gone"), Upsert(6, 5, ItemValues()), cut=9)
    assert [item_id for item_id, _ in refused] == [first]
    assert executor.cut == (9,)
    assert executor.documents == 600
    # Nothing of this shard is in it, and still it counts.
    assert commit(executor, cut=12) == []
    assert executor.cut == (12,)


def test_slots_are_reused_as_soon_as_no_query_reads_them(
    generation, load_live: Callable[..., ShardExecutor], work: Work, clock: Clock
) -> None:
    executor = load_live(devices=("cpu", "cpu"))
    ids = generation.catalogue.item_ids[:30].tolist()

    def change(version: int) -> int:
        commit(executor, *(titled(one, version, f"v{version}") for one in ids))
        return executor.usage().retired_slots

    assert change(1) == 0
    executor.open("early", work, 101.0)
    assert change(2) == 30
    executor.open("late", work, 105.0)
    assert change(3) == 60
    executor.release("early")
    assert executor.usage().retired_slots == 30
    executor.open("early", work, 103.0)
    assert change(4) == 60
    clock.now_s = 103.0
    assert executor.expire() == 1
    assert executor.usage().retired_slots == 60
    executor.release("late")
    assert executor.usage().retired_slots == 0
    assert change(5) == 0
    executor.open("abandoned", work, 104.0)
    assert change(6) == 30
    clock.now_s = 104.0
    assert executor.expire() == 1
    assert executor.usage().retired_slots == 0


def test_an_open_query_reads_the_fields_that_its_items_had(
    generation, load_live: Callable[..., ShardExecutor], work: Work
) -> None:
    executor = load_live(devices=("cpu", "cpu", "cpu"))
    kept, gone, changed = generation.catalogue.item_ids[:3].tolist()
    commit(executor, titled(changed, 1, "first"))
    executor.open("q", work, 200.0)
    commit(executor, titled(changed, 2, "second"), Delete(gone, 3), Upsert(5, 4, ItemValues()))
    ids = [changed, gone, kept, 5]
    assert executor.fields(ids, ["title"]) == {"title": ["second", None, "Film 0", ""]}
    assert executor.fields(ids, ["title"], "q") == {"title": ["first", "Film 1", "Film 0", None]}
    assert executor.fields([], ["title"], "q") == {"title": []}
    assert executor.is_open("q")
    executor.release("q")
    assert not executor.is_open("q")
    assert executor.fields(ids, ["title"], "q") == executor.fields(ids, ["title"])


def test_round_two_reads_what_round_one_found(
    generation, load_live: Callable[..., ShardExecutor], work: Work
) -> None:
    executor = load_live()
    executor.open("q", work, 200.0)
    before = executor.close("q", everything(work))
    gone = [Delete(one, 1) for one in generation.catalogue.item_ids.tolist()]
    commit(executor, *gone, *(Upsert(one, 2, ItemValues()) for one in range(400)))
    assert executor.documents == 400
    again = executor.close("q", everything(work))
    for one, other in zip(before[:-1], again[:-1], strict=True):
        assert torch.equal(one, other)
    executor.open("q", work, 200.0)
    assert not torch.equal(executor.close("q", everything(work)).item_ids, before.item_ids)


def test_a_full_pool_takes_the_same_updates_again_when_queries_have_ended(
    generation, load_live: Callable[..., ShardExecutor], work: Work
) -> None:
    executor = load_live(headroom=0.01)
    room = executor.usage().dead_slots
    executor.open("q", work, 200.0)
    ids = generation.catalogue.item_ids.tolist()
    patches = [titled(one, 1, "new") for one in ids]
    new = [Upsert(one, 2, ItemValues()) for one in range(room - 300)]
    prepared = executor.updater.prepare([*patches, *new])
    with pytest.raises(PoolExhausted):
        executor.apply(prepared, (1,))
    executor.apply(executor.updater.prepare(patches), (0,))
    with pytest.raises(PoolExhausted) as caught:
        executor.apply(prepared, (1,))
    assert caught.value.retired >= 600
    assert executor.cut == (0,)
    executor.release("q")
    assert executor.apply(prepared, (1,)) == []
    assert executor.cut == (1,)
    assert executor.documents == 600 + len(new)
    assert executor.fields([ids[0]], ["title"]) == {"title": ["new"]}


def test_deleted_ids_are_forgotten_once_nothing_older_can_come(
    generation, load_live: Callable[..., ShardExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_DELETES_KNOWN", 0)
    executor = load_live(devices=("cpu", "cpu"))
    maps = [part.id_map for part in executor._retriever.indexes]

    def known() -> int:
        return sum(one.num_ids for one in maps)

    ids = generation.catalogue.item_ids[:40].tolist()
    first, second, *halved = generation.catalogue.item_ids[40:44].tolist()
    commit(executor, *(Delete(one, 3) for one in ids), cut=5)
    assert known() == 600
    # What comes ahead of its turn says nothing of what can still come.
    commit(executor, *(Upsert(one, 2, ItemValues()) for one in ids), cut=None)
    assert (executor.documents, executor.cut) == (560, (5,))
    commit(executor, cut=6)
    assert known() == 560
    # The cut moves with the second half of a batch; the deletes of the first one count too.
    commit(executor, *(Delete(one, 3) for one in halved), cut=6)
    assert known() == 560
    commit(executor, cut=7)
    assert (executor.documents, known()) == (558, 558)
    # Urgent ones come ahead of their turn: what is older comes after them, and then they again.
    commit(executor, Delete(first, 9, urgent=True), Delete(second, 9, urgent=True), cut=None)
    for cut in (7, 8, 9):
        commit(executor, Upsert(first, cut - 1, ItemValues()), Delete(second, cut - 2), cut=cut)
        assert (executor.documents, known()) == (556, 558)
    commit(executor, Delete(first, 9, urgent=True), Delete(second, 9, urgent=True), cut=10)
    commit(executor, Upsert(second, 10, ItemValues()), cut=11)
    assert (executor.documents, known()) == (557, 557)
    assert executor.fields([first, second], ["title"]) == {"title": [None, ""]}


def test_many_small_batches_of_deletes_are_held_in_one_piece(
    generation, load_live: Callable[..., ShardExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_MOST_PIECES", 4)
    monkeypatch.setattr(executor_module, "_DELETES_KNOWN", 15)
    executor = load_live()
    for cut in range(1, 30):
        commit(executor, Delete(1_000_000 + cut, 5), cut=cut)
    assert len(executor._deleted[0]) <= 5
    # The last fifteen and the one of the last batch.
    assert executor._retriever.indexes[0].id_map.num_ids == 600 + 16
    before = executor.documents
    commit(executor, *(Upsert(1_000_000 + cut, 2, ItemValues()) for cut in range(14, 30)), cut=29)
    assert executor.documents == before


def test_the_last_deleted_ids_stay_known_and_older_changes_out(
    load_live: Callable[..., ShardExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_DELETES_KNOWN", 30)
    executor = load_live()
    for cut in range(1, 20):
        commit(executor, *(Delete(10 * cut + one, 5) for one in range(10)), cut=cut)
    assert executor._retriever.indexes[0].id_map.num_ids == 600 + 40
    before = executor.documents
    commit(executor, *(Upsert(one, 2, ItemValues()) for one in range(160, 200)), cut=19)
    assert executor.documents == before


def test_rows_of_a_table_are_read_by_the_next_user(
    generation, load_live: Callable[..., ShardExecutor]
) -> None:
    executor = load_live()
    users = [{"history": generation.catalogue.item_ids[::2][:9].tolist()}]
    before = executor.encode(users).embedding
    prepared = executor.updater.prepare(
        [RowChange("history", 1, tuple(range(1, 301)), np.ones((300, 16), dtype=np.float32))]
    )
    assert torch.equal(executor.encode(users).embedding, before)
    executor.apply(prepared, (1,))
    assert not torch.equal(executor.encode(users).embedding, before)
