"""Which requests are golden: real users where there are some, every kind of request in turn.

Shapes: N items.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silvershard.model.catalogue import NULL_INT, Catalogue
from silvershard.model.request import FeatureValues, Request
from silvershard.model.schema import Attribute, UserFeature
from silvershard.model.spec import ServingSpec
from silvershard.shard.golden import MAX_EXACT_ITEMS

_LONGEST_HISTORY = 30
_WORDS = ("silver", "shard", "search", "by", "words")
_SOME = 5

_Changes = dict[str, Any]


def draw_requests(
    spec: ServingSpec,
    catalogue: Catalogue,
    count: int,
    *,
    users: Sequence[Request] = (),
    seed: int = 0,
) -> list[Request]:
    """Return requests of every kind that a generation serves, the same for the same arguments.

    They take turns: short and long lists, exact search, few probes, a user without features, task
    weights, formulas that order by one task, and filters on every attribute.

    Args:
        spec: of the generation.
        catalogue: its items; values of filters come from them.
        count: requests wanted; fewer where the catalogue is empty.
        users: features, and excluded ids, of real users; without any, features are drawn from what
            the items have.
        seed: of the draws.
    """
    if not len(catalogue):
        return []
    return _Draw(spec, catalogue, users, seed).requests(count)


class _Draw:
    def __init__(
        self, spec: ServingSpec, catalogue: Catalogue, users: Sequence[Request], seed: int
    ) -> None:
        self._spec = spec
        self._schema = spec.item_schema
        self._catalogue = catalogue
        self._users = users
        self._generator = np.random.default_rng(seed)
        self._ids = catalogue.item_ids

    def requests(self, count: int) -> list[Request]:
        kinds = self._kinds()
        return [
            dataclasses.replace(self._user(), **kinds[at % len(kinds)]()) for at in range(count)
        ]

    def _kinds(self) -> list[Callable[[], _Changes]]:
        """Return the kinds of requests that this generation can serve."""
        schema = self._schema
        kinds: list[Callable[[], _Changes]] = [
            lambda: {"k": self._k(10)},
            lambda: {"k": self._k(100)},
            lambda: {"k": self._k(50), "exact": len(self._catalogue) <= MAX_EXACT_ITEMS},
            lambda: {"k": self._k(20), "nprobe": 1, "ann_k": 30},
            lambda: {"k": 1, "features": {}, "exclude_ids": self._some_ids()},
        ]
        if schema.weights and schema.allow_task_weights:
            kinds.append(lambda: {"k": self._k(20), "task_weights": self._weights()})
        if schema.allow_value:
            kinds += [partial(self._ordered_by, task) for task in schema.tasks]
        for attribute in schema.attributes:
            kinds += [
                partial(self._filtered, attribute, negated=is_not) for is_not in (False, True)
            ]
        return kinds

    def _ordered_by(self, task: str) -> _Changes:
        return {"k": self._k(20), "value": task}

    def _k(self, wanted: int) -> int:
        return min(wanted, self._spec.defaults.k_max)

    def _user(self) -> Request:
        """Return a real user, or one that is made up, with what is excluded."""
        if self._users:
            user = self._users[int(self._generator.integers(len(self._users)))]
            return Request(features=user.features, exclude_ids=user.exclude_ids)
        features = {one.name: self._feature(one) for one in self._schema.user_features}
        return Request(features=features)

    def _feature(self, feature: UserFeature) -> FeatureValues:
        """Return values of a user feature, like those that items have of the same type."""
        if feature.kind == "numbers":
            drawn: list[float] = self._generator.standard_normal(feature.width).tolist()
            return drawn
        if feature.kind == "text":
            return [" ".join(self._generator.permutation(_WORDS).tolist())]
        longest = min(feature.max_length, _LONGEST_HISTORY)
        return self._drawn(self._known(feature), int(self._generator.integers(0, longest + 1)))

    def _known(self, feature: UserFeature) -> NDArray[Any]:
        """Return ids that a feature may mean: those of items' features of its type."""
        same = [
            self._catalogue.features[one.name].values
            for one in self._schema.item_features
            if (one.kind, one.dtype) == ("ids", feature.dtype)
        ]
        if same:
            return np.concatenate(same)
        return self._ids if feature.dtype == "int" else np.zeros(0, dtype=object)

    def _some_ids(self) -> list[int]:
        return [int(one) for one in self._generator.choice(self._ids, _SOME)]

    def _filtered(self, attribute: Attribute, *, negated: bool) -> _Changes:
        """Return a filter with values that items have; few eligible items are searched exactly."""
        name = attribute.name
        if attribute.kind == "category":
            held = self._catalogue.categories[name].values
            values = self._drawn(held, _SOME)
            text, value, most = f"{name} IN ($value)", values, int(np.isin(held, values).sum())
        else:
            column = self._catalogue.numbers[name]
            given = np.isfinite(column) if attribute.dtype == "float" else column != NULL_INT
            values = self._drawn(column[given], 1)
            text, value, most = f"{name} >= $value", values[:1], len(column)
        if not values:
            return {"k": self._k(10)}
        if negated:
            text, most = f"NOT ({text})", len(self._catalogue)
        return {
            "k": self._k(30),
            "filter": text,
            "params": {"value": value},
            "exact": most <= MAX_EXACT_ITEMS and bool(self._generator.integers(2)),
        }

    def _drawn(self, values: NDArray[Any], count: int) -> list[Any]:
        drawn: list[Any] = self._generator.choice(values, count).tolist() if len(values) else []
        return drawn

    def _weights(self) -> Mapping[str, float]:
        return {
            name: float(np.float32(self._generator.uniform(0, 2))) for name in self._schema.weights
        }
