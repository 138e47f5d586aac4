import subprocess
import sys

import pytest
import torch

from silvershard.model.bags import Bags, Sequences
from silvershard.model.embeddings import (
    PooledTables,
    QuantizedTables,
    SequenceTables,
)
from silvershard.model.errors import FieldError
from silvershard.model.placement import (
    Precision,
)

# Odd numbers of rows, so that no cut is even.
ROWS = {"films": 1001, "genres": 17, "tags": 101}
DIM = 48


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


def random_sequences(num_sequences: int, rows: int, seed: int) -> Sequences:
    bags = random_bags(num_sequences, rows, seed)
    return Sequences(bags.rows, bags.lengths)


def all_bags(num_bags: int, seed: int = 1) -> dict[str, Bags]:
    return {name: random_bags(num_bags, count, seed) for name, count in ROWS.items()}


def all_sequences(num_sequences: int, seed: int = 1) -> dict[str, Sequences]:
    return {name: random_sequences(num_sequences, count, seed) for name, count in ROWS.items()}


@pytest.fixture(scope="module")
def float_tables() -> PooledTables:
    torch.manual_seed(3)
    return PooledTables(ROWS, DIM)


@pytest.fixture(scope="module")
def float_sequences() -> SequenceTables:
    torch.manual_seed(4)
    return SequenceTables(ROWS, DIM)


def largest_step(tables: PooledTables | SequenceTables, name: str, levels: int) -> float:
    weight = tables.weight(name).detach()
    return float((weight.amax(1) - weight.amin(1)).max()) / levels


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15)])
def test_a_quantised_row_is_within_a_step_of_its_float_row(
    precision: Precision, levels: int, float_tables: PooledTables
) -> None:
    tables = QuantizedTables.from_float(float_tables, precision)
    for name, count in ROWS.items():
        found = tables.take(name, torch.arange(count))
        wanted = float_tables.weight(name).detach()
        # Half a step of the codes, and as much again for the rounding of scale and bias.
        assert float((found - wanted).abs().max()) <= largest_step(float_tables, name, levels)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_bags_are_the_weighted_sums_of_their_rows(
    precision: Precision, float_tables: PooledTables
) -> None:
    tables = QuantizedTables.from_float(float_tables, precision)
    bags = all_bags(30)
    pooled = tables(bags)
    for name, bag in bags.items():
        rows = tables.take(name, bag.rows).double() * bag.weights[:, None]
        of = torch.arange(30).repeat_interleave(bag.lengths)
        wanted = torch.zeros(30, DIM, dtype=torch.float64).index_add_(0, of, rows)
        assert pooled[name].dtype == torch.float32
        assert torch.allclose(pooled[name].double(), wanted, atol=1e-6)
        assert not pooled[name][bag.lengths == 0].any()


def test_sequences_are_the_rows_of_their_values(float_sequences: SequenceTables) -> None:
    sequences = all_sequences(20)
    found = float_sequences(sequences)
    for name, one in sequences.items():
        assert torch.equal(found[name], float_sequences.weight(name)[one.rows])
    empty = float_sequences(all_sequences(0))
    assert [part.shape for part in empty.values()] == [(0, DIM)] * 3


def test_every_table_of_sequences_learns() -> None:
    tables = SequenceTables({"films": 9, "genres": 4}, 3)
    one = Sequences(longs(1, 1), longs(2))
    sum(value.sum() for value in tables({"films": one, "genres": one}).values()).backward()
    for name in ("films", "genres"):
        gradient = tables.weight(name).grad
        assert gradient is not None
        assert gradient[1].tolist() == [2.0, 2.0, 2.0]
        assert not gradient[2:].any()


def test_a_state_that_does_not_fit_is_refused(float_tables: PooledTables) -> None:
    tables = QuantizedTables(ROWS, DIM, "int8")
    state = QuantizedTables.from_float(float_tables, "int8").state_dict()
    key = "tables.embedding_bags.tags.weight"
    with pytest.raises(RuntimeError, match=rf"{key} must be \(101, 52\) uint8, got \(101, 48\)"):
        tables.load_state_dict(float_tables.state_dict())
    with pytest.raises(RuntimeError, match=r"\(101, 52\) uint8, got \(101, 28\)"):
        tables.load_state_dict(QuantizedTables.from_float(float_tables, "int4").state_dict())
    damaged = state[key].clone()
    damaged[7, 1] = 0x7E
    with pytest.raises(RuntimeError, match=f"{key} must have finite scales and biases"):
        tables.load_state_dict({**state, key: damaged})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tables.embedding_bags.more.weight"):
        tables.load_state_dict({**state, "tables.embedding_bags.more.weight": damaged})
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        tables.load_state_dict(state)


def test_a_state_can_lie_inside_a_larger_model(float_tables: PooledTables) -> None:
    outer = torch.nn.Module()
    outer.user = QuantizedTables.from_float(float_tables, "int8")
    assert f"user.tables.embedding_bags.{next(iter(ROWS))}.weight" in outer.state_dict()
    assert len(outer.state_dict()) == len(ROWS)
    outer.load_state_dict(outer.state_dict())


def test_tables_hold_zeros_until_they_are_filled() -> None:
    tables = QuantizedTables(ROWS, DIM, "int8")
    assert not tables(all_bags(5))["films"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -70000.0])
def test_weights_that_cannot_be_quantised_name_their_table(value: float) -> None:
    floats = PooledTables({"films": 9, "genres": 4}, 8)
    with torch.no_grad():
        floats.weight("genres")[2, 5] = value
    with pytest.raises(FieldError, match=r"genres: must be finite and within ±65504, .* row 2"):
        QuantizedTables.from_float(floats, "int8")


def test_a_dimension_that_does_not_fit_the_precision_is_refused() -> None:
    with pytest.raises(FieldError, match="dim: must be a multiple of 4 for int8, got 6"):
        QuantizedTables({"films": 9}, 6, "int8")
    with pytest.raises(FieldError, match="dim: must be a multiple of 8 for int4, got 12"):
        QuantizedTables.from_float(PooledTables({"films": 9}, 12), "int4")


def test_a_lookup_of_other_features_or_rows_is_refused(float_tables: PooledTables) -> None:
    tables = QuantizedTables.from_float(float_tables, "int8")
    bags = all_bags(3)
    with pytest.raises(FieldError, match="features: must be"):
        tables({"films": bags["films"]})
    beyond = bags["tags"]._replace(rows=bags["tags"].rows + 101)
    with pytest.raises(FieldError, match="tags: rows must be from 0 to 100"):
        tables({**bags, "tags": beyond})
    with pytest.raises(FieldError, match="songs: must be one of the tables"):
        tables.update_rows("songs", longs(1), torch.zeros(1, DIM))
    with pytest.raises(FieldError, match="tags: rows must be from 0 to 100, got 101"):
        tables.take("tags", longs(101))


def test_caches_forget_rows_that_were_written_behind_them(float_tables: PooledTables) -> None:
    tables = QuantizedTables.from_float(float_tables, "int8")
    forgotten = []

    class Memory:
        def reset_cache_states(self) -> None:
            forgotten.append(tables.records("tags")[7].tolist())

    tables._memories.append(Memory())
    before = tables.records("tags")[7].tolist()
    tables.update_rows("tags", longs(7), torch.randn(1, DIM))
    tables.load_state_dict(QuantizedTables(ROWS, DIM, "int8").state_dict())
    assert [row == before for row in forgotten] == [False, False]
    assert not any(forgotten[1])
