import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from silvershard.cluster import (
    ApplyResult,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    RequestRefused,
    UpdateRejection,
)
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.update_feed import Delivery, Feed
from silvershard.deploy.update_files import Entry

ACCEPTED = ApplyResult((), ())


def entries(*item_ids: int, first: int = 1) -> list[Entry]:
    return [Entry(at, at, {}, ItemUpsert(one)) for at, one in enumerate(item_ids, first)]


def rejected(*rejections: tuple[int, str]) -> ApplyResult:
    return ApplyResult((), tuple(UpdateRejection(at, code, "said") for at, code in rejections))


class Cluster:
    """Answers calls from a list, then accepts everything."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[list[int]] = []
        self._lock = threading.Lock()

    def apply(self, updates: Sequence[Any]) -> ApplyResult:
        with self._lock:
            self.calls.append([one.item_id for one in updates])
            answer = self.answers.pop(0) if self.answers else ACCEPTED
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer()
        assert isinstance(answer, ApplyResult)
        return answer


class Clock:
    """Time that passes only in ``wait``."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(clock: Clock) -> Callable[..., list[Delivery]]:
    """Sends batches one after the other and returns what became of them."""

    def sent(cluster: Cluster, *batches: list[Entry], **options: Any) -> list[Delivery]:
        settled: list[Delivery] = []
        feed = Feed(cluster.apply, settled.append, clock=clock, wait=clock.wait, **options)
        with feed:
            for batch in batches:
                feed.send(batch)
            feed.finish()
        return settled

    return sent


def test_batches_settle_in_the_order_in_which_they_were_sent(
    run: Callable[..., list[Delivery]],
) -> None:
    batches = [entries(at * 2, at * 2 + 1) for at in range(20)]
    cluster = Cluster()
    assert run(cluster, *batches) == [Delivery(batch, {}) for batch in batches]
    assert sorted(cluster.calls) == [[at * 2, at * 2 + 1] for at in range(20)]


def test_several_batches_are_under_way_at_once() -> None:
    together = threading.Barrier(3)

    def answer() -> ApplyResult:
        together.wait(20)
        return ACCEPTED

    cluster, settled = Cluster(answer, answer, answer), list[Delivery]()
    with Feed(cluster.apply, settled.append, in_flight=3) as feed:
        for item_id in range(3):
            feed.send(entries(item_id))
        feed.finish()
    assert len(settled) == 3


def test_no_more_batches_are_under_way_than_allowed() -> None:
    most, now, lock = 0, 0, threading.Lock()

    def apply(updates: Sequence[Any]) -> ApplyResult:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.001)
        with lock:
            now -= 1
        return ACCEPTED

    settled: list[Delivery] = []
    with Feed(apply, settled.append, in_flight=2) as feed:
        for item_id in range(30):
            feed.send(entries(item_id))
            assert item_id + 1 - len(settled) <= 2
        feed.finish()
    assert most <= 2


def test_a_batch_waits_for_those_with_the_same_items() -> None:
    holding, begun = threading.Event(), threading.Event()

    def hold() -> ApplyResult:
        begun.set()
        assert holding.wait(20)
        return ACCEPTED

    cluster, settled = Cluster(hold), list[Delivery]()
    with Feed(cluster.apply, settled.append) as feed:
        feed.send(entries(1, 2))
        assert begun.wait(20)
        feed.send(entries(3))
        sender = threading.Thread(target=lambda: feed.send(entries(2)))
        sender.start()
        while len(cluster.calls) < 2:
            threading.Event().wait(0.001)
        sender.join(0.01)
        assert sender.is_alive()
        assert cluster.calls == [[1, 2], [3]]
        holding.set()
        sender.join(20)
        feed.finish()
    assert cluster.calls == [[1, 2], [3], [2]]
    assert len(settled) == 3


def test_what_is_rejected_for_good_is_told_and_not_sent_again(
    run: Callable[..., list[Delivery]],
) -> None:
    cluster = Cluster(rejected((1, "INVALID_ARGUMENT"), (2, "ABORTED")))
    (delivery,) = run(cluster, entries(10, 11, 12, first=5))
    assert delivery.rejected == {6: "INVALID_ARGUMENT: said", 7: "ABORTED: said"}
    assert cluster.calls == [[10, 11, 12]]


def test_records_that_are_no_update_are_told_and_not_sent(
    run: Callable[..., list[Delivery]],
) -> None:
    cluster = Cluster()
    wrong = [Entry(3, 3, "{", None, "no JSON"), Entry(4, 4, "}", None, "no JSON either")]
    first, second = run(cluster, [*wrong, *entries(1, first=5)], wrong)
    assert first.rejected == second.rejected == {3: "no JSON", 4: "no JSON either"}
    assert cluster.calls == [[1]]


def test_what_is_refused_for_a_while_is_sent_again_and_what_follows_it_for_the_item_waits(
    run: Callable[..., list[Delivery]], clock: Clock
) -> None:
    cluster = Cluster(
        rejected((0, "RESOURCE_EXHAUSTED"), (2, "NOT_FOUND")), ACCEPTED, rejected((0, "ABORTED"))
    )
    (delivery,) = run(cluster, entries(1, 2, 1, 3))
    assert cluster.calls == [[1, 2, 3], [1], [1]]
    assert delivery.rejected == {4: "NOT_FOUND: said", 3: "ABORTED: said"}
    assert len(clock.waits) == 1


def test_only_what_follows_an_upsert_waits(run: Callable[..., list[Delivery]]) -> None:
    updates = [
        ItemPatch(1, signals={"popularity": 0.1}),
        ItemPatch(1, signals={"popularity": 0.2}),
        ItemUpsert(1),
        ItemPatch(2),
        ItemDelete(1),
        ItemUpsert(1),
        ItemDelete(2),
    ]
    cluster = Cluster()
    run(cluster, [Entry(at, at, {}, one) for at, one in enumerate(updates, 1)])
    assert cluster.calls == [[1, 1, 1, 2, 2], [1, 1]]


class Full:
    """A cluster that has room for a new item now and then, and keeps what it takes."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.items: dict[int, list[str]] = {}

    def apply(self, updates: Sequence[Any]) -> ApplyResult:
        if self.draw.random() < 0.2:
            raise RequestRefused("UNAVAILABLE", "later")
        refused = []
        for at, one in enumerate(updates):
            if isinstance(one, ItemDelete):
                self.items.pop(one.item_id, None)
            elif isinstance(one, ItemPatch):
                if one.item_id in self.items:
                    self.items[one.item_id] = [*self.items[one.item_id], one.fields["title"]]
            elif self.draw.random() < 0.5:
                refused.append((at, "RESOURCE_EXHAUSTED"))
            else:
                self.items[one.item_id] = [one.fields["title"]]
        return rejected(*refused)


@pytest.mark.parametrize("seed", range(5))
def test_an_item_ends_as_the_last_records_of_the_file_say(
    run: Callable[..., list[Delivery]], seed: int
) -> None:
    draw = random.Random(seed)
    kinds = (ItemUpsert, ItemUpsert, ItemPatch, ItemPatch, ItemDelete)
    updates: list[Any] = []
    for number in range(200):
        kind, item_id = draw.choice(kinds), draw.randrange(12)
        given = {} if kind is ItemDelete else {"fields": {"title": str(number)}}
        updates.append(kind(item_id, **given))
    all_at_once = Full(seed)
    all_at_once.draw.random = lambda: 1.0  # type: ignore[method-assign]
    all_at_once.apply(updates)
    cluster = Full(seed)
    batch = [Entry(at, at, {}, one) for at, one in enumerate(updates)]
    run(cluster, *[batch[at : at + 40] for at in range(0, 200, 40)])
    assert cluster.items == all_at_once.items


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_a_refused_call_is_sent_again_after_the_delay_that_the_cluster_names(
    run: Callable[..., list[Delivery]], clock: Clock, code: str
) -> None:
    told = RequestRefused(code, "later", retry_after_s=1.25)
    cluster = Cluster(told, RequestRefused(code, "later"), told)
    (delivery,) = run(cluster, entries(1, 2))
    assert delivery.rejected == {}
    assert cluster.calls == [[1, 2]] * 4
    assert (clock.waits[0], clock.waits[2]) == (1.25, 1.25)
    assert 0.1 < clock.waits[1] < 1


def test_pauses_grow_and_begin_anew_with_progress(
    run: Callable[..., list[Delivery]], clock: Clock
) -> None:
    full = rejected((0, "RESOURCE_EXHAUSTED"), (1, "RESOURCE_EXHAUSTED"))
    cluster = Cluster(*[full] * 8, rejected((1, "RESOURCE_EXHAUSTED")))
    run(cluster, entries(1, 2))
    assert all(
        before < after for before, after in zip(clock.waits[:3], clock.waits[1:4], strict=True)
    )
    assert max(clock.waits) <= 5.0
    assert clock.waits[-1] < 0.3


def test_a_cluster_that_accepts_nothing_for_too_long_ends_it(
    run: Callable[..., list[Delivery]], clock: Clock
) -> None:
    cluster = Cluster(*[RequestRefused("UNAVAILABLE", "no sequencer")] * 99)
    with pytest.raises(TimedOut, match="nothing was accepted for 30 s: UNAVAILABLE: no sequencer"):
        run(cluster, entries(1), give_up_s=30.0)
    assert 30 < sum(clock.waits) < 40


def test_a_refusal_for_good_ends_it(run: Callable[..., list[Delivery]]) -> None:
    cluster = Cluster(RequestRefused("NOT_FOUND", "no such model"))
    with pytest.raises(RequestRefused, match="no such model"):
        run(cluster, entries(1))
    assert len(cluster.calls) == 1


def test_a_batch_without_a_form_on_the_wire_is_divided_to_find_who_has_none() -> None:
    calls: list[list[int]] = []

    def apply(updates: Sequence[Any]) -> ApplyResult:
        calls.append([one.item_id for one in updates])
        if any(one.item_id < 0 for one in updates):
            raise ValueError("item_id: must be at least 0")
        return rejected(*((at, "ABORTED") for at, one in enumerate(updates) if one.item_id == 4))

    settled: list[Delivery] = []
    with Feed(apply, settled.append) as feed:
        feed.send(entries(1, 2, -3, 4, 5))
        feed.finish()
    assert settled[0].rejected == {3: "item_id: must be at least 0", 4: "ABORTED: said"}
    accepted = [one for one in calls if min(one) >= 0]
    assert [item_id for one in accepted for item_id in one] == [1, 2, 4, 5]


def test_no_more_updates_are_sent_per_second_than_the_rate(
    run: Callable[..., list[Delivery]], clock: Clock
) -> None:
    run(Cluster(), *[entries(at, 100 + at) for at in range(50)], rate=10.0)
    # The first batch goes at once.
    assert clock.now_s - 100.0 == pytest.approx(49 * 2 / 10)


def test_what_was_not_sent_for_a_time_is_not_caught_up(clock: Clock) -> None:
    with Feed(Cluster().apply, lambda _: None, rate=10.0, clock=clock, wait=clock.wait) as feed:
        feed.send(entries(1))
        clock.now_s += 60
        before_s = clock.now_s
        for item_id in range(2, 12):
            feed.send(entries(item_id))
        feed.finish()
    assert clock.now_s - before_s == pytest.approx(0.9)


def test_leaving_gives_up_what_waits() -> None:
    cluster = Cluster(*[RequestRefused("UNAVAILABLE", "later")] * 999)
    with Feed(cluster.apply, lambda _: None, in_flight=1) as feed:
        feed.send(entries(1))
        while not cluster.calls:
            threading.Event().wait(0.001)
    assert len(cluster.calls) < 99
    with pytest.raises(CommandError, match="has ended"):
        feed.finish()


def test_a_delete_is_an_update_like_any_other(run: Callable[..., list[Delivery]]) -> None:
    cluster = Cluster()
    (delivery,) = run(cluster, [Entry(1, 1, {}, ItemDelete(7))])
    assert (delivery.rejected, cluster.calls) == ({}, [[7]])
