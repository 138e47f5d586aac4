"""The places of shard processes: what the driver asks before it starts one.

Shapes: S shards.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.layout import Place
from silvershard.deploy.placement import Move
from silvershard.deploy.shard_watch import ShardHandle


class Places(Protocol):
    """Where shard processes go, on one machine or on several hosts."""

    def lay_out(self, sharding: ShardingSection) -> None:
        """Find a place for each copy that has none yet, beside all that is there.

        Raises:
            Refused: if there is no room, saying in numbers what is missing.
            StateError: if it cannot be written down, as everything here does.
        """
        ...

    def name(self, place: Place) -> str:
        """Return the name under which the process of a copy is started, or runs already.

        It is another one when the copy is started again.
        """
        ...

    def where(self, place: Place) -> str:
        """Return the host of a copy; empty on a single machine."""
        ...

    def kept(self, actor: str, handle: ShardHandle) -> ShardHandle:
        """Return a handle whose end is noted."""
        ...

    def moves(self, sharding: ShardingSection) -> Sequence[Move]:
        """Return which copies shall be on other hosts than they are."""
        ...

    def begin(self, moves: Sequence[Move], sharding: ShardingSection) -> None:
        """Give copies a second place each, beside the one that they have."""
        ...

    def commit(self) -> None:
        """Let the copies in second places be the ones that count."""
        ...


class HerePlaces:
    """Everything is on this machine."""

    def __init__(self) -> None:
        self._names: Counter[str] = Counter()
        """How often each was given to an actor."""

    def lay_out(self, sharding: ShardingSection) -> None:
        """Do nothing."""

    def name(self, place: Place) -> str:
        """Return a name that no actor had before: one that ended has its name for a while."""
        name = f"shard-{place.shard}-{place.replica}"
        again = f"-{self._names[name]}" if self._names[name] else ""
        self._names[name] += 1
        return name + again

    def where(self, place: Place) -> str:
        """Return nothing."""
        return ""

    def kept(self, actor: str, handle: ShardHandle) -> ShardHandle:
        """Return it as it is."""
        return handle

    def moves(self, sharding: ShardingSection) -> Sequence[Move]:
        """Return none: there is no other host."""
        return ()

    def begin(self, moves: Sequence[Move], sharding: ShardingSection) -> None:
        """Do nothing."""

    def commit(self) -> None:
        """Do nothing."""
