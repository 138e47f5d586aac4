"""What the user tower reads beside the history: ids with weights, and numbers.

Ids are pooled in a table of their own, weighted by their weights over the sum of the absolute ones;
without known ids the default row counts. Numbers are standardised and projected.

Shapes: B users, n values of all users together, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from silvershard.model.bags import DEFAULT_ROW, Bags, Vocabulary, weighted_bags
from silvershard.model.catalogue import UserColumn
from silvershard.model.numbers import NumberFeatures
from silvershard.model.request import WeightedIds
from silvershard.model.two_tower_config import TwoTowerConfig, number_inputs, user_table


class UserFeatures(nn.Module):
    """The vocabularies and projections of the user features of a tower; tables are not in it."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.ids = tuple(feature.name for feature in config.user_ids)
        self.vocabularies = nn.ModuleDict(
            {f"of_{one.name}": Vocabulary(one.size, one.dtype) for one in config.user_ids}
        )
        self.numbers = NumberFeatures(config.user_numbers, config.dim)

    @property
    def names(self) -> tuple[str, ...]:
        """All features, ids first."""
        return (*self.ids, *self.numbers.names)

    def vocabulary(self, feature: str) -> Vocabulary:
        """The known ids of a feature."""
        return cast(Vocabulary, self.vocabularies[f"of_{feature}"])

    def of_columns(self, columns: Mapping[str, UserColumn], num_users: int) -> dict[str, Bags]:
        """What user tables pool and projections read of users; absent columns have no values.

        Args:
            columns: raw values of each feature, B rows each.
            num_users: B.

        Raises:
            ValueError: if a column has other than B rows, or a row a wrong number of numbers.
        """
        none = torch.zeros(num_users, dtype=torch.int64)
        bags = {}
        for name in self.ids:
            rows, lengths, weights = none[:0], none, torch.ones(0)
            if name in columns:
                values, given = columns[name].values, columns[name].weights
                if len(values) != num_users:
                    raise ValueError(
                        f"feature {name} must have {num_users} rows, got {len(values)}"
                    )
                rows = self.vocabulary(name).rows(values.values)
                lengths = torch.from_numpy(values.lengths)
                weights = torch.ones(len(rows)) if given is None else torch.from_numpy(given)
            bags[user_table(name)] = weighted_bags(rows, lengths, weights)
        numbers = {name: columns[name].values for name in self.numbers.names if name in columns}
        return bags | self.numbers.bags(numbers, num_users)

    def of_requests(
        self, features: Sequence[Mapping[str, Sequence[Any]]]
    ) -> tuple[dict[str, Bags], list[list[str]]]:
        """The same of requests, and the warnings of each: how many ids are unknown.

        Args:
            features: user features of B requests, checked against the schema.
        """
        warnings: list[list[str]] = [[] for _ in features]
        bags = {}
        for name in self.ids:
            given, lengths, weights = flattened([one.get(name, ()) for one in features])
            rows = self.vocabulary(name).rows(given)
            unknown_values(name, rows, lengths, warnings)
            known = torch.ones(len(rows)) if weights is None else weights
            bags[user_table(name)] = weighted_bags(rows, lengths, known)
        for name in self.numbers.names:
            given, lengths, _ = flattened([one.get(name, ()) for one in features])
            numbers = torch.tensor(given, dtype=torch.float32)
            bags[number_inputs(name)] = self.numbers.projection(name).bags(numbers, lengths)
        return bags, warnings

    def forward(self, bags: Mapping[str, Bags]) -> list[Tensor]:
        """Return the columns ``(B, D)`` float32 of each feature of numbers."""
        columns: list[Tensor] = self.numbers(bags)
        return columns


def flattened(values: Sequence[Sequence[Any]]) -> tuple[list[Any], Tensor, Tensor | None]:
    """Return all values of B requests, ``(B,)`` int64 lengths, and ``(n,)`` float32 weights.

    The weights are None where no request has any.
    """
    lengths = torch.tensor([len(one) for one in values], dtype=torch.int64)
    flat = [value for one in values for value in one]
    if not any(isinstance(one, WeightedIds) for one in values):
        return flat, lengths, None
    weights = [one.weights if isinstance(one, WeightedIds) else np.ones(len(one)) for one in values]
    return flat, lengths, torch.from_numpy(np.concatenate(weights).astype(np.float32))


def unknown_values(name: str, rows: Tensor, lengths: Tensor, warnings: Sequence[list[str]]) -> None:
    """Add a warning for each request of whose values some are unknown.

    Args:
        name: of the feature.
        rows: ``(n,)`` int64 table rows of all values.
        lengths: ``(B,)`` int64 values per request.
        warnings: of each request, added to in place.
    """
    request = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    found = torch.bincount(request[rows != DEFAULT_ROW], minlength=lengths.shape[0])
    for at, (asked, known) in enumerate(zip(lengths.tolist(), found.tolist(), strict=True)):
        if known < asked:
            warnings[at].append(f"feature {name}: {asked - known} of {asked} values unknown")
