"""An index that was trained with the towers: published whole, the same answers on any shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from silvershard.model.answer import Answer
from silvershard.model.clustering import assign_clusters
from silvershard.model.quality import same_ranking
from silvershard.model.request import Request
from silvershard.model.spec import SearchDefaults
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.publish import Published, publish_generation
from silvershard.shard.snapshot import open_snapshot


@pytest.fixture(scope="module")
def centroids(generation: Any) -> torch.Tensor:
    """Centroids ``(16, D)`` as training leaves them: of any length, and of very unequal lists."""
    generator = torch.Generator().manual_seed(5)
    items = generation.model.embed_items(generation.catalogue.features)
    chosen = items[torch.randperm(len(items), generator=generator)[:16]].clone()
    chosen[4:] -= 2 * items.mean(0)
    length = 0.5 + torch.rand(16, 1, generator=generator)
    return (chosen + 0.1 * torch.randn(chosen.shape, generator=generator)) * length


@pytest.fixture(scope="module")
def published(
    generation: Any, centroids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    return publish_generation(
        tmp_path_factory.mktemp("joint"),
        name="films",
        model=generation.model,
        builder="two_tower",
        config=generation.model.config.model_dump(mode="json"),
        catalogue=generation.catalogue,
        schema=generation.schema,
        defaults=SearchDefaults(probes=4, ann_k=40),
        num_clusters=16,
        false_positive_rate=0.1,
        max_exact_planes=6,
        centroids=centroids,
    )


def test_trained_centroids_are_those_of_the_generation(
    generation: Any, centroids: torch.Tensor, published: Published
) -> None:
    stored, _ = open_snapshot(published.path).load_dense()
    items = generation.model.embed_items(generation.catalogue.features)
    found = assign_clusters(items, centroids)
    assert torch.equal(stored, found.centroids)
    sizes = torch.bincount(found.assignment, minlength=16)
    whole, _ = load_retriever(published.path)
    pages = (whole.indexes[0].page_table >= 0).sum(1)
    assert torch.equal(pages, -(-sizes // 64))
    assert published.longest_list == int(sizes.max())


def test_no_list_of_trained_centroids_is_published_longer_than_four_times_the_mean(
    generation: Any, centroids: torch.Tensor, published: Published
) -> None:
    items = generation.model.embed_items(generation.catalogue.features)
    free = assign_clusters(items, centroids, max_imbalance=16)
    assert torch.bincount(free.assignment).max() > 4 * published.mean_list
    assert published.longest_list <= 4 * published.mean_list


def test_a_trained_index_answers_alike_alone_in_batches_and_on_shards(
    generation: Any,
    published: Published,
    request_maker: Callable[..., list[Request]],
    ask_shards: Callable[..., list[Answer]],
) -> None:
    whole = load_retriever(published.path)[0]
    requests = request_maker(generation, 24, seed=5)
    alone = [whole([request])[0] for request in requests]
    assert any(len(answer.item_ids) > 5 for answer in alone)
    for one, other in zip(whole(requests), alone, strict=True):
        assert same_ranking(one, other).same
    for shards, devices in ((2, ("cpu",)), (3, ("cpu", "cpu"))):
        executors = [
            load_executor(published.path, shard, shards, devices=devices) for shard in range(shards)
        ]
        found = ask_shards(executors, requests, "key")
        for one, other in zip(found, alone, strict=True):
            compared = same_ranking(one, other)
            assert compared.same, compared.difference
