import pytest
import torch

from silvershard.model.bags import (
    Bags,
    Sequences,
    Vocabulary,
    check_lookup,
    inputs_of,
    mean_bags,
    number_bags,
    shares_of,
    spread,
    string_key,
    weighted_bags,
)
from silvershard.model.errors import FieldError


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_string_keys_are_the_same_everywhere_and_never_negative() -> None:
    assert string_key("Comedy") == 4157779672809187837
    assert string_key("\ud800") >= 0
    assert all(0 <= string_key(str(number)) < 2**63 for number in range(1000))


def test_spread_counts_up_from_every_start() -> None:
    assert spread(longs(5, 0, 9), longs(2, 0, 3)).tolist() == [5, 6, 9, 10, 11]
    assert spread(longs(), longs()).tolist() == []


@pytest.mark.parametrize("dtype", ["int", "string"])
def test_a_vocabulary_numbers_its_ids_from_one(dtype: str) -> None:
    values = [-(2**63), -1, 7, 2**63 - 1] if dtype == "int" else ["", "a", "b", "ä"]
    unknown = 8 if dtype == "int" else "c"
    vocabulary = Vocabulary(4, "int" if dtype == "int" else "string")
    vocabulary.fill(reversed(values))
    rows = vocabulary.rows([*values, unknown, values[0]]).tolist()
    assert sorted(rows[:4]) == [1, 2, 3, 4]
    assert rows[4:] == [0, rows[0]]


def test_a_vocabulary_is_whole_in_its_tensors() -> None:
    first, second = Vocabulary(3, "string"), Vocabulary(3, "string")
    first.fill(["x", "y", "z"])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.rows(["y", "q", "x"]), second.rows(["y", "q", "x"]))


def test_an_empty_vocabulary_knows_nothing() -> None:
    assert Vocabulary(0, "int").rows([1, 2]).tolist() == [0, 0]
    assert Vocabulary(2, "int").rows([]).tolist() == []


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 3 distinct ids, got 2"):
        Vocabulary(3, "int").fill([1, 2, 2])


def test_weights_are_shares_of_the_absolute_sum_of_the_known_ids() -> None:
    rows, lengths = longs(4, 0, 5, 6, 7, 8, 0), longs(3, 0, 2, 1, 1)
    weights = torch.tensor([1.0, 50.0, 3.0, -1.0, 0.25, 0.0, 2.0])
    bags = weighted_bags(rows, lengths, weights)
    assert bags.lengths.tolist() == [2, 1, 2, 1, 1]
    assert bags.rows.tolist() == [4, 5, 0, 6, 7, 0, 0]
    assert bags.weights.tolist() == [0.25, 0.75, 1.0, -0.800000011920929, 0.20000000298023224, 1, 1]


def test_equal_weights_are_a_mean_bit_for_bit() -> None:
    lengths = torch.arange(1, 200)
    rows = torch.ones(int(lengths.sum()), dtype=torch.int64)
    weights = torch.full((len(rows),), 0.3)
    mean = mean_bags(rows, lengths)
    assert torch.equal(weighted_bags(rows, lengths, torch.ones(len(rows))).weights, mean.weights)
    assert torch.equal(mean.weights, (1.0 / lengths.float()).repeat_interleave(lengths))
    near = weighted_bags(rows, lengths, weights).weights
    assert torch.allclose(near, mean.weights, rtol=1e-6)


def test_shares_do_not_depend_on_other_bags() -> None:
    weights = torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    bag = torch.arange(50).repeat_interleave(10)
    together = shares_of(weights, bag, 50)
    for one in range(50):
        mine = bag == one
        alone = shares_of(weights[mine], torch.zeros(10, dtype=torch.int64), 1)
        assert torch.equal(alone, together[mine])


def test_numbers_lie_in_bags_as_inputs_with_a_one() -> None:
    numbers = torch.tensor([[1.5, 0.0], [9.0, 9.0], [-2.0, 3.0]])
    bags = number_bags(numbers, torch.tensor([True, False, True]))
    assert bags.lengths.tolist() == [3, 0, 3]
    assert bags.rows.tolist() == [0, 1, 2, 0, 1, 2]
    assert inputs_of(bags, 2).tolist() == [[1, 1.5, 0], [0, 0, 0], [1, -2, 3]]
    assert inputs_of(bags.take(longs(2, 1, 2)), 2).tolist() == [[1, -2, 3], [0, 0, 0], [1, -2, 3]]
    assert inputs_of(number_bags(numbers[:0], torch.zeros(0, dtype=torch.bool)), 2).shape == (0, 3)


def test_mean_bags_leave_unknown_rows_out() -> None:
    bags = mean_bags(longs(4, 0, 5, 0, 0, 6), longs(3, 0, 2, 1))
    assert bags.lengths.tolist() == [2, 1, 1, 1]
    assert bags.rows.tolist() == [4, 5, 0, 0, 6]
    assert bags.weights.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_bags_can_be_taken_in_any_order() -> None:
    bags = Bags(longs(1, 2, 3), torch.tensor([0.1, 0.2, 0.3]), longs(2, 0, 1)).take(longs(2, 0, 2))
    assert bags.rows.tolist() == [3, 1, 2, 3]
    assert bags.lengths.tolist() == [1, 2, 1]
    assert torch.equal(bags.weights, torch.tensor([0.3, 0.1, 0.2, 0.3]))


def test_a_lookup_that_fits_its_tables_is_let_through() -> None:
    films = Bags(longs(0, 8), torch.ones(2), longs(2, 0, 0))
    genres = Bags(longs(), torch.zeros(0), longs(0, 0, 0))
    assert check_lookup({"genres": genres, "films": films}, {"films": 9, "genres": 4}) == 3
    assert check_lookup({"films": Sequences(longs(), longs())}, {"films": 9}) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"genres": Sequences(longs(1), longs(1))}, r"features: must be \['films'\], got"),
        ({}, "features: must be"),
        ({"films": Sequences(longs(9), longs(1))}, "films: rows must be from 0 to 8, got 9"),
        ({"films": Sequences(longs(-1, 3), longs(2))}, "films: rows must be from 0 to 8, got -1"),
        ({"films": Sequences(longs(1, 2), longs(1))}, "films: .* as lengths say, 1, got 2"),
        ({"films": Sequences(longs(1, 2), longs(3, -1))}, "films: lengths must be at least 0"),
    ],
)
def test_a_lookup_that_does_not_fit_names_the_feature(
    given: dict[str, Sequences], message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        check_lookup(given, {"films": 9})


def test_features_of_different_batches_are_refused() -> None:
    films, genres = Sequences(longs(1), longs(1)), Sequences(longs(1), longs(1, 0))
    with pytest.raises(FieldError, match="genres: must have as many lengths as others, 1, got 2"):
        check_lookup({"films": films, "genres": genres}, {"films": 9, "genres": 4})
