from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.numbers import LIMIT, NumberFeatures, NumberProjection, numbers_of
from silvershard.model.two_tower_config import NumberFeature, number_inputs


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.fixture
def projection() -> NumberProjection:
    made = NumberProjection(2, 3)
    made.fill(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    with torch.no_grad():
        made.projection.weight[:3, :3] = torch.tensor(
            [[100.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        )
        made.projection.bias.copy_(torch.tensor([5.0, 6.0, 7.0]))
    return made


def test_numbers_are_standardised_and_projected_with_a_one(projection: NumberProjection) -> None:
    # Means 2 and 10, deviations 1 and none: a constant number keeps its scale.
    bags = projection.bags(torch.tensor([4.0, 10.5]), longs(2))
    assert projection(bags).tolist() == [[105.0, 8.0, 7.5]]


def test_absent_numbers_give_the_bias_alone(projection: NumberProjection) -> None:
    bags = projection.bags(torch.tensor([2.0, 10.0]), longs(0, 2, 0))
    assert projection(bags).tolist() == [[5, 6, 7], [105, 6, 7], [5, 6, 7]]
    assert bags.lengths.tolist() == [0, 3, 0]


def test_numbers_far_from_the_mean_are_cut(projection: NumberProjection) -> None:
    largest = float(np.finfo(np.float32).max)
    found = projection(projection.bags(torch.tensor([largest, -largest]), longs(2)))
    assert found.tolist() == [[105.0, 6.0 + LIMIT, 7.0 - LIMIT]]


def test_without_numbers_nothing_is_standardised() -> None:
    made = NumberProjection(2, 3)
    made.fill(torch.zeros(0, 2))
    assert (made.mean.tolist(), made.scale.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    made = NumberProjection(5, 24)
    numbers, given = torch.randn(33, 5), torch.rand(33) < 0.8
    made.fill(numbers * 3 + 1)
    together = made(made.bags(numbers[given].flatten(), given * 5))
    for size in (1, 2, 7):
        for start in range(0, 33 - size, size):
            some = slice(start, start + size)
            alone = made.bags(numbers[some][given[some]].flatten(), given[some] * 5)
            assert torch.equal(made(alone), together[some])
    torch.set_num_threads(before)


def test_columns_become_the_inputs_of_every_feature() -> None:
    made = NumberFeatures((NumberFeature(name="a", width=1), NumberFeature(name="b", width=2)), 4)
    bags = made.bags({"b": Ragged.from_rows([[1, 2], []], dtype="float")}, 2)
    assert bags[number_inputs("a")].lengths.tolist() == [0, 0]
    assert bags[number_inputs("b")].lengths.tolist() == [3, 0]
    assert [tuple(one.shape) for one in made(bags)] == [(2, 4), (2, 4)]
    taken = bags[number_inputs("b")].take(longs(1, 0))
    assert torch.equal(made.projection("b")(taken), made(bags)[1].flip(0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [1.0]], "feature a must have 2 values or none, got 1 in row 1"),
        ([[1.0, 2.0]], "feature a must have 2 rows, got 1"),
    ],
)
def test_a_wrong_column_is_named(rows: Any, message: str) -> None:
    made = NumberFeatures((NumberFeature(name="a", width=2),), 4)
    with pytest.raises(ValueError, match=message):
        made.bags({"a": Ragged.from_rows(rows, dtype="float")}, 2)


def test_numbers_come_as_float32_with_their_lengths() -> None:
    found, lengths = numbers_of("a", Ragged.from_rows([[0.1], []], dtype="float"), 1)
    assert found.dtype == torch.float32
    assert (found.tolist(), lengths.tolist()) == ([float(np.float32(0.1))], [1, 0])
