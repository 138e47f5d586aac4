import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.model.catalogue import NULL_INT, Ragged
from silvershard.model.two_tower import TwoTower
from silvershard.shard.changes import NewItems
from silvershard.shard.executor import LiveParts
from silvershard.shard.item_columns import to_values
from silvershard.shard.load import load_live
from silvershard.shard.mutation_batch import MutationBatch, SignalPatches
from silvershard.shard.mutations import (
    Delete,
    ItemValues,
    Mutation,
    Patch,
    RowChange,
    Upsert,
    updatable_tables,
)
from silvershard.shard.partition import partition_of
from silvershard.shard.snapshot import PartitionData, open_snapshot
from silvershard.shard.updater import Prepared, ShardUpdater


@pytest.fixture(scope="module")
def live(generation) -> LiveParts:
    return load_live(generation.path, headroom=0.5)[1]


def upserts_of(data: PartitionData, schema: Any) -> list[Upsert]:
    values = to_values(data.catalogue, schema)
    ids = data.catalogue.item_ids.tolist()
    return [Upsert(one, 1, value) for one, value in zip(ids, values, strict=True)]


def equal(one: Prepared, other: Prepared) -> bool:
    def flat(found: Any) -> list[Any]:
        if isinstance(found, Mapping):
            return [entry for name in sorted(found) for entry in (name, *flat(found[name]))]
        if isinstance(found, tuple | list):
            return [entry for one in found for entry in flat(one)]
        if isinstance(found, Tensor | np.ndarray):
            return [str(found.dtype), tuple(found.shape), np.asarray(found).tolist()]
        return [found]

    return repr(flat(one)) == repr(flat(other))


@pytest.mark.parametrize("fixture", ["generation", "semantic_generation"])
def test_an_upsert_has_the_bits_that_publishing_gives_the_item(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    made = request.getfixturevalue(fixture)
    snapshot = open_snapshot(made.path)
    updater = load_live(made.path, headroom=0.5)[1].updater
    data = snapshot.load_partition(3)
    assert data is not None
    ((changes,),) = updater.prepare(upserts_of(data, made.schema)).waves
    found = changes.upserts
    assert found.item_ids.tolist() == data.catalogue.item_ids.tolist()
    for name in ("codes", "scales", "cache"):
        assert torch.equal(getattr(found, name), getattr(data, name)), name
        assert getattr(found, name).dtype == getattr(data, name).dtype
    assert all(map(torch.equal, found.bits, data.bits))
    assert torch.equal(found.signals, torch.from_numpy(data.catalogue.signals))
    for name, column in data.catalogue.fields.items():
        assert found.fields[name].tolist() == column.tolist()
    if data.semantic_codes is None:
        assert found.semantic_codes is None
    else:
        assert found.semantic_codes is not None
        assert torch.equal(found.semantic_codes, data.semantic_codes)
    assert found.clusters.dtype == torch.int32
    # Balance may have moved an item that was published; few lists of these are too long.
    assert (found.clusters == data.clusters).float().mean() > 0.9


def test_a_patch_says_what_it_gives(live: LiveParts) -> None:
    patches = [
        Patch(1, 5, ItemValues(attributes={"genre": ("Drama",), "year": ()})),
        Patch(2, 6, ItemValues(signals={"freshness": 0.5}, fields={"title": "Ran"})),
        Patch(3, 7, ItemValues(attributes={"maker": (300,)}, fields={"year": None})),
    ]
    found = live.updater.prepare(patches).waves[0][0].patches
    assert found.item_ids.tolist() == [1, 2, 3]
    assert found.versions.tolist() == [5, 6, 7]
    assert {name: given.tolist() for name, given in found.attributes.items()} == {
        "genre": [True, False, False],
        "year": [True, False, False],
        "maker": [False, False, True],
    }
    assert found.bits.exact.sum(1).tolist() == [1, 0, 0]
    assert (found.bits.terms != found.bits.terms.max()).sum(1).tolist() == [0, 0, 1]
    assert found.signals.tolist() == [[0, 0], [0, 0.5], [0, 0]]
    assert found.signals_given.tolist() == [[False, False], [False, True], [False, False]]
    titles, given = found.fields["title"]
    assert titles.tolist() == ["", "Ran", ""]
    assert given.tolist() == [False, True, False]
    years, given = found.fields["year"]
    assert years.tolist() == [NULL_INT] * 3
    assert given.tolist() == [False, False, True]
    features = Patch(4, 8, ItemValues(features={"genres": ("Horror",)}))
    unchanged = live.updater.prepare([features]).waves[0][0].patches
    assert unchanged.attributes == {}
    assert unchanged.fields == {}


def test_an_upsert_is_embedded_by_its_own_features_not_by_those_of_a_later_patch(
    live: LiveParts,
) -> None:
    upsert = Upsert(9, 1, ItemValues(features={"genres": ("Drama",)}))
    patch = Patch(9, 2, ItemValues({"genre": ("Horror",)}, features={"genres": ("Horror",)}))
    alone = live.updater.prepare([upsert]).waves[0][0].upserts
    both = live.updater.prepare([upsert, patch]).waves[0][0].upserts
    assert torch.equal(alone.cache, both.cache)
    assert both.versions.tolist() == [2]
    assert not torch.equal(alone.bits.exact, both.bits.exact)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_item_goes_to_the_part_that_holds_its_partition(generation, num_shards: int) -> None:
    ids = list(range(500))
    mutations: list[Mutation] = [Delete(one, 1) for one in ids]
    mutations += [Upsert(one + 500, 1, ItemValues()) for one in ids]
    mutations += [Patch(one + 1000, 1, ItemValues()) for one in ids]
    seen: list[int] = []
    for shard in range(num_shards):
        retriever, live = load_live(
            generation.path, shard=shard, num_shards=num_shards, devices=("cpu",) * 3, headroom=0.5
        )
        owned = range(shard * 64 // num_shards, (shard + 1) * 64 // num_shards)
        for wave in live.updater.prepare(mutations).waves:
            for part, changes in enumerate(wave):
                found = torch.cat(
                    [changes.upserts.item_ids, changes.patches.item_ids, changes.deletes]
                )
                partitions = partition_of(found, 64)
                assert all(one in owned for one in partitions.tolist())
                assert (partitions % 3 == part).all()
                assert len(found)
                seen += found.tolist()
        for part, index in enumerate(retriever.indexes):
            held = index.item_ids[index.item_ids >= 0]
            assert (live.updater.parts_of(held.tolist()) == part).all()
    assert sorted(seen) == list(range(1500))


def test_what_cannot_be_taken_is_rejected_alone(
    live: LiveParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TwoTower.embed_items

    def failing(self: TwoTower, features: Mapping[str, Ragged]) -> Tensor:
        embeddings = whole(self, features).clone()
        embeddings[1] = float("nan")
        embeddings[2] = 1e5
        return embeddings

    monkeypatch.setattr(TwoTower, "embed_items", failing)
    values = ItemValues(features={"movie": (3,)})
    found = live.updater.prepare(
        [
            Upsert(1, 1, values),
            Upsert(2, 2, values),
            Patch(2, 3, ItemValues(signals={"popularity": 1})),
            Upsert(3, 4, values),
            Upsert(4, 5, values),
            Upsert(5, 6, ItemValues(attributes={"colour": ("red",)})),
            RowChange("movie", 7, (1,), np.zeros((1, 16), dtype=np.float32)),
            Delete(6, 8),
            Patch(6, 9, ItemValues()),
        ]
    )
    ((changes,),) = found.waves
    assert changes.upserts.item_ids.tolist() == [1, 4]
    assert bool(torch.isfinite(changes.upserts.cache).all())
    # The patch goes to the item as it was before.
    assert changes.patches.item_ids.tolist() == [2]
    assert changes.deletes.tolist() == [6]
    assert changes.delete_versions.tolist() == [8]
    reasons = dict(found.rejected)
    assert reasons[2] == "the item tower gave values that are not finite"
    assert reasons[3] == "the item tower gave values beyond float16"
    assert reasons[5].startswith("attributes: must name attributes of the schema")
    assert reasons[-1].startswith("table: must be a table that only the user tower reads")
    assert reasons[6] == "there is no such item to patch"
    assert len(reasons) == 5


@pytest.mark.parametrize(("shard", "devices"), [(0, 1), (1, 3)])
def test_a_batch_in_columns_becomes_what_its_mutations_become_one_by_one(
    generation, shard: int, devices: int
) -> None:
    draw = np.random.default_rng(0)
    signals = generation.schema.signals
    placed: list[tuple[int, Mutation]] = []
    rows: list[list[int]] = [[], []]
    for place in range(300):
        item = int(draw.integers(0, 400))
        if draw.random() < 0.8:
            rows[place % 2].append(place)
            placed.append((place, Patch(item, place + 1, ItemValues())))
        else:
            values = ItemValues(signals={signals[0]: 0.5})
            kinds = (Delete(item, place + 1), Upsert(item, place + 1, values))
            placed.append((place, kinds[place % 2]))
    columns = []
    for given, places in zip((signals, signals[:1]), rows, strict=True):
        of_signals = [placed[place][1] for place in places]
        values = draw.normal(size=(len(places), len(given))).astype(np.float32)
        columns.append(
            SignalPatches(
                np.array(places),
                np.array([one.item_id for one in of_signals if isinstance(one, Patch)]),
                np.array([one.version for one in of_signals]),
                tuple(given)[::-1],
                values,
            )
        )
    others = [one for one in placed if not isinstance(one[1], Patch)]
    singles = sorted(
        [*others, *columns[0].one_by_one(), *columns[1].one_by_one()], key=itemgetter(0)
    )
    both = []
    for batch in (MutationBatch(others, columns), MutationBatch(singles)):
        _, live = load_live(
            generation.path, shard=shard, num_shards=2, devices=("cpu",) * devices, headroom=0.5
        )
        prepared = live.updater.prepare_batch(batch)
        refused = {one for one in prepared.rejected if "no such item" not in one[1]}
        for wave in prepared.waves:
            for part, changes in zip(live.parts, wave, strict=True):
                part.apply(changes)
        assert not refused
        index = [part.index for part in live.parts]
        ids = torch.arange(400)
        both.append(
            [
                (
                    at := one.slots_of(ids),
                    one.signals.flatten(0, 1)[at.clamp(min=0)][at >= 0],
                    one.terms.flatten(0, 1)[at.clamp(min=0)][at >= 0],
                    one.id_map.locate(ids.numpy()).versions,
                )[1:]
                for one in index
            ]
        )
    for mine, other in zip(*both, strict=True):
        for one, same in zip(mine, other, strict=True):
            assert np.array_equal(one, same)


def test_nothing_prepares_to_nothing(live: LiveParts) -> None:
    assert live.updater.prepare([]) == Prepared((), (), ())


def test_preparing_is_the_same_beside_a_thread_that_answers(
    generation, request_maker: Callable[..., Any]
) -> None:
    retriever, live = load_live(generation.path, headroom=0.5)
    snapshot = open_snapshot(generation.path)
    mutations: list[Mutation] = []
    for partition in range(8):
        data = snapshot.load_partition(partition)
        assert data is not None
        mutations += upserts_of(data, generation.schema)
    wanted = live.updater.prepare(mutations)
    requests = request_maker(generation, 20, seed=3)
    answers = retriever(requests)
    ended = threading.Event()
    different: list[int] = []

    def answer() -> None:
        while not ended.is_set():
            for one, other in zip(retriever(requests), answers, strict=True):
                if not torch.equal(one.scores, other.scores):
                    different.append(1)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        assert all(equal(live.updater.prepare(mutations), wanted) for _ in range(10))
    finally:
        ended.set()
        thread.join()
    assert not different


@pytest.mark.parametrize(("precision", "devices"), [("float32", 1), ("int8", 1), ("int8", 3)])
def test_rows_of_user_tables_are_written_once(
    publish_model: Callable[..., Any], precision: str, devices: int
) -> None:
    made = publish_model(precision=precision)
    retriever, live = load_live(made.path, devices=("cpu",) * devices, headroom=0.5)
    history = made.catalogue.item_ids[::2][:5].tolist()
    users = [{"history": history}, {}]
    before = retriever.encode(users).embedding
    items = retriever.model.embed_items(made.catalogue.features)
    rows = retriever.model.vocabulary("movie").rows(np.array(history, dtype=np.int64))
    values = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    change = RowChange("history", 3, tuple(rows.tolist()), values)
    prepared = live.updater.prepare([change])
    assert prepared.waves == ()
    assert torch.equal(retriever.encode(users).embedding, before)
    live.updater.write_rows(prepared.rows)
    after = retriever.encode(users).embedding
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    for version in (2, 3):
        live.updater.write_rows(
            live.updater.prepare([replace(change, version=version, values=values * 0)]).rows
        )
    assert torch.equal(retriever.encode(users).embedding, after)
    live.updater.write_rows(
        live.updater.prepare([replace(change, version=4, values=values * 0)]).rows
    )
    assert not torch.equal(retriever.encode(users).embedding[0], after[0])
    # The tower of the items, and so what is in the index, stays.
    assert torch.equal(retriever.model.embed_items(made.catalogue.features), items)


def test_rows_are_made_for_the_tower_before_the_thread_of_the_model_has_them(
    live: LiveParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(48, dtype=np.float32).reshape(3, 16)
    prepared = live.updater.prepare([RowChange("history", 3, (7, 2, 4), values)])
    (change,) = prepared.rows
    assert (change.table, change.version) == ("history", 3)
    assert torch.equal(change.rows, torch.tensor([7, 2, 4]))
    assert torch.equal(change.values, torch.from_numpy(values))
    given: list[Any] = []
    monkeypatch.setattr(
        type(live.updater._retriever.model), "update_rows", lambda _, *args: given.append(args)
    )
    live.updater.write_rows(prepared.rows)
    ((table, rows, written, version),) = given
    assert (table, version) == ("history", 3)
    assert rows is change.rows
    assert written is change.values


def test_rows_of_remote_tables_are_written_by_their_source(
    publish_model: Callable[..., Any],
) -> None:
    made = publish_model(remote=("history",))
    retriever, live = load_live(made.path, headroom=0.5)
    users = [{"history": made.catalogue.item_ids[::2][:5].tolist()}]
    before = retriever.encode(users).embedding
    every = tuple(range(1, 151))
    change = RowChange("history", 1, every, np.ones((150, 16), dtype=np.float32))
    prepared = live.updater.prepare([change])
    assert prepared.rejected == ()
    assert torch.equal(retriever.encode(users).embedding, before)
    live.updater.write_rows(prepared.rows)
    after = retriever.encode(users).embedding
    assert not torch.equal(after, before)
    again = live.updater.prepare([replace(change, values=change.values * 0)])
    live.updater.write_rows(again.rows)
    assert torch.equal(retriever.encode(users).embedding, after)


def test_an_updater_of_no_partition_takes_nothing(generation) -> None:
    retriever, _ = load_live(generation.path, headroom=0.5)
    config = generation.model.config.model_dump(mode="json")
    nobody = ShardUpdater(retriever, range(0, 0), updatable_tables("two_tower", config))
    found = nobody.prepare([Delete(1, 1), Upsert(2, 1, ItemValues())])
    assert found == Prepared((), (), ())


def test_new_items_are_complete(live: LiveParts) -> None:
    found = live.updater.prepare([Upsert(1, 1, ItemValues())]).waves[0][0].upserts
    assert isinstance(found, NewItems)
    assert found.codes.shape == (1, 16)
    assert found.signals.tolist() == [[0, 0]]
    assert found.fields["title"].tolist() == [""]
