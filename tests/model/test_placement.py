import os
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from silvershard.model.placement import (
    Kind,
    PlacedShard,
    Precision,
    Sharding,
    TableConstraint,
    TablePlan,
    TablePlanError,
    TableTopology,
    Tier,
    check_cuda,
    check_tables,
    measured_topology,
    memory_bytes,
    placement_problem,
    plan_of,
    record_bytes,
    word_columns,
)

GPUS = TableTopology(device="cuda", num_devices=2, hbm_bytes=1000, host_bytes=4001)


def shard(
    device: int, first_row: int, num_rows: int, first_column: int = 0, num_columns: int = 16
) -> dict[str, int]:
    return PlacedShard(
        device=device,
        first_row=first_row,
        num_rows=num_rows,
        first_column=first_column,
        num_columns=num_columns,
        hbm_bytes=32 * num_rows,
        host_bytes=0,
    ).model_dump()


def plan(**changes: Any) -> dict[str, Any]:
    table = {
        "name": "films",
        "num_rows": 9,
        "sharding": "row",
        "tier": "hbm",
        "shards": [shard(0, 0, 5), shard(1, 5, 4)],
    }
    top = {"topology": GPUS.model_dump(), "kind": "pooled", "dim": 16, "precision": "int8"}
    own = {key: changes[key] for key in changes if key in top}
    rest = {key: changes[key] for key in changes if key not in top}
    return {**top, **own, "tables": [{**table, **rest}]}


@pytest.mark.parametrize(
    ("precision", "words", "record", "on_cuda"), [("int8", 4, 68, 80), ("int4", 8, 36, 48)]
)
def test_rows_are_as_wide_as_the_lookups_lay_them_out(
    precision: Precision, words: int, record: int, on_cuda: int
) -> None:
    assert word_columns(precision) == words
    assert record_bytes(64, precision) == record
    assert memory_bytes(64, precision, "cpu") == record
    assert memory_bytes(64, precision, "cuda") == on_cuda


@pytest.mark.parametrize(
    ("rows", "dim", "precision", "message"),
    [
        ({"films": 9}, 6, "int8", "dim: must be a multiple of 4 for int8, got 6"),
        ({"films": 9}, 0, "int8", "dim: must be a multiple of 4 for int8, got 0"),
        ({"films": 9}, 4, "int4", "dim: must be a multiple of 8 for int4, got 4"),
        ({"films": 0}, 8, "int4", "films: must have at least 1 row, got 0"),
        ({}, 8, "int4", "rows: must name at least one table"),
        ({"films": 9}, 8, "fp8", "precision: must be one of int8, int4, got 'fp8'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    rows: dict[str, int], dim: int, precision: Any, message: str
) -> None:
    with pytest.raises(TablePlanError, match=message):
        check_tables(rows, dim, precision)


def test_a_topology_gives_each_device_an_equal_part_of_host_memory() -> None:
    assert GPUS.host_bytes_per_device == 2000


@pytest.mark.parametrize(("device", "hbm_bytes"), [("cpu", 1), ("cuda", 0)])
def test_hbm_belongs_to_gpus(device: str, hbm_bytes: int) -> None:
    with pytest.raises(ValidationError, match="hbm_bytes must be 0 on cpu and more on cuda"):
        TableTopology.model_validate(
            {"device": device, "num_devices": 1, "hbm_bytes": hbm_bytes, "host_bytes": 1}
        )


def test_the_topology_of_this_machine_leaves_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    found = measured_topology(["cpu", "cpu"], reserve=0.25)
    assert found == TableTopology(device="cpu", num_devices=2, host_bytes=3_072_000)


def test_the_least_free_gpu_decides_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [(8000, 9000), (6000, 9000)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: free[place])
    found = measured_topology(["cuda:0", "cuda:1"], reserve=0.5)
    assert (found.device, found.num_devices, found.hbm_bytes) == ("cuda", 2, 3000)


@pytest.mark.parametrize("devices", [[], ["cpu", "cuda:0"], ["cuda:1"], ["cuda"], ["tpu"]])
def test_devices_that_cannot_be_one_process_are_refused(devices: list[str]) -> None:
    with pytest.raises(TablePlanError, match="devices: must be 'cpu' only, or 'cuda:0'"):
        measured_topology(devices)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_cuda(1)
    with pytest.raises(TablePlanError, match="devices: must be 2 of cuda, got 1"):
        measured_topology(["cuda:0", "cuda:1"])


@pytest.mark.parametrize("reserve", [-0.1, 1.0, float("nan")])
def test_a_reserve_out_of_range_is_refused(reserve: float) -> None:
    with pytest.raises(TablePlanError, match="reserve: must be at least 0 and below 1"):
        measured_topology(["cpu"], reserve=reserve)


def test_a_plan_survives_being_written_down() -> None:
    found = TablePlan.model_validate(plan())
    assert TablePlan.model_validate_json(found.model_dump_json()) == found
    assert found.rows == {"films": 9}
    assert found.used_bytes() == [(160, 0), (128, 0)]
    assert found.fits
    tight = GPUS.model_copy(update={"hbm_bytes": 159})
    assert not found.model_copy(update={"topology": tight}).fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": [shard(0, 0, 5)]}, "do not cover it"),
        ({"shards": [shard(0, 0, 5), shard(1, 4, 5)]}, "shard 1 of table films does not continue"),
        ({"shards": [shard(0, 0, 5), shard(1, 5, 5)]}, "do not cover it"),
        ({"shards": [shard(0, 0, 5, 0, 8), shard(1, 5, 4)]}, "shard 0 .* does not continue"),
        ({"shards": [shard(1, 0, 5), shard(0, 5, 4)]}, "shard 0 .* does not continue"),
        ({"shards": [shard(0, 0, 9)]}, "must have a shard on every device"),
        ({"sharding": "table", "shards": [shard(2, 0, 9)]}, "shard 0 .* does not continue"),
        ({"sharding": "table"}, "shard 0 .* does not continue"),
        (
            {"sharding": "column", "shards": [shard(0, 0, 9, 0, 6), shard(1, 0, 9, 6, 10)]},
            "shard 0 .* does not continue",
        ),
        ({"cache_ratio": 0.5}, "cache_ratio of table films goes with host_cached only"),
        ({"tier": "host_cached"}, "cache_ratio of table films goes with host_cached only"),
        ({"tier": "host_cached", "cache_ratio": 0.5}, "past the cache"),
        (
            {"sharding": "column", "kind": "sequence", "shards": [shard(0, 0, 9)]},
            "no column-wise lookup",
        ),
        ({"dim": 18}, "dim: must be a multiple of 4 for int8, got 18"),
    ],
)
def test_a_plan_that_does_not_tile_its_tables_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        TablePlan.model_validate(plan(**changes))


def test_two_tables_of_one_name_are_refused() -> None:
    document = plan()
    with pytest.raises(ValidationError, match="tables must have distinct names"):
        TablePlan.model_validate({**document, "tables": document["tables"] * 2})


def test_cpu_tables_lie_in_host_memory() -> None:
    cpu = TableTopology(device="cpu", num_devices=2, host_bytes=4000).model_dump()
    with pytest.raises(ValidationError, match="must lie in host on cpu, got hbm"):
        TablePlan.model_validate(plan(topology=cpu))
    assert TablePlan.model_validate(plan(topology=cpu, tier="host")).tables[0].tier == "host"


def test_cached_tables_share_one_cache() -> None:
    cached = {"sharding": "table", "tier": "host_cached"}
    first = plan(**cached, cache_ratio=0.5, shards=[shard(0, 0, 9)])
    second = plan(**cached, cache_ratio=0.1, name="tags", num_rows=3, shards=[shard(0, 0, 3)])
    third = plan(name="genres")
    tables = [*first["tables"], *second["tables"], *third["tables"]]
    found = TablePlan.model_validate({**first, "tables": tables})
    assert found.cache_ratio_of(["films", "tags", "genres"]) == pytest.approx(0.4)
    assert found.cache_ratio_of(["genres"]) is None


def test_what_a_plan_leaves_is_the_budget_of_the_next() -> None:
    left = TablePlan.model_validate(plan()).remaining
    assert (left.hbm_bytes, left.host_bytes) == (1000 - 160, 4000)
    assert (left.device, left.num_devices) == ("cuda", 2)
    on_host = plan(tier="host")
    for one in on_host["tables"][0]["shards"]:
        one.update(hbm_bytes=0, host_bytes=600 + one["num_rows"])
    assert TablePlan.model_validate(on_host).remaining.host_bytes == 2 * (2000 - 605)


def test_a_plan_describes_itself_as_a_table() -> None:
    cached = plan(
        name="tags", sharding="table", tier="host_cached", cache_ratio=0.05, shards=[shard(1, 0, 9)]
    )
    document = {**plan(), "tables": [*plan()["tables"], *cached["tables"]]}
    assert TablePlan.model_validate(document).describe().splitlines() == [
        "table   rows  sharding  tier            devices  hbm bytes     host bytes",
        "films   9     row       hbm             0,1      288           0",
        "tags    9     table     host_cached 5%  1        288           0",
        "cuda:0                                           160 of 1,000  0 of 2,000",
        "cuda:1                                           416 of 1,000  0 of 2,000",
    ]


@pytest.mark.parametrize(
    ("sharding", "tier", "kind", "fits"),
    [
        ("column", "host_cached", "pooled", True),
        ("row", "host", "pooled", True),
        ("row", "host_cached", "pooled", False),
        ("row", "host_cached", "sequence", True),
        ("column", None, "sequence", False),
        (None, None, "sequence", True),
    ],
)
def test_a_combination_without_a_lookup_is_a_problem(
    sharding: Sharding | None, tier: Tier | None, kind: Kind, fits: bool
) -> None:
    assert (placement_problem(sharding, tier, kind, device="cuda") is None) == fits


def test_a_plan_is_of_one_kind() -> None:
    found = TablePlan.model_validate(plan())
    assert plan_of("pooled", found) is found
    with pytest.raises(TablePlanError, match="kind: must be sequence, got pooled"):
        plan_of("sequence", found)


def test_every_setting_is_described_and_unknown_ones_are_refused() -> None:
    for model in (TableTopology, TableConstraint, TablePlan, PlacedShard):
        assert all(field.description for field in model.model_fields.values())
        assert model.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError):
        TableConstraint.model_validate({"cache_ratio": 0.0})
