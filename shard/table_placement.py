"""Where the embedding tables of a loaded model lie: on devices of this process, or elsewhere."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from silvershard.model.placement import (
    Sharding,
    TablePlan,
    TableTopology,
    measured_topology,
    record_bytes,
)
from silvershard.model.quantized_rows import records_problem
from silvershard.model.remote_tables import PRECISION, RemoteTables, RowSource, StoredRows
from silvershard.model.sharded_tower import shard_tower
from silvershard.model.two_tower import TwoTower

_log = logging.getLogger(__name__)


class RowSources(Protocol):
    """Where the rows of the remote tables of any generation are."""

    def open(self, generation: int, tables: Collection[str]) -> RowSource:
        """Return a source of the rows of these tables of a generation, as they were published.

        It belongs to one model: updates of rows reach it through that model alone.
        """
        ...


@dataclass(frozen=True)
class TableSettings:
    """What is decided about the tables of a process."""

    sources: RowSources | None = None
    """Of the rows of remote tables; None: they are loaded with the model."""
    sharding: Mapping[str, Sharding] = field(default_factory=dict)
    """How quantised tables are cut over several devices, by table; others as the planner says."""
    host_bytes: int = 0
    """Budget of the quantised tables; 0: most of the memory that is free."""


def remote_tables(model: nn.Module) -> list[str]:
    """Return the names of the remote tables of a model."""
    return [
        name for part in model.modules() if isinstance(part, RemoteTables) for name in part.rows
    ]


def connect_tables(
    model: nn.Module, source: RowSource | None, load_rows: Callable[[str], Tensor]
) -> None:
    """Give the remote tables of a model a source of their rows.

    Args:
        model: the model.
        source: where the rows are; None: in this process.
        load_rows: returns the records ``(rows, W)`` uint8 of a table, for that.

    Raises:
        ValueError: if what was loaded is not the rows of a table.
    """
    for part in model.modules():
        if not isinstance(part, RemoteTables):
            continue
        if source is not None:
            part.connect(source)
            continue
        stored = {name: load_rows(name) for name in part.rows}
        for name, num_rows in part.rows.items():
            problem = records_problem(stored[name], (num_rows, record_bytes(part.dim, PRECISION)))
            if problem:
                raise ValueError(f"rows of table {name} {problem}")
        part.connect(StoredRows(stored))


def place_tables(
    model: nn.Module, devices: Sequence[str], settings: TableSettings
) -> list[TablePlan]:
    """Put the quantised tables of a model onto the devices of this process; log and return where.

    Raises:
        TablePlanError: naming the table that does not fit its budget or cannot be cut as decided.
    """
    if not isinstance(model, TwoTower):
        return []
    topology = measured_topology(devices)
    if settings.host_bytes:
        topology = TableTopology.model_validate(
            topology.model_dump() | {"host_bytes": settings.host_bytes}
        )
    plans = shard_tower(model, topology, settings.sharding)
    for plan in plans:
        _log.info("%s tables, %s:\n%s", plan.kind, plan.precision, plan.describe())
    return plans
