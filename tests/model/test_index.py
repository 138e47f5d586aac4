import pytest
import torch

from silvershard.kernels import quantize_rows
from silvershard.model.index import ItemIndex
from silvershard.shard.load import load_retriever


@pytest.fixture(scope="module")
def index(generation) -> ItemIndex:
    return load_retriever(generation.path)[0].indexes[0]


def test_slots_are_found_by_id_and_unknown_ids_have_none(generation, index: ItemIndex) -> None:
    ids = torch.from_numpy(generation.catalogue.item_ids)
    slots = index.slots_of(ids.view(20, 30))
    assert torch.equal(index.item_ids.flatten()[slots], ids.view(20, 30))
    unknown = torch.tensor([-1, 0, int(ids.max()) + 1, 2**63 - 1])
    assert index.slots_of(unknown).tolist() == [-1, -1, -1, -1]
    assert index.slots_of(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)


def test_live_documents_are_counted(index: ItemIndex) -> None:
    assert index.documents == 600


def test_a_scan_of_every_cluster_orders_by_quantised_score_then_id(generation, index) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)
    codes, scales = quantize_rows(query)
    clusters = torch.arange(16, dtype=torch.int32).expand(3, 16).contiguous()
    none = torch.zeros(3, 0, 4, dtype=torch.int64)
    found = index.scan(
        codes, scales, clusters, none, none, torch.zeros(3, 0, dtype=torch.int64), 600
    )
    live = torch.nonzero(index.item_ids.flatten() >= 0).flatten()
    dots = codes.double() @ index.codes.flatten(0, 1)[live].double().T
    for row in range(3):
        scores = dots[row].float() * index.scales.flatten()[live] * scales[row]
        wanted = sorted(
            zip((-scores).tolist(), index.item_ids.flatten()[live].tolist(), strict=True)
        )
        got = list(zip((-found.scores[row]).tolist(), found.item_ids[row].tolist(), strict=True))
        assert got == wanted


def test_what_is_at_a_slot_belongs_together(generation, index: ItemIndex) -> None:
    rows = torch.tensor([0, 17, 599])
    ids = torch.from_numpy(generation.catalogue.item_ids)[rows]
    slots = index.slots_of(ids)
    got, signals = index.items_at(torch.cat([slots, torch.tensor([-1])])[None])
    assert got.tolist() == [[*ids.tolist(), -1]]
    assert torch.equal(signals[0, :3], torch.from_numpy(generation.catalogue.signals)[rows])
    assert (signals[0, 3] == 0).all()
    with torch.inference_mode():
        whole = generation.model.embed_items(dict(generation.catalogue.features))
    assert torch.equal(index.cache.flatten(0, 1)[slots], whole[rows].half())
