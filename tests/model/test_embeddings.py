import subprocess
import sys

import pytest
import torch

from silvershard.model.embeddings import (
    Bags,
    PooledTables,
    Vocabulary,
    mean_bags,
    spread,
    string_key,
)


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_importing_the_model_imports_no_torchrec() -> None:
    code = (
        "import sys, silvershard.model.retriever, silvershard.model.two_tower, "
        "silvershard.model.registry, silvershard.model.training\n"
        "print(sum(name.split('.')[0] in ('torchrec', 'fbgemm_gpu') for name in sys.modules))"
    )
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0"


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


def random_bags(num_bags: int, rows: int, seed: int) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (num_bags,), generator=generator)
    total = int(lengths.sum())
    values = torch.randint(rows, (total,), generator=generator)
    return Bags(values, torch.rand(total, generator=generator), lengths)


def test_bags_are_pooled_by_weight() -> None:
    tables = PooledTables({"films": 9, "genres": 4}, 3)
    films = Bags(longs(1, 8, 2), torch.tensor([0.5, 2.0, 1.0]), longs(2, 1))
    genres = Bags(longs(3), torch.tensor([1.0]), longs(1, 0))
    pooled = tables({"genres": genres, "films": films})
    weight = tables.weight("films")
    assert torch.allclose(pooled["films"][0], 0.5 * weight[1] + 2.0 * weight[8])
    assert torch.allclose(pooled["films"][1], weight[2])
    assert torch.equal(pooled["genres"][0], tables.weight("genres")[3])
    assert not pooled["genres"][1].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bag_has_the_same_bits_whatever_bags_surround_it(threads: int) -> None:
    rows = {"films": 500, "genres": 20}
    tables = PooledTables(rows, 64)
    bags = {name: random_bags(200, count, seed=1) for name, count in rows.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            together = tables(bags)
            for chosen in (*torch.arange(200).split(1), torch.randperm(200), longs(7, 3, 7)):
                apart = tables({name: bag.take(chosen) for name, bag in bags.items()})
                for name in rows:
                    assert torch.equal(apart[name], together[name][chosen])
    finally:
        torch.set_num_threads(before)


def test_no_bags_give_no_rows() -> None:
    tables = PooledTables({"films": 9}, 3)
    assert tables({"films": Bags(longs(), torch.zeros(0), longs())})["films"].shape == (0, 3)


def test_every_table_learns() -> None:
    tables = PooledTables({"films": 9, "genres": 4}, 3)
    bag = Bags(longs(1), torch.ones(1), longs(1))
    sum(value.sum() for value in tables({"films": bag, "genres": bag}).values()).backward()
    for name in ("films", "genres"):
        gradient = tables.weight(name).grad
        assert gradient is not None
        assert gradient[1].tolist() == [1.0, 1.0, 1.0]
        assert not gradient[2:].any()
