"""A history of updates gives the same items, bit for bit, however shards and batches cut it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.model.answer import Answer
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.compiled_request import compile_request
from silvershard.model.merge import Merge
from silvershard.model.planes import PlaneDictionary
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.model.retriever import assemble
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.two_tower import TwoTower
from silvershard.model.types import Cutoffs, RoundTwo, Work
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.fields import FieldValue
from silvershard.shard.item_columns import to_catalogue, to_values
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.mutations import (
    Delete,
    ItemValues,
    Mutation,
    Patch,
    RowChange,
    Upsert,
    count_rare,
)
from silvershard.shard.publish import publish_generation
from silvershard.shard.rebase import rebase
from silvershard.shard.snapshot import open_snapshot

Ask = Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]
GENRES = ("Action", "Drama", "Epic", "Noir", "Western")
NOT_FINITE, TOO_LARGE = 13, 14
"""Films that the item tower of these tests cannot embed."""


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer], *, counts: bool = True) -> None:
    assert len(got) == len(wanted)
    for at, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compared = same_ranking(one, other)
        assert compared.same, (at, compared.difference)
        assert torch.equal(one.refined, other.refined), at
        assert one.exhausted == other.exhausted, at
        assert not counts or one.counts == other.counts, at
        for task, scores in one.task_scores.items():
            assert torch.equal(scores, other.task_scores[task]), (at, task)


@pytest.fixture(autouse=True, scope="module")
def _a_tower_that_fails() -> Iterator[None]:
    whole = TwoTower.embed_items

    def failing(self: TwoTower, features: Mapping[str, Ragged]) -> Tensor:
        embeddings = whole(self, features).clone()
        movies = features["movie"]
        for row in range(len(movies)):
            if NOT_FINITE in movies.row(row):
                embeddings[row, 3] = float("nan")
            if TOO_LARGE in movies.row(row):
                embeddings[row, 5] = 1e6
        return embeddings

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(TwoTower, "embed_items", failing)
        yield


def random_values(generator: np.random.Generator, *, whole: bool, rare: int) -> ItemValues:
    """Values of most columns for an upsert, of some for a patch."""

    def given(values: dict[str, Any]) -> dict[str, Any]:
        share = 0.9 if whole else 0.4
        return {name: one for name, one in values.items() if generator.random() < share}

    makers = generator.integers(0, 220, int(generator.integers(0, rare + 1)))
    most = min(rare, 2)
    genres = generator.choice(GENRES, int(generator.integers(0, most + 1)), replace=False)
    year = int(generator.integers(1950, 2030))
    movie = generator.choice(
        [NOT_FINITE, TOO_LARGE, 7, int(generator.integers(1 << 40))], p=[0.05, 0.05, 0.2, 0.7]
    )
    return ItemValues(
        attributes=given(
            {
                "genre": tuple(genres.tolist()),
                "maker": tuple(makers.tolist()),
                "year": (year,) if generator.random() < 0.8 else (),
                "price": (round(float(generator.uniform(-5, 20)), 1),),
            }
        ),
        signals=given({"popularity": generator.random(), "freshness": generator.random()}),
        fields=given({"title": f"New {generator.integers(1000)}", "year": None}),
        features=given({"movie": (int(movie),), "genres": tuple(genres.tolist())}) if whole else {},
    )


def random_history(
    item_ids: Sequence[int], count: int, seed: int, *, rare: int = 4
) -> list[Mutation]:
    """Upserts, patches and deletes of old and new items, some refused, and rows of tables."""
    generator = np.random.default_rng(seed)
    # Few enough that most of them are changed several times.
    known = [*generator.choice(item_ids, 60, replace=False).tolist(), *range(100, 130)]
    history: list[Mutation] = []
    for version in range(1, count + 1):
        item_id = int(generator.choice(known))
        kind = generator.random()
        if kind < 0.3:
            values = random_values(generator, whole=True, rare=rare)
            history.append(Upsert(item_id, version, values))
        elif kind < 0.8:
            values = random_values(generator, whole=False, rare=rare)
            history.append(Patch(item_id, version, values))
        elif kind < 0.97:
            history.append(Delete(item_id, version, urgent=bool(kind > 0.9)))
        else:
            rows = tuple(generator.choice(30, 4, replace=False).tolist())
            rows_of = generator.normal(size=(4, 16)).astype(np.float32)
            history.append(RowChange("history", version, rows, rows_of))
    return history


def one_by_one(
    items: dict[int, ItemValues], history: Sequence[Mutation], planes: PlaneDictionary
) -> dict[int, ItemValues]:
    """What a history makes of some items, by the meaning of each mutation."""
    items = dict(items)
    for one in history:
        if isinstance(one, Delete):
            items.pop(one.item_id, None)
        elif isinstance(one, Upsert):
            movie = one.values.features.get("movie", ())
            fits = count_rare(one.values, planes) <= planes.terms_width
            if fits and not {NOT_FINITE, TOO_LARGE} & set(movie):
                items[one.item_id] = one.values
        elif isinstance(one, Patch) and one.item_id in items:
            patched = items[one.item_id].patched(one.values)
            if count_rare(patched, planes) <= planes.terms_width:
                items[one.item_id] = patched
    return items


def batches_of(history: Sequence[Mutation], seed: int | None) -> list[Sequence[Mutation]]:
    """The history whole, one by one (seed 0), or cut at random."""
    if seed is None:
        return [history]
    if seed == 0:
        return [[one] for one in history]
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(len(history), len(history) // 12, replace=False)).tolist()
    ends = [*cuts, len(history)]
    return [history[start:end] for start, end in zip([0, *cuts], ends, strict=True)]


def follow(executor: ShardExecutor, batches: Sequence[Sequence[Mutation]]) -> list[tuple[int, str]]:
    done, rejected = 0, []
    for batch in batches:
        done += len(batch)
        rejected += executor.apply(executor.updater.prepare(batch), (done,))
    assert executor.cut == (done,)
    return rejected


@pytest.fixture(scope="module")
def history(generation) -> list[Mutation]:
    return random_history(generation.catalogue.item_ids.tolist(), 700, seed=5)


@pytest.fixture(scope="module")
def requests(generation, request_maker: Callable[..., list[Request]]) -> list[Request]:
    return request_maker(generation, 80, seed=21)


@pytest.fixture(scope="module")
def alone(generation, history: list[Mutation]) -> ShardExecutor:
    """One shard that took every mutation by itself."""
    executor = load_executor(generation.path, 0, 1, headroom=0.5)
    follow(executor, batches_of(history, 0))
    return executor


@pytest.fixture(scope="module")
def expected(ask_shards: Ask, alone: ShardExecutor, requests: list[Request]) -> list[Answer]:
    return ask_shards([alone], requests, "expected")


@pytest.fixture(scope="module")
def final(generation, history: list[Mutation], alone: ShardExecutor) -> Catalogue:
    """The items that the history leaves."""
    schema = generation.schema
    ids = generation.catalogue.item_ids.tolist()
    items = dict(zip(ids, to_values(generation.catalogue, schema), strict=True))
    items = one_by_one(items, history, alone.spec.planes)
    return to_catalogue(sorted(items), [items[one] for one in sorted(items)], schema)


def changed_model(model: TwoTower, history: Sequence[Mutation]) -> TwoTower:
    changed = copy.deepcopy(model)
    for one in history:
        if isinstance(one, RowChange):
            changed.update_rows(one.table, torch.tensor(one.rows), torch.from_numpy(one.values))
    return changed


def publish(
    path: Path,
    generation: Any,
    model: TwoTower,
    catalogue: Catalogue,
    semantic: SemanticSource | None = None,
) -> Path:
    spec = open_snapshot(generation.path).spec
    return publish_generation(
        path,
        name="films",
        model=model,
        builder="two_tower",
        config=model.config.model_dump(mode="json"),
        catalogue=catalogue,
        schema=generation.schema,
        defaults=spec.defaults,
        num_clusters=spec.num_clusters,
        semantic=semantic,
        golden_requests=0,
    ).path


def test_the_history_covers_what_matters(
    generation, history: list[Mutation], final: Catalogue
) -> None:
    rejected = follow(load_executor(generation.path, 0, 1, headroom=0.5), batches_of(history, 0))
    reasons = {reason for _, reason in rejected}
    wanted = (
        "terms_width=4",
        "values that are not finite",
        "values beyond float16",
        "there is no such item to patch",
        "the item would have 5 rare values, this generation holds 4",
    )
    assert all(any(one in reason for reason in reasons) for one in wanted)
    base = set(generation.catalogue.item_ids.tolist())
    ids = set(final.item_ids.tolist())
    assert ids - base
    assert base - ids


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_neither_shards_nor_batches_change_an_answer(
    ask_shards: Ask,
    generation,
    history: list[Mutation],
    requests: list[Request],
    expected: list[Answer],
    num_shards: int,
    seed: int | None,
) -> None:
    shards = [
        load_executor(generation.path, one, num_shards, headroom=0.5) for one in range(num_shards)
    ]
    for number, shard in enumerate(shards):
        follow(shard, batches_of(history, None if seed is None else seed + 10 * number))
    assert_same(ask_shards(shards, requests, "q"), expected)


def test_local_devices_do_not_change_an_answer(
    ask_shards: Ask,
    generation,
    history: list[Mutation],
    requests: list[Request],
    expected: list[Answer],
) -> None:
    devices = ("cpu", "cpu", "cpu")
    executor = load_executor(generation.path, 0, 1, devices=devices, headroom=0.5)
    follow(executor, batches_of(history, 4))
    assert_same(ask_shards([executor], requests, "q"), expected)


@pytest.mark.slow
def test_semantic_candidates_follow_the_updates(
    ask_shards: Ask,
    semantic_generation,
    history: list[Mutation],
    request_maker: Callable[..., list[Request]],
) -> None:
    requests = request_maker(semantic_generation, 40, seed=24)
    path = semantic_generation.path
    before = ask_shards([load_executor(path, 0, 1)], requests, "q")
    answers = []
    for num_shards, seed in ((1, 0), (3, 2), (2, None)):
        shards = [load_executor(path, one, num_shards, headroom=0.5) for one in range(num_shards)]
        for shard in shards:
            follow(shard, batches_of(history, seed))
        answers.append(ask_shards(shards, requests, "q"))
    assert_same(answers[1], answers[0])
    assert_same(answers[2], answers[0])
    changed = [
        one.item_ids.tolist() != other.item_ids.tolist()
        for one, other in zip(answers[0], before, strict=True)
    ]
    assert sum(changed) > 10


def test_what_is_refused_does_not_depend_on_batches(generation, history: list[Mutation]) -> None:
    found = []
    for seed in (0, None, 3):
        executor = load_executor(generation.path, 0, 1, headroom=0.5)
        found.append(follow(executor, batches_of(history, seed)))
    whole = {item_id for item_id, _ in found[0]}
    assert all({item_id for item_id, _ in one} <= whole for one in found[1:])


def test_what_comes_early_or_again_changes_nothing(
    ask_shards: Ask, generation, history: list[Mutation], requests: list[Request]
) -> None:
    def answers(*batches: Sequence[Mutation]) -> list[Answer]:
        executor = load_executor(generation.path, 0, 1, headroom=0.5)
        follow(executor, batches)
        return ask_shards([executor], requests, "q")

    urgent = [one for one in history if isinstance(one, Delete) and one.urgent]
    begun = history[:400]
    wanted = answers(begun, urgent)
    assert_same(answers(urgent, *batches_of(begun, 6)), wanted)
    assert_same(answers(begun, history[100:300], urgent, history[:200], urgent), wanted)


def test_the_live_shard_answers_as_a_generation_of_its_items_would(
    ask_shards: Ask,
    generation,
    alone: ShardExecutor,
    final: Catalogue,
    history: list[Mutation],
    request_maker: Callable[..., list[Request]],
    tmp_path: Path,
) -> None:
    fresh = publish(tmp_path, generation, changed_model(generation.model, history), final)
    requests = [
        Request(features=one.features, k=one.k, filter=one.filter, exact=True)
        for one in request_maker(generation, 80, seed=22)
    ]
    retriever = load_retriever(fresh)[0]
    wanted = [retriever([one])[0] for one in requests]
    assert any(len(one.item_ids) for one in wanted)
    assert_same(ask_shards([alone], requests, "q"), wanted, counts=False)


def test_the_live_shard_holds_the_fields_of_its_items(
    alone: ShardExecutor, final: Catalogue
) -> None:
    found = alone.fields(final.item_ids.tolist(), ["title", "year"])
    assert found["title"] == final.fields["title"].tolist()
    null = np.iinfo(np.int64).min
    assert found["year"] == [None if one == null else one for one in final.fields["year"].tolist()]


@pytest.mark.parametrize("fixture", ["generation", "semantic_generation"])
def test_the_next_generation_can_be_made_of_the_live_one_and_its_log(
    ask_shards: Ask,
    request: pytest.FixtureRequest,
    fixture: str,
    request_maker: Callable[..., list[Request]],
    tmp_path: Path,
) -> None:
    made = request.getfixturevalue(fixture)
    # With few rare values, nothing is refused for having too many.
    history = random_history(made.catalogue.item_ids.tolist(), 500, seed=9, rare=1)
    executor = load_executor(made.path, 0, 1, headroom=0.5)
    follow(executor, batches_of(history, 1))
    rebased = rebase(open_snapshot(made.path), iter(history))
    fresh = publish(
        tmp_path, made, cast(TwoTower, rebased.model), rebased.catalogue, semantic=rebased.semantic
    )
    requests = [
        Request(features=one.features, k=one.k, filter=one.filter, exact=True)
        for one in request_maker(made, 40, seed=23)
    ]
    retriever = load_retriever(fresh)[0]
    wanted = [retriever([one])[0] for one in requests]
    assert_same(ask_shards([executor], requests, "q"), wanted, counts=False)


@pytest.fixture(scope="module")
def work(generation, requests: list[Request]) -> Work:
    whole = load_retriever(generation.path)[0]
    compiled = [compile_request(one, whole.spec) for one in requests[:30]]
    plans = [one.plan(whole.spec, 300 if one.needs_count else None) for one in compiled]
    encoded = whole.encode([one.features for one in compiled])
    return assemble(compiled, plans, encoded.embedding, encoded.user_state)


class Asked(NamedTuple):
    """What a query found, and what it may show of it."""

    rounds: RoundTwo
    fields: list[dict[str, list[FieldValue]]]


def cutoffs_of(executors: Sequence[ShardExecutor], work: Work, key: str) -> Cutoffs:
    firsts = [one.open(key, work, float("inf")) for one in executors]
    return Merge().cutoffs(firsts, work.ann_k, work.semantic_k)


def finished(
    executors: Sequence[ShardExecutor], work: Work, key: str, cutoffs: Cutoffs
) -> list[Asked]:
    rounds = [one.close(key, cutoffs) for one in executors]
    return [
        Asked(
            second,
            [
                executor.fields([one for one in ids if one >= 0], ["title", "year"], key)
                for ids in second.item_ids.tolist()
            ],
        )
        for executor, second in zip(executors, rounds, strict=True)
    ]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_query_that_is_open_reads_the_cut_at_which_it_was_opened(
    generation, history: list[Mutation], work: Work, num_shards: int
) -> None:
    """Several queries stay open over several commits; a twin without any gives what they must."""
    busy, quiet = (
        [load_executor(generation.path, one, num_shards, headroom=1.0) for one in range(num_shards)]
        for _ in range(2)
    )
    waiting: list[tuple[str, Cutoffs, list[Asked]]] = []
    different = 0
    for step, batch in enumerate(batches_of(history, 8)[:24]):
        key = f"q{step}"
        cutoffs = cutoffs_of(busy, work, key)
        assert all(map(torch.equal, cutoffs, cutoffs_of(quiet, work, key)))
        waiting.append((key, cutoffs, finished(quiet, work, key, cutoffs)))
        for executor in (*busy, *quiet):
            executor.release(key if executor in quiet else "unknown")
            executor.apply(executor.updater.prepare(batch), (step,))
        if len(waiting) < 4:
            continue
        key, cutoffs, wanted = waiting.pop(step % 3)
        found = finished(busy, work, key, cutoffs)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.rounds.item_ids, other.rounds.item_ids)
            assert torch.equal(one.rounds.values, other.rounds.values)
            assert torch.equal(one.rounds.tasks, other.rounds.tasks)
            assert one.fields == other.fields
        later = [
            executor.fields([one for one in ids if one >= 0], ["title", "year"])
            for executor, asked in zip(busy, found, strict=True)
            for ids in asked.rounds.item_ids.tolist()
        ]
        different += later != [one for asked in found for one in asked.fields]
        for executor in busy:
            executor.release(key)
    assert different > 3
    assert all(one.usage().retired_slots > 0 for one in busy)
    for executor in busy:
        for key, _, _ in waiting:
            executor.release(key)
    assert all(one.usage().retired_slots == 0 for one in busy)
