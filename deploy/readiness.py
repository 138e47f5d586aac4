"""Whether a generation lacks anything that the live one has: asked before it takes its place.

Shapes: L log partitions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from silvershard.deploy.control_store import Control
from silvershard.deploy.roster import Key
from silvershard.deploy.shard_host import Held
from silvershard.deploy.state import GenerationRecord, GenerationRole

Reports = Mapping[Key, Mapping[int, Held]]
"""What every process said last that it holds, by generation."""

REMEMBERED = 256
"""Refused items that a process remembers of a generation, the newest ones."""

_OLD, _NEW = 1, 2
"""What old and new processes hold, where they are compared."""

_LEVEL_S = 1.0
"""A few reports: under load one generation of a process and the other are ahead in turns."""


@dataclass
class _Pace:
    """How a process keeps up: the cut of the live generation that it is measured by."""

    target: tuple[int, ...]
    asked_s: float
    """When the live generation was there."""
    level_s: float = float("-inf")
    """When the live generation had no more than the coming one has reached since."""


class Readiness:
    """Follows how far behind the live generation the coming one is, process by process."""

    def __init__(self) -> None:
        self._paces: dict[Key, _Pace] = {}

    def observe(self, reports: Reports, live: int, coming: int, now_s: float) -> str:
        """Take the newest reports; return in words who is behind, empty if nobody is.

        A process is level when the coming generation has applied all that the live one of its shard
        had applied a second ago. What holds no live generation is measured by the
        other replicas.

        Args:
            reports: of the processes that shall change over; those without it are passed over.
            live: the live generation.
            coming: the one that shall take its place.
            now_s: reading of the clock.
        """
        behind = []
        for key in self._paces.keys() - reports.keys():
            del self._paces[key]
        for key, held in sorted(reports.items()):
            if coming not in held:
                self._paces.pop(key, None)
                continue
            reached, wanted = held[coming].cut, _live_cut(reports, key[0], live)
            pace = self._paces.setdefault(key, _Pace(wanted, now_s))
            if _covers(reached, pace.target):
                pace.level_s = pace.asked_s
                pace.target, pace.asked_s = wanted, now_s
            if _covers(reached, wanted):
                pace.level_s = now_s
            if now_s - pace.level_s > _LEVEL_S:
                behind.append(
                    f"shard {key[0]}.{key[1]} is at position {_numbers(reached)} of the update "
                    f"log, the live generation at {_numbers(wanted)}"
                )
        return "; ".join(behind)

    def observe_new(self, new: Mapping[Key, Held], old: Sequence[Held], now_s: float) -> str:
        """Take what new processes hold of the live generation; return in words who is behind.

        Args:
            new: what they hold; it is measured by the furthest of the old ones, whatever shards
                those serve.
            old: what the others hold.
            now_s: reading of the clock.
        """
        reports: dict[Key, Mapping[int, Held]] = {key: {_NEW: held} for key, held in new.items()}
        if old:
            furthest = tuple(map(max, zip(*(one.cut for one in old), strict=False)))
            reports |= {(shard, -1): {_OLD: old[0]._replace(cut=furthest)} for shard, _ in new}
        return self.observe(reports, _OLD, _NEW, now_s)


class Lacking(NamedTuple):
    """What a coming generation refused, shard by shard compared with the live one; in words."""

    refused: str = ""
    """Updates that the live one took."""
    early: str = ""
    """Where the live one has still to come to what the other one refused."""
    unknown: str = ""
    """Where nobody knows whether the live one took it."""


NOTHING = Lacking()


def refusals(reports: Reports, live: int, coming: int) -> Lacking:
    """Return which updates a coming generation refused that the live one took.

    A patch of an item that the coming one does not have is none. The live one took what no replica
    of the shard refused, unless it refused more than processes remember.
    """
    lacking: dict[int, str] = {}
    early, unknown = set(), set()
    for (shard, _), held in reports.items():
        if coming not in held:
            continue
        others = [by[live] for (of, _), by in reports.items() if of == shard and live in by]
        taken = {_subject(*refused) for one in others for refused in one.refused}
        missing = {
            item: why for item, why in held[coming].refused if _subject(item, why) not in taken
        }
        if not missing:
            continue
        if not others or any(len(one.refused) >= REMEMBERED for one in others):
            unknown.add(shard)
        elif not _covers(_live_cut(reports, shard, live), held[coming].cut):
            early.add(shard)
        else:
            lacking |= missing
    item, why = next(iter(lacking.items()), (0, ""))
    return Lacking(
        f"it refused updates of {len(lacking)} items that the live one took; item {item}: {why}"
        if lacking
        else "",
        f"the live one has not come to all that shards {_numbers(sorted(early))} refused"
        if early
        else "",
        f"whether the live one took what shards {_numbers(sorted(unknown))} refused is not known: "
        f"at most {REMEMBERED} refused items of a shard are remembered"
        if unknown
        else "",
    )


def _subject(item: int, why: str) -> tuple[int, str]:
    """Return what was refused: an item, or what is said of a table."""
    return (item, "") if item >= 0 else (item, why)


def is_prepared(held: Mapping[int, Held] | None, generation: int) -> bool:
    """Return whether a process said that it can serve a generation; None: it said nothing yet."""
    one = (held or {}).get(generation)
    return one is not None and one.state == "prepared"


def records_of(reports: Reports, control: Control) -> tuple[GenerationRecord, ...]:
    """Return every generation that a process holds, as status shows it."""
    roles: dict[int, GenerationRole] = {
        control.previous: "previous",
        control.canary: "canary",
        control.live: "live",
    }
    records = []
    for generation in sorted(set().union(*reports.values())):
        held = [one[generation] for one in reports.values() if generation in one]
        record = GenerationRecord(
            generation=generation,
            role=roles.get(generation, "staged"),
            prepared=sum(one.state == "prepared" for one in held),
            processes=len(reports),
            reason=next((one.reason for one in held if one.state == "failed"), ""),
        )
        records.append(record)
    return tuple(records)


def _live_cut(reports: Reports, shard: int, live: int) -> tuple[int, ...]:
    """Return ``(L,)`` the furthest that the live generation of a shard is anywhere."""
    cuts = [held[live].cut for (of, _), held in reports.items() if of == shard and live in held]
    return tuple(map(max, zip(*cuts, strict=False))) if cuts else ()


def _covers(cut: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(one >= two for one, two in zip(cut, other, strict=False))


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "0"
