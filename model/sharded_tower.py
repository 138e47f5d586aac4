"""Cutting the quantised tables of a tower over the devices of one process."""

from collections.abc import Mapping

from silvershard.model.embeddings import (
    QuantizedSequences,
    QuantizedTables,
    ShardedSequences,
    ShardedTables,
)
from silvershard.model.placement import (
    Sharding,
    TableConstraint,
    TablePlan,
    TablePlanError,
    TableTopology,
)
from silvershard.model.table_planner import plan_tables
from silvershard.model.two_tower import TwoTower

_PARTS = ("user_tables", "session_table", "item_tables")


def shard_tower(
    tower: TwoTower, topology: TableTopology, sharding: Mapping[str, Sharding]
) -> list[TablePlan]:
    """Put the quantised tables of a tower onto devices, in place; return where they lie.

    What is looked up keeps its bits. Tables of float32 and remote tables stay as they are, and so
    does everything where there is one device of the CPU.

    Args:
        tower: the tower.
        topology: the devices and their budgets, for all tables together.
        sharding: how tables are cut, by name; TorchRec's planner chooses for others.

    Raises:
        TablePlanError: naming the table that does not fit or cannot be cut so, or a name in
            ``sharding`` that is no quantised table of the tower.
    """
    parts = {
        name: part
        for name in _PARTS
        if isinstance(part := getattr(tower, name), QuantizedTables | QuantizedSequences)
    }
    known = sorted({name for part in parts.values() for name in part.features})
    for name in sharding:
        if name not in known:
            raise TablePlanError("sharding", f"must be of quantised tables {known}, got {name!r}")
    if topology.device == "cpu" and topology.num_devices == 1:
        return []
    plans: list[TablePlan] = []
    for attribute, part in parts.items():
        plan = plan_tables(
            {name: part.records(name).shape[0] for name in part.features},
            part.dim,
            part.precision,
            topology,
            kind=part.kind,
            constraints={
                name: TableConstraint(sharding=sharding[name])
                for name in part.features
                if name in sharding
            },
        )
        made = ShardedTables(plan) if part.kind == "pooled" else ShardedSequences(plan)
        made.load_state_dict(part.state_dict())
        setattr(tower, attribute, made.eval())
        topology = plan.remaining
        plans.append(plan)
    return plans
