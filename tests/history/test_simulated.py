"""The checker against histories that are right, and against the same ones with one thing wrong."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from history.checker import PROPERTIES, check
from history.events import FaultEvent, QueryEvent, numbered
from history.simulated import RECOVERY_S, Asked, History, simulated
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 1 << 32)
Spoiled = tuple[QueryEvent, set[str]]
"""An answer that is wrong now, and the properties of which one must be found violated."""


def put(query: QueryEvent, item: int, title: str) -> QueryEvent:
    titles = [*query.fields["title"], title]
    return replace(query, ids=(*query.ids, item), fields={"title": titles})


def without(query: QueryEvent, item: int) -> QueryEvent:
    at = query.ids.index(item)
    titles = [*query.fields["title"]]
    del titles[at]
    return replace(query, ids=query.ids[:at] + query.ids[at + 1 :], fields={"title": titles})


def repeats(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not query.ids:
        return None
    at = draw.randrange(len(query.ids))
    return put(query, query.ids[at], query.fields["title"][at]), {"no_duplicate"}


def drops(asked: Asked, draw: random.Random) -> Spoiled | None:
    if not asked.certain:
        return None
    query = without(asked.query, draw.choice(asked.certain))
    return query, {"coverage_honesty", "read_your_writes"}


def resurrects(asked: Asked, draw: random.Random) -> Spoiled | None:
    if not asked.dead:
        return None
    return put(asked.query, draw.choice(asked.dead), "x"), {"no_resurrected_delete"}


def lets_in(asked: Asked, draw: random.Random) -> Spoiled | None:
    if not asked.ineligible:
        return None
    item = draw.choice(asked.ineligible)
    return put(asked.query, item, "x"), {"no_ineligible_item", "read_your_writes", "seen_whole"}


def invents(asked: Asked, draw: random.Random) -> Spoiled | None:
    return put(asked.query, 10**6, "x"), {"no_ineligible_item", "coverage_honesty"}


def mistitles(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not query.ids:
        return None
    titles = [*query.fields["title"]]
    titles[draw.randrange(len(titles))] = "nobody wrote this"
    return replace(query, fields={"title": titles}), {"seen_whole"}


def stamps(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not any(title == f"G{query.generation}" for title in query.fields["title"]):
        return None
    other = 3 - (query.generation or 0)
    return replace(query, generation=other), {"no_mixed_generation"}


def goes_back(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not query.after:
        return None
    cut = tuple(one._replace(position=query.after[0].position - 1) for one in query.cut)
    return replace(query, cut=cut), {"cut_is_monotone_per_token"}


def boasts(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not query.lost or query.is_full:
        return None
    coverage = (query.coverage or 0.0) + 0.5 * (1.0 - (query.coverage or 0.0))
    return replace(query, coverage=coverage), {"coverage_honesty"}


def fails(asked: Asked, draw: random.Random) -> Spoiled | None:
    query = asked.query
    if not query.is_full:
        return None
    return (
        QueryEvent(
            sent_s=query.sent_s, done_s=query.done_s, code="INTERNAL", request=query.request
        ),
        {"no_failed_request"},
    )


SPOILERS: dict[str, Callable[[Asked, random.Random], Spoiled | None]] = {
    one.__name__: one
    for one in (
        repeats,
        drops,
        resurrects,
        lets_in,
        invents,
        mistitles,
        stamps,
        goes_back,
        boasts,
        fails,
    )
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_a_cluster_that_does_everything_right_violates_nothing(seed: int) -> None:
    check(numbered(simulated(seed).events)).require()


def test_histories_give_every_property_something_to_look_at() -> None:
    looked = sum(
        (check(numbered(simulated(seed).events)).looked for seed in range(20)),
        start=check([]).looked,
    )
    assert {name for name in PROPERTIES if looked[name] < 20} == set()


def excused(history: History, query: QueryEvent) -> bool:
    faults = [one for one in history.events if isinstance(one, FaultEvent)]
    return any(one.begin_s <= query.done_s <= one.end_s + 2 * RECOVERY_S for one in faults)


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_one_thing_that_is_wrong_is_found_where_it_is(spoiler: str) -> None:
    found = 0
    for seed in range(25):
        draw = random.Random(seed)
        history = simulated(seed, steps=60)
        for asked in draw.sample(history.asked, len(history.asked)):
            spoiled = SPOILERS[spoiler](asked, draw)
            if spoiled is None or (spoiler == "fails" and excused(history, asked.query)):
                continue
            query, wanted = spoiled
            events = [query if one is asked.query else one for one in history.events]
            line = events.index(query) + 1
            violations = check(numbered(events)).violations
            assert any(one.property in wanted and one.lines[0] == line for one in violations), seed
            found += 1
            break
    assert found > 10
