"""Ids to pooled embeddings: vocabularies, bags of rows, and the TorchRec tables that hold them.

This is the one module that knows TorchRec, and it imports it only when tables are built.

Shapes: B bags, n values of all bags together, D embedding dimension.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

DEFAULT_ROW = 0
"""The row of every table that stands for an absent or unknown id."""


def string_key(value: str) -> int:
    """The 63-bit key under which a string is stored; the same on every machine."""
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Bags(NamedTuple):
    """B weighted lists of table rows, one after another."""

    rows: Tensor
    """``(n,)`` int64."""
    weights: Tensor
    """``(n,)`` float32."""
    lengths: Tensor
    """``(B,)`` int64, their sum is n."""

    def take(self, bags: Tensor) -> Self:
        """These bags ``(m,)`` int64, in this order; a bag may come more than once."""
        lengths = self.lengths[bags]
        starts = (self.lengths.cumsum(0) - self.lengths)[bags]
        at = spread(starts, lengths)
        return self._replace(rows=self.rows[at], weights=self.weights[at], lengths=lengths)


def spread(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers from ``start`` to ``start + length - 1`` of every pair, one after another."""
    begins = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    return (starts - begins).repeat_interleave(lengths) + torch.arange(total)


def mean_bags(rows: Tensor, lengths: Tensor) -> Bags:
    """Bags that average their known rows; one without known rows holds the default row.

    Args:
        rows: ``(n,)`` int64, ``DEFAULT_ROW`` where a value is unknown.
        lengths: ``(B,)`` int64 values per bag.
    """
    bag = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    known = rows != DEFAULT_ROW
    counts = torch.zeros_like(lengths).index_add_(0, bag[known], torch.ones_like(bag[known]))
    filled = counts.clamp(min=1)
    out = torch.full((int(filled.sum()),), DEFAULT_ROW, dtype=torch.int64)
    out[spread(filled.cumsum(0) - filled, counts)] = rows[known]
    return Bags(out, (1.0 / filled.float()).repeat_interleave(filled), filled)


class Vocabulary(nn.Module):
    """The known ids of a feature; their table rows are 1, 2, ... in the order of the keys.

    An int is its own key and a string has ``string_key``. The keys are a buffer, so the tensors of
    a model say everything that is needed to look ids up.
    """

    keys: Tensor

    def __init__(self, size: int, dtype: Literal["int", "string"]) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("keys", torch.arange(size, dtype=torch.int64))

    @torch.no_grad()
    def fill(self, values: Iterable[Any]) -> None:
        """Make these distinct values the known ones, in place.

        Raises:
            ValueError: if the number of distinct keys is not the size of the vocabulary.
        """
        keys = sorted(set(self._keys(list(values)).tolist()))
        if len(keys) != self.keys.shape[0]:
            raise ValueError(f"values must have {self.keys.shape[0]} distinct ids, got {len(keys)}")
        self.keys.copy_(torch.tensor(keys, dtype=torch.int64))

    def _keys(self, values: Sequence[Any] | np.ndarray[Any, Any]) -> Tensor:
        if self.dtype == "int":
            return torch.from_numpy(np.array(values, dtype=np.int64).reshape(-1))
        known: dict[str, int] = {}
        keys = []
        for value in values:
            key = known.get(value)
            if key is None:
                key = known[value] = string_key(value)
            keys.append(key)
        return torch.tensor(keys, dtype=torch.int64)

    def rows(self, values: Sequence[Any] | np.ndarray[Any, Any]) -> Tensor:
        """The table row of each value, ``(n,)`` int64; ``DEFAULT_ROW`` where it is unknown."""
        wanted = self._keys(values)
        if not self.keys.numel():
            return torch.zeros_like(wanted)
        at = torch.searchsorted(self.keys, wanted).clamp_(max=self.keys.shape[0] - 1)
        return torch.where(self.keys[at] == wanted, at + 1, DEFAULT_ROW)


class PooledTables(nn.Module):
    """One embedding table per feature and the weighted sums of its rows, by TorchRec.

    A bag is summed in the order of its values, whatever other bags there are.
    """

    def __init__(self, rows: Mapping[str, int], dim: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # fbgemm names its own deprecated modules when it is imported.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torchrec import (
                EmbeddingBagCollection,
                EmbeddingBagConfig,
                KeyedJaggedTensor,
                PoolingType,
            )
        self.features = tuple(rows)
        self._batch_type = KeyedJaggedTensor
        self.tables: nn.Module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=num_rows,
                    embedding_dim=dim,
                    feature_names=[name],
                    pooling=PoolingType.SUM,
                )
                for name, num_rows in rows.items()
            ],
            is_weighted=True,
        )

    def weight(self, feature: str) -> nn.Parameter:
        """The table of a feature, ``(rows, D)`` float32."""
        return self.get_parameter(f"tables.embedding_bags.{feature}.weight")

    def forward(self, bags: Mapping[str, Bags]) -> dict[str, Tensor]:
        """Return the weighted sum of each bag, ``(B, D)`` float32 per feature.

        Args:
            bags: B bags for each of the features; B may be 0.
        """
        if not bags[self.features[0]].lengths.shape[0]:
            return {name: self.weight(name)[:0] for name in self.features}
        batch = self._batch_type(
            keys=list(self.features),
            values=torch.cat([bags[name].rows for name in self.features]),
            weights=torch.cat([bags[name].weights for name in self.features]),
            lengths=torch.cat([bags[name].lengths for name in self.features]),
        )
        pooled = self.tables(batch)
        # By key: the order of the columns is TorchRec's business.
        return {name: pooled[name] for name in self.features}
