"""What must be true of every answer, and of the whole at its end.

A violation names a property; the names of ``history.checker`` are used where they fit.
"""

import asyncio
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from history.checker import (
    BOUNDED_RECOVERY,
    COVERAGE_HONESTY,
    NO_DUPLICATE,
    NO_FAILED_REQUEST,
    NO_MIXED_GENERATION,
    READ_YOUR_WRITES,
)
from simulation.catalogue import LOG_ID, Cut
from simulation.process import Origin

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import code_name
from silvershard.cluster.shard_map import ShardMap

EXACT_ANSWER = "exact_answer"
NO_MIXED_REPLICA = "no_mixed_replica"
NO_OLDER_MAP = "no_older_map"
NO_FENCED_EPOCH = "no_fenced_epoch"
IN_TIME = "in_time"
NO_UNKNOWN_FAILURE = "no_unknown_failure"
BUDGETS = "budgets"
NOTHING_LEFT = "nothing_left"
ONE_HEDGE = "one_hedge"
LOSERS_END = "losers_end"

GRACE_S = 3.0
"""For so long a replica must have been named by the map that a request can count on it."""
LEARN_S = 2.0
"""A router that has not taken another cut of the catalogue by then may ask who has left."""
SETTLE_S = 1.0
"""After that a trouble between a router and a process, or of a process, has no consequences."""
LATE_S = 0.025
"""Of what the deadlines of its neighbours make late."""
SHORTEST_S = 1.5
"""Requests with less time may end before it is noticed that a replica hangs."""

_HEDGE_BURST = 16
_UNDER_WAY = 16
"""Hedges that are counted only when they have ended."""
_EXPECTED = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}
_ANN_K = re.compile(r"ann_k=(\d+)")
_MOST_TRIED = 400


class Violation(NamedTuple):
    """What cannot be."""

    property: str
    number: int
    """Of the request; 0: of none."""
    from_s: float
    at_s: float
    reason: str

    def __str__(self) -> str:
        what = f"request {self.number}: " if self.number else ""
        return f"{self.property}: at {self.at_s:.6f}: {what}{self.reason}"


@dataclass(frozen=True)
class Asked:
    """A request, and what was true when it was sent."""

    number: int
    node: Any
    user: int
    text: str
    k: int
    exact: bool
    excluded: tuple[int, ...]
    titles: bool
    min_coverage: float | None
    session: int
    after: Cut
    limit_s: float
    sent_s: float
    map: ShardMap | None = None
    """By which its router serves."""

    def message(self) -> retrieval_pb2.RetrieveRequest:
        message = retrieval_pb2.RetrieveRequest(
            request_id=str(self.number),
            k=self.k,
            filter=self.text,
            exclude_ids=self.excluded,
            return_task_scores=True,
        )
        message.named.features["user"].floats.append(float(self.user))
        if self.exact:
            message.search.exact = True
        if self.titles:
            message.return_fields.append("title")
        if self.min_coverage is not None:
            message.min_coverage = self.min_coverage
        for at, position in enumerate(self.after):
            if position:
                message.consistency.after.add(log_epoch=LOG_ID, partition=at, position=position)
        return message


@dataclass
class Checks:
    """Looks at everything that happens."""

    world: Any
    violations: list[Violation] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    judged: int = 0
    unverified: int = 0
    is_recovered: bool = False

    def violated(self, name: str, reason: str, asked: Asked | None = None) -> None:
        now_s = self.world.loop.now_s
        since_s = asked.sent_s if asked is not None else now_s
        number = asked.number if asked is not None else 0
        self.violations.append(Violation(name, number, since_s, now_s, reason))
        self.world.say("VIOLATION", self.violations[-1])

    def failed(self, asked: Asked, code: int, reason: str) -> None:
        """Take note of a refusal."""
        name = code_name(code)
        self.codes[name] += 1
        self.world.say("failed", asked.number, name, reason)
        if name not in _EXPECTED:
            self.violated(NO_UNKNOWN_FAILURE, f"{name}: {reason}", asked)
        self._check_time(asked)
        self._judge(asked, f"{name}: {reason}")

    def answered(self, asked: Asked, response: retrieval_pb2.RetrieveResponse) -> None:
        """Take note of an answer."""
        self.answers += 1
        self.codes["OK" if response.coverage.documents == 1.0 else "OK in part"] += 1
        self.world.say(
            "answered", asked.number, response.version.generation, response.coverage.documents
        )
        self._check_time(asked)
        self._check_answer(asked, response)
        coverage = response.coverage
        lost = "" if coverage.documents == 1.0 else str(coverage).replace("\n", " ")
        self._judge(asked, lost)

    def _check_time(self, asked: Asked) -> None:
        spent_s = self.world.loop.now_s - asked.sent_s
        if spent_s > asked.limit_s + LATE_S:
            self.violated(IN_TIME, f"it took {spent_s:.4f} s of {asked.limit_s} s", asked)

    def _judge(self, asked: Asked, failure: str) -> None:
        """Complain about a request that had to succeed and did not."""
        if asked.limit_s < SHORTEST_S or asked.node.is_dead:
            return
        if not self._must_succeed(asked):
            if self.is_recovered:
                self.violated(BOUNDED_RECOVERY, "something is not well yet", asked)
            return
        self.judged += 1
        if failure:
            name = BOUNDED_RECOVERY if self.is_recovered else NO_FAILED_REQUEST
            self.violated(name, failure, asked)

    def _must_succeed(self, asked: Asked) -> bool:
        """Return whether a replica of every shard was well, and reachable, all the time."""
        node, world = asked.node, self.world
        if asked.map is None or not node.condition.is_good_since(asked.sent_s - GRACE_S):
            return False
        if world.jumped_s >= asked.sent_s:
            # Whoever says that the time is over is believed, and no other one is asked.
            return False
        if world.board.left_s(asked.map) < asked.sent_s - LEARN_S:
            return False
        return all(
            any(
                self._is_well(asked, process)
                for process in world.engine.all
                if process.place.shard == shard and process.place.num_shards == asked.map.num_shards
            )
            for shard in range(asked.map.num_shards)
        )

    def _is_well(self, asked: Asked, process: Any) -> bool:
        since_s = asked.sent_s - GRACE_S
        if asked.node.named_s.get(process.epoch, float("inf")) > since_s:
            return False
        if not process.serves(asked.map.generation, since_s):
            return False
        conditions = [process.condition, *([process.log_condition] if asked.after else [])]
        return all(
            one.is_good_since(asked.sent_s - SETTLE_S) for one in conditions
        ) and self.world.faults.is_whole(asked.node, process, asked.sent_s)

    def _check_answer(self, asked: Asked, response: retrieval_pb2.RetrieveResponse) -> None:
        coverage, version = response.coverage, response.version
        ids = list(response.item_ids)
        if len(set(ids)) < len(ids):
            self.violated(NO_DUPLICATE, f"{ids}", asked)
        if asked.map is None or version.shard_map_version != asked.map.version:
            self.violated(NO_MIXED_GENERATION, f"it is of map {version.shard_map_version}", asked)
            return
        if version.generation != asked.map.generation:
            self.violated(NO_MIXED_GENERATION, f"it is of {version.generation}", asked)
        lost = {one.shard: one for one in coverage.shards}
        least = 0.9 if asked.min_coverage is None else asked.min_coverage
        if coverage.documents < least:
            self.violated(COVERAGE_HONESTY, f"it covers {coverage.documents} of {least}", asked)
        origins = self._origins(asked, response, lost)
        self._check_coverage(asked, response, origins)
        self._check_content(asked, response, origins, lost)
        cut = tuple(token.position for token in version.cut)
        if any(at < wanted for at, wanted in zip(cut, asked.after, strict=False)):
            self.violated(READ_YOUR_WRITES, f"it is of {cut}, after {asked.after}", asked)
        if cut:
            self.world.sessions[asked.session] = cut

    def _origins(
        self, asked: Asked, response: retrieval_pb2.RetrieveResponse, lost: dict[int, Any]
    ) -> dict[int, Origin]:
        """Return where the items of each shard come from."""
        assert asked.map is not None
        num_shards = asked.map.num_shards
        shard_of = self.world.catalogue.cut_into(num_shards).shard_of
        found: dict[int, int] = {}
        numbers = response.task_scores["origin"].values
        for item, number in zip(response.item_ids, numbers, strict=True):
            shard = shard_of[item]
            if found.setdefault(shard, int(number)) != int(number):
                self.violated(NO_MIXED_REPLICA, f"item {item} of shard {shard}", asked)
        origins = {shard: self.world.origins[number] for shard, number in found.items()}
        for shard, origin in origins.items():
            process = origin.process
            if (process.place.shard, process.place.num_shards) != (shard, num_shards):
                self.violated(EXACT_ANSWER, f"{process.name} answers for shard {shard}", asked)
            if shard in lost:
                self.violated(COVERAGE_HONESTY, f"items of shard {shard}, which is lost", asked)
            if origin.generation != response.version.generation:
                self.violated(NO_MIXED_GENERATION, f"{process.name}: {origin.generation}", asked)
            if origin.received_s > asked.node.fenced_s.get(process.epoch, float("inf")):
                self.violated(NO_FENCED_EPOCH, f"of {process.name}", asked)
        return origins

    def _check_coverage(
        self,
        asked: Asked,
        response: retrieval_pb2.RetrieveResponse,
        origins: dict[int, Origin],
    ) -> None:
        assert asked.map is not None
        coverage, num_shards = response.coverage, asked.map.num_shards
        lost = sum(one.documents for one in coverage.shards)
        addressed = response.counts.addressed
        told = (addressed - lost) / addressed if coverage.shards else 1.0
        if abs(told - coverage.documents) > 1e-9:
            self.violated(COVERAGE_HONESTY, f"{coverage.documents} for {told}", asked)
        if coverage.shards_full + coverage.shards_failed != num_shards:
            self.violated(COVERAGE_HONESTY, f"shards are missing: {coverage}", asked)
        if coverage.shards_failed != len(coverage.shards):
            self.violated(COVERAGE_HONESTY, f"outcomes are missing: {coverage}", asked)
        reasons = {reason for one in coverage.shards for reason in one.reasons}
        if not all(one.reasons for one in coverage.shards) or not reasons <= {*coverage.reasons}:
            self.violated(COVERAGE_HONESTY, f"a reason is missing: {coverage}", asked)
        if coverage.shards and response.exhausted:
            self.violated(COVERAGE_HONESTY, "it lacks a shard and is exhausted", asked)
        covered = {*range(num_shards)} - {one.shard for one in coverage.shards}
        if covered == origins.keys():
            documents = self.world.catalogue.documents
            held = sum(documents(num_shards, shard, one.cut) for shard, one in origins.items())
            if held != addressed - lost:
                self.violated(COVERAGE_HONESTY, f"{held} of {addressed} answered", asked)

    def _check_content(
        self,
        asked: Asked,
        response: retrieval_pb2.RetrieveResponse,
        origins: dict[int, Origin],
        lost: dict[int, Any],
    ) -> None:
        """Compare with the one right answer over the shards that are covered."""
        assert asked.map is not None
        catalogue, generation = self.world.catalogue, response.version.generation
        num_shards = asked.map.num_shards
        found = list(zip(response.item_ids, response.scores, strict=True))
        match = _ANN_K.search(response.plan)
        assert match is not None
        ann_k = int(match[1])
        known = {shard: origin.cut for shard, origin in origins.items()}
        unknown = [shard for shard in range(num_shards) if shard not in known and shard not in lost]
        least = tuple(token.position for token in response.version.cut)
        choices = self._cuts_from(least)
        if len(choices) ** len(unknown) > _MOST_TRIED:
            self.unverified += 1
            return
        for cuts in itertools.product(choices, repeat=len(unknown)):
            tried = {**known, **dict(zip(unknown, cuts, strict=True))}
            expected = catalogue.answer(
                generation,
                asked.user,
                asked.text,
                asked.k,
                ann_k,
                asked.excluded,
                num_shards,
                tried,
            )
            if expected == found:
                break
        else:
            self.violated(EXACT_ANSWER, f"{found} instead of {expected} at {known}", asked)
        for token, cut in ((least, cut) for cut in known.values()):
            if any(one > other for one, other in zip(token, cut, strict=True)):
                self.violated(READ_YOUR_WRITES, f"it tells {token}, a shard is at {cut}", asked)
        if asked.titles:
            titles = list(response.fields["title"].strings.values)
            if titles != [f"{generation}/{item}" for item in response.item_ids]:
                self.violated(NO_MIXED_GENERATION, f"titles {titles}", asked)

    def _cuts_from(self, least: Cut) -> list[Cut]:
        """Return the cuts that a shard can have been at."""
        if not least:
            return [()]
        end = self.world.catalogue.log.end
        spans = [range(one, last + 1) for one, last in zip(least, end, strict=True)]
        return list(itertools.islice(itertools.product(*spans), _MOST_TRIED + 1))

    def budgets(self, node: Any) -> None:
        """Check that no stretch of time had more hedges and retries than a share and a burst."""
        extra = node.router._extra
        counts = extra.counts
        paid = counts.hedges_won + counts.hedges_lost - counts.hedges_free
        retry_burst = extra._retries._capacity / 1_000_000
        for name, number, share, burst in (
            ("hedges", paid, 0.05, _HEDGE_BURST + _UNDER_WAY),
            ("retries", counts.retries, 0.1, retry_burst),
        ):
            above = number - share * counts.calls
            least = node.spent[name] = min(above, node.spent.get(name, 0.0))
            if above - least > burst + 1:
                self.violated(BUDGETS, f"{node.name}: {number} {name} of {counts.calls} calls")

    def quiescence(self) -> None:
        """Check that nothing is left of the requests, a while after the last one."""
        for node in self.world.nodes:
            router = node.router
            batcher = router._batcher
            left = {
                "waiting requests": batcher.num_waiting,
                "running batches": len(batcher._running) + len(batcher._demanding),
                "load": batcher._admission._running,
            }
            for held in router._held.values():
                known = held.coordinator._choice._known
                left["calls in flight"] = sum(one.in_flight for one in known.values())
                for link in itertools.chain(
                    *(held.links.replicas(one) for one in range(held.num_shards))
                ):
                    if not link.connection.is_idle:
                        left[f"calls of {link.connection.entry.address}"] = 1
            for what, number in left.items():
                if number:
                    self.violated(NOTHING_LEFT, f"{node.name} has {number} {what}")
        for process in self.world.engine.all:
            server = process.shard_server
            if server is None:
                continue
            if server._pending or server._by_key:
                self.violated(NOTHING_LEFT, f"{process.name} has {server._pending} calls")
            for hosted in server.hosting.served:
                hosted.executor.expire()
                if hosted.executor.num_open:
                    number = hosted.executor.num_open
                    self.violated(NOTHING_LEFT, f"{process.name} has {number} open queries")
        self.world.ledger.check_empty()
        for text in self.world.loop.failures:
            self.violated(NO_UNKNOWN_FAILURE, text)
        self.world.loop.failures.clear()

    def ended(self) -> None:
        """Check that nothing runs any more."""
        own = asyncio.current_task()
        left = [one for one in asyncio.all_tasks() if one is not own]
        for one in left:
            self.violated(NOTHING_LEFT, f"{one.get_coro()} still runs")
        for text in self.world.loop.failures:
            self.violated(NO_UNKNOWN_FAILURE, text)
