"""The processes of remote tables: started, watched, and named in the maps that the shards follow.

Each process holds a part of every table; the maps are one small file per table.

Shapes: S processes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from silvershard.cluster.table_config import ShardTables
from silvershard.cluster.table_map import TableEntry, TableShardMap
from silvershard.deploy.config import Config
from silvershard.deploy.shard_watch import ActorWatch, Handle
from silvershard.deploy.state import StateDir, TableRecord
from silvershard.shard.table_files import RowFile


class TableHost(BaseModel):
    """One process that serves a part of every table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int = Field(ge=0, description="index of the part")
    pid: int = Field(ge=1, description="its process")
    tables: dict[str, TableEntry] = Field(description="its entry in the map of each table")


StartTables = Callable[[int], Handle[TableHost]]
"""Starts the process of a part of all tables and returns its handle."""


class TableWatch(ActorWatch[TableHost]):
    """The state of one process of tables."""

    kind = "table process"

    @property
    def record(self) -> TableRecord:
        """Return the process as status shows it."""
        tables = self.entry.tables if self.entry else {}
        held = self.last.tables.values() if self.last else ()
        return TableRecord(
            shard=self.shard,
            state=self.state,
            pid=self.entry.pid if self.entry else 0,
            rows=sum(one.rows for one in held),
            addresses={name: one.address for name, one in tables.items()},
            restarts=self.restarts,
            reason=self.reason,
        )


class TableTier:
    """All processes of the remote tables of a generation; none where it has no such table."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        files: Sequence[RowFile],
        start: StartTables | None = None,
    ) -> None:
        """Prepare the processes.

        Args:
            state: where the maps go.
            config: settings.
            files: the remote tables of the generation.
            start: starts a process; by default as a Ray actor that serves ``files``.
        """
        self._state = state
        self._config = config
        self._files = {one.name: one for one in files}
        self._plans = {one.name: one.plan(config.tables.shards) for one in files}
        self._start = start or self._start_actor
        self._maps: dict[str, TableShardMap] = {}
        self.watches: list[TableWatch] = []

    @property
    def num_processes(self) -> int:
        """Return S."""
        return max((plan.num_shards for plan in self._plans.values()), default=0)

    @property
    def records(self) -> tuple[TableRecord, ...]:
        """Return every process as the launcher sees it now."""
        return tuple(one.record for one in self.watches)

    def for_shards(self) -> ShardTables:
        """Return what a shard is told of embedding tables, these and its own."""
        tables = self._config.tables
        return ShardTables(
            maps={name: str(self._state.table_map_file(name)) for name in self._files},
            client=tables.client(self._config.ping),
            wait_s=self._config.runtime.start_timeout_s,
            sharding=tables.sharding,
            host_bytes=tables.host_budget_mib << 20,
        )

    def start(self) -> None:
        """Start all processes at once."""
        if self._files:
            self._state.table_map_file("").parent.mkdir(mode=0o700, exist_ok=True)
        self.watches = [
            TableWatch(shard, self._start(shard), self._config.runtime)
            for shard in range(self.num_processes)
        ]

    def _start_actor(self, shard: int) -> Handle[TableHost]:
        from silvershard.cluster import table_actor
        from silvershard.deploy.ray_shard import RayShard

        # ray.remote turns the class into something that its type does not say.
        actor_class: Any = table_actor.TableActor
        tables = [
            {"plan": plan.model_dump(), "path": str(self._files[name].path)}
            for name, plan in self._plans.items()
            if shard < plan.num_shards
        ]
        return RayShard(actor_class.options(name=f"table-{shard}").remote(shard, tables), TableHost)

    def poll(self) -> None:
        """Look at every process once, and keep the maps true."""
        for one in self.watches:
            one.poll()
        for name in self._files:
            self._write_map(name)

    def _write_map(self, table: str) -> None:
        plan, before = self._plans[table], self._maps.get(table)
        entries = tuple(
            one.entry.tables[table]
            for one in self.watches
            if one.entry is not None and table in one.entry.tables
        )
        if before is not None and before.entries == entries:
            return
        if before is None and len(entries) < plan.num_shards:
            # The first map is whole, so that no shard begins with default rows.
            return
        self._maps[table] = TableShardMap(
            version=before.version + 1 if before else 1,
            plan=plan,
            entries=entries,
            default_row=self._files[table].default_row,
        )
        self._maps[table].write_atomic(self._state.table_map_file(table))

    def end(self) -> None:
        """End all processes for good."""
        with ExitStack() as rest:
            for one in self.watches:
                rest.callback(one.end)
        self.watches = []
