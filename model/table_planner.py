"""Plans for quantised tables: what may be chosen, TorchRec's choice, and whether it fits."""

import math
from collections.abc import Mapping
from typing import Literal

from silvershard.model.embeddings import propose_placement
from silvershard.model.placement import (
    TIERS,
    Kind,
    PlacedShard,
    PlacedTable,
    Precision,
    Proposal,
    Sharding,
    TableConstraint,
    TableOptions,
    TablePlan,
    TablePlanError,
    TableTopology,
    Tier,
    check_tables,
    memory_bytes,
    placement_problem,
    record_bytes,
    word_columns,
)


def plan_tables(
    rows: Mapping[str, int],
    dim: int,
    precision: Precision,
    topology: TableTopology,
    *,
    kind: Kind = "pooled",
    constraints: Mapping[str, TableConstraint] | None = None,
    batch_size: int = 64,
) -> TablePlan:
    """Return where TorchRec's planner puts quantised tables within the budgets.

    The planner weighs every allowed cut and memory of every table by its model of the time of a
    lookup, and takes the fastest whole that fits. No device of the topology needs to be there.

    Args:
        rows: rows of the table of each feature.
        dim: D, a multiple of 4 for int8 and of 8 for int4.
        precision: of the codes.
        topology: the devices and their budgets.
        kind: pooled bags, or sequences.
        constraints: what is decided already, by table.
        batch_size: B of a lookup, for the cost model and its buffers.

    Raises:
        TablePlanError: naming the table that does not fit, what it needs and the budget; or the
            argument, constraint or size that cannot be.
    """
    check_tables(rows, dim, precision)
    given = dict(constraints or {})
    for name in given:
        if name not in rows:
            raise TablePlanError("constraints", f"must be of tables {list(rows)}, got {name!r}")
    decided = {name: given.get(name, TableConstraint()) for name in rows}
    allowed = {
        name: _options(name, rows[name], dim, precision, topology, kind, decided[name])
        for name in rows
    }
    # The planner counts records; memory of a GPU is laid out in wider rows, all by one factor.
    record, laid_out = record_bytes(dim, precision), memory_bytes(dim, precision, topology.device)
    budgets = topology.model_copy(
        update={
            "hbm_bytes": topology.hbm_bytes * record // laid_out,
            "host_bytes": topology.host_bytes * record // laid_out,
        }
    )
    for without_columns in (False, True):
        offered = {name: _offered(allowed[name], without_columns=without_columns) for name in rows}
        proposals = propose_placement(kind, rows, dim, precision, budgets, offered, batch_size)
        if proposals is None:
            break
        tables = tuple(
            _placed(name, rows[name], proposals[name], precision, topology, decided[name])
            for name in rows
        )
        plan = TablePlan(topology=topology, kind=kind, dim=dim, precision=precision, tables=tables)
        if plan.fits:
            return plan
    raise _refusal(rows, dim, precision, topology, decided)


def _offered(options: TableOptions, *, without_columns: bool) -> TableOptions:
    """Return the options, less the cut by column if there is another.

    The planner does not count that every part of such a cut repeats the header of its rows and is
    laid out by itself, so its choice may be too large.
    """
    others = tuple(cut for cut in options.shardings if cut != "column")
    return options._replace(shardings=others) if without_columns and others else options


def _options(
    name: str,
    num_rows: int,
    dim: int,
    precision: Precision,
    topology: TableTopology,
    kind: Kind,
    constraint: TableConstraint,
) -> TableOptions:
    """Return what the planner may choose from for a table, all of which can be built."""
    problem = placement_problem(constraint.sharding, constraint.tier, kind, device=topology.device)
    if problem:
        raise TablePlanError(name, problem)
    devices = topology.num_devices
    # TorchRec gives every device the same number of rows, rounded up, as long as there are any.
    all_get_rows = -(-num_rows // devices) * (devices - 1) < num_rows
    columns = next(
        width
        for width in range(word_columns(precision), dim + 1, word_columns(precision))
        if dim % width == 0 and width * devices >= dim
    )
    cuts: dict[Sharding, bool] = {
        "table": True,
        "row": all_get_rows,
        "column": columns < dim or devices == 1,
    }
    if constraint.sharding is not None and not cuts[constraint.sharding]:
        raise TablePlanError(
            name,
            f"cannot be cut by {constraint.sharding}: {num_rows} rows of {dim} columns do not give "
            f"{devices} devices a part each in whole 4-byte words",
        )
    free = [cut for cut in cuts if cuts[cut] and devices > 1] or ["table"]
    shardings = tuple(
        cut
        for cut in ([constraint.sharding] if constraint.sharding else free)
        if placement_problem(cut, constraint.tier, kind, device=topology.device) is None
    )
    return TableOptions(
        shardings=shardings,
        tiers=(constraint.tier,) if constraint.tier else TIERS[topology.device],
        columns=columns,
        cache_ratio=constraint.cache_ratio,
        values_per_bag=constraint.values_per_bag,
    )


def _placed(
    name: str,
    num_rows: int,
    proposal: Proposal,
    precision: Precision,
    topology: TableTopology,
    constraint: TableConstraint,
) -> PlacedTable:
    """Return a proposal with the bytes that it takes."""
    cached = constraint.cache_ratio if proposal.tier == "host_cached" else None
    shards = []
    for device, first_row, first_column, rows, columns in proposal.shards:
        hbm, host = _shard_bytes(rows, columns, precision, topology.device, proposal.tier, cached)
        shards.append(
            PlacedShard(
                device=device,
                first_row=first_row,
                num_rows=rows,
                first_column=first_column,
                num_columns=columns,
                hbm_bytes=hbm,
                host_bytes=host,
            )
        )
    return PlacedTable(
        name=name,
        num_rows=num_rows,
        sharding=proposal.sharding,
        tier=proposal.tier,
        cache_ratio=cached,
        shards=tuple(shards),
    )


def _shard_bytes(
    num_rows: int,
    num_columns: int,
    precision: Precision,
    device: Literal["cpu", "cuda"],
    tier: Tier,
    cache_ratio: float | None,
) -> tuple[int, int]:
    """Return the bytes of device memory and of host memory that a shard takes."""
    each = memory_bytes(num_columns, precision, device)
    if tier == "hbm":
        return num_rows * each, 0
    cached = math.ceil(num_rows * cache_ratio) if cache_ratio is not None else 0
    return cached * each, num_rows * each


def _refusal(
    rows: Mapping[str, int],
    dim: int,
    precision: Precision,
    topology: TableTopology,
    constraints: Mapping[str, TableConstraint],
) -> TablePlanError:
    """Return the error that names the table which does not fit, what it needs and the budget.

    It is the largest of those that do not fit by themselves where their constraint puts them, else
    the largest of all.
    """
    each = memory_bytes(dim, precision, topology.device)

    def room(name: str) -> int:
        constraint = constraints[name]
        devices = 1 if constraint.sharding == "table" else topology.num_devices
        hbm = topology.hbm_bytes if constraint.tier in (None, "hbm") else 0
        host = topology.host_bytes_per_device if constraint.tier != "hbm" else 0
        return devices * max(hbm, host)

    alone = [name for name in rows if rows[name] * each > room(name)]
    name = max(alone or rows, key=lambda one: rows[one])
    total = sum(rows.values()) * each
    others = f", all {len(rows)} tables need {total:,}" if len(rows) > 1 else ""
    asked = constraints[name]
    decided = {"sharding": asked.sharding, "tier": asked.tier}
    wanted = ", ".join(f"{key} {value}" for key, value in decided.items() if value)
    under = f" under its constraint ({wanted})" if wanted else ""
    return TablePlanError(
        name,
        f"does not fit{under}: it needs {rows[name] * each:,} bytes as {precision}{others}; the "
        f"budget on each of {topology.num_devices} {topology.device} devices is "
        f"{topology.hbm_bytes:,} bytes of its own memory and {topology.host_bytes_per_device:,} "
        "of host memory",
    )
