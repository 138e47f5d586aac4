"""Random histories of a small cluster that does everything right, and ways to spoil one.

The cluster is a log, shards whose replicas apply it each at its own pace, and a router that asks
one replica of each shard. It is not built like the real one: it keeps every item as it was after
every record of the log, and answers from there.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from history.events import (
    ActivateEvent,
    CatalogueEvent,
    Event,
    FaultEvent,
    Lost,
    QueryEvent,
    Token,
    WriteEvent,
)
from history.placing import shard_of

LOG = 77
NUM_PARTITIONS = 16
KINDS = ("a", "b", "c")
YEARS = range(2000, 2004)
PUBLISHED = range(1, 25)
WRITTEN = (*range(1, 7), *range(100, 108))
"""Some of the catalogue, some that are new."""
RECOVERY_S = 5.0
FILTERS: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]] = (
    ("", lambda item: True),
    ("kind:a", lambda item: "a" in item["kind"]),
    ("NOT kind:b", lambda item: "b" not in item["kind"]),
    ("year >= 2002", lambda item: item["year"] >= 2002),
    ("kind:c OR year = 2000", lambda item: "c" in item["kind"] or item["year"] == 2000),
)


class Item(NamedTuple):
    """An item that is there."""

    attributes: Mapping[str, Any]
    fields: Mapping[str, Any]


Items = dict[int, Item]


@dataclass
class Asked:
    """What only the simulation knows of an answer."""

    query: QueryEvent
    certain: list[int]
    """Items that nothing but this answer would be right to hold."""
    dead: list[int]
    """Items that were acked as deleted and must be gone."""
    ineligible: list[int]
    """Items that are there, that no update is in doubt of, and that the filter keeps out."""


@dataclass
class History:
    """A history that is right, with what is needed to spoil it."""

    events: list[Event]
    asked: list[Asked] = field(default_factory=list)


class Simulation:
    """One run: ``History`` of so many steps from a seed."""

    def __init__(self, seed: int, steps: int = 120) -> None:
        self._draw = random.Random(seed)
        self._steps = steps
        self._now_s = 1000.0
        self._num_shards = self._draw.choice((1, 2, 3, 4))
        self._replicas = self._draw.choice((1, 2))
        self._events: list[Event] = []
        self._asked: list[Asked] = []
        self._log: list[tuple[int, Callable[[Item | None], Item | None]]] = []
        """Of each record its item, and what it makes of that."""
        self._applied = [[0] * self._replicas for _ in range(self._num_shards)]
        self._down: set[int] = set()
        """Shards none of whose replicas answers."""
        self._versions: dict[int, int] = {}
        self._doubtful: set[int] = set()
        """Items with an update that nobody answered."""
        self._acked: tuple[int, ...] = ()
        self._deleted: dict[int, int] = {}
        """Positions of deletes that were acked and are the last of their item."""
        self._touched: dict[int, int] = {}
        """The last position that concerns an item."""
        self._catalogues = {number: self._published(number) for number in (1, 2)}
        self._live = 1

    def _published(self, generation: int) -> Items:
        draw = random.Random(5)
        items = {one: self._drawn(draw, f"G{generation}") for one in PUBLISHED}
        # One of them stands only in the second generation.
        return items if generation == 2 else {k: v for k, v in items.items() if k != max(PUBLISHED)}

    def _drawn(self, draw: random.Random, title: str) -> Item:
        kinds = draw.sample(KINDS, draw.randint(0, 2))
        year = draw.choice(YEARS)
        return Item({"kind": kinds, "year": year}, {"title": title})

    def run(self) -> History:
        """Return the history of all steps."""
        for number, items in self._catalogues.items():
            self._events.append(
                CatalogueEvent(
                    generation=number,
                    num_partitions=NUM_PARTITIONS,
                    items={str(one): item.attributes for one, item in items.items()},
                    marker=("title", f"G{number}"),
                )
            )
        for _ in range(self._steps):
            self._advance()
            step = self._draw.choices(
                (self._write, self._ask, self._apply, self._fault, self._activate),
                (6, 8, 5, 0.4, 0.2),
            )[0]
            step()
        return History(self._events, self._asked)

    def _advance(self) -> float:
        self._now_s += self._draw.uniform(0.001, 0.02)
        return self._now_s

    def _write(self) -> None:
        item = self._draw.choice(WRITTEN)
        version = self._versions[item] = self._versions.get(item, 0) + 1
        is_there = self._at_end(item) is not None
        op = self._draw.choice(("upsert", "patch", "delete")) if is_there else "upsert"
        made = self._drawn(self._draw, f"{item} in {version}")
        attributes: Mapping[str, Any] = made.attributes
        if op == "patch":
            attributes = {"year": attributes["year"]} if self._draw.random() < 0.5 else {}
        sent = WriteEvent(
            item_id=item,
            op=op,
            version=version,
            invoked_s=self._advance(),
            done_s=self._advance(),
            outcome="unknown",
            attributes={} if op == "delete" else attributes,
            fields={} if op == "delete" else made.fields,
        )
        fate = self._draw.random()
        if fate < 0.1:
            self._events.append(replace(sent, outcome="refused"))
            return
        is_lost = fate < 0.25 and self._draw.random() < 0.5
        if not is_lost:
            self._append(item, sent)
        if fate < 0.25:
            self._doubtful.add(item)
            self._events.append(sent)
            return
        end = len(self._log)
        self._acked = (end,)
        self._touched[item] = end
        self._deleted.pop(item, None)
        if op == "delete":
            self._deleted[item] = end
        if op != "patch":
            self._doubtful.discard(item)
        token = Token(LOG, 0, end)
        self._events.append(replace(sent, outcome="acked", tokens=(token,)))

    def _append(self, item: int, write: WriteEvent) -> None:
        def changed(before: Item | None) -> Item | None:
            if write.op == "delete":
                return None
            if write.op == "upsert":
                return Item(write.attributes, write.fields)
            if before is None:
                return None
            return Item(
                {**before.attributes, **write.attributes}, {**before.fields, **write.fields}
            )

        self._log.append((item, changed))

    def _at(self, item: int, position: int, generation: int) -> Item | None:
        found = self._catalogues[generation].get(item)
        for other, change in self._log[:position]:
            if other == item:
                found = change(found)
        return found

    def _at_end(self, item: int) -> Item | None:
        """Return an item as it is where nothing in doubt can make it another one."""
        return None if item in self._doubtful else self._at(item, len(self._log), self._live)

    def _apply(self) -> None:
        replicas = self._draw.choice(self._applied)
        at = self._draw.randrange(self._replicas)
        replicas[at] = self._draw.randint(replicas[at], len(self._log))

    def _fault(self) -> None:
        """Take a shard away, or bring it back."""
        begin_s = self._advance()
        down = self._draw.randrange(self._num_shards)
        self._down.add(down)
        for _ in range(self._draw.randint(1, 4)):
            self._ask()
        end_s = self._advance()
        for _ in range(self._draw.randint(0, 2)):
            self._ask()
        self._down.clear()
        self._events.append(
            FaultEvent(
                name="kill",
                target=f"shard {down}",
                begin_s=begin_s,
                end_s=end_s,
                excuses=True,
                recovery_s=RECOVERY_S,
            )
        )
        self._ask()

    def _activate(self) -> None:
        begin_s = self._advance()
        self._live = 3 - self._live
        self._events.append(
            ActivateEvent(generation=self._live, begin_s=begin_s, end_s=self._advance())
        )

    def _ask(self) -> None:
        sent_s = self._advance()
        text, holds = self._draw.choice(FILTERS)
        request: dict[str, Any] = {"k": self._draw.choice((5, 100)), "exact": True, "filter": text}
        demanded = self._acked[0] if self._acked and self._draw.random() < 0.5 else 0
        if demanded:
            request["after"] = [[LOG, 0, demanded]]
        excluded = self._draw.sample(WRITTEN, 2) if self._draw.random() < 0.2 else []
        if excluded:
            request["exclude_ids"] = excluded
        if self._down and self._draw.random() < 0.4:
            request["min_coverage"] = 1.0
            self._events.append(
                QueryEvent(
                    sent_s=sent_s, done_s=self._advance(), code="UNAVAILABLE", request=request
                )
            )
            return
        cuts = []
        for replicas in self._applied:
            at = self._draw.randrange(self._replicas)
            replicas[at] = max(replicas[at], demanded)
            cuts.append(replicas[at])
        self._answer(sent_s, request, cuts, holds, excluded)

    def _answer(
        self,
        sent_s: float,
        request: dict[str, Any],
        cuts: Sequence[int],
        holds: Callable[[Mapping[str, Any]], bool],
        excluded: Sequence[int],
    ) -> None:
        alive = [shard for shard in range(self._num_shards) if shard not in self._down]
        if not alive:
            self._events.append(
                QueryEvent(
                    sent_s=sent_s, done_s=self._advance(), code="UNAVAILABLE", request=request
                )
            )
            return
        documents = [0] * self._num_shards
        found: Items = {}
        for one in sorted({*PUBLISHED, *WRITTEN}):
            shard = shard_of(one, NUM_PARTITIONS, self._num_shards)
            item = self._at(one, cuts[shard], self._live)
            documents[shard] += item is not None
            passes = item is not None and holds(item.attributes)
            if item is not None and passes and shard in alive and one not in excluded:
                found[one] = item
        ids = list(found)
        self._draw.shuffle(ids)
        ids = ids[: request["k"]]
        addressed = sum(documents)
        lost = tuple(
            Lost(shard, documents[shard], ("SHARD_UNAVAILABLE",)) for shard in sorted(self._down)
        )
        lacks = sum(one.documents for one in lost)
        cut = min(cuts[shard] for shard in alive)
        query = QueryEvent(
            sent_s=sent_s,
            done_s=self._advance(),
            request=request,
            ids=tuple(ids),
            fields={"title": [found[one].fields["title"] for one in ids]},
            generation=self._live,
            cut=(Token(LOG, 0, cut),),
            coverage=(addressed - lacks) / addressed if lost else 1.0,
            reasons=("SHARD_UNAVAILABLE",) if lost else (),
            shards_total=self._num_shards,
            lost=lost,
            addressed=addressed,
            exhausted=not lost and len(ids) < request["k"],
        )
        self._events.append(query)
        self._asked.append(self._known(query, cut, holds, excluded))

    def _known(
        self,
        query: QueryEvent,
        cut: int,
        holds: Callable[[Mapping[str, Any]], bool],
        excluded: Sequence[int],
    ) -> Asked:
        """Return what is certain of an answer: nothing is under way or in doubt of those items."""
        asked = Asked(query, [], [], [])
        lost = {one.shard for one in query.lost}
        for one in sorted({*PUBLISHED, *WRITTEN}):
            shard = shard_of(one, NUM_PARTITIONS, self._num_shards)
            if shard in lost or one in excluded or one in self._doubtful:
                continue
            if self._touched.get(one, 0) > cut:
                continue
            item = self._at(one, cut, self._live)
            if item is None:
                if one in self._deleted:
                    asked.dead.append(one)
            elif not holds(item.attributes):
                asked.ineligible.append(one)
            elif one in query.ids and len(query.ids) < query.request["k"]:
                asked.certain.append(one)
        return asked


def simulated(seed: int, steps: int = 120) -> History:
    """Return a history that is right."""
    return Simulation(seed, steps).run()
