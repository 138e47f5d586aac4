"""Properties that every history of a cluster has, whatever broke in it.

``check`` looks at all of them. A violation names the events, the items and the reason in words.
What nobody can know is never a violation: an update without an answer may be there or not.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from history.events import Event, FaultEvent, QueryEvent
from history.item_states import Possible, State
from history.world import World, places_of

COVERAGE_HONESTY = "coverage_honesty"
NO_MIXED_GENERATION = "no_mixed_generation"
NO_RESURRECTED_DELETE = "no_resurrected_delete"
NO_DUPLICATE = "no_duplicate"
NO_INELIGIBLE_ITEM = "no_ineligible_item"
READ_YOUR_WRITES = "read_your_writes"
SEEN_WHOLE = "seen_whole"
CUT_IS_MONOTONE = "cut_is_monotone_per_token"
NO_FAILED_REQUEST = "no_failed_request"
BOUNDED_RECOVERY = "bounded_recovery"

_BLOOM = (1, "BLOOM")
_MOST_SHOWN = 20
_TOLERANCE = 1e-6


class Violation(NamedTuple):
    """What cannot be."""

    property: str
    lines: tuple[int, ...]
    """Of the events that contradict each other, that of the answer first."""
    items: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        lines = ", ".join(map(str, self.lines))
        items = f" of item {', '.join(map(str, self.items))}" if self.items else ""
        return f"{self.property}: line {lines}{items}: {self.reason}"


@dataclass
class Report:
    """What a check found."""

    violations: list[Violation] = field(default_factory=list)
    looked: Counter[str] = field(default_factory=Counter)
    """How often each property had something to look at: one that had nothing proves nothing."""

    def of(self, name: str) -> list[Violation]:
        """Return the violations of a property."""
        return [one for one in self.violations if one.property == name]

    def require(self, *names: str) -> None:
        """Fail if there is a violation, or if a property had nothing to look at.

        Raises:
            AssertionError: with the first violations.
        """
        shown = "\n".join(map(str, self.violations[:_MOST_SHOWN]))
        assert not self.violations, f"{len(self.violations)} violations:\n{shown}"
        idle = [name for name in names if not self.looked[name]]
        assert not idle, f"nothing was there to look at for {', '.join(idle)}"


def check(
    events: Sequence[Event],
    *,
    names: Collection[str] = (),
    uncounted: Collection[str] = ("CANCELLED",),
) -> Report:
    """Return the violations of a history, in the order of its lines.

    Args:
        events: in any order; lines are those of the events.
        names: properties to look at; empty for all.
        uncounted: status codes that are no failures, because those who asked meant to get them.
    """
    world, report = World(events), Report()
    wanted = set(names or PROPERTIES)
    unknown = wanted - PROPERTIES.keys()
    if unknown:
        raise ValueError(
            f"names must be of {', '.join(PROPERTIES)}, got {', '.join(sorted(unknown))}"
        )
    found: list[Violation] = []
    for look in dict.fromkeys(
        one for name in PROPERTIES if name in wanted for one in PROPERTIES[name]
    ):
        found += look(world, report, uncounted)
    kept = [one for one in found if one.property in wanted]
    report.violations = sorted(kept, key=lambda one: (one.lines, one.property, one.items))
    return report


def no_duplicate(world: World, report: Report, uncounted: Collection[str] = ()) -> list[Violation]:
    """Return the answers that hold an item more than once."""
    found = []
    for one in world.answers:
        report.looked[NO_DUPLICATE] += 1
        if len(set(one.ids)) < len(one.ids):
            twice = tuple(sorted(item for item, count in Counter(one.ids).items() if count > 1))
            found.append(
                Violation(NO_DUPLICATE, (one.line,), twice, "it is in the answer more than once")
            )
    return found


def cut_is_monotone_per_token(
    world: World, report: Report, uncounted: Collection[str] = ()
) -> list[Violation]:
    """Return the answers whose cut is before a token of their request."""
    found = []
    for one in world.answers:
        if not one.cut:
            continue
        cut = {token[:2]: token.position for token in one.cut}
        for token in one.after:
            report.looked[CUT_IS_MONOTONE] += 1
            reached = cut.get(token[:2])
            if reached is None or reached < token.position:
                at = "nothing" if reached is None else reached
                reason = (
                    f"its cut is {at} in partition {token.partition} of log {token.log_id}, "
                    f"its request demands {token.position}"
                )
                found.append(Violation(CUT_IS_MONOTONE, (one.line,), (), reason))
    return found


def no_mixed_generation(
    world: World, report: Report, uncounted: Collection[str] = ()
) -> list[Violation]:
    """Return the answers with an item of another generation than their stamp, or of none yet."""
    found = []
    for one in world.answers:
        if one.generation is None:
            continue
        strangers = _strangers(world, one)
        report.looked[NO_MIXED_GENERATION] += _tells_generation(world, one)
        if strangers:
            others = sorted({str(other) for other in strangers.values()})
            reason = (
                f"the answer is of generation {one.generation}, the item is of {', '.join(others)}"
            )
            found.append(
                Violation(NO_MIXED_GENERATION, (one.line,), tuple(sorted(strangers)), reason)
            )
        begun = _begun_s(world, one)
        if begun > one.done_s:
            lines = [
                event.line for event in world.activations if event.generation == one.generation
            ]
            reason = f"generation {one.generation} answers before anybody made it live"
            found.append(Violation(NO_MIXED_GENERATION, (one.line, *lines), (), reason))
    return found


def _tells_generation(world: World, answer: QueryEvent) -> bool:
    """Return whether an answer shows of what generation its items are."""
    own = world.catalogues.get(answer.generation or 0)
    return own is not None and own.marker is not None and own.marker[0] in answer.fields


def _strangers(world: World, answer: QueryEvent) -> dict[int, int]:
    """Return the items of an answer that are of another generation, and of which."""
    found: dict[int, int] = {}
    own = world.catalogues.get(answer.generation or 0)
    for other in world.catalogues.values():
        if own is None or other is own:
            continue
        if other.marker is not None:
            name, value = other.marker
            for item, shown in zip(answer.ids, answer.fields.get(name, ()), strict=False):
                if shown == value and (own.marker != other.marker):
                    found[item] = other.generation
        if other.items is not None and own.items is not None:
            for item in answer.ids:
                key = str(item)
                if key in other.items and key not in own.items and item not in world.items:
                    found[item] = other.generation
    return found


def _begun_s(world: World, answer: QueryEvent) -> float:
    """Return when the generation of an answer was made live at the earliest, -inf for always."""
    if not world.activations or answer.is_pinned or answer.generation == world.first_generation:
        return float("-inf")
    begun = [one.begin_s for one in world.activations if one.generation == answer.generation]
    return min(begun, default=float("inf"))


def items_are_right(
    world: World, report: Report, uncounted: Collection[str] = ()
) -> list[Violation]:
    """Return the items that an answer must not hold as it does, or must hold and does not.

    They violate one of: no_ineligible_item, no_resurrected_delete, read_your_writes, seen_whole,
    coverage_honesty.
    """
    found: list[Violation] = []
    for answer in world.answers:
        found += _Look(world, report, answer).violations()
    return found


class _Look:
    """One look at the items of an answer."""

    def __init__(self, world: World, report: Report, answer: QueryEvent) -> None:
        self._world = world
        self._report = report
        self._answer = answer
        self._places = places_of(answer)
        self._settled_s = answer.sent_s if answer.settled else float("-inf")
        self._before_s = world.proven_before(self._places)
        self._lost = {one.shard for one in answer.lost}
        self._excluded = {int(one) for one in answer.request.get("exclude_ids", ())}
        self._filters = answer.request.get("filter_mode") not in _BLOOM

    def violations(self) -> list[Violation]:
        """Return what is wrong with the items of the answer."""
        answer, found = self._answer, []
        strangers = _strangers(self._world, answer)
        shown = [
            {name: values[at] for name, values in answer.fields.items()}
            for at in range(len(answer.ids))
        ]
        for item, fields in zip(answer.ids, shown, strict=True):
            if item not in strangers:
                found += self._of_item(item, fields)
        if self._is_complete():
            found += self._missing()
        return found

    def _possible(self, item: int) -> tuple[State, int, Possible]:
        base = self._world.base(self._answer.generation, item)
        own = self._world.items.get(item)
        if own is None:
            return base, 0, Possible([base], list, None)
        must = own.must(
            self._places, self._answer.done_s, self._settled_s, own.proven(self._before_s)
        )
        return base, must, own.possible(base, must, self._answer.done_s)

    def _passes(self, state: State) -> bool:
        return not self._filters or self._world.matches(self._answer, state)

    def _of_item(self, item: int, fields: Mapping[str, Any]) -> Iterable[Violation]:
        answer, report = self._answer, self._report
        if item in self._excluded:
            yield self._wrong(NO_INELIGIBLE_ITEM, item, "the request excludes it")
            return
        if self._world.shard_of(answer, item) in self._lost:
            shard = self._world.shard_of(answer, item)
            reason = f"it is of shard {shard}, which the answer says that it lacks"
            yield self._wrong(COVERAGE_HONESTY, item, reason)
            return
        base, must, possible = self._possible(item)
        there = [one for one in possible.states if one.is_there]
        report.looked[NO_INELIGIBLE_ITEM] += bool(answer.request.get("filter")) and bool(there)
        if possible.must is not None:
            report.looked[READ_YOUR_WRITES] += 1
        if not there:
            yield self._gone(item, possible)
            return
        passing = [one for one in there if self._passes(one)]
        showing = [one for one in there if _shows(one, fields)]
        both = [one for one in passing if _shows(one, fields)]
        report.looked[SEEN_WHOLE] += any(one.fields.keys() & fields.keys() for one in there)
        if both:
            self._learn(item, base, must, both)
            return
        was = [one for one in possible.older() if one.is_there and self._passes(one)]
        if possible.must is not None and any(_shows(one, fields) for one in was):
            reason = f"it is shown as it was before {_named(possible)}: {_told(fields)}"
            yield self._wrong(READ_YOUR_WRITES, item, reason, possible)
        elif not passing:
            reason = (
                f"it does not pass {answer.request.get('filter')!r}: "
                f"{' or '.join(_told(one.attributes) for one in there[:3])}"
            )
            yield self._wrong(NO_INELIGIBLE_ITEM, item, reason, possible)
        else:
            reason = (
                f"{_told(fields)} is of no version that it may be in: "
                f"{' or '.join(_told(one.fields) for one in there[:3])}"
                + ("" if showing else ", and of none that does not pass the filter")
            )
            yield self._wrong(SEEN_WHOLE, item, reason, possible)

    def _gone(self, item: int, possible: Possible) -> Violation:
        if possible.must is not None and possible.must.write.op == "delete":
            reason = f"it is there after {_named(possible)}"
            return self._wrong(NO_RESURRECTED_DELETE, item, reason, possible)
        if item in self._world.items:
            reason = "nobody had sent it when the answer was there"
        else:
            reason = f"generation {self._answer.generation} does not hold it, and nobody wrote it"
        return self._wrong(NO_INELIGIBLE_ITEM, item, reason, possible)

    def _is_complete(self) -> bool:
        """Return whether an item that is not in the answer is not there, or not of its shards."""
        answer = self._answer
        limit = answer.request.get("k")
        if not answer.is_full and not (answer.lost and answer.shards_total):
            return False
        has_room = limit is not None and len(answer.ids) < limit
        # An answer that was cut although it is exact, because items came meanwhile, says so.
        is_exact = bool(answer.request.get("exact")) and not answer.warnings
        return (is_exact and has_room) or (answer.exhausted and answer.is_full)

    def _missing(self) -> Iterable[Violation]:
        """Yield the items that the answer must hold and does not."""
        answer, ids = self._answer, set(self._answer.ids)
        self._report.looked[COVERAGE_HONESTY] += 1
        for item in sorted(self._world.unwritten(answer) - ids - self._excluded):
            if self._world.shard_of(answer, item) not in self._lost:
                yield self._wrong(COVERAGE_HONESTY, item, "it passes the filter and is missing")
        for item in self._world.items:
            if item in ids or item in self._excluded:
                continue
            if self._lost and self._world.shard_of(answer, item) in (None, *self._lost):
                continue
            base, must, possible = self._possible(item)
            if possible.must is not None:
                self._report.looked[READ_YOUR_WRITES] += 1
                self._report.looked[NO_RESURRECTED_DELETE] += possible.must.write.op == "delete"
            fits = [
                one
                for one in possible.states
                if not (one.is_known and one.is_there and self._passes(one))
            ]
            if fits:
                self._learn(item, base, must, fits)
                continue
            was = [one for one in possible.older() if not (one.is_there and self._passes(one))]
            if possible.must is not None and was:
                reason = f"it is missing, as it was before {_named(possible)}"
                yield self._wrong(READ_YOUR_WRITES, item, reason, possible)
            else:
                reason = "it passes the filter in every version that it may be in and is missing"
                yield self._wrong(COVERAGE_HONESTY, item, reason, possible)

    def _learn(self, item: int, base: State, must: int, fits: Sequence[State]) -> None:
        """Note what the answer proves of updates that nobody acked."""
        own = self._world.items.get(item)
        if own is not None:
            done_s = self._answer.done_s
            own.note(done_s, own.least(base, must, done_s, fits))

    def _wrong(
        self, name: str, item: int, reason: str, possible: Possible | None = None
    ) -> Violation:
        lines = possible.must.lines if possible is not None and possible.must is not None else ()
        return Violation(name, (self._answer.line, *lines), (item,), reason)


def _shows(state: State, fields: Mapping[str, Any]) -> bool:
    return all(fields[name] == value for name, value in state.fields.items() if name in fields)


def _named(possible: Possible) -> str:
    assert possible.must is not None
    return f"the {possible.must.write.op} of version {possible.must.version:g}"


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items()) or "nothing"


def coverage_is_stated_right(
    world: World, report: Report, uncounted: Collection[str] = ()
) -> list[Violation]:
    """Return the answers whose coverage contradicts itself, their minimum or the catalogue."""
    found = []
    for one in world.queries:
        for reason in _misstated(world, report, one):
            found.append(Violation(COVERAGE_HONESTY, (one.line,), (), reason))
    return found


def _misstated(world: World, report: Report, query: QueryEvent) -> Iterable[str]:
    if not query.is_answer:
        if query.ids:
            yield f"it is refused with {query.code} and holds {len(query.ids)} items"
        return
    coverage = query.coverage
    if coverage is None:
        return
    report.looked[COVERAGE_HONESTY] += 1
    minimum = query.request.get("min_coverage")
    if not 0.0 < coverage <= 1.0:
        yield f"an answer must cover more than 0 and at most 1, got {coverage}"
    if minimum is not None and coverage < minimum:
        yield f"it covers {coverage:.6f} and at least {minimum:.6f} is required: that is no answer"
    if coverage < 1.0 and not query.reasons:
        yield f"it covers {coverage:.6f} for no reason"
    if query.exhausted and coverage < 1.0:
        yield f"it covers {coverage:.6f} and is said to have looked everywhere"
    if query.shards_total is None:
        return
    if (coverage < 1.0) != bool(query.lost) and not _are_empty(query.lost):
        yield f"it covers {coverage:.6f} and lacks {len(query.lost)} shards"
    for one in query.lost:
        bounds = world.documents(query, one.shard)
        if bounds is not None and not bounds[0] <= one.documents <= bounds[1]:
            yield (
                f"shard {one.shard} is said to have {one.documents} documents, "
                f"it has {bounds[0]} to {bounds[1]}"
            )
        if not set(one.reasons) <= set(query.reasons):
            yield f"what became of shard {one.shard} is not among the reasons"
    if query.addressed:
        lacks = sum(one.documents for one in query.lost) / query.addressed
        if abs(1.0 - lacks - coverage) > _TOLERANCE:
            yield (
                f"it covers {coverage:.6f}, the shards that it lacks have {lacks:.6f} of the "
                f"{query.addressed} documents"
            )


def _are_empty(lost: Sequence[Any]) -> bool:
    return bool(lost) and all(one.documents == 0 for one in lost)


def requests_do_not_fail(
    world: World, report: Report, uncounted: Collection[str] = ("CANCELLED",)
) -> list[Violation]:
    """Return failures that no fault excuses, and faults that last too long or cost too much.

    A fault that excuses failures does so until the first request succeeds that was sent after its
    end, and further for as long as it may take to recover. A request that fails later than that is
    a matter of recovery if none has succeeded yet, and else a failure of its own.
    """
    report.looked[NO_FAILED_REQUEST] += len(world.queries)
    queries = [one for one in world.queries if one.code not in uncounted]
    outages = [_Outage(world, fault, queries) for fault in world.faults]
    found = []
    for outage in outages:
        report.looked[BOUNDED_RECOVERY] += outage.is_bounded and outage.recovered_s is not None
    for query in queries:
        if not query.failure:
            continue
        near = [one for one in outages if one.concerns(query)]
        excusing = [one for one in near if one.excuses(query)]
        for one in excusing:
            one.failed.append(query)
        if excusing:
            continue
        late = [one for one in near if one.fault.excuses and one.is_going_on(query)]
        if late:
            fault = late[-1].fault
            over = query.sent_s - fault.end_s
            reason = (
                f"{over:.3f} s after {_fault(fault)}, which is over in {fault.recovery_s:.3f} s, "
                f"{query.failure}"
            )
            found.append(Violation(BOUNDED_RECOVERY, (query.line, fault.line), (), reason))
        else:
            found.append(
                Violation(
                    NO_FAILED_REQUEST, (query.line,), (), f"no fault excuses it: {query.failure}"
                )
            )
    for outage in outages:
        most = outage.fault.may_fail
        if most is not None and len(outage.failed) > most:
            lines = tuple(one.line for one in outage.failed)
            reason = f"{len(lines)} requests failed for {_fault(outage.fault)}, {most} may"
            found.append(Violation(BOUNDED_RECOVERY, (outage.fault.line, *lines), (), reason))
    return found


class _Outage:
    """What a fault may do to requests."""

    def __init__(self, world: World, fault: FaultEvent, queries: Sequence[QueryEvent]) -> None:
        self.fault = fault
        self.failed: list[QueryEvent] = []
        self.recovered_s: float | None = next(
            (one.done_s for one in queries if one.sent_s >= fault.end_s and not one.failure), None
        )
        """When a request had succeeded that was sent after the end."""

    @property
    def is_bounded(self) -> bool:
        """Return whether it says in what time requests succeed again."""
        return self.fault.recovery_s is not None

    def concerns(self, query: QueryEvent) -> bool:
        """Return whether a request was under way or sent after the fault began."""
        return query.done_s >= self.fault.begin_s

    def excuses(self, query: QueryEvent) -> bool:
        """Return whether a request may fail for it."""
        if not self.fault.excuses:
            return False
        limit_s = self.fault.recovery_s
        return (limit_s is None and self.is_going_on(query)) or (
            limit_s is not None and query.sent_s <= self.fault.end_s + limit_s
        )

    def is_going_on(self, query: QueryEvent) -> bool:
        """Return whether no request had succeeded since its end when a request was sent."""
        return self.recovered_s is None or query.sent_s <= self.recovered_s


def _fault(fault: FaultEvent) -> str:
    return f"{fault.name} of {fault.target}" if fault.target else fault.name


Check = Callable[[World, Report, Collection[str]], list[Violation]]

PROPERTIES: Mapping[str, tuple[Check, ...]] = {
    COVERAGE_HONESTY: (coverage_is_stated_right, items_are_right),
    NO_MIXED_GENERATION: (no_mixed_generation,),
    NO_RESURRECTED_DELETE: (items_are_right,),
    NO_DUPLICATE: (no_duplicate,),
    NO_INELIGIBLE_ITEM: (items_are_right,),
    READ_YOUR_WRITES: (items_are_right,),
    SEEN_WHOLE: (items_are_right,),
    CUT_IS_MONOTONE: (cut_is_monotone_per_token,),
    NO_FAILED_REQUEST: (requests_do_not_fail,),
    BOUNDED_RECOVERY: (requests_do_not_fail,),
}
"""What looks at each property; some look at several at once."""
