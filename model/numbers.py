"""Features of numbers: standardised, and projected to the width of an embedding.

Shapes: B users or items, W numbers of a feature, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from silvershard.model.bags import Bags, inputs_of, number_bags
from silvershard.model.catalogue import Ragged
from silvershard.model.dense import PaddedLinear
from silvershard.model.two_tower_config import NumberFeature, number_inputs

LIMIT = 10.0
"""Standard deviations from the mean at which numbers are cut."""
_SMALLEST_DEVIATION = 1e-9


class NumberProjection(nn.Module):
    """One feature of numbers as D columns.

    Numbers are standardised by what training saw, and projected together with a 1 that tells given
    numbers from absent ones; absent ones give the bias alone. Each row of the result has the same
    bits alone and in any batch, and is finite whatever the numbers are.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.projection = PaddedLinear(width + 1, dim)

    @torch.no_grad()
    def fill(self, numbers: Tensor) -> None:
        """Standardise by these numbers ``(n, W)`` from now on; a constant one keeps its scale.

        Without any numbers everything stays.
        """
        if numbers.shape[0]:
            deviation = numbers.double().std(0, correction=0)
            inverse = 1.0 / deviation.clamp(min=_SMALLEST_DEVIATION)
            self.mean.copy_(numbers.double().mean(0))
            self.scale.copy_(torch.where(deviation > 0, inverse, 1.0))

    def bags(self, numbers: Tensor, lengths: Tensor) -> Bags:
        """The inputs of the projection, in a form that batches are taken from.

        Args:
            numbers: ``(n,)`` float32, all given numbers one after another.
            lengths: ``(B,)`` int64, W or 0 for each user or item.
        """
        given = lengths > 0
        rows = torch.zeros(lengths.shape[0], self.width)
        rows[given] = numbers.view(-1, self.width)
        return number_bags(((rows - self.mean) * self.scale).clamp(-LIMIT, LIMIT), given)

    def forward(self, bags: Bags) -> Tensor:
        """Return the projection of these inputs, ``(B, D)`` float32."""
        projected: Tensor = self.projection(inputs_of(bags, self.width))
        return projected


class NumberFeatures(nn.Module):
    """The projections of several features of numbers of users, or of items."""

    def __init__(self, features: Sequence[NumberFeature], dim: int) -> None:
        super().__init__()
        self.names = tuple(feature.name for feature in features)
        self.projections = nn.ModuleDict(
            {f"of_{one.name}": NumberProjection(one.width, dim) for one in features}
        )

    def projection(self, feature: str) -> NumberProjection:
        """The projection of one feature."""
        return cast(NumberProjection, self.projections[f"of_{feature}"])

    def bags(self, columns: Mapping[str, Ragged], count: int) -> dict[str, Bags]:
        """The inputs of all projections, by ``number_inputs`` of the feature.

        Args:
            columns: float64 numbers of each feature, B rows each; those not here are absent.
            count: B.

        Raises:
            ValueError: naming the feature, if it has other than B rows, or a row other than W
                numbers or none.
        """
        bags = {}
        for name in self.names:
            numbers, lengths = torch.zeros(0), torch.zeros(count, dtype=torch.int64)
            if name in columns:
                if len(columns[name]) != count:
                    raise ValueError(
                        f"feature {name} must have {count} rows, got {len(columns[name])}"
                    )
                numbers, lengths = numbers_of(name, columns[name], self.projection(name).width)
            bags[number_inputs(name)] = self.projection(name).bags(numbers, lengths)
        return bags

    def forward(self, bags: Mapping[str, Bags]) -> list[Tensor]:
        """Return the columns ``(B, D)`` float32 of each feature."""
        return [self.projection(name)(bags[number_inputs(name)]) for name in self.names]


def numbers_of(name: str, column: Ragged, width: int) -> tuple[Tensor, Tensor]:
    """Return all numbers ``(n,)`` float32 of a column, and ``(B,)`` int64 how many each row has.

    Raises:
        ValueError: naming the feature, if a row has another number of values than W or none.
    """
    lengths = torch.from_numpy(column.lengths)
    wrong = torch.nonzero((lengths != 0) & (lengths != width)).flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"feature {name} must have {width} values or none, got {int(lengths[row])} in row {row}"
        )
    return torch.from_numpy(column.values).float(), lengths
