from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from silvershard.model.catalogue import Catalogue
from silvershard.model.schema import Schema
from silvershard.model.two_tower_config import NumberFeature
from silvershard.shard.embedding import embed_values, embedding_problems
from silvershard.shard.item_columns import to_values
from silvershard.shard.load import load_retriever
from silvershard.shard.mutations import ItemValues
from silvershard.shard.snapshot import open_snapshot

NUMBERS = (NumberFeature(name="size", width=3),)


def alone_and_together(
    model: nn.Module, values: Sequence[ItemValues], schema: Schema, wanted: Tensor
) -> None:
    """Embed the same items in batches of every size, at every place."""
    before = torch.get_num_threads()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1)).tolist()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (1, 2, 7, 33, len(values)):
                for start in range(0, min(len(values), 4 * size), size):
                    rows = order[start : start + size]
                    found = embed_values(model, [values[row] for row in rows], schema)
                    assert torch.equal(found, wanted[rows]), (threads, size, start)
    finally:
        torch.set_num_threads(before)


def published(path: Any) -> tuple[Catalogue, Tensor]:
    """The items of a generation and the embeddings that it holds, float16."""
    snapshot = open_snapshot(path)
    held = [snapshot.load_partition(one) for one in range(snapshot.spec.num_partitions)]
    parts = [one for one in held if one is not None]
    return Catalogue.concat([one.catalogue for one in parts]), torch.cat(
        [one.cache for one in parts]
    )


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({}, 1),
        ({"item_numbers": NUMBERS}, 1),
        ({"precision": "int8"}, 1),
        ({"precision": "int4", "item_numbers": NUMBERS}, 3),
    ],
)
def test_an_item_has_the_same_bits_in_every_batch_and_those_of_its_publication(
    publish_model: Callable[..., Any], options: dict[str, Any], devices: int
) -> None:
    made = publish_model(**options)
    model = load_retriever(made.path, devices=("cpu",) * devices)[0].model
    catalogue, cache = published(made.path)
    values = to_values(catalogue, made.schema)
    wanted = embed_values(model, values, made.schema)
    assert torch.equal(wanted.half(), cache)
    alone_and_together(model, values, made.schema, wanted)


def test_two_thousand_items_have_the_bits_that_each_has_alone(generation) -> None:
    values = to_values(generation.catalogue, generation.schema) * 4
    wanted = embed_values(generation.model, values[:600], generation.schema)
    found = embed_values(generation.model, values, generation.schema)
    assert torch.equal(found, wanted.repeat(4, 1))


@pytest.mark.slow
def test_a_text_has_the_same_bits_in_every_batch(publish_model: Callable[..., Any]) -> None:
    made = publish_model(texts=True)
    model = load_retriever(made.path)[0].model
    catalogue, cache = published(made.path)
    values = to_values(catalogue, made.schema)
    wanted = embed_values(model, values, made.schema)
    assert torch.equal(wanted.half(), cache)
    alone_and_together(model, values[:40], made.schema, wanted[:40])


def test_an_embedding_that_no_index_can_hold_is_told() -> None:
    embeddings = torch.tensor(
        [[1.0, 2.0], [float("nan"), 0], [7e4, 0], [0, float("inf")], [65504.0, 0]]
    )
    assert embedding_problems(embeddings) == [
        "",
        "the item tower gave values that are not finite",
        "the item tower gave values beyond float16",
        "the item tower gave values that are not finite",
        "",
    ]
    assert embedding_problems(torch.zeros(0, 4)) == []
