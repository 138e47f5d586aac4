"""What the events of a history say together: the items, the generations, the log and the faults."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from history.events import (
    ActivateEvent,
    CatalogueEvent,
    Event,
    FaultEvent,
    QueryEvent,
    WriteEvent,
)
from history.item_states import ABSENT, ANYTHING, ItemHistory, Places, State
from history.placing import partition_of, shard_of
from history.plain_filter import Holds, compiled


class World:
    """A history, in the forms in which it is asked."""

    def __init__(self, events: Sequence[Event]) -> None:
        kinds: dict[type, list[Any]] = {}
        for event in events:
            kinds.setdefault(type(event), []).append(event)
        self.queries: list[QueryEvent] = sorted(
            kinds.get(QueryEvent, ()), key=lambda one: one.done_s
        )
        self.answers = [one for one in self.queries if one.is_answer]
        self.first_generation: int | None = next(
            (one.generation for one in self.answers if not one.is_pinned), None
        )
        """The one that served when the history began."""
        self.faults: list[FaultEvent] = sorted(
            kinds.get(FaultEvent, ()), key=lambda one: one.begin_s
        )
        self.activations: list[ActivateEvent] = kinds.get(ActivateEvent, [])
        self.catalogues: dict[int, CatalogueEvent] = {
            one.generation: one for one in kinds.get(CatalogueEvent, ())
        }
        writes: dict[int, list[WriteEvent]] = {}
        for one in kinds.get(WriteEvent, ()):
            writes.setdefault(one.item_id, []).append(one)
        self.items = {item: ItemHistory(own) for item, own in writes.items()}
        self._bases: dict[tuple[int | None, int], State] = {}
        self._filters: dict[str, Holds] = {}
        self._matches: dict[tuple[str, int], tuple[State, bool]] = {}
        self._unwritten: dict[tuple[int, str], frozenset[int]] = {}
        self._shards: dict[tuple[int, int, int], int] = {}
        self._counts: dict[tuple[int, int], list[int]] = {}
        self._reached: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self._num_partitions: Counter[int] = Counter()
        self._note_places()

    def _note_places(self) -> None:
        """Note when what lies at a position of the log was sent at the earliest."""
        placed: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for own in self.items.values():
            for one in own.versions:
                for tokens in one.tokens:
                    for token in tokens:
                        placed.setdefault(token[:2], []).append((token.position, one.invoked_s))
        for place, pairs in placed.items():
            positions: list[int] = []
            latest: list[float] = []
            for position, invoked_s in sorted(pairs):
                positions.append(position)
                latest.append(max(invoked_s, latest[-1] if latest else invoked_s))
            self._reached[place] = positions, latest

    def proven_before(self, places: Places) -> float:
        """Return a time by which all that was in the log is applied by who has reached some places.

        What was seen before an update was sent is before it in the log; that is known only of a log
        of one partition.
        """
        if len(self._reached) != 1:
            return float("-inf")
        ((place, (positions, latest)),) = self._reached.items()
        at = bisect_right(positions, places.get(place, 0))
        return latest[at - 1] if at else float("-inf")

    def base(self, generation: int | None, item: int) -> State:
        """Return an item as a generation was published."""
        catalogue = self.catalogues.get(generation) if generation is not None else None
        if catalogue is None or catalogue.items is None:
            return ANYTHING
        key = generation, item
        if key not in self._bases:
            attributes = catalogue.items.get(str(item))
            fields = dict([catalogue.marker]) if catalogue.marker else {}
            self._bases[key] = ABSENT if attributes is None else State(True, attributes, fields)
        return self._bases[key]

    def matches(self, query: QueryEvent, state: State) -> bool:
        """Return whether an item in a state passes the filter of a request."""
        if not state.is_there:
            return False
        key = _filter_key(query.request)
        if not state.is_known or not query.request.get("filter"):
            return True
        found = self._matches.get((key, id(state)))
        if found is None:
            held = self._filter(query.request)(state.attributes)
            # The state is kept, so that its number stays its own.
            found = self._matches[key, id(state)] = state, held
        return found[1]

    def _filter(self, request: Mapping[str, Any]) -> Holds:
        key = _filter_key(request)
        if key not in self._filters:
            self._filters[key] = compiled(request.get("filter", ""), request.get("params"))
        return self._filters[key]

    def unwritten(self, query: QueryEvent) -> frozenset[int]:
        """Return the items of the generation of an answer that nobody wrote and its filter lets in.

        None of them are known of a generation that has no catalogue.
        """
        catalogue = self.catalogues.get(query.generation or 0)
        if catalogue is None or catalogue.items is None:
            return frozenset()
        key = catalogue.generation, _filter_key(query.request)
        if key not in self._unwritten:
            holds = self._filter(query.request)
            self._unwritten[key] = frozenset(
                item
                for text, attributes in catalogue.items.items()
                if (item := int(text)) not in self.items and holds(attributes)
            )
        return self._unwritten[key]

    def shard_of(self, query: QueryEvent, item: int) -> int | None:
        """Return the shard that holds an item for an answer; None if that is not known."""
        catalogue = self.catalogues.get(query.generation or 0)
        if catalogue is None or not catalogue.num_partitions or not query.shards_total:
            return None
        key = item, catalogue.num_partitions, query.shards_total
        if key not in self._shards:
            self._shards[key] = shard_of(*key)
        return self._shards[key]

    def documents(self, query: QueryEvent, shard: int) -> tuple[int, int] | None:
        """Return how many documents a shard may have had at least and at most for an answer.

        None if that is not known.
        """
        catalogue = self.catalogues.get(query.generation or 0)
        if catalogue is None or catalogue.items is None or not catalogue.num_partitions:
            return None
        if not query.shards_total:
            return None
        per_partition = self._counts.setdefault(
            (catalogue.generation, catalogue.num_partitions), []
        )
        if not per_partition:
            per_partition += [0] * catalogue.num_partitions
            for text in catalogue.items:
                per_partition[partition_of(int(text), catalogue.num_partitions)] += 1
        first = shard * catalogue.num_partitions // query.shards_total
        last = (shard + 1) * catalogue.num_partitions // query.shards_total
        fewest = most = sum(per_partition[first:last])
        for item, own in self.items.items():
            if self.shard_of(query, item) != shard:
                continue
            base = self.base(query.generation, item)
            fewest -= base.is_there and own.first_s["delete"] <= query.done_s
            most += not base.is_there and own.first_s["upsert"] <= query.done_s
        return fewest, most


def _filter_key(request: Mapping[str, Any]) -> str:
    params = request.get("params")
    text = str(request.get("filter", ""))
    return f"{text}\0{sorted(params.items())}" if params else text


def places_of(query: QueryEvent) -> dict[tuple[int, int], int]:
    """Return what every shard that answered had applied: its cut, and what was demanded."""
    places: dict[tuple[int, int], int] = {}
    for one in (*query.cut, *query.after):
        places[one[:2]] = max(one.position, places.get(one[:2], 0))
    return places
