"""The text tower: a text encoder that is a whole model, for queries and items in one space.

Shapes: B requests, D embedding dimension, U candidates of a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from silvershard.model.text_encoder import TextEncoder
from silvershard.model.two_tower import Encoded


class TextTower(TextEncoder):
    """A model of texts alone: items are found by the embeddings of their texts."""

    def encode(self, features: Sequence[Mapping[str, Sequence[Any]]]) -> Encoded:
        """Return the embedding of each request's text; the user state has no columns.

        The texts of one request are joined with a space. A request without any is embedded as an
        empty text, and says so in its warnings, as does one whose text is too long.

        Args:
            features: user features of B requests, checked against the schema; B may be 0.
        """
        texts = self.query_texts(features)
        embedding, truncated = self.embed_queries(texts)
        warnings = []
        for text, cut in zip(texts, truncated, strict=True):
            said = []
            if not text:
                said.append(f"{self.config.query}: no text was given")
            if cut:
                said.append(self.too_long)
            warnings.append(tuple(said))
        return Encoded(embedding[:, None, :], embedding.new_zeros(len(texts), 0), tuple(warnings))

    def rank_slots(
        self,
        query: Tensor,
        user_state: Tensor,
        cache: Tensor,
        slots: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return no task logits, ``(B, U, 0)`` float32: the score alone tells texts apart."""
        return query.new_zeros(*slots.shape, 0)
