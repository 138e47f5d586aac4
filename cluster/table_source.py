"""The remote tables of a generation as the model sees them: one source of rows.

Shapes: n rows asked for, W bytes of a record.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from silvershard.cluster.table_client import RemoteTable
from silvershard.cluster.table_config import RemoteTableSection, ShardTables
from silvershard.cluster.table_lookup import TableCounts
from silvershard.model.remote_tables import FetchedRows
from silvershard.shard.errors import DeadlineExceeded, StateError
from silvershard.shard.table_placement import TableSettings
from silvershard.shard.table_rows import Floats, Ints

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
        self._tables = dict(tables)

    @classmethod
    def follow(
        cls, maps: Mapping[str, Path], config: RemoteTableSection, *, timeout_s: float
    ) -> Self:
        """Return the tables whose maps lie in these files, which are looked at again and again.

        Args:
            maps: file of the map of each table; it may still be written.
            config: of every table; each has a cache of its own.
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
                tables[name] = RemoteTable.follow(path, config)
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

    def update(self, table: str, ids: Ints, values: Floats, timeout_s: float = 10.0) -> None:
        """Replace rows of a table in place; arguments and errors are those of ``RemoteTable``.

        Raises:
            StateError: if the table is not one of these.
        """
        self._table(table).update(ids, values, timeout_s)

    def counts(self) -> dict[str, TableCounts]:
        """Return what was looked up in each table so far."""
        return {name: table.counts() for name, table in self._tables.items()}

    def close(self) -> None:
        """Disconnect from all tables."""
        for table in self._tables.values():
            table.close()

    def _table(self, name: str) -> RemoteTable:
        found = self._tables.get(name)
        if found is None:
            raise StateError(f"table {name} must be one of {sorted(self._tables)}")
        return found


def settings_of(tables: ShardTables) -> TableSettings:
    """Return the settings of a shard's tables, with a source that follows the maps, if any.

    Raises:
        StateError: if a map does not come in time, or is damaged.
    """
    source = None
    if tables.maps:
        maps = {name: Path(path) for name, path in tables.maps.items()}
        source = RemoteRows.follow(maps, tables.client, timeout_s=tables.wait_s)
    return TableSettings(source, tables.sharding, tables.host_bytes)
