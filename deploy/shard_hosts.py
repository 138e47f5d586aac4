"""The ways to all shard processes, one for each that has said where it is."""

from collections.abc import Mapping, Sequence

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.readiness import is_prepared
from silvershard.deploy.roster import Key
from silvershard.deploy.shard_host import Connect, Held, Host
from silvershard.deploy.shard_watch import ShardWatch


class ShardHosts:
    """What every process of a shard says that it holds; nothing here waits."""

    def __init__(self, connect: Connect) -> None:
        """Know of nobody; ``connect`` opens the way to a process."""
        self.by_key: dict[Key, Host] = {}
        self.entries: dict[Key, ShardEntry] = {}
        """Where they are."""
        self._connect = connect

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.by_key)

    @property
    def reports(self) -> dict[Key, Mapping[int, Held]]:
        """Return what each said last that it holds; empty before it said anything."""
        return {key: host.held or {} for key, host in self.by_key.items()}

    def follow(self, watches: Sequence[ShardWatch]) -> None:
        """Keep one way to every process that has said where it is, and take its answers."""
        entries = {(one.shard, one.replica): one.entry for one in watches if one.entry is not None}
        for key in [key for key, entry in self.entries.items() if entries.get(key) != entry]:
            self.by_key.pop(key).close()
        for key, entry in entries.items():
            if key not in self.by_key:
                self.by_key[key] = self._connect(entry.address)
        self.entries = entries
        for host in self.by_key.values():
            host.poll()

    def prepared(self, generation: int) -> list[Key]:
        """Return the processes that could answer from a generation."""
        return [key for key, host in self.by_key.items() if is_prepared(host.held, generation)]

    def close(self) -> None:
        """Leave the processes alone."""
        for host in self.by_key.values():
            host.close()
        self.by_key, self.entries = {}, {}
