from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.index import ItemIndex
from silvershard.shard import assignment_sample
from silvershard.shard.assignment_sample import SAMPLE, AssignmentSample
from silvershard.shard.build import build_index
from silvershard.shard.page_pool import PagePool
from silvershard.shard.snapshot import open_snapshot


class Sampled:
    """A generation and the sample of its index; some of its items may stand elsewhere."""

    def __init__(self, generation: Any, away: int = 0) -> None:
        snapshot = open_snapshot(generation.path)
        loaded = [snapshot.load_partition(one) for one in range(snapshot.spec.num_partitions)]
        held = [one for one in loaded if one is not None]
        self.index: ItemIndex = build_index(held, snapshot.spec, headroom=0.5)
        self.centroids = snapshot.load_dense()[0]
        self.pool = PagePool(self.index.page_table, self.index.planes[0], self.centroids)
        self.elsewhere = np.random.default_rng(1).permutation(
            self.index.slots_of(torch.from_numpy(generation.catalogue.item_ids)).numpy()
        )[:away]
        self.sample = AssignmentSample(self.index, self.cluster_of, self.centroids)

    def cluster_of(self, slots: Any) -> Any:
        """The cluster of every slot, another one for those that stand elsewhere."""
        clusters = self.pool.cluster_of(slots)
        return np.where(np.isin(slots, self.elsewhere), (clusters + 1) % 16, clusters)


def exact_error(one: Sampled) -> float:
    """The share over all items, in float64."""
    slots = np.flatnonzero(one.index.item_ids.flatten().numpy() >= 0)
    rows = one.index.cache.flatten(0, 1)[torch.from_numpy(slots)].double()
    cosines = torch.nn.functional.normalize(rows, dim=1) @ one.centroids.double().T
    own = cosines[torch.arange(len(slots)), torch.from_numpy(one.cluster_of(slots))]
    return float((cosines.amax(1) - own > 2**-9).double().mean())


@pytest.mark.parametrize("away", [0, 60, 300, 600])
def test_the_error_is_the_share_of_items_that_stand_elsewhere(generation: Any, away: int) -> None:
    one = Sampled(generation, away)
    exact = exact_error(one)
    # Balanced lists put some of these random films elsewhere to begin with.
    assert exact >= away / 600 * 0.9
    # Three standard deviations of 1,024 draws.
    assert one.sample.error == pytest.approx(exact, abs=0.05)


def test_looks_follow_the_items_as_they_are_now(generation: Any) -> None:
    one = Sampled(generation)
    before = one.sample.error
    one.elsewhere = np.arange(one.index.item_ids.numel())
    one.sample.look()
    assert before < one.sample.error < before + 0.05
    for _ in range(SAMPLE):
        one.sample.look()
    assert one.sample.error == pytest.approx(exact_error(one), abs=0.05)
    assert one.sample.error > before + 0.5


def test_items_that_are_deleted_are_not_drawn(generation: Any) -> None:
    one = Sampled(generation, away=300)
    dead = torch.from_numpy(one.elsewhere)
    live = one.index.planes[0].view(-1)
    for slot in dead.tolist():
        live[slot >> 6] &= ~(torch.tensor(1) << (slot & 63))
    again = AssignmentSample(one.index, one.cluster_of, one.centroids)
    assert again.error < 0.2 < one.sample.error


def test_an_index_without_items_or_without_pages_has_no_error(generation: Any) -> None:
    spec = open_snapshot(generation.path).spec
    centroids = open_snapshot(generation.path).load_dense()[0]
    for headroom in (0.0, 1.0):
        empty = build_index([], spec, headroom=headroom)
        sample = AssignmentSample(empty, lambda slots: slots * 0, centroids)
        sample.look()
        assert sample.error == 0


def test_a_look_reads_fewer_items_where_there_are_more_centroids(
    generation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Sampled(generation)
    read: list[int] = []
    monkeypatch.setattr(one.sample, "_take", read.append)
    one.sample.look()
    monkeypatch.setattr(assignment_sample, "_WORK", 5 * one.centroids.numel())
    tight = AssignmentSample(one.index, one.cluster_of, one.centroids)
    monkeypatch.setattr(tight, "_take", read.append)
    tight.look()
    assert read == [32, 5]
