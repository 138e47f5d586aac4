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
    return weighted_bags(rows, lengths, torch.ones(rows.shape[0]))


def weighted_bags(rows: Tensor, lengths: Tensor, weights: Tensor) -> Bags:
    """Bags of the known rows whose weights are not 0; without any, the default row.

    The weights of a bag are divided by the sum of their absolute values.

    Args:
        rows: ``(n,)`` int64, ``DEFAULT_ROW`` where a value is unknown.
        lengths: ``(B,)`` int64 values per bag.
        weights: ``(n,)`` float32, finite.
    """
    bag = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    kept = (rows != DEFAULT_ROW) & (weights != 0)
    counts = torch.bincount(bag[kept], minlength=lengths.shape[0])
    filled = counts.clamp(min=1)
    at = spread(filled.cumsum(0) - filled, counts)
    out = torch.full((int(filled.sum()),), DEFAULT_ROW, dtype=torch.int64)
    out[at] = rows[kept]
    shares = torch.ones(out.shape[0])
    shares[at] = shares_of(weights[kept].double(), bag[kept], lengths.shape[0])
    return Bags(out, shares, filled)


def shares_of(weights: Tensor, bag: Tensor, num_bags: int) -> Tensor:
    """Weights ``(n,)`` float64 over the sums of the absolute ones of their bags, float32.

    Args:
        weights: those of a bag are summed in order, whatever other bags there are.
        bag: ``(n,)`` int64 in [0, num_bags).
        num_bags: B.
    """
    totals = torch.bincount(bag, weights=weights.abs(), minlength=num_bags)
    return (weights / totals[bag]).float()


def number_bags(numbers: Tensor, given: Tensor) -> Bags:
    """Numbers as the inputs of a linear layer: a bag is a 1 and then its numbers, or empty.

    Args:
        numbers: ``(B, W)`` float32.
        given: ``(B,)`` bool, whether the bag has numbers.
    """
    lengths = given.long() * (numbers.shape[1] + 1)
    inputs = torch.nn.functional.pad(numbers[given], (1, 0), value=1.0)
    rows = torch.arange(inputs.shape[1]).expand_as(inputs)
    return Bags(rows.flatten(), inputs.flatten(), lengths)


def inputs_of(bags: Bags, width: int) -> Tensor:
    """The inputs ``(B, W + 1)`` float32 that ``number_bags`` packed; zeros where none are given."""
    inputs = torch.zeros(bags.lengths.shape[0], width + 1)
    bag = torch.arange(bags.lengths.shape[0]).repeat_interleave(bags.lengths)
    inputs[bag, bags.rows] = bags.weights
    return inputs


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
