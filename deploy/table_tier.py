"""The processes of remote tables: started, watched, and named in the maps that the shards follow.

Each process holds a part of every table of a generation; the maps are one small file per table.
Generations whose rows are the same share their processes.

Shapes: L log partitions, S processes.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from silvershard.cluster.security_config import PeerSection
from silvershard.cluster.table_config import ShardTables, TableHolding, TableRows
from silvershard.cluster.table_map import TableEntry, TableShardMap, map_path
from silvershard.deploy.config import Config
from silvershard.deploy.pulse import Feel, Pulse
from silvershard.deploy.shard_watch import ActorWatch, Handle
from silvershard.deploy.state import StateDir, TableRecord
from silvershard.deploy.state_log import log_url
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import read_outline
from silvershard.shard.table_files import RowFile, row_files


class TableHost(BaseModel):
    """One process that serves a part of every table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int = Field(ge=0, description="index of the part")
    pid: int = Field(ge=1, description="its process")
    tables: dict[str, TableEntry] = Field(
        min_length=1, description="its entry in the map of each table"
    )

    @property
    def address(self) -> str:
        """Return ``host:port`` of one of its servers, which share a thread."""
        return next(iter(self.tables.values())).address


StartTables = Callable[[int, Path], Handle[TableHost]]
"""Starts the process of a part of the tables that a file names, and returns its handle."""


class PublishedRows(NamedTuple):
    """The remote tables of a generation as they were published."""

    generation: int
    files: tuple[RowFile, ...]
    checksums: tuple[str, ...]
    """Of the files."""
    log_id: int
    """Update log that the cut is of; 0: none."""
    cut: tuple[int, ...]
    """``(L,)`` positions up to which changes are in the rows; empty: none are."""

    def lead_to(self, later: "PublishedRows") -> bool:
        """Return whether these rows, kept up to date, are also those of another generation.

        They are where the bytes are the same and nothing that the other one has still to replay
        came before: then no change lies between the two that left a trace.
        """
        if (self.checksums, self.files_by_name) != (later.checksums, later.files_by_name):
            return False
        if self.log_id not in (0, later.log_id):
            return False
        return all(mine <= its for mine, its in zip_longest(self.cut, later.cut, fillvalue=0))

    @property
    def files_by_name(self) -> tuple[str, ...]:
        """Return the names of the tables."""
        return tuple(one.name for one in self.files)


def published_rows(path: Path) -> PublishedRows:
    """Return the remote tables of the generation in a directory.

    Raises:
        SnapshotError: if the manifest or a file cannot be read.
    """
    outline = read_outline(path)
    return PublishedRows(
        generation=outline.generation,
        files=tuple(row_files(path)),
        checksums=tuple(
            outline.checksums[name] for name in sorted(outline.sizes) if name.startswith("rows/")
        ),
        log_id=outline.log_id,
        cut=outline.cut,
    )


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
    """The processes that hold one set of rows, for the generations that have it."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        rows: PublishedRows,
        holding: Path,
        start: StartTables,
        feel: Feel = Pulse,
    ) -> None:
        """Start all processes at once.

        Args:
            state: where the maps go.
            config: settings.
            rows: what they hold, of at least one table.
            holding: file that tells them so.
            start: starts a process.
            feel: takes the pulse of the process at an address.
        """
        self.rows = rows
        self._state = state
        self._config = config
        self._holding = holding
        self._plans = {one.name: one.plan(config.tables.shards) for one in rows.files}
        self._maps: dict[tuple[int, str], TableShardMap] = {}
        self._users: dict[int, PublishedRows] = {}
        self._write_holding()
        num_processes = max(plan.num_shards for plan in self._plans.values())
        self.watches = [
            TableWatch(shard, start(shard, holding), config.runtime, feel=feel)
            for shard in range(num_processes)
        ]

    @property
    def generations(self) -> list[int]:
        """Return the generations that use it."""
        return sorted(self._users)

    def use(self, rows: PublishedRows) -> None:
        """Serve a generation whose rows these lead to."""
        self._users[rows.generation] = rows
        map_path(self._state.tables_dir, rows.generation, "").parent.mkdir(
            mode=0o700, parents=True, exist_ok=True
        )

    def leave(self, generation: int) -> None:
        """Serve a generation no more."""
        del self._users[generation]
        for key in [one for one in self._maps if one[0] == generation]:
            del self._maps[key]
        shutil.rmtree(map_path(self._state.tables_dir, generation, "").parent, ignore_errors=True)
        if self._users and self.rows.generation not in self._users:
            # Its files may go. What starts again must find others with the same rows.
            self.rows = min(self._users.values(), key=lambda one: (one.cut, one.generation))
            self._write_holding()

    def _write_holding(self) -> None:
        TableHolding(
            tables=tuple(
                TableRows(plan=self._plans[one.name], path=str(one.path)) for one in self.rows.files
            ),
            log_url=log_url(self._state, self._config),
            log_id=self.rows.log_id,
            cut=self.rows.cut,
        ).write_atomic(self._holding)

    def poll(self) -> None:
        """Look at every process once, and keep the maps true."""
        for one in self.watches:
            one.poll()
        for generation, rows in self._users.items():
            for file in rows.files:
                self._write_map(generation, file)

    def _write_map(self, generation: int, file: RowFile) -> None:
        key = (generation, file.name)
        plan, before = self._plans[file.name], self._maps.get(key)
        entries = tuple(
            one.entry.tables[file.name]
            for one in self.watches
            if one.entry is not None and file.name in one.entry.tables
        )
        if before is not None and before.entries == entries:
            return
        if before is None and len(entries) < plan.num_shards:
            # The first map is whole, so that no shard begins with default rows.
            return
        self._maps[key] = TableShardMap(
            version=before.version + 1 if before else 1,
            plan=plan,
            entries=entries,
            default_row=file.default_row,
        )
        path = map_path(self._state.tables_dir, generation, file.name)
        self._maps[key].write_atomic(path)

    def end(self) -> None:
        """End all processes for good."""
        for generation in self.generations:
            self.leave(generation)
        self._holding.unlink(missing_ok=True)
        with ExitStack() as rest:
            for one in self.watches:
                rest.callback(one.end)


class TableTiers:
    """The processes of the remote tables of all generations that shards hold."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        start: StartTables | None = None,
        *,
        feel: Feel = Pulse,
    ) -> None:
        """Prepare without a process.

        Args:
            state: where generations are and the maps go.
            config: settings.
            start: starts a process; by default as a Ray actor.
            feel: takes the pulse of the process at an address.
        """
        self._feel = feel
        self._state = state
        self._config = config
        self._start = start or functools.partial(_start_actor, config.security.peers)
        self._rows: dict[int, PublishedRows] = {}
        self._tiers: list[TableTier] = []
        self._num_started = 0
        self._said = ""

    @property
    def watches(self) -> list[TableWatch]:
        """Return every process."""
        return [one for tier in self._tiers for one in tier.watches]

    @property
    def records(self) -> tuple[TableRecord, ...]:
        """Return every process as the launcher sees it now."""
        return tuple(
            one.record.model_copy(update={"generations": tuple(tier.generations)})
            for tier in self._tiers
            for one in tier.watches
        )

    def for_shards(self) -> ShardTables:
        """Return what a shard is told of embedding tables, these and its own."""
        tables = self._config.tables
        return ShardTables(
            maps=str(self._state.tables_dir),
            client=tables.client(self._config.ping),
            wait_s=self._config.runtime.start_timeout_s,
            sharding=tables.sharding,
            host_bytes=tables.host_budget_mib << 20,
        )

    def hold(self, generations: Collection[int]) -> None:
        """Start processes for the rows of these generations, and end what none of them needs.

        A generation that cannot be read has none; the shards say what is wrong with it.
        """
        for number in sorted(self._rows.keys() - set(generations)):
            self._drop(number)
        for number in sorted(set(generations) - self._rows.keys()):
            try:
                rows = published_rows(generation_dir(self._state.generations, number))
            except SnapshotError as error:
                self._say(str(error))
                continue
            self._rows[number] = rows
            if rows.files:
                self._tier_for(rows).use(rows)

    def _tier_for(self, rows: PublishedRows) -> TableTier:
        for tier in self._tiers:
            if tier.rows.lead_to(rows):
                return tier
        self._num_started += 1
        self._state.tables_dir.mkdir(mode=0o700, exist_ok=True)
        holding = self._state.tables_dir / f"tier-{self._num_started:06d}.json"
        self._tiers.append(
            TableTier(self._state, self._config, rows, holding, self._start, self._feel)
        )
        return self._tiers[-1]

    def _drop(self, generation: int) -> None:
        del self._rows[generation]
        for tier in self._tiers:
            if generation in tier.generations:
                tier.leave(generation)
                if not tier.generations:
                    self._tiers.remove(tier)
                    tier.end()
                return

    def poll(self) -> None:
        """Look at every process once, and keep the maps true."""
        for tier in self._tiers:
            tier.poll()

    def end(self) -> None:
        """End all processes for good."""
        with ExitStack() as rest:
            for tier in self._tiers:
                rest.callback(tier.end)
        self._tiers = []
        self._rows = {}

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(json.dumps({"event": "tables", "message": text}), file=sys.stderr)


def _start_actor(peers: PeerSection, shard: int, holding: Path) -> Handle[TableHost]:
    from silvershard.cluster import table_actor
    from silvershard.deploy.ray_shard import RayShard

    # ray.remote turns the class into something that its type does not say.
    actor_class: Any = table_actor.TableActor
    actor = actor_class.options(name=f"{holding.stem}-{shard}").remote(
        shard, str(holding), peers=peers.model_dump()
    )
    return RayShard(actor, TableHost)
