"""The texts that towers are trained with: those of the items, and those that ask for them.

A frozen encoder makes E numbers of each text, once. Positions are then trained partly with a text
that asks for their item, beside its user's history or in its place.

Shapes: N items, Q distinct texts, B positions, n texts of all items together, E width of an encoded
text.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.model.bags import Bags
from silvershard.model.catalogue import Ragged
from silvershard.model.text_config import TextTrainingConfig
from silvershard.model.text_encoder import TextEncoder
from silvershard.model.text_features import TextFeatures


class TrainingTexts(NamedTuple):
    """The encoder and what it makes of all texts of a training."""

    encoder: TextEncoder
    items: Tensor
    """``(N, E)`` float32; zeros for an item without a text."""
    queries: Tensor
    """``(Q, E)`` float32."""
    numbers: Tensor
    """``(n,)`` int64 in [0, Q), the texts that ask for each item, one item after another."""
    lengths: Tensor
    """``(N,)`` int64, their number."""


class QueryTexts(NamedTuple):
    """The texts that ask for items, as the projection reads them."""

    bags: Bags
    """Of Q texts, and behind them an absent one."""
    numbers: Tensor
    """As in ``TrainingTexts``."""
    lengths: Tensor
    """As in ``TrainingTexts``."""

    def draw(self, items: Tensor, share: float) -> tuple[Bags, Tensor]:
        """Texts of these items ``(B,)``, most of them absent, and ``(B,)`` bool where there is one.

        Args:
            items: int64.
            share: probability of a text; an item without any has none.
        """
        lengths = self.lengths[items]
        starts = (self.lengths.cumsum(0) - self.lengths)[items]
        at = starts + (torch.rand(len(items)) * lengths).long()
        given = (torch.rand(len(items)) < share) & (lengths > 0)
        absent = len(self.bags.lengths) - 1
        chosen = torch.full_like(items, absent)
        chosen[given] = self.numbers[at[given]]
        return self.bags.take(chosen), given


def embed_training_texts(
    encoder: TextEncoder, features: Mapping[str, Ragged], config: TextTrainingConfig
) -> TrainingTexts:
    """Return what the encoder makes of the items and of the texts that ask for them.

    Args:
        encoder: whose texts of items are those of ``config``.
        features: the values of each item feature, N rows each.
        config: the section of the recipe.

    Raises:
        ValueError: naming a feature of the section that items do not have.
    """
    for field, names in (
        ("text.item_text", encoder.config.item_features),
        ("text.query_texts", config.query_texts),
    ):
        for name in names:
            if name not in features:
                known = ", ".join(sorted(features))
                raise ValueError(f"{field} must name item features, which are {known}, got {name}")
    num_items = len(features[config.query_texts[0]])
    asking: list[list[str]] = [[] for _ in range(num_items)]
    for name in config.query_texts:
        for row, texts in enumerate(asking):
            texts += map(str, features[name].row(row).tolist())
    # A blank text asks for nothing.
    asking = [[text for text in texts if text.strip()] for texts in asking]
    distinct = {text: at for at, text in enumerate(sorted({one for row in asking for one in row}))}
    return TrainingTexts(
        encoder=encoder,
        items=encoder.embed_present(features, num_items),
        queries=encoder.embed_queries(list(distinct)).embedding,
        numbers=torch.tensor([distinct[one] for row in asking for one in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in asking], dtype=torch.int64),
    )


def query_texts(texts: TrainingTexts, features: TextFeatures) -> QueryTexts:
    """Return the texts that ask for items as the projection of a model reads them."""
    absent = torch.zeros(1, texts.queries.shape[1])
    bags = features.query_bags(torch.cat([texts.queries, absent]))
    return QueryTexts(bags, texts.numbers, texts.lengths)
