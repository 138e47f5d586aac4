"""Values of user features as JSON, for the command line and the file of users.

A list of ids or numbers is itself; ids with weights are pairs: ``[["heist", 2], ["noir", 0.5]]``.
"""

import reprlib
from typing import Any

from silvershard.model.request import FeatureValues, WeightedIds


def to_json(values: FeatureValues) -> list[Any]:
    """Return the values as JSON values."""
    if isinstance(values, WeightedIds):
        return [list(pair) for pair in zip(values.ids, values.weights, strict=True)]
    return list(values)


def from_json(value: object) -> FeatureValues:
    """Return the values in JSON; a single id or number stands for a list of it.

    Raises:
        ValueError: if they are something else.
    """
    listed = value if isinstance(value, list) else [value]
    if all(_is_scalar(one) for one in listed):
        return tuple(listed)
    pairs = [one for one in listed if isinstance(one, list) and len(one) == 2]
    if len(pairs) == len(listed) and all(
        _is_scalar(one) and _is_scalar(weight) and not isinstance(weight, str)
        for one, weight in pairs
    ):
        return WeightedIds(
            tuple(one for one, _ in pairs),
            tuple(_weight(position, two) for position, (_, two) in enumerate(pairs)),
        )
    raise ValueError(
        f"must be ids or numbers, or pairs of an id and its weight, got {reprlib.repr(value)}"
    )


def _weight(position: int, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"weight {position} must be a number that fits float32, got {reprlib.repr(value)}"
        ) from None


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)
