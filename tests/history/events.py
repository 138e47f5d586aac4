"""What happened to a cluster, as its users and its tester saw it: one JSON object per line.

Times are readings of the monotonic clock of one machine, in seconds. A key that is not listed here
is ignored, so that whoever records may keep more.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple


class Token(NamedTuple):
    """A place in the update log."""

    log_id: int
    partition: int
    position: int


class Lost(NamedTuple):
    """A shard that an answer lacks, as the answer names it."""

    shard: int
    documents: int
    reasons: tuple[str, ...]


class HistoryError(ValueError):
    """A history that says what cannot be, or lacks what must be said."""


@dataclass(frozen=True, kw_only=True)
class QueryEvent:
    """A request, and what came back."""

    sent_s: float
    done_s: float
    code: str = "OK"
    """Name of the gRPC status; what follows from ``ids`` on is of an answer, so of ``OK``."""
    at_s: float | None = None
    """When it was to be sent."""
    deadline_s: float | None = None
    """Seconds from ``sent_s`` after which it is too late."""
    session: str = ""
    router: str = ""
    message: str = ""
    """Of a refusal."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Of the fields of ``Query`` those that are set; at least those that the checker reads:
    k, filter, params, exact, exclude_ids, filter_mode, min_coverage, after, generation, alias."""
    settled: bool = False
    """Whether its sender knows that all that was acked before is applied."""
    ids: tuple[int, ...] = ()
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """What the answer shows of each of ``ids``."""
    generation: int | None = None
    cut: tuple[Token, ...] = ()
    coverage: float | None = None
    """Documents answered / documents addressed."""
    reasons: tuple[str, ...] = ()
    shards_total: int | None = None
    lost: tuple[Lost, ...] = ()
    addressed: int | None = None
    """Documents."""
    exhausted: bool = False
    warnings: tuple[str, ...] = ()
    plan: str = ""
    shard_map_version: int | None = None
    line: int = 0

    @property
    def is_answer(self) -> bool:
        """Return whether something came back that can be looked at."""
        return self.code == "OK"

    @property
    def is_pinned(self) -> bool:
        """Return whether the request says which generation is to answer."""
        return self.request.get("generation") is not None or bool(self.request.get("alias"))

    @property
    def is_full(self) -> bool:
        """Return whether all documents are said to have answered."""
        return self.coverage is None or self.coverage >= 1.0

    @property
    def after(self) -> tuple[Token, ...]:
        """Return the tokens of the request."""
        return tuple(Token(*one) for one in self.request.get("after", ()))

    @property
    def failure(self) -> str:
        """Return in words why the request failed; empty if it did not."""
        if self.code != "OK":
            return f"it was refused with {self.code}" + (
                f" ({self.message})" if self.message else ""
            )
        if self.deadline_s is not None and self.done_s - self.sent_s > self.deadline_s:
            return f"it took {self.done_s - self.sent_s:.3f} s of {self.deadline_s:.3f} s"
        if not self.is_full:
            return f"it covers {self.coverage:.6f} for {', '.join(self.reasons) or 'no reason'}"
        return ""


@dataclass(frozen=True, kw_only=True)
class WriteEvent:
    """One update of one item, each time that it was sent.

    Who sends it may say so before, with an outcome that is unknown, and later with the same
    ``session`` and ``invoked_s`` what came of it.
    """

    item_id: int
    op: str
    """upsert, patch or delete."""
    version: int
    """Above 0 and given by the writer, so that a resend is the same update."""
    invoked_s: float
    done_s: float
    outcome: str
    """acked, refused or unknown: it may be there or not."""
    tokens: tuple[Token, ...] = ()
    """Of its call: who has reached all of them has applied it."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    ttl_s: float | None = None
    urgent: bool = False
    session: str = ""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class FaultEvent:
    """Something that was done to the cluster."""

    name: str
    begin_s: float
    end_s: float
    """When it was over; that of the begin where it is a blow."""
    target: str = ""
    excuses: bool = False
    """Whether requests may fail in it: no replica of some shard is left, or no router."""
    recovery_s: float | None = None
    """Seconds after its end in which requests succeed again; None: it is not bounded."""
    may_fail: int | None = None
    """Requests that may fail for it at most; None: any number."""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class CatalogueEvent:
    """A generation as it was published."""

    generation: int
    num_partitions: int = 0
    """P; 0: it is not known which shard holds an item."""
    items: Mapping[str, Mapping[str, Any]] | None = None
    """Attributes by item; None: they are not known."""
    marker: tuple[str, Any] | None = None
    """A field and its value that every item of this generation has, and no item of another one."""
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class ActivateEvent:
    """A generation that was made the one that serves; what answers first was so from the start."""

    generation: int
    begin_s: float
    end_s: float
    line: int = 0


Event = QueryEvent | WriteEvent | FaultEvent | CatalogueEvent | ActivateEvent

KINDS: Mapping[str, type[Event]] = {
    "query": QueryEvent,
    "write": WriteEvent,
    "fault": FaultEvent,
    "catalogue": CatalogueEvent,
    "activate": ActivateEvent,
}
_NAMES = {kind: name for name, kind in KINDS.items()}
_OPS = ("upsert", "patch", "delete")
_OUTCOMES = ("acked", "refused", "unknown")


def event_of(said: Mapping[str, Any], line: int = 0) -> Event:
    """Return the event that a JSON object states.

    Raises:
        HistoryError: naming the line and what is wrong with it.
    """
    kind = KINDS.get(str(said.get("kind")))
    if kind is None:
        raise HistoryError(
            f"line {line}: kind must be one of {', '.join(KINDS)}, got {said.get('kind')!r}"
        )
    given = {one.name: said[one.name] for one in fields(kind) if one.name in said}
    given["line"] = line
    for one in fields(kind):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in given:
            raise HistoryError(f"line {line}: {one.name} is required of kind {said['kind']}")
    for name in ("ids", "reasons", "warnings"):
        if name in given:
            given[name] = tuple(given[name])
    for name in ("cut", "tokens"):
        if name in given:
            given[name] = tuple(Token(*one) for one in given[name])
    if "lost" in given:
        given["lost"] = tuple(Lost(shard, docs, tuple(why)) for shard, docs, why in given["lost"])
    if given.get("marker") is not None:
        given["marker"] = tuple(given["marker"])
    if kind is WriteEvent:
        for name, allowed in (("op", _OPS), ("outcome", _OUTCOMES)):
            if given[name] not in allowed:
                raise HistoryError(
                    f"line {line}: {name} must be one of {', '.join(allowed)}, got {given[name]!r}"
                )
        if given["version"] <= 0:
            raise HistoryError(f"line {line}: version must be above 0, got {given['version']}")
    return kind(**given)


def said_of(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object, without what is as by default."""
    said: dict[str, Any] = {"kind": _NAMES[type(event)]}
    plain = asdict(event)
    for one in fields(event):
        value = getattr(event, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if one.name != "line" and (default is MISSING or value != default):
            said[one.name] = plain[one.name]
    return said


def read(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of some lines of JSON, numbered from 1; a last line cut short is left out.

    Raises:
        HistoryError: naming the line and what is wrong with it.
    """
    for number, text in enumerate(lines, start=1):
        try:
            said = json.loads(text)
        except ValueError as error:
            if not text.endswith("\n"):
                return
            raise HistoryError(f"line {number}: {error}") from None
        yield event_of(said, number)


def load(path: Path) -> list[Event]:
    """Return the events of a file."""
    with path.open() as file:
        return list(read(file))


def numbered(events: Iterable[Event | Mapping[str, Any]]) -> list[Event]:
    """Return events with their places as lines, as if they had been read from a file."""
    said = [one if isinstance(one, Mapping) else said_of(one) for one in events]
    return [event_of(one, line) for line, one in enumerate(said, start=1)]
