import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import quantize_rows
from silvershard.model.audit import IndexAudit, recall
from silvershard.model.catalogue import Catalogue
from silvershard.model.clustering import spherical_kmeans
from silvershard.model.planes import choose_planes, encode_items
from silvershard.model.retriever import Centroids, Retriever
from silvershard.model.schema import Schema
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.build import build_index
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import PartitionData


def clustered(num_items: int, dim: int, seed: int) -> Tensor:
    """A mixture of Gaussians with power-law weights and a decaying spectrum, on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).float() ** -0.5
    centres = torch.randn(150, dim, generator=generator) * spectrum
    weights = 1.0 / torch.arange(1, 151).float()
    label = torch.multinomial(weights, num_items, replacement=True, generator=generator)
    items = centres[label] + 0.7 * torch.randn(num_items, dim, generator=generator) * spectrum
    return torch.nn.functional.normalize(items, dim=1)


def make(embeddings: Tensor, num_clusters: int, num_parts: int) -> tuple[Retriever, Tensor]:
    """An index over bare vectors; ids are not in row order."""
    count = embeddings.shape[0]
    ids = np.random.default_rng(0).permutation(count).astype(np.int64) * 3
    clustering = spherical_kmeans(embeddings, num_clusters, seed=1, iterations=8)
    schema = Schema()
    catalogue = Catalogue(ids, {}, {}, np.zeros((count, 0), dtype=np.float32), {}, {})
    planes = choose_planes(schema, catalogue)
    spec = ServingSpec(
        model="vectors",
        generation=1,
        documents=count,
        dim=embeddings.shape[1],
        num_clusters=num_clusters,
        num_partitions=64,
        partition_documents=(count, *(0,) * 63),
        page_slots=64,
        item_schema=schema,
        planes=planes,
        defaults=SearchDefaults(probes=1, ann_k=10),
    )
    codes, scales = quantize_rows(embeddings)
    parts = []
    for part in range(num_parts):
        rows = torch.arange(part, count, num_parts)
        rows = rows[torch.argsort(clustering.assignment[rows], stable=True)]
        local = catalogue.take(rows.numpy())
        data = PartitionData(
            local,
            clustering.assignment[rows].to(torch.int32),
            codes[rows],
            scales[rows],
            embeddings[rows].half(),
            encode_items(planes, schema, local),
        )
        parts.append(build_index([data], spec))
    model = torch.nn.Module()
    retriever = Retriever(model, Centroids.of(clustering.centroids), parts, spec)
    return retriever, torch.from_numpy(ids)


@pytest.mark.parametrize(("dim", "num_parts"), [(64, 1), (128, 2)])
def test_scan_and_refine_find_what_exact_search_finds_on_the_same_probes(
    dim: int, num_parts: int
) -> None:
    everything = clustered(20_032, dim, seed=dim)
    items, query = everything[:20_000], everything[20_000:].view(16, 2, dim)
    retriever, ids = make(items, 64, num_parts)
    audit = IndexAudit(retriever, ids, items)
    wanted = audit.exact_in_probes(query, 16, 1000)
    found = audit.indexed(query, 16, 1500, 1000)
    assert int((wanted < 0).sum()) == 0
    assert float(recall(found, wanted).mean()) >= 0.999
    scan_only = audit.indexed(query, 16, 1000, 1000)
    assert float(recall(scan_only, wanted).mean()) < float(recall(found, wanted).mean())


def test_probing_everything_finds_the_exact_best() -> None:
    everything = clustered(1_010, 32, seed=5)
    retriever, ids = make(everything[:1000], 8, 1)
    audit = IndexAudit(retriever, ids, everything[:1000])
    query = everything[1000:].view(10, 1, 32)
    exact = audit.exact(query, 50)
    assert torch.equal(audit.exact_in_probes(query, 8, 50), exact)
    by_hand = torch.topk(query[:, 0].double() @ everything[:1000].double().T, 50).indices
    assert float(recall(exact[:, 0], ids[by_hand]).mean()) == 1.0
    assert float(recall(audit.indexed(query, 8, 200, 50), exact).mean()) >= 0.99
    assert float(recall(audit.indexed(query, 1, 200, 50), exact).mean()) < 0.9


def test_an_audit_over_other_items_is_refused(generation) -> None:
    retriever = load_retriever(generation.path)[0]
    ids = torch.from_numpy(generation.catalogue.item_ids)
    with pytest.raises(ValueError, match="must be the 600 documents"):
        IndexAudit(retriever, ids + 1, torch.zeros(600, 16))
    with pytest.raises(ValueError, match="must be the 600 documents"):
        IndexAudit(retriever, ids[:-1], torch.zeros(599, 16))


def test_recall_ignores_padding_and_order() -> None:
    found = torch.tensor([[3, 1, -1], [5, 6, 7], [-1, -1, -1]])
    wanted = torch.tensor([[1, 2, 3], [9, -1, -1], [-1, -1, -1]])
    assert recall(found, wanted).tolist() == [2 / 3, 0.0, 1.0]
