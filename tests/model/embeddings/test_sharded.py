from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from silvershard.model import embeddings
from silvershard.model.bags import Bags, Sequences
from silvershard.model.embeddings import (
    PooledTables,
    QuantizedSequences,
    QuantizedTables,
    SequenceTables,
    ShardedSequences,
    ShardedTables,
)
from silvershard.model.placement import (
    Kind,
    PlacedShard,
    PlacedTable,
    Precision,
    Sharding,
    TablePlan,
    TablePlanError,
    TableTopology,
)

# Odd numbers of rows, so that no cut is even.
ROWS = {"films": 1001, "genres": 17, "tags": 101}
DIM = 48


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_bags(num_bags: int, rows: int, seed: int) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (num_bags,), generator=generator)
    total = int(lengths.sum())
    values = torch.randint(rows, (total,), generator=generator)
    return Bags(values, torch.rand(total, generator=generator), lengths)


def random_sequences(num_sequences: int, rows: int, seed: int) -> Sequences:
    bags = random_bags(num_sequences, rows, seed)
    return Sequences(bags.rows, bags.lengths)


def all_bags(num_bags: int, seed: int = 1) -> dict[str, Bags]:
    return {name: random_bags(num_bags, count, seed) for name, count in ROWS.items()}


def all_sequences(num_sequences: int, seed: int = 1) -> dict[str, Sequences]:
    return {name: random_sequences(num_sequences, count, seed) for name, count in ROWS.items()}


def cut(sharding: Sharding, num_devices: int, name: str) -> tuple[PlacedShard, ...]:
    rows = [ROWS[name] * place // num_devices for place in range(num_devices + 1)]
    words = [DIM // 8 * place // num_devices * 8 for place in range(num_devices + 1)]
    device = len(name) % num_devices
    parts = {
        "table": [(device, 0, ROWS[name], 0, DIM)],
        "row": [
            (place, rows[place], rows[place + 1] - rows[place], 0, DIM)
            for place in range(num_devices)
        ],
        # The first columns on the last device, so that no order can be mistaken for the other.
        "column": [
            (num_devices - 1 - place, 0, ROWS[name], words[place], words[place + 1] - words[place])
            for place in range(num_devices)
        ],
    }[sharding]
    return tuple(
        PlacedShard(
            device=at,
            first_row=row,
            num_rows=count,
            first_column=column,
            num_columns=width,
            hbm_bytes=0,
            host_bytes=0,
        )
        for at, row, count, column, width in parts
    )


def plan_of(
    shardings: dict[str, Sharding], num_devices: int, precision: Precision, kind: Kind = "pooled"
) -> TablePlan:
    return TablePlan(
        topology=TableTopology(device="cpu", num_devices=num_devices, host_bytes=1 << 30),
        kind=kind,
        dim=DIM,
        precision=precision,
        tables=tuple(
            PlacedTable(
                name=name,
                num_rows=ROWS[name],
                sharding=sharding,
                tier="host",
                shards=cut(sharding, num_devices, name),
            )
            for name, sharding in shardings.items()
        ),
    )


@pytest.fixture(scope="module")
def float_tables() -> PooledTables:
    torch.manual_seed(3)
    return PooledTables(ROWS, DIM)


@pytest.fixture(scope="module")
def float_sequences() -> SequenceTables:
    torch.manual_seed(4)
    return SequenceTables(ROWS, DIM)


SHARDINGS = [
    dict.fromkeys(ROWS, "table"),
    dict.fromkeys(ROWS, "row"),
    dict.fromkeys(ROWS, "column"),
    {"films": "row", "genres": "column", "tags": "table"},
    {"films": "table", "genres": "row", "tags": "column"},
]


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shardings", SHARDINGS)
def test_every_cut_of_pooled_tables_gives_the_bits_of_one_piece(
    shardings: dict[str, Sharding],
    precision: Precision,
    num_devices: int,
    float_tables: PooledTables,
) -> None:
    whole = QuantizedTables.from_float(float_tables, precision)
    sharded = ShardedTables(plan_of(shardings, num_devices, precision))
    sharded.load_state_dict(whole.state_dict())
    nothing = {name: Bags(longs(), torch.zeros(0), longs(0, 0)) for name in ROWS}
    for bags in (all_bags(40), all_bags(1, seed=5), nothing, all_bags(0)):
        wanted, found = whole(bags), sharded(bags)
        assert list(found) == list(wanted)
        for name in ROWS:
            assert torch.equal(found[name], wanted[name])
    for name in ROWS:
        assert torch.equal(sharded.records(name), whole.records(name))


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "shardings", [*SHARDINGS[:2], {"films": "row", "genres": "table", "tags": "row"}]
)
def test_every_cut_of_sequences_gives_the_bits_of_one_piece(
    shardings: dict[str, Sharding],
    precision: Precision,
    num_devices: int,
    float_sequences: SequenceTables,
) -> None:
    whole = QuantizedSequences.from_float(float_sequences, precision)
    sharded = ShardedSequences(plan_of(shardings, num_devices, precision, kind="sequence"))
    sharded.load_state_dict(whole.state_dict())
    nothing = {name: Sequences(longs(), longs(0, 0)) for name in ROWS}
    for sequences in (all_sequences(20), all_sequences(1, seed=5), nothing, all_sequences(0)):
        wanted, found = whole(sequences), sharded(sequences)
        for name, count in ROWS.items():
            assert torch.equal(found[name], wanted[name])
            assert torch.equal(wanted[name], whole.take(name, sequences[name].rows))
            assert wanted[name].shape == (sequences[name].rows.shape[0], DIM)
            assert count == whole.records(name).shape[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("sharding", ["whole", "table", "row", "column"])
def test_a_quantised_bag_has_the_same_bits_whatever_bags_surround_it(
    sharding: str, precision: Precision, threads: int, float_tables: PooledTables
) -> None:
    tables = QuantizedTables.from_float(float_tables, precision)
    if sharding in ("table", "row", "column"):
        sharded = ShardedTables(plan_of(dict.fromkeys(ROWS, sharding), 2, precision))
        sharded.load_state_dict(tables.state_dict())
        tables = sharded
    bags = all_bags(40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = tables(bags)
        for chosen in (*torch.arange(40).split(1), torch.randperm(40)[:33], longs(7, 3, 7)):
            apart = tables({name: bag.take(chosen) for name, bag in bags.items()})
            for name in ROWS:
                assert torch.equal(apart[name], together[name][chosen])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shardings", [None, *SHARDINGS[1:]])
def test_updated_rows_are_those_of_tables_quantised_afterwards(
    shardings: dict[str, Sharding] | None, precision: Precision
) -> None:
    torch.manual_seed(5)
    floats = PooledTables(ROWS, DIM)
    tables = QuantizedTables.from_float(floats, precision)
    if shardings is not None:
        sharded = ShardedTables(plan_of(shardings, 3, precision))
        sharded.load_state_dict(tables.state_dict())
        tables = sharded
    bags = all_bags(20)
    before = tables(bags)
    for name, count in ROWS.items():
        rows = torch.randperm(count)[: count // 2]
        values = 3.0 * torch.randn(rows.shape[0], DIM)
        tables.update_rows(name, rows, values)
        with torch.no_grad():
            floats.weight(name)[rows] = values
    afterwards = QuantizedTables.from_float(floats, precision)
    found, wanted = tables(bags), afterwards(bags)
    for name in ROWS:
        assert torch.equal(found[name], wanted[name])
        assert not torch.equal(found[name], before[name])
        assert torch.equal(tables.records(name), afterwards.records(name))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_tables_come_back_from_a_file_with_the_same_bits(
    precision: Precision, float_tables: PooledTables, tmp_path: Path
) -> None:
    whole = QuantizedTables.from_float(float_tables, precision)
    sharded = ShardedTables(plan_of(SHARDINGS[3], 3, precision))
    sharded.load_state_dict(whole.state_dict())
    width = 4 + DIM * (8 if precision == "int8" else 4) // 8
    for tables in (whole, sharded):
        path = tmp_path / "tables.safetensors"
        safetensors.torch.save_file(tables.state_dict(), path)
        state = safetensors.torch.load_file(path)
        assert {key: tuple(one.shape) for key, one in state.items()} == {
            f"tables.embedding_bags.{name}.weight": (count, width) for name, count in ROWS.items()
        }
        again = QuantizedTables(ROWS, DIM, precision)
        again.load_state_dict(state)
        bags = all_bags(10)
        for name in ROWS:
            assert torch.equal(again(bags)[name], whole(bags)[name])


def test_a_plan_of_the_other_kind_is_refused() -> None:
    with pytest.raises(TablePlanError, match="kind: must be pooled, got sequence"):
        ShardedTables(plan_of(SHARDINGS[0], 2, "int8", kind="sequence"))
    with pytest.raises(TablePlanError, match="kind: must be sequence, got pooled"):
        ShardedSequences(plan_of(SHARDINGS[0], 2, "int8"))


def test_a_plan_for_devices_that_are_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cpu = plan_of(SHARDINGS[0], 2, "int8")
    topology = TableTopology(device="cuda", num_devices=2, hbm_bytes=1 << 30, host_bytes=1 << 30)
    plan = cpu.model_copy(update={"topology": topology})
    with pytest.raises(TablePlanError, match="devices: must be 2 of cuda, got 1"):
        ShardedTables(plan)


def test_a_gpu_plan_reaches_torchrec_with_its_kernels_places_and_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    class Sharder:
        def __init__(self, kind: str, settings: dict[str, Any]) -> None:
            seen.update(kind=kind, settings=settings)

        def shard(self, whole: Any, parameters: Any, env: Any, device: Any) -> None:
            seen.update(parameters=parameters, world_size=env.world_size, device=device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(embeddings, "_sharder", Sharder)
    topology = TableTopology(device="cuda", num_devices=2, hbm_bytes=1 << 30, host_bytes=1 << 30)
    tiers = {"films": "host_cached", "genres": "hbm", "tags": "host"}
    tables = [
        table.model_copy(
            update={
                "tier": tiers[table.name],
                "cache_ratio": 0.05 if table.name == "films" else None,
            }
        )
        for table in plan_of(
            {"films": "column", "genres": "row", "tags": "table"}, 2, "int8"
        ).tables
    ]
    plan = TablePlan(
        topology=topology, kind="pooled", dim=DIM, precision="int8", tables=tuple(tables)
    )
    embeddings._sharded_collection(plan, list(ROWS))
    found = {
        name: (
            one.sharding_type,
            one.compute_kernel,
            [
                (str(shard.placement), shard.shard_offsets, shard.shard_sizes)
                for shard in one.sharding_spec.shards
            ],
        )
        for name, one in seen["parameters"].items()
    }
    assert found == {
        "films": (
            "column_wise",
            "quant_uvm_caching",
            [("rank:1/cuda:1", [0, 0], [1001, 24]), ("rank:0/cuda:0", [0, 24], [1001, 24])],
        ),
        "genres": (
            "row_wise",
            "quant",
            [("rank:0/cuda:0", [0, 0], [8, 48]), ("rank:1/cuda:1", [8, 0], [9, 48])],
        ),
        "tags": ("table_wise", "quant_uvm", [("rank:0/cuda:0", [0, 0], [101, 48])]),
    }
    assert (seen["kind"], seen["world_size"], seen["device"].type) == ("pooled", 2, "cuda")
    assert seen["settings"] == {"cache_load_factor": pytest.approx(0.05)}
