"""The places of shard processes on several hosts, as the supervisor keeps them in the store."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.cluster_store import ClusterStore, Launched
from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.errors import Refused
from silvershard.deploy.host_state import HostState
from silvershard.deploy.layout import Layout, Place, copy_of, number_of
from silvershard.deploy.placement import Copy, Host, Move
from silvershard.deploy.shard_watch import ShardHandle


class Beside(NamedTuple):
    """A copy that takes room on a host and is not one of those that are planned."""

    num_shards: int
    copy: Copy
    host: str


PlanCopies = Callable[
    [ShardingSection, Sequence[Host], Mapping[Copy, str], Sequence[Beside]], Mapping[Copy, str]
]
"""Returns the host of every copy, given how many there shall be, the hosts, where copies are, and
what else takes room; raises ``Refused`` if there is none."""


def present_in(layout: Layout, sharding: ShardingSection) -> dict[Copy, str]:
    """Return where the copies of a set are that has so many."""
    return {
        copy_of(one.place, sharding.replicas): one.host
        for one in layout.copies
        if _counts(one.place, sharding) and one.role == "serving"
    }


def beside_in(layout: Layout, sharding: ShardingSection) -> list[Beside]:
    """Return what else is there."""
    return [
        Beside(one.num_shards, copy_of(one.place, sharding.replicas), one.host)
        for one in layout.copies
        if not _counts(one.place, sharding) or one.role != "serving"
    ]


def first_layout(launched: Launched) -> Layout:
    """Return the layout of a cluster that starts."""
    placed = {(shard, number): one.name for one in launched.hosts for shard, number in one.copies}
    shards = max(shard for shard, _ in placed) + 1
    return Layout().added({Place(shards, *key): host for key, host in sorted(placed.items())})


def _counts(place: Place, sharding: ShardingSection) -> bool:
    return place.num_shards == sharding.shards and place.replica < sharding.copies


class HostPlaces:
    """Where copies are; see ``places.Places``."""

    def __init__(
        self,
        store: ClusterStore,
        launched: Launched,
        term: int,
        sharding: ShardingSection,
        plan: PlanCopies,
        states: Callable[[], Mapping[str, HostState]],
    ) -> None:
        """Take over what is written down; what belongs to nobody any more leaves.

        Args:
            store: of the cluster.
            launched: what was started.
            term: of this supervisor.
            sharding: the copies that serve now.
            plan: finds places.
            states: returns the states of hosts that are not up.

        Raises:
            StateError: if the store cannot be used, as everything here does.
        """
        self._store = store
        self._launched = launched
        self._term = term
        self._plan = plan
        self._states = states
        self._last: dict[Place, str] = {}
        """The host that a copy had when it ended."""
        self._moves: tuple[object, tuple[Move, ...]] = None, ()
        """What was asked for last, and what was found."""
        self._is_written = True
        self.said = ""
        """Why copies cannot be where they shall be; empty if nothing is in the way."""
        found = store.read(Layout, "layout")
        self.layout = found or first_layout(launched)
        self.strays = [
            one.actor
            for one in self.layout.copies
            if one.role != "serving" or not _counts(one.place, sharding)
        ]
        """Processes that an earlier supervisor had begun to start or to end."""
        self._write(self.layout.left(self.strays))

    @property
    def hosts(self) -> list[Host]:
        """Return every host in its state."""
        states = self._states()
        listed = [one.listed() for one in self._launched.hosts]
        return [one._replace(state=states.get(one.name, one.state)) for one in listed]

    def lay_out(self, sharding: ShardingSection) -> None:
        """Find a place for each copy that has none yet."""
        wanted = [
            Place(sharding.shards, shard, replica)
            for replica in range(sharding.copies)
            for shard in range(sharding.shards)
        ]
        lacking = [one for one in wanted if self.layout.at(one) is None]
        if lacking:
            at = self._planned(sharding)
            self._write(
                self.layout.added({one: at[copy_of(one, sharding.replicas)] for one in lacking})
            )

    def _planned(self, sharding: ShardingSection) -> Mapping[Copy, str]:
        present, beside = present_in(self.layout, sharding), beside_in(self.layout, sharding)
        return self._plan(sharding, self.hosts, present, beside)

    def name(self, place: Place) -> str:
        """Return the name under which the process of a copy is started, or runs already."""
        found = self.layout.at(place)
        if found is None:
            self._write(self.layout.added({place: self._last[place]}))
            found = self.layout.copies[-1]
        return found.actor

    def where(self, place: Place) -> str:
        """Return the host of a copy."""
        found = self.layout.at(place)
        return found.host if found is not None else ""

    def kept(self, actor: str, handle: ShardHandle) -> ShardHandle:
        """Return a handle whose end is noted."""
        return PlacedHandle(handle, lambda: self.ended(actor))

    def ended(self, actor: str) -> None:
        """Note that a process has ended for good; ``flush`` writes it down."""
        for one in self.layout.copies:
            if one.actor == actor:
                self._last[one.place] = one.host
                self.layout = self.layout.without(actor)
                self._is_written = False

    def flush(self) -> None:
        """Write down what has ended."""
        if not self._is_written:
            self._write(self.layout)

    def moves(self, sharding: ShardingSection) -> Sequence[Move]:
        """Return which copies shall be on other hosts than they are."""
        hosts = self.hosts
        asked = tuple((one.name, one.state) for one in hosts), self.layout, sharding
        if asked != self._moves[0]:
            self._moves = asked, self._sought(sharding, hosts)
        return self._moves[1]

    def _sought(self, sharding: ShardingSection, hosts: Sequence[Host]) -> tuple[Move, ...]:
        present = present_in(self.layout, sharding)
        holding = set(present.values())
        left = {one.name for one in hosts if one.state in ("retired", "down")} & holding
        is_empty = any(one.state == "up" and one.name not in holding for one in hosts)
        self.said = ""
        if not left and not is_empty:
            return ()
        try:
            at = self._planned(sharding)
        except Refused as error:
            self.said = str(error)
            return ()
        # A copy without a place was given up; it is started again with its host.
        return tuple(
            Move(copy, source, at[copy]) for copy, source in present.items() if at[copy] != source
        )

    def begin(self, moves: Sequence[Move], sharding: ShardingSection) -> None:
        """Give copies a second place each, beside the one that they have."""
        targets = {
            Place(sharding.shards, one.copy.shard, number_of(one.copy, sharding.replicas)): (
                one.target
            )
            for one in moves
        }
        self._write(self.layout.added(targets, "coming"))

    def commit(self) -> None:
        """Let the copies in second places be the ones that count."""
        self._write(self.layout.relieved())

    def _write(self, layout: Layout) -> None:
        self._store.write(self._term, "layout", layout.model_dump_json())
        self.layout, self._is_written = layout, True


class PlacedHandle:
    """An actor whose end is noted."""

    def __init__(self, handle: ShardHandle, ended: Callable[[], None]) -> None:
        self._handle = handle
        self._ended = ended

    def restarts(self) -> int:
        """Return how often it was started again."""
        return self._handle.restarts()

    def entry(self) -> ShardEntry | None:
        """Return where it serves, None while it loads."""
        return self._handle.entry()

    def ask_again(self) -> None:
        """Forget what it said."""
        self._handle.ask_again()

    def end(self) -> None:
        """End it for good."""
        self._handle.end()
        self._ended()
