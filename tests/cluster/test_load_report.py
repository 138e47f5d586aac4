import re
from typing import Any

import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.arrivals import Stretch
from silvershard.cluster.codec import coverage_to
from silvershard.cluster.load import IN_FLIGHT_LIMIT, OK, SENT_TOO_LATE, Entry
from silvershard.cluster.load_outcome import judge
from silvershard.cluster.load_report import Generator, LoadReport, merged
from silvershard.cluster.outcome import Coverage

DEADLINE_S = 1.0


def answer(coverage: float = 1.0, generation: int = 1) -> bytes:
    reasons = () if coverage == 1 else ("SHARD_UNAVAILABLE",)
    message = retrieval_pb2.RetrieveResponse(
        coverage=coverage_to(Coverage(coverage, 2, 2, 0, reasons))
    )
    message.version.generation = generation
    return message.SerializeToString()


def report(
    *entries: tuple[float, float, str, bytes],
    zero_s: float = 0.0,
    stretches: tuple[Stretch, ...] = (Stretch(2.0, 2, 2), Stretch(2.0, 4, 4)),
    lag_s: float = 0.0,
    cpu_s: float = 0.1,
) -> LoadReport:
    """What came of requests: when due, how long it took, code, body."""
    made = LoadReport(stretches, measured_s=sum(one.seconds for one in stretches))
    made.generators.append(Generator(made.measured_s, cpu_s, 0))
    for number, (at_s, took_s, code, body) in enumerate(entries):
        entry = Entry(number, at_s, at_s + lag_s, at_s + took_s, code, body)
        made.add(entry, judge(entry, DEADLINE_S), zero_s)
    return made


ENTRIES = (
    (0.5, 0.010, OK, answer()),
    (1.5, 0.020, OK, answer(0.5)),
    (1.6, 0.0, "UNAVAILABLE", b""),
    (2.5, 1.5, OK, answer(generation=2)),
    (3.5, 0.0, IN_FLIGHT_LIMIT, b""),
)


def test_requests_are_counted_by_what_came_of_them() -> None:
    found = report(*ENTRIES).as_json()
    counts = {
        name: found[name] for name in ("ok", "degraded", "partial", "late", "error", "unsent")
    }
    assert counts == {"ok": 1, "degraded": 0, "partial": 1, "late": 1, "error": 1, "unsent": 1}
    assert found["errors"] == {"IN_FLIGHT_LIMIT": 1, "LATE": 1, "UNAVAILABLE": 1}
    assert found["failed_share"] == 0.6
    assert (found["rate"], found["goodput"]) == (1.25, 0.25)
    assert found["generations"] == {"1": 2, "2": 1}
    assert found["reasons"] == {"SHARD_UNAVAILABLE": 1}
    assert (found["coverage"], found["least_coverage"]) == (pytest.approx(2.5 / 3, abs=1e-4), 0.5)
    assert found["max_ms"] == 1500.0


def test_every_second_and_every_stretch_stands_for_itself() -> None:
    found = report(*ENTRIES).as_json()
    series = found["series"]
    assert [one["requests"] for one in series] == [1, 2, 1, 1]
    assert [one["error"] for one in series] == [0, 1, 0, 0]
    assert [one["p99_ms"] for one in series] == [10.0, 20.0, 1500.0, None]
    assert [one["coverage"] for one in series] == [1.0, 0.5, 1.0, None]
    assert [one["requests"] for one in found["stretches"]] == [3, 2]
    assert [one["wanted_rate"] for one in found["stretches"]] == [2, 4]


def test_the_warm_up_does_not_count() -> None:
    found = report(*ENTRIES, zero_s=1.55)
    assert found.total.count() == 3
    assert sorted(found.seconds) == [0, 1]


def test_reports_of_processes_are_merged() -> None:
    whole = report(*ENTRIES).as_json()
    parts = merged([report(*ENTRIES[:2]), report(*ENTRIES[2:])]).as_json()
    assert parts["generator"].pop("processes") == 2
    assert parts.pop("generator")["cpu_s"] == 0.2
    whole.pop("generator")
    assert parts == whole


def test_a_load_that_was_stopped_is_described_as_far_as_it_went() -> None:
    stopped = report(*ENTRIES[:3])
    stopped.measured_s = 1.75
    found = stopped.as_json()
    assert (found["seconds"], len(found["series"]), len(found["stretches"])) == (1.75, 2, 1)
    assert found["series"][1]["rate"] == pytest.approx(2 / 0.75, abs=1e-3)


def test_nothing_came_yet() -> None:
    found = report().as_json()
    assert (found["requests"], found["failed_share"], found["p99_ms"]) == (0, 0, None)
    assert found["coverage"] is None
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("more", "entry", "words"),
    [
        ({}, (0.5, 0.0, IN_FLIGHT_LIMIT, b""), "1 requests were not sent, because as many"),
        ({}, (0.5, 0.0, SENT_TOO_LATE, b""), "the generator was the limit, give it more"),
        ({"lag_s": 0.02}, (0.5, 0.06, OK, answer()), "sent 20.0 ms late"),
        ({"cpu_s": 3.9}, (0.5, 0.06, OK, answer()), r"took 0\.97 cores"),
    ],
)
def test_figures_that_speak_of_the_generator_say_so(
    more: dict[str, Any], entry: tuple[float, float, str, bytes], words: str
) -> None:
    found = report(entry, **more)
    (warning,) = found.warnings()
    assert re.search(words, warning)
    assert found.limited_by_generator == (entry[2] != IN_FLIGHT_LIMIT)


def test_a_generator_that_kept_up_is_not_blamed() -> None:
    assert report((0.5, 0.06, OK, answer()), lag_s=0.0015).warnings() == []


def test_latency_counts_from_when_a_request_was_due_although_it_was_sent_late() -> None:
    found = report((0.5, 0.06, OK, answer()), lag_s=0.02).as_json()
    assert (found["p50_ms"], found["generator"]["lag_p50_ms"]) == (60.0, 20.0)
