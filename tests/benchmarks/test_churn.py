from typing import Any

import numpy as np
import pytest

from benchmarks import churn
from silvershard.shard.live_index import LiveIndex


@pytest.fixture(scope="module")
def contents() -> churn.Contents:
    return churn.Contents(512, 16)


@pytest.fixture
def world(contents: churn.Contents) -> tuple[LiveIndex, churn.State, Any]:
    state = churn.State(contents, 1_000)
    spec, partition = state.spec(16), state.partition()
    index = churn.build_index([partition], spec, headroom=0.5)
    store = churn.FieldStore(partition.catalogue.item_ids, partition.catalogue.fields)
    return LiveIndex(index, store, spec, contents.centroids), state, spec


def test_a_run_ends_with_the_catalogue_and_the_free_pages_that_it_began_with() -> None:
    figures = churn.run(2_000, 12_000, 16, 200)
    assert figures["updates"] == 12_000
    assert figures["free_pages_after"] == figures["free_pages_before"]
    assert figures["free_pages_fewest"] < figures["free_pages_before"]
    assert figures["restoring_updates"] > 500


def test_updates_are_of_every_kind_and_the_last_ones_restore_the_catalogue(
    contents: churn.Contents,
) -> None:
    state = churn.State(contents, 1_000)
    changes = state.churned(500)
    sizes = (len(changes.patches.item_ids), len(changes.upserts.item_ids), len(changes.deletes))
    assert sum(sizes) == 500
    for size, share in zip(sizes, (0.7, 0.2, 0.1), strict=True):
        assert abs(size - 500 * share) < 50
    while len(state.restored(100).upserts.item_ids):
        pass
    assert state.alive.all()
    assert (state.content == state.base).all()
    assert (state.tags_of == state.base).all()


@pytest.mark.parametrize("name", ["codes", "cache", "terms", "columns", "planes"])
def test_an_index_that_differs_from_a_rebuild_passes_no_gate(
    world: tuple[LiveIndex, churn.State, Any], name: str
) -> None:
    live, state, spec = world
    for _ in range(3):
        live.apply(state.churned(200))
        live.reclaim(live.epoch)
    churn.check_equal(live, state, spec)
    tensor = live.index.get_buffer(name)
    if name == "planes":
        tensor[1:] = 0
    else:
        tensor += 1
    with pytest.raises(RuntimeError, match="differ"):
        churn.check_equal(live, state, spec)


def test_an_index_that_lost_an_item_passes_no_gate(
    world: tuple[LiveIndex, churn.State, Any],
) -> None:
    live, state, spec = world
    live.apply(state.churned(200))
    state.alive[np.flatnonzero(~state.alive)[0]] = True
    with pytest.raises(RuntimeError, match="other items"):
        churn.check_equal(live, state, spec)


def test_rejected_updates_end_a_run(world: tuple[LiveIndex, churn.State, Any]) -> None:
    live, state, _ = world
    pauses = churn.Pauses([], [])
    pauses.commit(live, state.churned(100))
    assert pauses.updates == 100
    changes = state.churned(300)
    unknown = changes.patches._replace(item_ids=changes.patches.item_ids + (1 << 62))
    with pytest.raises(RuntimeError, match="rejected"):
        pauses.commit(live, changes._replace(patches=unknown))
