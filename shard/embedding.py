"""Items as the item tower sees them: the embedding of each, and whether an index can hold it."""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from silvershard.model.catalogue import Ragged
from silvershard.model.schema import Schema
from silvershard.shard.item_columns import to_features
from silvershard.shard.mutations import ItemValues


class _Tower(Protocol):
    def embed_items(self, features: Mapping[str, Ragged]) -> Tensor: ...


@torch.inference_mode()
def embed_values(model: nn.Module, values: Sequence[ItemValues], schema: Schema) -> Tensor:
    """Return the embedding of each item, ``(n, D)`` float32, for at least one item.

    The tower gives an item the same bits in every batch, and those that publishing gave it.

    Args:
        model: with an item tower.
        values: of items, checked against the schema.
        schema: of the generation.
    """
    return cast(_Tower, model).embed_items(to_features(values, schema))


def embedding_problems(embeddings: Tensor) -> list[str]:
    """Return for each embedding ``(n, D)`` why no index can hold it, empty where one can."""
    finite = embeddings.isfinite().all(1).tolist()
    fits = embeddings.half().isfinite().all(1).tolist()
    return [
        ""
        if is_fit
        else "the item tower gave values beyond float16"
        if is_finite
        else "the item tower gave values that are not finite"
        for is_finite, is_fit in zip(finite, fits, strict=True)
    ]
