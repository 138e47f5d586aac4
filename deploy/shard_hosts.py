"""The ways to all shard processes, one for each that has said where it is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

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

    def relieve(self, others: "ShardHosts") -> None:
        """Take the ways to other processes in the places of those to the same copies."""
        for key, host in others.by_key.items():
            if key in self.by_key:
                self.by_key[key].close()
            self.by_key[key], self.entries[key] = host, others.entries[key]

    def prepared(self, generation: int) -> list[Key]:
        """Return the processes that could answer from a generation."""
        return [key for key, host in self.by_key.items() if is_prepared(host.held, generation)]

    def entries_of(
        self, named: Collection[Key], documents: Callable[[int], int]
    ) -> tuple[ShardEntry, ...]:
        """Return the entries of some processes, by shard and replica.

        Args:
            named: those.
            documents: returns those of a shard.
        """
        return tuple(
            entry.model_copy(update={"documents": documents(entry.shard)})
            for key, entry in sorted(self.entries.items())
            if key in named
        )

    def close(self) -> None:
        """Leave the processes alone."""
        for host in self.by_key.values():
            host.close()
        self.by_key, self.entries = {}, {}


def reconcile(
    host: Host,
    held: Mapping[int, Held],
    wanted: Collection[int],
    *,
    live: int,
    path: Callable[[int], Path],
) -> None:
    """Wish that a process holds what it shall, and nothing else.

    Args:
        host: the process.
        held: what it said last that it holds.
        wanted: what it shall hold.
        live: the live generation, which is wished for first.
        path: returns the directory of a generation.
    """
    given_up = held.keys() - set(wanted)
    for generation in sorted(given_up):
        host.retire(generation)
    if given_up:
        # What is given up makes the room for what comes.
        return
    for generation in sorted(wanted, key=lambda one: (one != live, one)):
        # A swap fails with the first process that cannot hold its generation, and one that is
        # parked or a canary fails for what a reload would meet again, such as too little room.
        failed = generation in held and held[generation].state == "failed"
        if generation not in held or (failed and generation == live):
            host.prepare(generation, str(path(generation)))
