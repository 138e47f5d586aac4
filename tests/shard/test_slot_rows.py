from typing import Any

import numpy as np
import pytest
import torch

from silvershard.kernels import unpack_bits
from silvershard.model.index import ItemIndex
from silvershard.model.planes import FIRST_EXACT_PLANE
from silvershard.shard.build import build_index
from silvershard.shard.changes import NewItems
from silvershard.shard.slot_rows import SlotRows, exact_columns
from silvershard.shard.snapshot import PartitionData, Snapshot, open_snapshot


@pytest.fixture(scope="module")
def snapshot(generation: Any) -> Snapshot:
    return open_snapshot(generation.path)


@pytest.fixture
def partitions(snapshot: Snapshot) -> list[PartitionData]:
    loaded = [snapshot.load_partition(one) for one in range(snapshot.spec.num_partitions)]
    return [one for one in loaded if one is not None]


@pytest.fixture
def index(snapshot: Snapshot, partitions: list[PartitionData]) -> ItemIndex:
    return build_index(partitions, snapshot.spec, headroom=0.5)


def test_items_that_are_written_again_elsewhere_have_the_same_rows(
    snapshot: Snapshot, partitions: list[PartitionData], index: ItemIndex
) -> None:
    rows, data = SlotRows(index, snapshot.spec.planes), partitions[0]
    count = len(data.catalogue)
    there = index.slots_of(torch.from_numpy(data.catalogue.item_ids))
    before = {name: one.clone() for name, one in index.named_buffers()}
    # Two to a word, in no order, on free pages.
    first = int(index.page_table.max()) + 1
    slots = np.random.default_rng(0).permutation(64 * first + 32 * np.arange(count))
    rows.write(
        slots,
        NewItems(
            item_ids=torch.from_numpy(data.catalogue.item_ids),
            versions=torch.ones(count, dtype=torch.int64),
            clusters=data.clusters,
            codes=data.codes,
            scales=data.scales,
            cache=data.cache,
            bits=data.bits,
            signals=torch.from_numpy(data.catalogue.signals),
            fields=data.catalogue.fields,
            semantic_codes=None,
        ),
    )
    rows.write_planes(slots, exact_columns(data.bits.exact))
    assert torch.equal(index.planes[0], before["planes"][0])
    rows.show(slots, np.zeros(0, dtype=np.int64))
    here = torch.from_numpy(slots)
    for name in ("codes", "scales", "item_ids", "terms", "cache", "signals"):
        flat = index.get_buffer(name).flatten(0, 1)
        assert torch.equal(flat[here], flat[there]), name
    assert torch.equal(index.columns.flatten(1)[:, here], index.columns.flatten(1)[:, there])
    bits = unpack_bits(index.planes).flatten(1)
    assert torch.equal(bits[:, here], bits[:, there])
    others = torch.ones(bits.shape[1], dtype=torch.bool)
    others[here] = False
    assert torch.equal(bits[:, others], unpack_bits(before["planes"]).flatten(1)[:, others])


def test_copied_slots_have_the_rows_and_exact_bits_of_their_sources(
    snapshot: Snapshot, index: ItemIndex
) -> None:
    planes = snapshot.spec.planes
    rows = SlotRows(index, planes)
    old = np.flatnonzero(rows.item_ids >= 0)[[5, 90, 3, 200]]
    new = 64 * (int(index.page_table.max()) + 1) + np.array([7, 3, 64, 8], dtype=np.int64)
    exact = rows.exact_bits(old)
    wanted = unpack_bits(index.planes).flatten(1)[:, torch.from_numpy(old)]
    last = FIRST_EXACT_PLANE + planes.num_exact_planes
    assert (exact == wanted[FIRST_EXACT_PLANE:last].numpy()).all()
    rows.copy(old, new)
    rows.write_planes(new, exact)
    rows.show(new, old)
    bits = unpack_bits(index.planes).flatten(1)
    assert torch.equal(bits[:, torch.from_numpy(new)], wanted)
    assert not bool(bits[0, torch.from_numpy(old)].any())
    assert (rows.item_ids[new] == rows.item_ids[old]).all()
    assert index.documents == 600


def test_writing_replaces_whatever_bits_a_slot_had(snapshot: Snapshot, index: ItemIndex) -> None:
    rows = SlotRows(index, snapshot.spec.planes)
    free = 64 * (int(index.page_table.max()) + 1)
    slots = free + np.array([0, 5, 63], dtype=np.int64)
    bits = unpack_bits(index.planes)
    bits[1:].view(len(bits) - 1, -1)[:, free:] = True
    index.planes.copy_(
        torch.from_numpy(np.packbits(bits.numpy(), axis=2, bitorder="little")).view(torch.int64)
    )
    rows.terms[slots] = torch.iinfo(torch.int64).max
    rows.write_planes(slots, np.zeros((snapshot.spec.planes.num_exact_planes, 3), dtype=np.bool_))
    after = unpack_bits(index.planes)[1:].flatten(1)
    assert not bool(after[:, slots].any())
    assert bool(after[:, free + 1 : free + 5].all())


def test_nothing_to_write_changes_nothing(snapshot: Snapshot, index: ItemIndex) -> None:
    rows, none = SlotRows(index, snapshot.spec.planes), np.zeros(0, dtype=np.int64)
    before = {name: one.clone() for name, one in index.named_buffers()}
    exact = rows.exact_bits(none)
    assert exact.shape == (snapshot.spec.planes.num_exact_planes, 0)
    rows.copy(none, none)
    rows.write_planes(none, exact)
    rows.show(none, none)
    for name, one in index.named_buffers():
        assert torch.equal(one, before[name]), name
