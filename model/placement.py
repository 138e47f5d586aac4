"""Where quantised embedding tables lie: budgets of devices, and a plan for them as plain data.

A plan says for each table how it is cut, in which memory it lies and what each device holds of it.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.errors import FieldError

Precision = Literal["int8", "int4"]
Kind = Literal["pooled", "sequence"]
Sharding = Literal["table", "row", "column"]
Tier = Literal["hbm", "host", "host_cached"]

CODE_BITS: Mapping[Precision, int] = {"int8": 8, "int4": 4}
HEADER_BYTES = 4
"""The scale and the bias of a row, both float16."""

TIERS: Mapping[str, tuple[Tier, ...]] = {"cpu": ("host",), "cuda": ("hbm", "host", "host_cached")}
"""The memories that the tables of a device can lie in."""

_WORD_BYTES = 4
_CUDA_ROW_BYTES = 16


class TablePlanError(FieldError):
    """Tables that cannot be placed as asked; ``field`` is the table, or the setting at fault."""


def word_columns(precision: Precision) -> int:
    """Return the number of codes of one 4-byte word; every row and every cut holds whole words."""
    return 8 * _WORD_BYTES // CODE_BITS[precision]


def record_bytes(dim: int, precision: Precision) -> int:
    """Return the bytes W of a quantised row as it is stored and sent."""
    return HEADER_BYTES + dim * CODE_BITS[precision] // 8


def memory_bytes(dim: int, precision: Precision, device: Literal["cpu", "cuda"]) -> int:
    """Return the bytes that a row of a shard takes in a lookup's memory."""
    record = record_bytes(dim, precision)
    if device == "cpu":
        return record
    return -(-record // _CUDA_ROW_BYTES) * _CUDA_ROW_BYTES


def check_tables(rows: Mapping[str, int], dim: int, precision: Precision) -> None:
    """Check the sizes of quantised tables.

    Raises:
        TablePlanError: if there is no table, one has no rows, the precision is unknown, or a row
            is not a whole number of 4-byte words, as the lookups of FBGEMM need it.
    """
    if precision not in CODE_BITS:
        raise TablePlanError(
            "precision", f"must be one of {', '.join(CODE_BITS)}, got {precision!r}"
        )
    if dim < 1 or dim % word_columns(precision):
        raise TablePlanError(
            "dim", f"must be a multiple of {word_columns(precision)} for {precision}, got {dim}"
        )
    if not rows:
        raise TablePlanError("rows", "must name at least one table, got none")
    for name, num_rows in rows.items():
        if num_rows < 1:
            raise TablePlanError(name, f"must have at least 1 row, got {num_rows}")


class TableTopology(BaseModel):
    """The devices of one shard and the memory that its tables may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda"] = Field(description="type of the devices")
    num_devices: int = Field(ge=1, le=64, description="devices of one process")
    hbm_bytes: int = Field(
        default=0, ge=0, description="budget of each device's own memory; 0 on cpu"
    )
    host_bytes: int = Field(
        ge=0, description="budget of host memory; each device may use an equal part of it"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.device == "cuda") != (self.hbm_bytes > 0):
            raise ValueError(f"hbm_bytes must be 0 on cpu and more on cuda, got {self.hbm_bytes}")
        return self

    @property
    def host_bytes_per_device(self) -> int:
        """Return the part of the host memory that the tables of one device may take."""
        return self.host_bytes // self.num_devices


def measured_topology(devices: Sequence[str], *, reserve: float = 0.2) -> TableTopology:
    """Return the topology of these devices with the memory that is free now.

    Host memory is what the kernel reports as unused, so pages of its file cache do not count.

    Args:
        devices: ``"cpu"`` any number of times, or ``"cuda:0"``, ``"cuda:1"``, ... from 0 on.
        reserve: the share of the free memory that is left to everything else, from 0 to below 1.

    Raises:
        TablePlanError: if the devices are none, mixed or not there, or the reserve is out of range.
    """
    if not 0.0 <= reserve < 1.0:
        raise TablePlanError("reserve", f"must be at least 0 and below 1, got {reserve}")
    names = list(devices)
    share = 1.0 - reserve
    host_bytes = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * share)
    if names and all(name == "cpu" for name in names):
        return TableTopology(device="cpu", num_devices=len(names), host_bytes=host_bytes)
    if not names or names != [f"cuda:{place}" for place in range(len(names))]:
        raise TablePlanError(
            "devices", f"must be 'cpu' only, or 'cuda:0', 'cuda:1' and so on, got {names}"
        )
    check_cuda(len(names))
    free = min(torch.cuda.mem_get_info(place)[0] for place in range(len(names)))
    return TableTopology(
        device="cuda",
        num_devices=len(names),
        hbm_bytes=int(free * share),
        host_bytes=host_bytes,
    )


def check_cuda(num_devices: int) -> None:
    """Check that there are that many GPUs.

    Raises:
        TablePlanError: if there are fewer.
    """
    found = torch.cuda.device_count()
    if found < num_devices:
        raise TablePlanError("devices", f"must be {num_devices} of cuda, got {found}")


class TableConstraint(BaseModel):
    """What a person decides about one table; the planner decides the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharding: Sharding | None = Field(
        default=None, description="how the table is cut; not given: the planner chooses"
    )
    tier: Tier | None = Field(
        default=None,
        description="hbm, host memory, or host memory with a cache in hbm; not given: the planner "
        "chooses",
    )
    cache_ratio: float = Field(
        default=0.2, gt=0, le=1, description="share of the rows that fit into the cache in hbm"
    )
    values_per_bag: float = Field(
        default=1.0, gt=0, description="expected values of a bag, for the planner's cost model"
    )


class TableOptions(NamedTuple):
    """What a planner may choose from for one table, and what it has to reckon with."""

    shardings: tuple[Sharding, ...]
    tiers: tuple[Tier, ...]
    columns: int
    """Of each part where it is cut by column."""
    cache_ratio: float
    values_per_bag: float


class Proposal(NamedTuple):
    """What a planner chose for one table."""

    sharding: Sharding
    tier: Tier
    shards: list[tuple[int, int, int, int, int]]
    """Device, first row, first column, number of rows and of columns of each."""


class PlacedShard(BaseModel):
    """One rectangle of a table on one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: int = Field(ge=0, description="index of the device")
    first_row: int = Field(ge=0, description="first row")
    num_rows: int = Field(ge=1, description="number of rows")
    first_column: int = Field(ge=0, description="first column")
    num_columns: int = Field(ge=1, description="number of columns")
    hbm_bytes: int = Field(ge=0, description="bytes in the device's own memory")
    host_bytes: int = Field(ge=0, description="bytes in host memory")


class PlacedTable(BaseModel):
    """One table, cut and placed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="of the feature that the table embeds")
    num_rows: int = Field(ge=1, description="rows of the whole table")
    sharding: Sharding = Field(description="how it is cut")
    tier: Tier = Field(description="the memory it lies in")
    cache_ratio: float | None = Field(
        default=None, gt=0, le=1, description="share of the rows in the cache; host_cached only"
    )
    shards: tuple[PlacedShard, ...] = Field(min_length=1, description="its parts, in order")

    @property
    def hbm_bytes(self) -> int:
        """Return the bytes in the memory of devices."""
        return sum(shard.hbm_bytes for shard in self.shards)

    @property
    def host_bytes(self) -> int:
        """Return the bytes in host memory."""
        return sum(shard.host_bytes for shard in self.shards)


class TablePlan(BaseModel):
    """Quantised tables over the devices of one process; everything needed to build them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    topology: TableTopology = Field(description="the devices and their budgets")
    kind: Kind = Field(description="lookups of weighted bags, or of one row per value")
    dim: int = Field(ge=1, description="embedding dimension D")
    precision: Precision = Field(description="of the codes")
    tables: tuple[PlacedTable, ...] = Field(min_length=1, description="in the order of features")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.rows) != len(self.tables):
            raise ValueError(f"tables must have distinct names, got {list(self.rows)}")
        check_tables(self.rows, self.dim, self.precision)
        for table in self.tables:
            self._check_table(table)
        return self

    def _check_table(self, table: PlacedTable) -> None:
        """Refuse shards that do not tile the table, or that no device can hold."""
        if (table.tier == "host_cached") != (table.cache_ratio is not None):
            raise ValueError(f"cache_ratio of table {table.name} goes with host_cached only")
        problem = placement_problem(
            table.sharding, table.tier, self.kind, device=self.topology.device
        )
        if problem:
            raise ValueError(f"table {table.name} {problem}")
        whole = {"num_rows": table.num_rows, "num_columns": self.dim}
        at = {"num_rows": 0, "num_columns": 0}
        cut = {"row": "num_rows", "column": "num_columns"}.get(table.sharding)
        for place, shard in enumerate(table.shards):
            sizes = {"num_rows": shard.num_rows, "num_columns": shard.num_columns}
            fits = all(sizes[side] == whole[side] for side in whole if side != cut)
            begins = shard.first_row == at["num_rows"] and shard.first_column == at["num_columns"]
            words = shard.num_columns % word_columns(self.precision) == 0
            ranked = table.sharding != "row" or shard.device == place
            inside = shard.device < self.topology.num_devices
            if not (fits and begins and words and ranked and inside):
                raise ValueError(f"shard {place} of table {table.name} does not continue its cut")
            if cut:
                at[cut] += sizes[cut]
        if cut and at[cut] != whole[cut]:
            raise ValueError(f"shards of table {table.name} do not cover it")
        if cut == "num_rows" and len(table.shards) != self.topology.num_devices:
            raise ValueError(f"table {table.name} must have a shard on every device")

    @property
    def rows(self) -> dict[str, int]:
        """Return the rows of each table."""
        return {table.name: table.num_rows for table in self.tables}

    def used_bytes(self) -> list[tuple[int, int]]:
        """Return the bytes of its own and of host memory that each device takes."""
        used = [[0, 0] for _ in range(self.topology.num_devices)]
        for table in self.tables:
            for shard in table.shards:
                used[shard.device][0] += shard.hbm_bytes
                used[shard.device][1] += shard.host_bytes
        return [(hbm, host) for hbm, host in used]

    def cache_ratio_of(self, names: Collection[str]) -> float | None:
        """Return the share of the cached rows of these tables that fit into their caches."""
        cached = [(one.num_rows, one.cache_ratio) for one in self.tables if one.name in names]
        sizes = [(rows, rows * ratio) for rows, ratio in cached if ratio is not None]
        total = sum(rows for rows, _ in sizes)
        return sum(fitting for _, fitting in sizes) / total if total else None

    @property
    def fits(self) -> bool:
        """Return whether every device keeps within its budgets."""
        hbm, host = self.topology.hbm_bytes, self.topology.host_bytes_per_device
        return all(own <= hbm and shared <= host for own, shared in self.used_bytes())

    @property
    def remaining(self) -> TableTopology:
        """Return the same devices with what the fullest of them has left, for further tables."""
        used = self.used_bytes()
        hbm = self.topology.hbm_bytes - max(own for own, _ in used)
        host = self.topology.host_bytes_per_device - max(shared for _, shared in used)
        left = {"hbm_bytes": max(hbm, 0), "host_bytes": max(host, 0) * self.topology.num_devices}
        return self.topology.model_copy(update=left)

    def describe(self) -> str:
        """Return the plan as a table of text: one line per table, then one per device."""
        lines = [["table", "rows", "sharding", "tier", "devices", "hbm bytes", "host bytes"]]
        for table in self.tables:
            tier: str = table.tier
            if table.cache_ratio is not None:
                tier += f" {table.cache_ratio:.0%}"
            devices = ",".join(str(shard.device) for shard in table.shards)
            sizes = [f"{table.hbm_bytes:,}", f"{table.host_bytes:,}"]
            lines.append([table.name, f"{table.num_rows:,}", table.sharding, tier, devices, *sizes])
        used = self.used_bytes()
        for place, (hbm, host) in enumerate(used):
            name = f"{self.topology.device}:{place}"
            budget = self.topology.hbm_bytes, self.topology.host_bytes_per_device
            sizes = [f"{hbm:,} of {budget[0]:,}", f"{host:,} of {budget[1]:,}"]
            lines.append([name, "", "", "", "", *sizes])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def placement_problem(
    sharding: Sharding | None, tier: Tier | None, kind: Kind, *, device: Literal["cpu", "cuda"]
) -> str | None:
    """Return what is wrong with this combination, None where nothing is."""
    if tier is not None and tier not in TIERS[device]:
        return f"must lie in {' or '.join(TIERS[device])} on {device}, got {tier}"
    if kind == "sequence" and sharding == "column":
        return "must be cut by table or row for sequences: there is no column-wise lookup of them"
    if kind == "pooled" and sharding == "row" and tier == "host_cached":
        return (
            "must lie in hbm or host when it is cut by row: its rows are pooled after they are "
            "brought together, past the cache"
        )
    return None


def plan_of(kind: Kind, plan: TablePlan) -> TablePlan:
    """Return the plan if it is one of this kind.

    Raises:
        TablePlanError: if it is of another.
    """
    if plan.kind != kind:
        raise TablePlanError("kind", f"must be {kind}, got {plan.kind}")
    return plan
