"""The remote tables of generations as their models see them: a source of rows for each.

Shapes: n rows asked for, W bytes of a record.
"""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection, ShardTables
from silvershard.cluster.table_lookup import TableCounts
from silvershard.cluster.table_map import map_path
from silvershard.model.remote_tables import FetchedRows
from silvershard.shard.errors import DeadlineExceeded, StateError
from silvershard.shard.table_placement import TableSettings

_LOOK_S = 0.05
_READY_S = 5.0
"""A shard that is started again must not wait long for a table process that is down."""

_log = logging.getLogger(__name__)


class RemoteRows:
    """A source of rows that lie in other processes; any thread may ask.

    All tables are asked before the first is waited for, so several cost about as much as one.
    """

    def __init__(self, tables: Mapping[str, RemoteTable]) -> None:
        """Take over the tables, by name; ``close`` closes them."""
        self.tables: Mapping[str, RemoteTable] = dict(tables)

    @classmethod
    def follow(
        cls,
        maps: Mapping[str, Path],
        config: RemoteTableSection,
        dialer: Dialer = PLAIN,
        *,
        timeout_s: float,
    ) -> Self:
        """Return the tables whose maps lie in these files, which are looked at again and again.

        Args:
            maps: file of the map of each table; it may still be written.
            config: of every table; each has a cache of its own.
            dialer: opens channels.
            timeout_s: longest wait for the maps. A process that is in its map but cannot be asked
                is waited for a few seconds at most, and then is like one that is lost later:
                default rows stand for its rows until it comes.

        Raises:
            StateError: if there is no map of a table by then, or it is damaged.
        """
        expires_at_s = time.monotonic() + timeout_s
        tables: dict[str, RemoteTable] = {}
        try:
            for name, path in maps.items():
                while not path.exists() and time.monotonic() < expires_at_s:
                    time.sleep(_LOOK_S)
                tables[name] = RemoteTable.follow(path, config, dialer)
            expires_at_s = min(expires_at_s, time.monotonic() + _READY_S)
            for table in tables.values():
                try:
                    table.wait_until_ready(max(expires_at_s - time.monotonic(), 0.0))
                except DeadlineExceeded as error:
                    _log.warning("%s; default rows stand for theirs", error)
        except BaseException:
            for table in tables.values():
                table.close()
            raise
        return cls(tables)

    def fetch(self, rows: Mapping[str, Tensor]) -> dict[str, FetchedRows]:
        """Return the rows ``(n,)`` int64 of each table, default rows where they cannot be had.

        Raises:
            StateError: if a table is not one of these, or was closed.
        """
        pending = {
            name: self._table(name).submit(np.ascontiguousarray(wanted.numpy()))
            for name, wanted in rows.items()
        }
        found = {name: one.records() for name, one in pending.items()}
        return {
            name: FetchedRows(torch.from_numpy(one.records), torch.from_numpy(one.defaulted))
            for name, one in found.items()
        }

    def write(self, table: str, version: int, rows: Tensor, values: Tensor) -> None:
        """Look rows of a table up as of a later version from now on.

        The rows themselves come from the table processes, which follow the same log.

        Raises:
            StateError: if the table is not one of these.
        """
        self._table(table).advance(version, rows.numpy())

    def counts(self) -> dict[str, TableCounts]:
        """Return what was looked up in each table so far."""
        return {name: table.counts() for name, table in self.tables.items()}

    def close(self) -> None:
        """Disconnect from all tables."""
        for table in self.tables.values():
            table.close()

    def _table(self, name: str) -> RemoteTable:
        found = self.tables.get(name)
        if found is None:
            raise StateError(f"table {name} must be one of {sorted(self.tables)}")
        return found


class RemoteSources:
    """Sources of rows for the generations of a shard process; any thread may call.

    Each generation has its own, since it is at a version of its own. A source that nobody holds any
    more is closed.
    """

    def __init__(
        self,
        folder: Path,
        config: RemoteTableSection,
        dialer: Dialer = PLAIN,
        *,
        timeout_s: float,
    ) -> None:
        """Make sources without asking anybody yet.

        Args:
            folder: where the maps of the remote tables of each generation are.
            config: of every table.
            dialer: opens channels.
            timeout_s: longest wait for the maps of a generation.
        """
        self._folder = folder
        self._config = config
        self._dialer = dialer
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._open: dict[weakref.ref[RemoteRows], Mapping[str, RemoteTable]] = {}
        self._ended: dict[str, TableCounts] = {}

    def open(self, generation: int, tables: Collection[str]) -> RemoteRows:
        """Return a source of the rows of these tables of a generation, as they were published.

        Raises:
            StateError: if there is no map of a table in time, or it is damaged.
        """
        maps = {name: map_path(self._folder, generation, name) for name in tables}
        rows = RemoteRows.follow(maps, self._config, self._dialer, timeout_s=self._timeout_s)
        with self._lock:
            self._open[weakref.ref(rows, self._forgotten)] = rows.tables
        return rows

    def counts(self) -> dict[str, TableCounts]:
        """Return what was looked up in each table so far, of all generations together."""
        with self._lock:
            found = dict(self._ended)
            for tables in self._open.values():
                for name, table in tables.items():
                    found[name] = _sum(found.get(name), table.counts())
        return found

    def _forgotten(self, rows: weakref.ref[RemoteRows]) -> None:
        # What collects garbage may be a thread that these tables wait for.
        threading.Thread(target=self._close, args=(rows,), name="close-tables").start()

    def _close(self, rows: weakref.ref[RemoteRows]) -> None:
        with self._lock:
            tables = self._open.pop(rows)
            for name, table in tables.items():
                self._ended[name] = _sum(self._ended.get(name), table.counts())
        for table in tables.values():
            table.close()


def settings_of(tables: ShardTables, dialer: Dialer = PLAIN) -> TableSettings:
    """Return the settings of a shard's tables, with sources that follow the maps, if any."""
    sources = None
    if tables.maps:
        sources = RemoteSources(Path(tables.maps), tables.client, dialer, timeout_s=tables.wait_s)
    return TableSettings(sources, tables.sharding, tables.host_bytes)


def _sum(one: TableCounts | None, other: TableCounts) -> TableCounts:
    if one is None:
        return other
    return TableCounts(
        lookups=one.lookups + other.lookups,
        rows=one.rows + other.rows,
        cached=one.cached + other.cached,
        fetched=one.fetched + other.fetched,
        defaulted=one.defaulted + other.defaulted,
        failures=Counter(one.failures) + Counter(other.failures),
    )
