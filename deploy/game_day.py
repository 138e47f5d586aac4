"""A game day: faults drawn by a seed hit a cluster one after the other, while known queries go on.

The blast radius is one fault at a time: the next one begins when the cluster is whole again.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from silvershard.cluster import RequestRefused, admin_pb2
from silvershard.cluster.admin_client import AdminClient
from silvershard.cluster.faults import FaultKind
from silvershard.cluster.load_outcome import FAILED, Outcome
from silvershard.deploy.state import ClusterRecord
from silvershard.deploy.tables import Cell, table

_LOOK_S = 0.05
_CALM_S = 2.0
"""Between two faults, so that the latencies of each are its own."""
_TAIL_S = 10.0
"""At the end of a game day, in which no fault begins."""
_FAILED: Final = tuple(one.value for one in FAILED)


class Draw(NamedTuple):
    """One kind of fault, as a plan has it."""

    kind: FaultKind
    target: str
    """``shard``, of which a copy is drawn, or the target itself."""
    seconds: tuple[float, float] = (0.0, 0.0)
    delay_ms: tuple[int, int] = (0, 0)
    share: tuple[float, float] = (1.0, 1.0)


PLANS: Final[Mapping[str, tuple[Draw, ...]]] = {
    "standard": (
        Draw("kill", "shard"),
        Draw("hang", "shard", (2.0, 6.0)),
        Draw("slow", "shard", (4.0, 8.0), delay_ms=(20, 200)),
        Draw("drop", "shard", (3.0, 8.0), share=(0.05, 0.5)),
        Draw("partition", "shard", (3.0, 8.0)),
        Draw("stall", "shard", (3.0, 8.0)),
        Draw("stall", "sequencer", (2.0, 5.0)),
        Draw("kill", "sequencer"),
        Draw("hang", "supervisor", (2.0, 5.0)),
    ),
    "reads": (
        Draw("hang", "shard", (2.0, 6.0)),
        Draw("slow", "shard", (4.0, 8.0), delay_ms=(20, 200)),
        Draw("partition", "shard", (3.0, 8.0)),
    ),
}
"""What is drawn from; each kind is as likely as any other."""


class Planned(NamedTuple):
    """A fault that was drawn."""

    kind: FaultKind
    target: str
    seconds: float
    delay_ms: int
    share: float


@dataclass
class Happened:
    """A fault that was drawn, and what became of it."""

    planned: Planned
    name: str
    began_unix_s: float
    over_unix_s: float = 0.0
    """When it was over."""
    whole_unix_s: float = 0.0
    """When every process served again; 0: that was not seen."""
    refused: str = ""
    """Why it was not injected."""


def draw_fault(draws: Sequence[Draw], rng: random.Random, record: ClusterRecord) -> Planned:
    """Return the next fault; the same seed and cluster give the same ones."""
    sequenced = record.sequencer is not None
    one = rng.choice([draw for draw in draws if sequenced or draw.target != "sequencer"])
    copies = sorted((copy.shard, copy.replica) for copy in record.shards)
    shard, replica = rng.choice(copies)
    return Planned(
        one.kind,
        f"shard {shard}.{replica}" if one.target == "shard" else one.target,
        round(rng.uniform(*one.seconds), 1),
        rng.randint(*one.delay_ms),
        round(rng.uniform(*one.share), 2),
    )


class GameDay:
    """The faults of a game day; ``run`` injects them, on a thread beside the load."""

    def __init__(
        self,
        admin: AdminClient,
        read_record: Callable[[], ClusterRecord | None],
        *,
        plan: str,
        seed: int,
        allow_outage: bool = False,
        report: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make one that has not begun.

        Args:
            admin: injects the faults.
            read_record: tells how the cluster is.
            plan: one of ``PLANS``.
            seed: decides which faults, when and for how long.
            allow_outage: also where no other copy of a shard answers.
            report: hears of each fault.
            clock: Unix time in seconds.
        """
        self.happened: list[Happened] = []
        self.failure: Exception | None = None
        """What ended it before its time."""
        self._admin = admin
        self._read_record = read_record
        self._draws = PLANS[plan]
        self._seed = seed
        self._rng = random.Random(seed)
        self._allow_outage = allow_outage
        self._report = report
        self._clock = clock

    def run(self, seconds: float, stop: threading.Event) -> None:
        """Inject one fault after the other until ``seconds`` are over, or until told to stop."""
        end_unix_s = self._clock() + max(seconds - _TAIL_S, 0.8 * seconds)
        try:
            while self._clock() < end_unix_s and not stop.wait(_CALM_S):
                record = self._read_record()
                if record is not None and record.is_whole:
                    self._inject(draw_fault(self._draws, self._rng, record), stop)
        except Exception as error:  # noqa: BLE001 - the border of a thread; whoever waits raises it
            self.failure = error
        finally:
            stop.set()

    def _inject(self, planned: Planned, stop: threading.Event) -> None:
        name = f"game-{self._seed}-{int(self._clock())}-{len(self.happened)}"
        happened = Happened(planned, name, self._clock())
        self.happened.append(happened)
        try:
            self._admin.inject_fault(
                planned.kind,
                planned.target,
                planned.seconds,
                delay_ms=planned.delay_ms,
                share=planned.share,
                allow_outage=self._allow_outage,
                operation_id=name,
            )
        except RequestRefused as error:
            if error.code not in ("FAILED_PRECONDITION", "UNAVAILABLE"):
                raise
            happened.refused = error.message
            self._report(f"{said(planned)}: not injected: {error.message}")
            return
        self._report(said(planned))
        # The supervisor answers nobody while it hangs.
        stop.wait(planned.seconds)
        while not stop.wait(_LOOK_S):
            faults = {one.operation_id: one.state for one in self._admin.list_faults()}
            if faults.get(name) != admin_pb2.FAULT_STATE_ACTIVE:
                break
        happened.over_unix_s = self._clock()
        while not stop.wait(_LOOK_S):
            record = self._read_record()
            if record is not None and record.is_whole:
                happened.whole_unix_s = self._clock()
                break


def said(planned: Planned) -> str:
    """Return a fault for people."""
    more = f" by {planned.delay_ms} ms" if planned.delay_ms else ""
    more += f" {planned.share:g}" if planned.share != 1 else ""
    lasting = f" for {planned.seconds:g} s" if planned.seconds else ""
    return f"{planned.kind} {planned.target}{more}{lasting}"


def account(happened: Sequence[Happened], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what users noticed, in all and of each fault.

    A request belongs to the last fault that had begun when it was due. An answer is wrong if it is
    whole and differs from another whole one to the same request by the same plan, of the same
    generation at the same cut.

    Args:
        happened: the faults, in their order.
        lines: the record of the load, in the order in which requests were due.
    """
    hits = [one for one in happened if not one.refused]
    by_fault: list[list[Mapping[str, Any]]] = [[] for _ in range(len(hits) + 1)]
    known: dict[tuple[Any, ...], list[int]] = {}
    wrong: set[int] = set()
    for line in lines:
        begun = sum(one.began_unix_s <= line["unix_s"] for one in hits)
        by_fault[begun].append(line)
        if line["outcome"] == Outcome.OK:
            key = (line["request"]["index"], line["plan"], line["generation"], *line["cut"])
            if known.setdefault(key, line["ids"]) != line["ids"]:
                wrong.add(line["number"])
    everything = [line for part in by_fault for line in part]
    return {
        **_counted(everything, wrong),
        "errors": dict(Counter(one["code"] for one in everything if one["outcome"] in _FAILED)),
        "before": _counted(by_fault[0], wrong),
        "faults": [
            {**_described(one), **_counted(part, wrong), "recovery_s": _recovery_s(one, part)}
            for one, part in zip(hits, by_fault[1:], strict=True)
        ],
        "refused": [
            {"fault": said(one.planned), "reason": one.refused} for one in happened if one.refused
        ],
    }


def _described(happened: Happened) -> dict[str, Any]:
    whole_s = happened.whole_unix_s - happened.over_unix_s
    return {
        "name": happened.name,
        "fault": said(happened.planned),
        "whole_s": round(whole_s, 2) if happened.whole_unix_s else None,
    }


def _counted(lines: Sequence[Mapping[str, Any]], wrong: set[int]) -> dict[str, Any]:
    outcomes = Counter(line["outcome"] for line in lines)
    answered = sorted(
        line["done_s"] - line["at_s"] for line in lines if line["outcome"] not in _FAILED
    )
    p99_s = answered[min(int(0.99 * len(answered)), len(answered) - 1)] if answered else None
    least = min((line["coverage"] for line in lines if line["coverage"] is not None), default=None)
    return {
        "requests": len(lines),
        "failed": sum(outcomes[one] for one in _FAILED),
        "partial": outcomes[Outcome.PARTIAL],
        "degraded": outcomes[Outcome.DEGRADED],
        "wrong": sum(line["number"] in wrong for line in lines),
        "least_coverage": least,
        "p99_ms": None if p99_s is None else round(p99_s * 1e3, 1),
    }


def _recovery_s(happened: Happened, lines: Sequence[Mapping[str, Any]]) -> float:
    """Return for how long after a fault requests still failed or lacked documents."""
    bad = [
        line["unix_s"] + line["done_s"] - line["at_s"]
        for line in lines
        if line["outcome"] in (*_FAILED, Outcome.PARTIAL)
    ]
    over_unix_s = happened.over_unix_s or happened.began_unix_s
    return round(max(max(bad, default=over_unix_s) - over_unix_s, 0.0), 2)


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the lines of the record of a load."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def render(document: Mapping[str, Any]) -> str:
    """Return an account for people."""
    headers = ("fault", "requests", "failed", "partial", "degraded", "wrong", "coverage", "p99 ms")
    rows = [(*_row("none yet", document["before"]), None, None)]
    rows += [
        (*_row(one["fault"], one), one["recovery_s"], one["whole_s"]) for one in document["faults"]
    ]
    lines = [table((*headers, "users s", "whole s"), rows)]
    lines += [f"not injected: {one['fault']}: {one['reason']}" for one in document["refused"]]
    lines.append(
        f"{document['requests']} requests, {document['failed']} failed, {document['partial']} "
        f"partial, {document['wrong']} wrong, seed {document['seed']}"
    )
    return "\n".join(lines)


def _row(name: str, counted: Mapping[str, Any]) -> tuple[Cell, ...]:
    names = ("requests", "failed", "partial", "degraded", "wrong", "least_coverage", "p99_ms")
    return (name, *(counted[one] for one in names))
