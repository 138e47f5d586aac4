"""A shard process as the driver talks to it: what it holds, what it shall load and let go of."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from silvershard.cluster import shard_pb2, shard_pb2_grpc
from silvershard.cluster.dialer import PLAIN, Dials

_TIMEOUT_S = 2.0
_PAUSE_S = 1.0
"""Time between two tries of the same wish."""


class Held(NamedTuple):
    """A generation in a shard process."""

    state: str
    """``loading``, ``catching up``, ``prepared`` or ``failed``."""
    reason: str
    documents: int
    """Live ones of its shard."""
    cut: tuple[int, ...]
    """Position in each log partition up to which updates are applied; empty: it follows none."""
    ends: tuple[int, ...]
    """The last position of each log partition that it knows of."""
    staleness_s: float
    pages: int
    free_pages: int
    rejected: int
    """Updates that it could not apply."""
    refused: tuple[tuple[int, str], ...] = ()
    """The newest items among them that it could not take, and why."""
    list_skew: float = 0.0
    """Longest list over mean list of its clusters; 0 without items, or where it follows no log."""
    assignment_error: float = 0.0
    """Share of its items that stand in another cluster than the nearest, as ``AssignmentSample``
    defines it."""

    @property
    def behind(self) -> int:
        """Return how many records of the log that it knows of it has not applied."""
        return sum(max(end - at, 0) for at, end in zip(self.cut, self.ends, strict=False))


class Host(Protocol):
    """What the driver needs of a shard process; nothing here waits."""

    @property
    def held(self) -> Mapping[int, Held] | None:
        """Return what it said last that it holds; None before it has said anything."""

    def poll(self) -> None:
        """Take what it has answered, and ask again when that is due."""

    def prepare(self, generation: int, snapshot: str) -> None:
        """Wish for a generation beside those that it holds; a wish that fails may be repeated."""

    def retire(self, generation: int) -> None:
        """Wish that it lets go of a generation."""

    def close(self) -> None:
        """Leave it alone."""


Connect = Callable[[str], Host]
"""Opens the way to the process at an address."""

_STATES = {
    shard_pb2.GENERATION_STATE_LOADING: "loading",
    shard_pb2.GENERATION_STATE_CATCHING_UP: "catching up",
    shard_pb2.GENERATION_STATE_PREPARED: "prepared",
    shard_pb2.GENERATION_STATE_FAILED: "failed",
}


class ShardHost:
    """A shard process behind its gRPC port."""

    def __init__(
        self,
        address: str,
        dialer: Dials = PLAIN,
        *,
        every_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a channel; nothing is asked yet.

        Args:
            address: ``host:port``.
            dialer: opens the channel.
            every_s: time between two questions.
            clock: for the pauses.
        """
        self._channel = dialer.channel(address)
        self._stub = shard_pb2_grpc.ShardStub(self._channel)
        self._every_s = every_s
        self._clock = clock
        self._held: dict[int, Held] | None = None
        self._asked: Any = None
        """The question that is on its way."""
        self._ask_at_s = clock()
        self._wishes: dict[tuple[str, int], tuple[float, Any]] = {}
        """Until when a wish is not repeated, and its call, which would be cancelled if nobody held
        it."""

    @property
    def held(self) -> Mapping[int, Held] | None:
        """Return what it said last that it holds."""
        return self._held

    def poll(self) -> None:
        """Take what it has answered, and ask again when that is due."""
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            if asked.exception() is None:
                self._held = held_from(asked.result())
        if self._asked is None and self._clock() >= self._ask_at_s:
            self._ask_at_s = self._clock() + self._every_s
            self._asked = self._stub.Inspect.future(shard_pb2.InspectRequest(), timeout=_TIMEOUT_S)

    def prepare(self, generation: int, snapshot: str) -> None:
        """Wish for a generation."""
        request = shard_pb2.PrepareRequest(generation=generation, snapshot=snapshot)
        self._wish(("prepare", generation), self._stub.Prepare, request)

    def retire(self, generation: int) -> None:
        """Wish that it lets go of a generation."""
        request = shard_pb2.RetireRequest(generation=generation)
        self._wish(("retire", generation), self._stub.Retire, request)

    def _wish(self, wish: tuple[str, int], method: Any, request: Any) -> None:
        now_s = self._clock()
        until_s, _ = self._wishes.get(wish, (now_s, None))
        if now_s >= until_s:
            self._wishes[wish] = now_s + _PAUSE_S, method.future(request, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def held_from(report: shard_pb2.ShardReport) -> dict[int, Held]:
    """Return what a shard process holds by generation."""
    return {
        one.generation: Held(
            state=_STATES.get(one.state, "loading"),
            reason=one.reason,
            documents=one.seen.documents,
            cut=tuple(one.seen.cut),
            ends=tuple(one.ends),
            staleness_s=one.seen.staleness_us / 1e6,
            pages=one.pool.pages,
            free_pages=one.pool.free_pages,
            rejected=one.updates.rejected,
            refused=tuple((item.item_id, item.reason) for item in one.refused),
            list_skew=one.pool.longest_list / one.pool.mean_list if one.pool.mean_list else 0.0,
            assignment_error=one.pool.assignment_error,
        )
        for one in report.generations
    }
