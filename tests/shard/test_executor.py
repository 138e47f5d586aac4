import pytest
import torch

from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.types import Cutoffs, Work
from silvershard.shard.errors import CandidatesExpired
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_retriever


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


def test_both_rounds_at_once_equal_the_two_rounds(executor: ShardExecutor, work: Work) -> None:
    first = executor.open("two", work, 200.0)
    cutoffs = executor._retriever.merge.cutoffs([first], work.ann_k)
    two = executor.close("two", cutoffs)
    one = executor.open_and_close("one", work, cutoffs, 200.0)
    assert torch.equal(one.item_ids, two.item_ids)
    assert torch.equal(one.values, two.values)


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


def test_warming_leaves_nothing_open(executor: ShardExecutor) -> None:
    executor.warm()
    assert executor.num_open == 0
