"""How much of the best the answers of a router hold: a few requests are searched again, everywhere.

The second search probes every cluster with the same candidates and the same reranking, so what it
finds more is what probing has left out. It runs behind the answers, one at a time.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from silvershard.cluster.config import RecallAuditSection
from silvershard.cluster.coordinator import Query
from silvershard.cluster.degrade_policy import UNDEMANDING
from silvershard.cluster.rounds import Fate, Served
from silvershard.model.plan import ALL_PAGES, Plan

_log = logging.getLogger(__name__)

_DEADLINE_S = 5.0
_NARROW, _MIDDLE = 0.01, 0.1

Run = Callable[[Sequence[Query]], Awaitable[list[Fate]]]
"""Answers queries over one generation."""


class Audited(NamedTuple):
    """What the audits of a band of selectivity have found so far."""

    audits: int = 0
    recalls: float = 0.0
    """Sum of their recalls, each 0 to 1."""


class RecallAudit:
    """Audits a sample of the answers; ``served`` is called for every one and never waits."""

    def __init__(
        self,
        section: RecallAuditSection,
        *,
        is_hot: Callable[[], bool],
        clock: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Make an audit that has seen nothing.

        Args:
            section: how many answers it looks at, and how much of the time it may take.
            is_hot: whether the router has too much to do for it.
            clock: must be the clock of the event loop.
            draw: returns a number in [0, 1) per answer.
        """
        self.found: dict[str, Audited] = {}
        """By band: ``unfiltered``, or how much of the catalogue the filter lets through."""
        self.given_up = 0
        """Audits that were begun and had no full answer."""
        self._section = section
        self._is_hot = is_hot
        self._clock = clock
        self._draw = draw
        self._next_s = clock()
        self._running: asyncio.Task[None] | None = None

    def served(self, query: Query, answer: Served, run: Run, num_clusters: int) -> None:
        """Audit an answer, if it is its turn.

        Args:
            query: what was asked.
            answer: what was answered.
            run: answers over the generation that has answered.
            num_clusters: C of that generation.
        """
        if self._draw() >= self._section.sample or answer.coverage.documents < 1:
            return
        if self._running is not None or self._clock() < self._next_s or self._is_hot():
            return
        wanted = answer.answer.item_ids[: self._section.k].tolist()
        band = band_of(query, answer)
        if answer.answer.plan.probes >= num_clusters:
            self._note(band, 1.0)
            return
        again = _everywhere(query, answer, self._section.k, num_clusters)
        again = replace(again, arrived_s=self._clock(), deadline_s=self._clock() + _DEADLINE_S)
        self._running = asyncio.create_task(self._audit(again, run, band, wanted))

    async def _audit(self, query: Query, run: Run, band: str, got: list[int]) -> None:
        began_s = self._clock()
        try:
            (fate,) = await run([query])
            if isinstance(fate, Served):
                best = fate.answer.item_ids.tolist()
                self._note(band, len({*best} & {*got}) / len(best) if best else 1.0)
            else:
                self.given_up += 1
        except Exception:  # noqa: BLE001  # nobody waits for it
            _log.exception("an audit of recall failed; the next is due as usual")
            self.given_up += 1
        finally:
            spent_s = self._clock() - began_s
            self._next_s = began_s + spent_s / self._section.share
            self._running = None

    def _note(self, band: str, recall: float) -> None:
        audits, recalls = self.found.get(band, Audited())
        self.found[band] = Audited(audits + 1, recalls + recall)

    async def aclose(self) -> None:
        """Give up what is under way."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)


def _everywhere(query: Query, answer: Served, k: int, num_clusters: int) -> Query:
    """Return a query for the same candidates out of all clusters."""
    ran = answer.answer.plan
    plan = Plan(ALL_PAGES, num_clusters, ran.ann_k, ran.semantic_k, ran.without)
    request = replace(
        query.request,
        k=min(query.request.k, k),
        plan=str(plan),
        exact=False,
        nprobe=0,
        ann_k=0,
        semantic_k=None,
        return_fields=(),
    )
    return replace(query, request=request, min_coverage=1.0, degrade=UNDEMANDING)


def band_of(query: Query, answer: Served) -> str:
    """Return how much of the catalogue the filter of a request lets through, in words."""
    if not query.request.filter:
        return "unfiltered"
    counts = answer.answer.counts
    if counts.eligible is None:
        return "uncounted"
    share = counts.eligible / max(counts.addressed, 1)
    return "to_1_percent" if share <= _NARROW else "to_10_percent" if share <= _MIDDLE else "above"
