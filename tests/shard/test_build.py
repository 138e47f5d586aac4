import pytest
import torch

from silvershard.kernels import PAD_TERM, popcount, unpack_bits
from silvershard.model.index import ItemIndex
from silvershard.model.planes import FIRST_EXACT_PLANE
from silvershard.shard.build import build_index
from silvershard.shard.snapshot import PartitionData, Snapshot, open_snapshot


@pytest.fixture(scope="module")
def snapshot(generation) -> Snapshot:
    return open_snapshot(generation.path)


@pytest.fixture(scope="module")
def partitions(snapshot: Snapshot) -> list[PartitionData]:
    loaded = [snapshot.load_partition(one) for one in range(snapshot.spec.num_partitions)]
    return [one for one in loaded if one is not None]


@pytest.fixture(scope="module")
def index(snapshot: Snapshot, partitions: list[PartitionData]) -> ItemIndex:
    return build_index(partitions, snapshot.spec)


def test_every_item_has_one_live_slot_on_a_page_of_its_cluster(
    index: ItemIndex, partitions: list[PartitionData]
) -> None:
    page_owner = {
        page: cluster
        for cluster, pages in enumerate(index.page_table.tolist())
        for page in pages
        if page >= 0
    }
    assert sorted(page_owner) == list(range(index.codes.shape[0]))
    live = unpack_bits(index.planes[0])
    assert torch.equal(live, index.item_ids >= 0)
    assert int(live.sum()) == 600
    for data in partitions:
        slots = index.slots_of(torch.from_numpy(data.catalogue.item_ids))
        assert bool((slots >= 0).all())
        clusters = [page_owner[slot // 64] for slot in slots.tolist()]
        assert clusters == data.clusters.tolist()


def test_every_column_of_an_item_is_in_its_slot(
    index: ItemIndex, partitions: list[PartitionData], snapshot: Snapshot
) -> None:
    planes = snapshot.spec.planes
    exact = unpack_bits(index.planes[FIRST_EXACT_PLANE : planes.first_bloom_plane]).flatten(1)
    for data in partitions:
        slots = index.slots_of(torch.from_numpy(data.catalogue.item_ids))
        assert torch.equal(index.codes.flatten(0, 1)[slots], data.codes)
        assert torch.equal(index.scales.flatten()[slots], data.scales)
        assert torch.equal(index.cache.flatten(0, 1)[slots], data.cache)
        assert torch.equal(index.terms.flatten(0, 1)[slots], data.bits.terms)
        assert torch.equal(index.columns.flatten(1)[:, slots].T, data.bits.columns)
        assert torch.equal(exact[:, slots].T, data.bits.exact)
        signals = torch.from_numpy(data.catalogue.signals)
        assert torch.equal(index.signals.flatten(0, 1)[slots], signals)


def test_pages_of_a_cluster_are_full_but_for_the_last(index: ItemIndex) -> None:
    live = popcount(index.planes[0]).sum(1)
    for pages in index.page_table.tolist():
        owned = [page for page in pages if page >= 0]
        assert owned == list(range(owned[0], owned[0] + len(owned))) if owned else True
        assert all(int(live[page]) == 64 for page in owned[:-1])
        assert all(int(live[page]) > 0 for page in owned)


def test_dead_slots_match_nothing(index: ItemIndex) -> None:
    dead = (index.item_ids < 0).flatten()
    assert int(dead.sum()) > 0
    assert bool((index.terms.flatten(0, 1)[dead] == PAD_TERM).all())
    assert not bool(unpack_bits(index.planes).flatten(1)[:, dead].any())


def test_items_of_a_cluster_are_shuffled_by_id(index: ItemIndex) -> None:
    longest = max(index.page_table.tolist(), key=lambda pages: sum(page >= 0 for page in pages))
    ids = [item for page in longest if page >= 0 for item in index.item_ids[page].tolist()]
    ids = [item for item in ids if item >= 0]
    assert ids != sorted(ids)


def test_the_order_of_the_partitions_changes_no_slot(
    index: ItemIndex, partitions: list[PartitionData], snapshot: Snapshot
) -> None:
    again = build_index(partitions[::-1], snapshot.spec)
    for name, tensor in index.named_buffers():
        assert torch.equal(tensor, again.get_buffer(name)), name


def test_no_partition_gives_an_empty_index(snapshot: Snapshot) -> None:
    empty = build_index([], snapshot.spec)
    assert empty.documents == 0
    assert empty.slots_of(torch.tensor([0, 5, -1])).tolist() == [-1, -1, -1]
    assert empty.page_table.shape == (16, 1)
    assert int(empty.count(torch.zeros(1, 0, 4, dtype=torch.int64))) == 0


def test_headroom_adds_free_pages_and_places_for_them_and_moves_nothing(
    index: ItemIndex, partitions: list[PartitionData], snapshot: Snapshot
) -> None:
    roomy = build_index(partitions, snapshot.spec, headroom=0.5)
    used, width = index.codes.shape[0], index.page_table.shape[1]
    assert roomy.codes.shape[0] == used + -(-used // 2) + 16
    assert torch.equal(roomy.page_table[:, :width], index.page_table)
    assert bool((roomy.page_table[:, width:] == -1).all())
    assert roomy.page_table.shape[1] % 8 == 0
    assert 2 * width <= roomy.page_table.shape[1] < 2 * width + 8
    for name in ("codes", "scales", "item_ids", "terms", "cache", "signals"):
        assert torch.equal(roomy.get_buffer(name)[:used], index.get_buffer(name)), name
    for name in ("planes", "columns"):
        assert torch.equal(roomy.get_buffer(name)[:, :used], index.get_buffer(name)), name
    assert bool((roomy.item_ids[used:] == -1).all())
    assert roomy.documents == 600


def test_an_empty_index_with_headroom_has_a_page_for_every_cluster(snapshot: Snapshot) -> None:
    for headroom in (0.01, 4.0, 40.0):
        empty = build_index([], snapshot.spec, headroom=headroom)
        assert empty.codes.shape[0] == 16
        assert empty.page_table.shape == (16, 8)


@pytest.mark.parametrize("headroom", [-0.1, float("inf"), float("nan")])
def test_headroom_out_of_range_is_refused(snapshot: Snapshot, headroom: float) -> None:
    with pytest.raises(ValueError, match="headroom must be at least 0 and finite"):
        build_index([], snapshot.spec, headroom=headroom)
