import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import RequestRefused, admin_pb2
from silvershard.deploy.game_day import (
    PLANS,
    GameDay,
    Happened,
    Planned,
    account,
    draw_fault,
    read_lines,
    render,
    said,
)
from silvershard.deploy.processes import myself
from silvershard.deploy.state import ClusterRecord, RouterRecord, SequencerRecord, ShardRecord


def cluster(*, state: Any = "serving", sequenced: bool = True) -> ClusterRecord:
    return ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="127.0.0.1:8001",
        model="films",
        generation=3,
        documents=10,
        router=RouterRecord(state="serving", pid=9),
        shards=tuple(
            ShardRecord(shard=shard, replica=replica, state=state, pid=7, documents=5)
            for replica in range(2)
            for shard in range(2)
        ),
        sequencer=SequencerRecord(state="serving", pid=8) if sequenced else None,
        ray_dir="",
        since_unix_s=0.0,
    )


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Stop(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self.clock.now_s += timeout or 0.0
        return self.is_set()


class Admin:
    """Injects nothing; a fault is over by the clock, and a kill takes two seconds to repair."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.asked: list[tuple[Any, ...]] = []
        self.until_s: dict[str, float] = {}
        self.broken_until_s = 0.0
        self.refusal = ""
        self.most = 0

    def inject_fault(self, kind: Any, target: str, seconds: float, **more: Any) -> None:
        if self.refusal:
            raise RequestRefused(self.refusal, "shard 0 would lose its last copy")
        going_on = [one for one in self.until_s.values() if one > self.clock.now_s]
        self.most = max(self.most, len(going_on) + 1)
        self.asked.append((kind, target, seconds, more["delay_ms"], more["share"]))
        self.until_s[more["operation_id"]] = self.clock.now_s + seconds
        if kind == "kill":
            self.broken_until_s = self.clock.now_s + 2.0

    def list_faults(self) -> list[admin_pb2.Fault]:
        states = {
            name: admin_pb2.FAULT_STATE_ACTIVE
            if end > self.clock.now_s
            else admin_pb2.FAULT_STATE_OVER
            for name, end in self.until_s.items()
        }
        return [admin_pb2.Fault(operation_id=one, state=state) for one, state in states.items()]

    def record(self) -> ClusterRecord:
        broken = self.clock.now_s < self.broken_until_s
        return cluster(state="restarting" if broken else "serving")


def play(seconds: float = 300.0, refusal: str = "", **options: Any) -> tuple[GameDay, Admin]:
    clock = Clock()
    admin = Admin(clock)
    admin.refusal = refusal
    day = GameDay(
        admin,  # type: ignore[arg-type]
        admin.record,
        **{"plan": "standard", "seed": 5, "clock": clock, **options},
    )
    day.run(seconds, Stop(clock))
    return day, admin


def test_the_same_seed_draws_the_same_faults() -> None:
    first, second = (play()[1].asked for _ in range(2))
    assert first == second
    assert play(seed=6)[1].asked != first
    assert len(first) > 20
    assert {one[0] for one in first} >= {"kill", "hang", "slow", "drop", "partition", "stall"}


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_drawn_is_what_a_cluster_takes(plan: str) -> None:
    rng = random.Random(3)
    drawn = [draw_fault(PLANS[plan], rng, cluster(sequenced=False)) for _ in range(300)]
    assert "sequencer" not in {one.target for one in drawn}
    assert {one.target for one in drawn} >= {f"shard {s}.{r}" for s in range(2) for r in range(2)}
    for one in drawn:
        assert (one.kind == "kill") == (one.seconds == 0)
        assert (one.kind == "slow") == (one.delay_ms > 0)
        assert one.kind == "drop" or one.share == 1


def test_one_fault_begins_when_the_other_is_repaired() -> None:
    day, admin = play()
    assert admin.most == 1
    assert day.failure is None
    for one, following in zip(day.happened, day.happened[1:], strict=False):
        assert one.began_unix_s + one.planned.seconds <= one.over_unix_s
        assert one.over_unix_s <= one.whole_unix_s < following.began_unix_s
        if one.planned.kind == "kill":
            assert one.whole_unix_s - one.over_unix_s > 1.5
    assert day.happened[-1].began_unix_s < 1000 + 300 - 10 + 3


def test_what_is_refused_is_told_and_passed_over() -> None:
    told: list[str] = []
    day, admin = play(refusal="FAILED_PRECONDITION", report=told.append)
    assert admin.asked == []
    assert len(day.happened) == len(told) > 20
    assert all("shard 0 would lose its last copy" in one for one in told)
    document = account(day.happened, [])
    assert document["faults"] == []
    assert len(document["refused"]) == len(told)


def test_an_error_ends_it_and_is_kept_for_who_waits() -> None:
    day, _ = play(refusal="UNAUTHENTICATED")
    assert isinstance(day.failure, RequestRefused)
    assert len(day.happened) == 1


def line(number: int, at_s: float, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    return {
        "number": number,
        "at_s": at_s,
        "done_s": at_s + 0.01,
        "unix_s": 1000.0 + at_s,
        "code": "OK",
        "outcome": outcome,
        "request": {"index": number % 2},
        "ids": [number % 2, 7],
        "plan": "probe",
        "generation": 1,
        "cut": [3],
        "coverage": 1.0,
        **more,
    }


KILL = Planned("kill", "shard 0.1", 0.0, 0, 1.0)
SLOW = Planned("slow", "shard 1.0", 4.0, 50, 1.0)


def test_every_request_counts_for_the_fault_that_had_begun() -> None:
    happened = [
        Happened(KILL, "a", 1010.0, 1010.0, 1012.5),
        Happened(SLOW, "b", 1015.0, refused="no"),
        Happened(SLOW, "c", 1020.0, 1024.0, 1024.0),
    ]
    lines = [
        line(0, 1.0),
        line(1, 9.9),
        line(2, 10.5, "error", code="UNAVAILABLE", coverage=0.5),
        line(3, 11.0, "partial", coverage=0.5),
        line(4, 12.0),
        line(5, 16.0, "degraded"),
        line(6, 21.0, done_s=21.2),
    ]
    document = account(happened, lines)
    assert document["before"]["requests"] == 2
    kill, slow = document["faults"]
    assert (kill["requests"], kill["failed"], kill["partial"], kill["degraded"]) == (4, 1, 1, 1)
    assert (kill["least_coverage"], kill["recovery_s"], kill["whole_s"]) == (0.5, 1.01, 2.5)
    assert (slow["requests"], slow["failed"], slow["recovery_s"]) == (1, 0, 0.0)
    assert slow["p99_ms"] == pytest.approx(200.0)
    assert document["errors"] == {"UNAVAILABLE": 1}
    assert (document["requests"], document["failed"], document["wrong"]) == (7, 1, 0)
    shown = render({**document, "seed": 5})
    for text in ("kill shard 0.1", "slow shard 1.0 by 50 ms for 4 s", "not injected", "seed 5"):
        assert text in shown


def test_a_whole_answer_that_differs_is_wrong_unless_something_changed() -> None:
    same = [line(0, 1.0), line(2, 2.0)]
    assert account([], same)["wrong"] == 0
    other = {"ids": [9, 7]}
    assert account([], [*same, line(4, 3.0, **other)])["wrong"] == 1
    for change in ({"cut": [4]}, {"generation": 2}, {"plan": "all"}, {"outcome": "degraded"}):
        assert account([], [*same, line(4, 3.0, **{**other, **change})])["wrong"] == 0


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps(line(at, 1.0 * at)) + "\n" for at in range(3)))
    assert [one["number"] for one in read_lines(path)] == [0, 1, 2]


def test_faults_are_said_for_people() -> None:
    assert said(KILL) == "kill shard 0.1"
    assert said(SLOW._replace(share=0.5)) == "slow shard 1.0 by 50 ms 0.5 for 4 s"
