import json
from typing import Any

import pytest

from silvershard.deploy.feature_json import from_json, to_json
from silvershard.model.request import FeatureValues, WeightedIds


@pytest.mark.parametrize(
    "values",
    [
        (1, 2),
        ("a", "b"),
        (3.5, 0.10000000149011612),
        (),
        WeightedIds(("heist",), (2.0,)),
        WeightedIds((7, 9), (0.10000000149011612, -1.0)),
    ],
)
def test_values_come_back_from_json(values: FeatureValues) -> None:
    assert from_json(json.loads(json.dumps(to_json(values)))) == values


def test_one_value_stands_for_a_list_of_it() -> None:
    assert from_json("heist") == ("heist",)
    assert from_json(7) == (7,)


def test_a_weight_that_no_float_holds_is_refused_briefly() -> None:
    with pytest.raises(ValueError, match="weight 1 must be a number that fits float32") as caught:
        from_json([["a", 1], ["b", 10**400]])
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="must be ids or numbers") as caught:
        from_json([["a"]] * 1000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    [None, True, {"a": 1}, [True], [None], [["a"]], [["a", "b"]], [["a", 1], "b"], [[[], 1]]],
)
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be ids or numbers, or pairs of an id and its weigh"):
        from_json(value)
