"""Whether a generation lacks anything that the live one has: asked before it takes its place.

Shapes: L log partitions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from silvershard.deploy.shard_host import Held

Key = tuple[int, int]
"""Shard and replica."""

Reports = Mapping[Key, Mapping[int, Held]]
"""What every process said last that it holds, by generation."""

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


def refusals(reports: Reports, live: int, coming: int) -> str:
    """Return in words which updates a coming generation refused that the live one took.

    Empty if there are none. A patch of an item that the coming one does not have is none.
    """
    lacking: dict[int, str] = {}
    for held in reports.values():
        if coming in held:
            taken = {item for item, _ in held[live].refused} if live in held else set()
            lacking |= {item: why for item, why in held[coming].refused if item not in taken}
    if not lacking:
        return ""
    item, why = next(iter(lacking.items()))
    return f"it refused updates of {len(lacking)} items that the live one took; item {item}: {why}"


def _live_cut(reports: Reports, shard: int, live: int) -> tuple[int, ...]:
    """Return ``(L,)`` the furthest that the live generation of a shard is anywhere."""
    cuts = [held[live].cut for (of, _), held in reports.items() if of == shard and live in held]
    return tuple(map(max, zip(*cuts, strict=False))) if cuts else ()


def _covers(cut: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(one >= two for one, two in zip(cut, other, strict=False))


def _numbers(cut: tuple[int, ...]) -> str:
    return ", ".join(map(str, cut)) or "0"
