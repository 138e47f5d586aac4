"""Ids to table rows: vocabularies, and the bags and sequences of rows that lookups take.

Shapes: B bags or sequences, n values of all of them together.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from silvershard.model.errors import FieldError
from silvershard.model.quantized_rows import check_rows

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


class Sequences(NamedTuple):
    """B lists of table rows, one after another."""

    rows: Tensor
    """``(n,)`` int64."""
    lengths: Tensor
    """``(B,)`` int64, their sum is n."""


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


def check_lookup(given: Mapping[str, Bags | Sequences], rows: Mapping[str, int]) -> int:
    """Return B, the number of bags or sequences of every feature.

    Args:
        given: what is looked up, by feature.
        rows: rows of the table of each feature.

    Raises:
        FieldError: naming the feature, if the features are others than those of ``rows``, they have
            different B, lengths do not add up, or a row is not in its table.
    """
    if given.keys() != rows.keys():
        raise FieldError("features", f"must be {sorted(rows)}, got {sorted(given)}")
    num_bags: int = next(iter(given.values())).lengths.shape[0]
    for name, one in given.items():
        check_rows(one.rows, rows[name], field=name)
        if one.lengths.shape[0] != num_bags:
            raise FieldError(
                name, f"must have as many lengths as others, {num_bags}, got {len(one.lengths)}"
            )
        total = int(one.lengths.sum())
        if total != one.rows.shape[0]:
            raise FieldError(
                name, f"rows must be as many as lengths say, {total}, got {len(one.rows)}"
            )
        if num_bags and int(one.lengths.amin()) < 0:
            raise FieldError(name, f"lengths must be at least 0, got {int(one.lengths.amin())}")
    return num_bags
