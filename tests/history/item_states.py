"""What an item may be at a moment, given what was written to it and what is known to be applied.

Updates of an item are in the order of their versions, and each is in the log or is not: an acked
one is, a refused one is not, and of one without an answer nobody knows. A replica has applied the
updates up to some version. An answer therefore shows an item as it is after one of its versions:
not an older one than the answer must reflect, and none that was sent only after the answer.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from history.events import HistoryError, Token, WriteEvent

Places = Mapping[tuple[int, int], int]
"""Positions by log and partition."""

_MOST_STATES = 64


class State(NamedTuple):
    """An item as it is after an update."""

    is_there: bool
    attributes: Mapping[str, Any]
    fields: Mapping[str, Any]
    """Those that are known; an answer may show others."""
    is_known: bool = True


ABSENT = State(False, {}, {})
ANYTHING = State(True, {}, {}, is_known=False)
"""Of an item of which nothing is known, not even whether it is there."""


@dataclass
class Version:
    """One update of an item, however often it was sent."""

    version: float
    write: WriteEvent
    """The last time that it was sent."""
    invoked_s: float
    """The first time that it was sent."""
    acked_s: float = float("inf")
    """When an acknowledgement was there first."""
    tokens: list[tuple[Token, ...]] = field(default_factory=list)
    """Of each acknowledgement."""
    lines: list[int] = field(default_factory=list)

    @property
    def is_acked(self) -> bool:
        """Return whether it is in the log."""
        return bool(self.tokens)

    def is_reached(self, places: Places) -> bool:
        """Return whether who has applied the log up to some positions has applied this."""
        return any(
            bool(tokens) and all(places.get(one[:2], 0) >= one.position for one in tokens)
            for tokens in self.tokens
        )


class Possible(NamedTuple):
    """What an item may be for an answer."""

    states: list[State]
    older: Callable[[], list[State]]
    """Returns what it was before the answer must show it otherwise."""
    must: Version | None
    """The newest update that the answer must reflect."""


class ItemHistory:
    """The updates of one item."""

    def __init__(self, writes: Iterable[WriteEvent]) -> None:
        by_version: dict[float, Version] = {}
        for write in _attempts(writes):
            if write.outcome == "refused":
                continue
            key = float(write.version)
            one = by_version.setdefault(key, Version(key, write, write.invoked_s))
            if (one.write.op, one.write.attributes, one.write.fields) != (
                write.op,
                write.attributes,
                write.fields,
            ):
                raise HistoryError(
                    f"line {write.line}: version {write.version} of item {write.item_id} is of "
                    f"another update than in line {one.lines[0]}"
                )
            one.invoked_s = min(one.invoked_s, write.invoked_s)
            one.lines.append(write.line)
            if write.outcome == "acked":
                one.acked_s = min(one.acked_s, write.done_s)
                one.tokens.append(write.tokens)
            if write.op == "upsert" and write.ttl_s is not None:
                _expire(by_version, one, write)
        self.versions = [by_version[key] for key in sorted(by_version)]
        self.first_s = {
            op: min(
                (one.invoked_s for one in self.versions if one.write.op == op),
                default=float("inf"),
            )
            for op in ("upsert", "patch", "delete")
        }
        """When the first update of each kind was sent."""
        # From each version on, when the first was sent: none of them was before.
        self._earliest = [float("inf")] * len(self.versions)
        least = float("inf")
        for at in reversed(range(len(self.versions))):
            least = self._earliest[at] = min(least, self.versions[at].invoked_s)
        self._evidence_s: list[float] = []
        self._evidence: list[float] = []
        self._folded: dict[int, tuple[State, list[list[State]]]] = {}

    def states(self, base: State) -> list[list[State]]:
        """Return what the item may be after each version, from none on."""
        if id(base) not in self._folded:
            self._folded[id(base)] = base, _fold(base, self.versions)
        return self._folded[id(base)][1]

    def must(self, places: Places, done_s: float, settled_s: float, proven: float) -> int:
        """Return how many versions an answer must reflect: all up to that one.

        Args:
            places: what every shard that answered had applied.
            done_s: when the answer was there.
            settled_s: what was acked by then is applied.
            proven: a version that is known to be applied.
        """
        for at in range(bisect_right(self._earliest, done_s), 0, -1):
            one = self.versions[at - 1]
            if one.is_reached(places) or one.acked_s <= settled_s or one.version <= proven:
                return at
        return 0

    def possible(self, base: State, must: int, done_s: float) -> Possible:
        """Return what the item may be for an answer that must reflect so many versions."""
        states = self.states(base)
        found = list(states[must])
        for at in range(must + 1, bisect_right(self._earliest, done_s) + 1):
            if self.versions[at - 1].invoked_s <= done_s:
                found += states[at]

        def older() -> list[State]:
            return [state for before in states[:must] for state in before]

        return Possible(found, older, self.versions[must - 1] if must else None)

    def note(self, done_s: float, version: float) -> None:
        """Take it that an answer of that time could not be as it is without a version."""
        if not self._evidence or version > self._evidence[-1]:
            self._evidence_s.append(done_s)
            self._evidence.append(version)

    def proven(self, before_s: float) -> float:
        """Return the newest version that answers had shown before some time, 0 for none."""
        at = bisect_left(self._evidence_s, before_s)
        return self._evidence[at - 1] if at else 0.0

    def least(self, base: State, must: int, done_s: float, fits: Sequence[State]) -> float:
        """Return the oldest version after which the item is in one of the states that fit."""
        states = self.states(base)
        for at in range(must, bisect_right(self._earliest, done_s) + 1):
            if any(one is other for one in states[at] for other in fits):
                return self.versions[at - 1].version if at else 0.0
        return 0.0


def _attempts(writes: Iterable[WriteEvent]) -> Iterable[WriteEvent]:
    """Return what became of each time that an update was sent: its last event says it."""
    found: dict[tuple[str, int, float], WriteEvent] = {}
    for one in writes:
        key = one.session, one.version, one.invoked_s
        if one.outcome != "unknown" or key not in found:
            found[key] = one
    return found.values()


def _expire(by_version: dict[float, Version], upsert: Version, write: WriteEvent) -> None:
    """Add the delete that may come when the time of an item is over: between two versions."""
    assert write.ttl_s is not None
    over_s = upsert.invoked_s + write.ttl_s
    gone = WriteEvent(
        item_id=write.item_id,
        op="delete",
        version=write.version,
        invoked_s=over_s,
        done_s=over_s,
        outcome="unknown",
        line=write.line,
    )
    key = upsert.version + 0.5
    by_version[key] = Version(key, gone, over_s, lines=[write.line])


def _fold(base: State, versions: Sequence[Version]) -> list[list[State]]:
    found = [[base]]
    before = [base]
    for one in versions:
        after = _distinct([_applied(state, one.write) for state in before])
        if one.is_acked and one.write.op == "patch":
            # Nobody acks the patch of an item that is not there.
            held = [_applied(state, one.write) for state in before if state.is_there]
            after = _distinct(held) or after
        found.append(after)
        before = after if one.is_acked else _distinct([*before, *after])
        if len(before) > _MOST_STATES:
            before = [ANYTHING]
    return found


def _applied(state: State, write: WriteEvent) -> State:
    if write.op == "delete":
        return ABSENT
    if write.op == "upsert":
        return State(True, write.attributes, write.fields)
    if not (state.is_known and state.is_there):
        return state
    return State(True, {**state.attributes, **write.attributes}, {**state.fields, **write.fields})


def _distinct(states: Iterable[State]) -> list[State]:
    found: list[State] = []
    for one in states:
        if not any(one is other or one == other for other in found):
            found.append(one)
    return found
