"""The texts of items and of requests as inputs of a two-tower model.

A frozen encoder makes E numbers of a text. Those of items and those of requests are standardised
and projected by layers of their own, as other numbers are.

Shapes: B requests, N items, E width of an encoded text, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from silvershard.model.bags import Bags
from silvershard.model.catalogue import Ragged
from silvershard.model.numbers import NumberProjection
from silvershard.model.text_config import TextTowerConfig
from silvershard.model.text_encoder import TextEncoder


class TextFeatures(nn.Module):
    """The encoder and the two projections; only these learn."""

    def __init__(self, config: TextTowerConfig, dim: int) -> None:
        """Build encoder and projections with weights yet to be loaded.

        Raises:
            ValueError: as ``TextEncoder`` does.
        """
        super().__init__()
        self.encoder = TextEncoder(config)
        self.item = NumberProjection(self.encoder.dim, dim)
        self.query = NumberProjection(self.encoder.dim, dim)

    def embed_items(self, features: Mapping[str, Ragged], num_items: int) -> Tensor:
        """Return what the encoder makes of each item, ``(N, E)`` float32; zeros without a text.

        Args:
            features: the values of each item feature, N rows each; those not here are absent.
            num_items: N.

        Raises:
            ValueError: if a feature of the text has another number of rows.
        """
        return self.encoder.embed_present(features, num_items)

    @torch.no_grad()
    def fill(self, items: Tensor, queries: Tensor) -> None:
        """Standardise by these embeddings, ``(N, E)`` and ``(Q, E)``, each number over E."""
        for projection, embedded in ((self.item, items), (self.query, queries)):
            projection.fill(embedded[embedded.any(1)])
            # A step of Adam moves every weight alike, and so a sum over E inputs E times as far.
            # Undivided, texts drowned the ids: NDCG@10 fell by a tenth.
            projection.scale.mul_(1 / projection.width)

    def item_bags(self, embedded: Tensor) -> Bags:
        """The inputs of the projection of items, as ``embed_items`` made them ``(N, E)``."""
        return _bags(self.item, embedded)

    def query_bags(self, embedded: Tensor) -> Bags:
        """The inputs of the projection of requests ``(B, E)``; rows of zeros are absent texts."""
        return _bags(self.query, embedded)

    def of_requests(
        self, features: Sequence[Mapping[str, Sequence[Any]]]
    ) -> tuple[Bags, list[list[str]]]:
        """The inputs of requests, and the warnings of each: that a text was cut.

        Args:
            features: user features of B requests, checked against the schema.
        """
        texts = self.encoder.query_texts(features)
        said = [at for at, text in enumerate(texts) if text]
        found, truncated = self.encoder.embed_queries([texts[at] for at in said])
        embedded = torch.zeros(len(texts), self.encoder.dim)
        embedded[said] = found
        warnings: list[list[str]] = [[] for _ in texts]
        for at, cut in zip(said, truncated, strict=True):
            if cut:
                warnings[at].append(self.encoder.too_long)
        return self.query_bags(embedded), warnings


def _bags(projection: NumberProjection, embedded: Tensor) -> Bags:
    given = embedded.any(1)
    return projection.bags(embedded[given].flatten(), given.long() * projection.width)
