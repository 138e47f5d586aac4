"""The shard processes of one cut of the catalogue, watched together.

Shapes: S shards, R replicas.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack

from silvershard.deploy.config_sections import RuntimeSection, ShardingSection
from silvershard.deploy.shard_watch import ShardHandle, ShardWatch

StartShard = Callable[[int, int, int], ShardHandle]
"""Starts the process of a shard, given S, its number and that of the copy; returns its handle."""

WatchShard = Callable[[int, int, int, ShardHandle], ShardWatch]
"""Watches the process of a shard, given S, its number, that of the copy, and its handle."""


class ShardSet:
    """S times R processes, whichever generations they hold."""

    def __init__(
        self,
        sharding: ShardingSection,
        start: StartShard,
        runtime: RuntimeSection,
        *,
        watch: WatchShard | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            sharding: how many there shall be.
            start: starts one.
            runtime: limits of a process.
            watch: watches one; None: on this machine.
        """
        self.sharding = sharding
        self.watches: list[ShardWatch] = []
        self._start = start
        self._runtime = runtime
        self._watch = watch or self._watched

    def start(self, replicas: Iterable[int]) -> None:
        """Start these copies of every shard, all at once."""
        self.watches += [
            self._started(shard, replica)
            for replica in replicas
            for shard in range(self.sharding.shards)
        ]

    def add(self, shard: int, replica: int) -> None:
        """Start one copy of one shard."""
        self.watches.append(self._started(shard, replica))

    def relieve(self, others: Collection[ShardWatch]) -> list[ShardWatch]:
        """Let processes of another set take the places of the same copies; return those."""
        newer = {(one.shard, one.replica): one for one in others}
        before = [one for one in self.watches if (one.shard, one.replica) in newer]
        self.watches = [newer.get((one.shard, one.replica), one) for one in self.watches]
        return before

    def restart(self, shard: int, replica: int) -> None:
        """End one process for good, and start another one in its place."""
        for at, one in enumerate(self.watches):
            if (one.shard, one.replica) == (shard, replica):
                one.end()
                self.watches[at] = self._started(shard, replica)

    def _started(self, shard: int, replica: int) -> ShardWatch:
        num_shards = self.sharding.shards
        handle = self._start(num_shards, shard, replica)
        return self._watch(num_shards, shard, replica, handle)

    def _watched(
        self, num_shards: int, shard: int, replica: int, handle: ShardHandle
    ) -> ShardWatch:
        return ShardWatch(shard, handle, self._runtime, replica=replica)

    def poll(self) -> None:
        """Look at every process once."""
        for one in self.watches:
            one.poll()

    def of(self, replicas: Collection[int]) -> list[ShardWatch]:
        """Return the processes of some copies."""
        return [one for one in self.watches if one.replica in replicas]

    def end(self, replicas: Collection[int] | None = None) -> None:
        """End some copies for good; None: all."""
        ended = self.watches if replicas is None else self.of(replicas)
        self.watches = [one for one in self.watches if one not in ended]
        with ExitStack() as rest:
            for one in ended:
                rest.callback(one.end)
