import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from silvershard.cluster.config import RecallAuditSection
from silvershard.cluster.coordinator import Query
from silvershard.cluster.outcome import Coverage
from silvershard.cluster.recall_audit import RecallAudit, band_of
from silvershard.cluster.rounds import Fate, Served
from silvershard.model.answer import Answer
from silvershard.model.counts import Counts
from silvershard.model.plan import Plan
from silvershard.model.request import Request
from silvershard.shard.errors import DeadlineExceeded

CLUSTERS = 16


def asked(**options: Any) -> Query:
    return Query(Request(**options), 0.5, 1001.0, 1000.0)


def served(
    item_ids: Sequence[int],
    *,
    probes: int = 2,
    coverage: float = 1.0,
    eligible: int | None = None,
) -> Served:
    ids = torch.tensor(item_ids, dtype=torch.int64)
    nothing = torch.zeros(len(ids))
    answer = Answer(
        item_ids=ids,
        scores=nothing,
        refined=nothing,
        task_scores={},
        plan=Plan("probe", probes, 300, 20, ("like",)),
        exhausted=False,
        counts=Counts(addressed=1000, probed=0, eligible=eligible, ann_kept=0, reranked=0),
    )
    return Served(answer, Coverage(coverage, 2, 2, 0))


class Everywhere:
    """Answers every query with the same items after a while."""

    def __init__(self, clock: Any, item_ids: Sequence[int] = (1, 2, 3, 4)) -> None:
        self.queries: list[Query] = []
        self.began_s: list[float] = []
        self.fate: Fate = served(item_ids, probes=CLUSTERS)
        self.takes_s = 0.1
        self._clock = clock

    async def __call__(self, queries: Sequence[Query]) -> list[Fate]:
        self.queries += queries
        self.began_s.append(self._clock())
        await asyncio.sleep(self.takes_s)
        return [self.fate]


def make(virtual: Any, **options: Any) -> RecallAudit:
    section = RecallAuditSection(**{"sample": 1.0, "share": 1.0, **options})
    return RecallAudit(section, is_hot=lambda: False, clock=virtual.time)


def test_the_recall_is_the_share_of_the_best_that_was_answered(virtual: Any) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)

    async def scenario() -> None:
        audit.served(asked(k=4), served([1, 9, 3, 8]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert audit.found == {"unfiltered": (1, 0.5)}


def test_all_clusters_are_searched_for_the_candidates_that_the_answer_had(virtual: Any) -> None:
    audit, run = make(virtual, k=3), Everywhere(virtual.time)
    query = asked(k=50, nprobe=2, filter="genre:1", return_fields=("title",), exclude_ids=(7,))

    async def scenario() -> None:
        audit.served(query, served([1]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    (again,) = run.queries
    assert again.request == Request(
        k=3,
        filter="genre:1",
        exclude_ids=(7,),
        plan="all_pages(probes=16,ann_k=300,semantic_k=20,without=like)",
    )
    assert again.min_coverage == 1
    assert again.deadline_s > query.deadline_s


def test_an_answer_out_of_all_clusters_needs_no_second_search(virtual: Any) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)

    async def scenario() -> None:
        audit.served(asked(), served([1], probes=CLUSTERS), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert not run.queries
    assert audit.found == {"unfiltered": (1, 1.0)}


def test_an_answer_that_lacks_documents_tells_nothing_of_the_index(virtual: Any) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)

    async def scenario() -> None:
        audit.served(asked(), served([1], coverage=0.99), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert not run.queries
    assert not audit.found


def test_audits_run_one_at_a_time_and_take_no_more_than_their_share(virtual: Any) -> None:
    audit, run = make(virtual, share=0.1), Everywhere(virtual.time)

    async def scenario() -> None:
        for _ in range(400):
            audit.served(asked(), served([1]), run, CLUSTERS)
            await asyncio.sleep(0.01)

    virtual.run_until_complete(scenario())
    gaps = [after - before for before, after in zip(run.began_s, run.began_s[1:], strict=False)]
    assert len(run.began_s) == 4
    assert min(gaps) >= 1.0 - 1e-9


@pytest.mark.parametrize(("drawn", "audits"), [(0.2, 0), (0.1, 0), (0.05, 1)])
def test_a_sample_is_audited(virtual: Any, drawn: float, audits: int) -> None:
    section = RecallAuditSection(sample=0.1, share=1.0)
    audit = RecallAudit(section, is_hot=lambda: False, clock=virtual.time, draw=lambda: drawn)
    run = Everywhere(virtual.time)

    async def scenario() -> None:
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert len(run.queries) == audits


def test_nothing_is_audited_while_the_router_has_too_much_to_do(virtual: Any) -> None:
    section = RecallAuditSection(sample=1.0)
    audit = RecallAudit(section, is_hot=lambda: True, clock=virtual.time)
    run = Everywhere(virtual.time)

    async def scenario() -> None:
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert not run.queries


@pytest.mark.parametrize("fate", [DeadlineExceeded("late"), RuntimeError("a bug")])
def test_an_audit_without_an_answer_is_counted_and_the_next_one_runs(
    virtual: Any, fate: Exception
) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)
    run.fate = fate

    async def scenario() -> None:
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(1)
        run.fate = served([1])
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert audit.given_up == 1
    assert audit.found == {"unfiltered": (1, 1.0)}


def test_a_search_that_breaks_is_counted_and_the_next_one_runs(virtual: Any) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)

    async def broken(queries: Sequence[Query]) -> list[Fate]:
        raise RuntimeError("a bug")

    async def scenario() -> None:
        audit.served(asked(), served([1]), broken, CLUSTERS)
        await asyncio.sleep(1)
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(1)

    virtual.run_until_complete(scenario())
    assert audit.given_up == 1
    assert len(run.queries) == 1


def test_closing_gives_up_what_is_under_way(virtual: Any) -> None:
    audit, run = make(virtual), Everywhere(virtual.time)
    run.takes_s = 100.0

    async def scenario() -> float:
        audit.served(asked(), served([1]), run, CLUSTERS)
        await asyncio.sleep(0)
        began_s: float = virtual.time()
        await audit.aclose()
        ended_s: float = virtual.time()
        return ended_s - began_s

    assert virtual.run_until_complete(scenario()) == 0
    assert not audit.found


@pytest.mark.parametrize(
    ("text", "eligible", "band"),
    [
        ("", None, "unfiltered"),
        ("genre:1", None, "uncounted"),
        ("genre:1", 0, "to_1_percent"),
        ("genre:1", 10, "to_1_percent"),
        ("genre:1", 11, "to_10_percent"),
        ("genre:1", 100, "to_10_percent"),
        ("genre:1", 101, "above"),
    ],
)
def test_bands_are_shares_of_the_catalogue(text: str, eligible: int | None, band: str) -> None:
    assert band_of(asked(filter=text), served([1], eligible=eligible)) == band
