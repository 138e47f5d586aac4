import re

import pytest

from silvershard.model.placement import (
    Kind,
    Precision,
    Sharding,
    TableConstraint,
    TablePlan,
    TablePlanError,
    TableTopology,
    Tier,
)
from silvershard.model.table_planner import plan_tables

ROWS = {"genres": 10_000, "tags": 200_000, "films": 1_000_000}
DIM = 64
MIB = 1 << 20


def gpus(hbm_bytes: int, *, host_bytes: int = 64 << 30, num_devices: int = 2) -> TableTopology:
    return TableTopology(
        device="cuda", num_devices=num_devices, hbm_bytes=hbm_bytes, host_bytes=host_bytes
    )


def cpus(num_devices: int, host_bytes: int = 1 << 30) -> TableTopology:
    return TableTopology(device="cpu", num_devices=num_devices, host_bytes=host_bytes)


def tiers(plan: TablePlan) -> dict[str, Tier]:
    return {table.name: table.tier for table in plan.tables}


def shardings(plan: TablePlan) -> dict[str, Sharding]:
    return {table.name: table.sharding for table in plan.tables}


@pytest.mark.parametrize("kind", ["pooled", "sequence"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tables_that_fit_into_hbm_lie_there(precision: Precision, kind: Kind) -> None:
    plan = plan_tables(ROWS, DIM, precision, gpus(1 << 30), kind=kind)
    assert set(tiers(plan).values()) == {"hbm"}
    assert [table.name for table in plan.tables] == list(ROWS)
    assert plan.fits


@pytest.mark.parametrize("kind", ["pooled", "sequence"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_does_not_fit_into_hbm_is_cached_from_host_memory(
    precision: Precision, kind: Kind
) -> None:
    plan = plan_tables(ROWS, DIM, precision, gpus(20 * MIB), kind=kind)
    films = plan.tables[2]
    assert films.tier == "host_cached"
    assert films.cache_ratio == 0.2
    assert films.hbm_bytes == pytest.approx(films.host_bytes / 5)
    assert tiers(plan)["genres"] == "hbm"
    assert plan.fits


@pytest.mark.parametrize("kind", ["pooled", "sequence"])
def test_without_room_for_a_cache_tables_lie_in_host_memory(kind: Kind) -> None:
    plan = plan_tables(ROWS, DIM, "int8", gpus(MIB), kind=kind)
    assert tiers(plan) == {"genres": "hbm", "tags": "host", "films": "host"}
    assert plan.fits


def test_a_table_larger_than_a_gpu_is_cut_over_both() -> None:
    # 80 bytes of each row: 96.8 MB in all, of which the films are 80.
    plan = plan_tables(ROWS, DIM, "int8", gpus(50 * MIB))
    films = plan.tables[2]
    assert tiers(plan) == dict.fromkeys(ROWS, "hbm")
    assert len(films.shards) == 2
    assert plan.fits


def test_a_plan_counts_rows_as_the_memory_of_the_device_lays_them_out() -> None:
    for topology, each in ((gpus(1 << 30, num_devices=1), 80), (cpus(1), 68)):
        plan = plan_tables(ROWS, DIM, "int8", topology)
        used = {one.name: one.hbm_bytes + one.host_bytes for one in plan.tables}
        assert used == {name: count * each for name, count in ROWS.items()}


def test_a_cpu_plan_lies_in_host_memory() -> None:
    plan = plan_tables(ROWS, DIM, "int8", cpus(2))
    assert set(tiers(plan).values()) == {"host"}
    assert {shard.device for table in plan.tables for shard in table.shards} == {0, 1}
    assert plan.fits


def test_a_plan_of_one_device_cuts_nothing() -> None:
    plan = plan_tables(ROWS, DIM, "int8", cpus(1))
    assert set(shardings(plan).values()) == {"table"}


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("sharding", ["table", "row", "column"])
def test_a_constraint_decides_the_cut(sharding: Sharding, num_devices: int) -> None:
    decided = {"films": TableConstraint(sharding=sharding)}
    plan = plan_tables(ROWS, DIM, "int8", cpus(num_devices), constraints=decided)
    films = plan.tables[2]
    assert films.sharding == sharding
    assert len(films.shards) == (1 if sharding == "table" else num_devices)


@pytest.mark.parametrize("tier", ["hbm", "host", "host_cached"])
def test_a_constraint_decides_the_memory(tier: Tier) -> None:
    decided = {"films": TableConstraint(tier=tier, cache_ratio=0.05)}
    plan = plan_tables(ROWS, DIM, "int8", gpus(1 << 30), constraints=decided)
    films = plan.tables[2]
    assert films.tier == tier
    assert films.cache_ratio == (0.05 if tier == "host_cached" else None)
    assert films.host_bytes == pytest.approx(0 if tier == "hbm" else 96e6, rel=0.2)


def test_the_planner_never_pools_rows_past_their_cache() -> None:
    for hbm in (10 * MIB, 20 * MIB, 30 * MIB):
        for table in plan_tables(ROWS, DIM, "int8", gpus(hbm)).tables:
            assert (table.sharding, table.tier) != ("row", "host_cached")


@pytest.mark.parametrize(
    ("topology", "constraint", "named"),
    [
        (gpus(MIB, host_bytes=10 * MIB), TableConstraint(), ""),
        (gpus(20 * MIB), TableConstraint(tier="hbm"), " under its constraint (tier hbm)"),
        (gpus(60 * MIB), TableConstraint(sharding="table", tier="hbm"), "(sharding table, tier"),
        (gpus(MIB, host_bytes=100 * MIB), TableConstraint(sharding="table"), "(sharding table)"),
        (gpus(1 << 30, host_bytes=MIB), TableConstraint(tier="host"), "(tier host)"),
    ],
)
def test_a_table_that_does_not_fit_is_named_with_its_need_and_the_budget(
    topology: TableTopology, constraint: TableConstraint, named: str
) -> None:
    with pytest.raises(TablePlanError) as caught:
        plan_tables(ROWS, DIM, "int8", topology, constraints={"films": constraint})
    assert caught.value.field == "films"
    message = caught.value.message
    assert named in message
    assert "it needs 80,000,000 bytes as int8, all 3 tables need 96,800,000" in message
    budget = f"{topology.hbm_bytes:,} bytes of its own memory"
    assert f"the budget on each of 2 cuda devices is {budget}" in message
    assert f"{topology.host_bytes_per_device:,} of host memory" in message


def test_the_table_that_cannot_be_where_it_must_is_named_before_a_larger_one() -> None:
    decided = {"tags": TableConstraint(tier="hbm")}
    with pytest.raises(TablePlanError, match=r"^tags: does not fit under its constraint") as caught:
        plan_tables(ROWS, DIM, "int8", gpus(2 * MIB), constraints=decided)
    assert caught.value.__cause__ is None


def test_tables_that_fit_one_by_one_but_not_together_name_the_largest() -> None:
    with pytest.raises(
        TablePlanError, match=r"^films: .* 68,000,000 .* all 3 tables .* 82,280,000"
    ):
        plan_tables(ROWS, DIM, "int8", cpus(2, host_bytes=75_000_000))


@pytest.mark.parametrize(
    ("rows", "sharding", "num_devices"), [(3, "row", 4), (5, "row", 4), (9, "column", 3)]
)
def test_a_cut_that_leaves_a_device_without_its_part_is_refused(
    rows: int, sharding: Sharding, num_devices: int
) -> None:
    decided = {"films": TableConstraint(sharding=sharding)}
    with pytest.raises(TablePlanError, match=f"films: cannot be cut by {sharding}: {rows} rows"):
        plan_tables({"films": rows}, 8, "int4", cpus(num_devices), constraints=decided)


@pytest.mark.parametrize("num_rows", range(1, 8))
def test_small_tables_are_only_cut_where_every_device_gets_a_row(num_rows: int) -> None:
    plan = plan_tables({"films": num_rows}, 8, "int8", cpus(4))
    assert (
        sum(shard.num_rows * shard.num_columns for shard in plan.tables[0].shards) == num_rows * 8
    )


@pytest.mark.parametrize(
    ("topology", "kind", "constraint", "message"),
    [
        (cpus(2), "pooled", TableConstraint(tier="hbm"), "must lie in host on cpu, got hbm"),
        (cpus(2), "sequence", TableConstraint(sharding="column"), "must be cut by table"),
        (
            gpus(MIB),
            "pooled",
            TableConstraint(sharding="row", tier="host_cached"),
            "must lie in hbm or host when it is cut by row",
        ),
    ],
)
def test_a_constraint_that_cannot_be_is_refused(
    topology: TableTopology, kind: Kind, constraint: TableConstraint, message: str
) -> None:
    with pytest.raises(TablePlanError, match=f"films: {re.escape(message)}"):
        plan_tables(ROWS, DIM, "int8", topology, kind=kind, constraints={"films": constraint})


def test_a_constraint_of_an_unknown_table_is_refused() -> None:
    with pytest.raises(TablePlanError, match=r"constraints: must be of tables .*, got 'songs'"):
        plan_tables(ROWS, DIM, "int8", cpus(2), constraints={"songs": TableConstraint()})


def test_equal_questions_have_equal_plans() -> None:
    first, second = (plan_tables(ROWS, DIM, "int4", gpus(20 * MIB)) for _ in range(2))
    assert first == second
    assert TablePlan.model_validate_json(first.model_dump_json()) == first
