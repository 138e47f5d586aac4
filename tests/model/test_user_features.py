import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.request import WeightedIds
from silvershard.model.two_tower_config import TwoTowerConfig, number_inputs
from silvershard.model.user_features import UserFeatures, flattened, unknown_values

CONFIG = TwoTowerConfig.model_validate(
    {
        "dim": 4,
        "heads": ["user"],
        "history": "history",
        "item": "film",
        "tables": [{"name": "film", "dtype": "int", "size": 2}],
        "user_ids": [{"name": "tags", "dtype": "string", "size": 3}],
        "user_numbers": [{"name": "age", "width": 1}],
    }
)


@pytest.fixture
def features() -> UserFeatures:
    made = UserFeatures(CONFIG)
    made.vocabulary("tags").fill(["a", "b", "c"])
    return made


def rows_of(features: UserFeatures, *tags: str) -> list[int]:
    return features.vocabulary("tags").rows(tags).tolist()


def test_ids_are_weighted_over_the_absolute_sum_of_the_known_ones(features: UserFeatures) -> None:
    bags, warnings = features.of_requests(
        [
            {"tags": WeightedIds(("a", "nobody", "b"), (1.0, 9.0, -3.0))},
            {"tags": ("b", "c")},
            {"tags": WeightedIds(("a", "c"), (0.0, 0.5))},
            {"tags": WeightedIds(("a",), (0.0,))},
            {},
        ]
    )
    found = bags["user_tags"]
    assert found.lengths.tolist() == [2, 2, 1, 1, 1]
    assert found.weights.tolist() == [0.25, -0.75, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert found.rows.tolist() == rows_of(features, "a", "b", "b", "c", "c", "nobody", "nobody")
    assert warnings == [["feature tags: 1 of 3 values unknown"], [], [], [], []]


def test_columns_of_training_read_the_same_as_requests(features: UserFeatures) -> None:
    columns = {
        "tags": UserColumn(
            Ragged.from_rows([["a", "b"], [], ["c", "d"]]),
            np.array([2.0, -0.1, 3.0, 1.0], dtype=np.float32),
        ),
        "age": UserColumn(Ragged.from_rows([[30.1], [], [7.0]], dtype="float")),
    }
    weight = float(np.float32(-0.1))
    requests, _ = features.of_requests(
        [
            {"tags": WeightedIds(("a", "b"), (2.0, weight)), "age": (float(np.float32(30.1)),)},
            {"tags": (), "age": ()},
            {"tags": WeightedIds(("c", "d"), (3.0, 1.0)), "age": (7.0,)},
        ]
    )
    read = features.of_columns(columns, 3)
    assert sorted(read) == sorted(requests) == sorted(["user_tags", number_inputs("age")])
    for name, bags in read.items():
        for one, other in zip(bags, requests[name], strict=True):
            assert torch.equal(one, other)


def test_a_column_without_weights_counts_every_id_alike(features: UserFeatures) -> None:
    columns = {"tags": UserColumn(Ragged.from_rows([["a", "b", "c"], ["c"]]))}
    bags = features.of_columns(columns, 2)
    third = float(np.float32(1 / 3))
    assert bags["user_tags"].weights.tolist() == [third, third, third, 1.0]
    assert bags[number_inputs("age")].lengths.tolist() == [0, 0]


def test_features_that_are_not_given_are_absent(features: UserFeatures) -> None:
    bags = features.of_columns({}, 2)
    assert bags["user_tags"].rows.tolist() == [0, 0]
    assert torch.equal(features(bags)[0], features(features.of_requests([{}, {}])[0])[0])
    assert features.of_columns({}, 0)["user_tags"].lengths.tolist() == []


def test_a_column_of_other_users_is_refused(features: UserFeatures) -> None:
    columns = {"tags": UserColumn(Ragged.from_rows([["a"]]))}
    with pytest.raises(ValueError, match="feature tags must have 2 rows, got 1"):
        features.of_columns(columns, 2)


def test_values_are_flattened_with_a_weight_of_one_where_none_is_given() -> None:
    flat, lengths, weights = flattened([(5, 6), WeightedIds((7,), (2.0,)), ()])
    assert (flat, lengths.tolist()) == ([5, 6, 7], [2, 1, 0])
    assert weights is not None
    assert weights.tolist() == [1.0, 1.0, 2.0]
    assert flattened([(5, 6)])[2] is None


def test_unknown_values_are_counted_per_request() -> None:
    warnings: list[list[str]] = [[], ["before"], []]
    unknown_values("x", torch.tensor([0, 3, 0, 2]), torch.tensor([2, 1, 1]), warnings)
    assert warnings == [
        ["feature x: 1 of 2 values unknown"],
        ["before", "feature x: 1 of 1 values unknown"],
        [],
    ]
