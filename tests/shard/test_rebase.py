from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Catalogue
from silvershard.shard.errors import SnapshotError
from silvershard.shard.item_columns import to_values
from silvershard.shard.load import load_live
from silvershard.shard.mutations import Delete, ItemValues, Mutation, Patch, RowChange, Upsert
from silvershard.shard.publish import publish_generation
from silvershard.shard.rebase import Rebased, catalogue_at, rebase
from silvershard.shard.snapshot import Snapshot, open_snapshot

FULL = ItemValues(
    attributes={"genre": ("Western",), "maker": (3,), "year": (1999,)},
    signals={"popularity": 0.5},
    fields={"title": "Ran"},
    features={"movie": (7,), "genres": ("Drama",)},
)


def values_of(catalogue: Catalogue, schema: Any) -> dict[int, ItemValues]:
    return dict(zip(catalogue.item_ids.tolist(), to_values(catalogue, schema), strict=True))


@pytest.fixture(scope="module")
def snapshot(generation) -> Snapshot:
    return open_snapshot(generation.path)


def test_without_updates_the_items_are_those_of_the_snapshot(generation, snapshot) -> None:
    made = rebase(snapshot, [])
    wanted = values_of(generation.catalogue, generation.schema)
    assert made.catalogue.item_ids.tolist() == sorted(wanted)
    assert values_of(made.catalogue, generation.schema) == wanted
    assert made.semantic is None
    assert made.remote_rows == {}
    state = generation.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in made.model.state_dict().items())


def test_updates_are_applied_in_the_order_of_the_log(generation, snapshot) -> None:
    first, second, third = generation.catalogue.item_ids[:3].tolist()
    base = values_of(generation.catalogue, generation.schema)
    patch = ItemValues({"genre": ()}, {"freshness": 0.25}, {"year": None}, {"genres": ("Horror",)})
    made = rebase(
        snapshot,
        [
            Upsert(5, 1, FULL),
            Patch(5, 2, patch),
            Delete(first, 3),
            Patch(first, 4, patch),
            Upsert(second, 5, FULL),
            Delete(second, 6),
            Upsert(second, 7, ItemValues()),
            Patch(third, 8, patch),
            Patch(third, 9, ItemValues(fields={"title": "New"})),
            Patch(6, 10, patch),
            Upsert(8, 11, FULL),
            Delete(8, 12),
            Patch(third, 8, ItemValues(fields={"title": "came again"})),
        ],
    ).catalogue
    made.validate(generation.schema)
    found = values_of(made, generation.schema)
    assert found.keys() == (base.keys() | {5}) - {first}
    assert found[5].attributes == {**FULL.attributes, "genre": (), "price": ()}
    assert found[5].fields == {"title": "Ran", "year": None}
    # Embedded again from now on: raw features of a patch count in the next generation.
    assert found[5].features == {"movie": (7,), "genres": ("Horror",)}
    assert found[second].attributes == {"genre": (), "maker": (), "year": (), "price": ()}
    assert found[third].attributes == {**base[third].attributes, "genre": ()}
    assert found[third].signals == {**base[third].signals, "freshness": 0.25}
    assert found[third].fields == {"title": "New", "year": None}
    assert found[third].features == {**base[third].features, "genres": ("Horror",)}
    others = found.keys() - {5, second, third}
    assert all(found[one] == base[one] for one in others)


def test_the_items_do_not_depend_on_the_order_of_other_items(generation, snapshot) -> None:
    mutations: list[Mutation] = [Upsert(one, 1, FULL) for one in range(50)]
    mutations += [Delete(one, 1) for one in generation.catalogue.item_ids[:9].tolist()]
    one, other = (rebase(snapshot, given).catalogue for given in (mutations, mutations[::-1]))
    assert one.item_ids.tolist() == sorted(one.item_ids.tolist())
    assert one.item_ids.tolist() == other.item_ids.tolist()
    assert values_of(one, generation.schema) == values_of(other, generation.schema)


def test_what_the_live_generation_had_no_room_for_is_taken(generation, snapshot) -> None:
    crowded = Patch(5, 2, ItemValues(attributes={"maker": tuple(range(300, 320))}))
    live = load_live(generation.path, headroom=0.5)[1]
    assert live.updater.prepare([Upsert(5, 1, FULL), crowded]).rejected
    made = rebase(snapshot, [Upsert(5, 1, FULL), crowded]).catalogue
    assert values_of(made, generation.schema)[5].attributes["maker"] == tuple(range(300, 320))


def test_what_no_generation_of_the_schema_could_take_is_left_out(
    generation, snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = type(generation.model).embed_items

    def failing(self: Any, features: Any) -> torch.Tensor:
        embeddings = whole(self, features).clone()
        embeddings[[at for at in range(len(embeddings)) if 13 in features["movie"].row(at)]] *= 1e6
        return embeddings

    monkeypatch.setattr(type(generation.model), "embed_items", failing)
    held = int(generation.catalogue.item_ids[0])
    bad = ItemValues(features={"movie": (13,)})
    made = rebase(
        snapshot,
        [
            Upsert(held, 1, bad),
            Patch(held, 2, ItemValues(fields={"title": "Kept"})),
            Upsert(5, 3, bad),
            Upsert(6, 4, ItemValues(attributes={"colour": ("red",)})),
        ],
    ).catalogue
    found = values_of(made, generation.schema)
    base = values_of(generation.catalogue, generation.schema)[held]
    assert found[held] == base.patched(ItemValues(fields={"title": "Kept"}))
    assert found.keys() & {5, 6} == set()


def test_rows_of_local_tables_are_in_the_model(generation, snapshot) -> None:
    def change(version: int, *rows: int) -> RowChange:
        return RowChange("history", version, rows, np.full((len(rows), 16), version, np.float32))

    made = rebase(snapshot, [change(1, 3, 4), change(3, 4, 5), change(2, 3)])
    table = made.model.user_tables.weight("history")
    assert [float(table[row, 0].detach()) for row in (3, 4, 5)] == [1.0, 3.0, 3.0]
    before = generation.model.user_tables.weight("history")
    assert torch.equal(table[6:], before[6:])
    assert not torch.equal(table[:6], before[:6])


def test_rows_of_remote_tables_are_in_the_records(publish_model: Callable[..., Any]) -> None:
    local = publish_model(precision="int8")
    remote = publish_model(precision="int8", remote=("history",))
    values = np.random.default_rng(3).normal(size=(2, 16)).astype(np.float32)
    change = RowChange("history", 1, (3, 9), values)
    one, other = (rebase(open_snapshot(made.path), [change]) for made in (local, remote))
    assert torch.equal(other.remote_rows["history"], one.model.user_tables.records("history"))
    users = [{"history": local.catalogue.item_ids[::2][:20].tolist()}]
    assert torch.equal(one.model.encode(users).embedding, other.model.encode(users).embedding)


def test_what_is_rebased_can_be_published(
    publish_semantic: Callable[..., Any], tmp_path: Path
) -> None:
    base = publish_semantic(items=100)
    snapshot = open_snapshot(base.path)
    made: Rebased = rebase(snapshot, iter([Upsert(5, 1, FULL)]))
    published = publish_generation(
        tmp_path,
        name="films",
        model=made.model,
        builder=snapshot.manifest.builder.name,
        config=snapshot.manifest.builder.config,
        catalogue=made.catalogue,
        schema=snapshot.spec.item_schema,
        defaults=snapshot.spec.defaults,
        num_clusters=8,
        semantic=made.semantic,
        remote_rows=made.remote_rows,
        golden_requests=2,
    )
    assert published.documents == 101


def test_every_item_can_be_deleted(generation) -> None:
    gone = [Delete(one, 1) for one in generation.catalogue.item_ids.tolist()]
    left = catalogue_at(generation.catalogue, gone, generation.schema)
    left.validate(generation.schema)
    assert len(left) == 0
    again = catalogue_at(left, [Upsert(5, 1, FULL)], generation.schema)
    assert again.item_ids.tolist() == [5]


def test_a_snapshot_that_is_damaged_is_refused(generation, snapshot, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="is missing"):
        rebase(Snapshot(tmp_path, snapshot.manifest), [])
