import argparse
import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.arrivals import Stretch
from silvershard.cluster.load_report import LoadReport
from silvershard.deploy import bench, verbs
from silvershard.deploy.state import StateDir
from silvershard.deploy.users import write_users

ARGUMENTS = ["--arrivals", "constant", "--warmup", "0", "--deadline", "20"]


@pytest.fixture
def run(fake_router: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the verb against the fake router; returns exit code, output and errors."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"features": {"history": [1]}}\n{"features": {"history": [2]}}\n')

    def invoke(*words: str) -> tuple[int, str, str]:
        where = ["--state", str(tmp_path), "--address", fake_router.address]
        code = verbs.run(["bench", *where, "--requests", str(requests), *ARGUMENTS, *words])
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


def test_a_load_is_put_and_described(run: Any, fake_router: Any, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    code, out, err = run(
        *("--rate", "100", "--duration", "0.3", "-k", "5", "--filter", "year >= 1990"),
        *("--output", "json", "--record", str(record)),
    )
    assert code == 0
    # The progress, which is shown where it takes longer, is wiped out in the end.
    assert err.rpartition("\r")[2] == ""
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (found["requests"], found["ok"], found["rate"]) == (30, 30, 100.0)
    assert (found["interrupted"], found["violations"], found["errors"]) == (False, [], {})
    assert found["distinct_requests"] == 2
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert len(record.read_text().splitlines()) == 30
    assert {(one.k, one.filter) for one in fake_router.asked} == {(5, "year >= 1990")}
    histories = [list(one.named.features["history"].ints) for one in fake_router.asked]
    assert sorted(histories) == [[1]] * 15 + [[2]] * 15


def test_steps_are_described_one_by_one(run: Any) -> None:
    code, out, _ = run("--rate", "50,100", "--duration", "0.4")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("all", "50/s", "100/s")] == [
        ["all", "75.0"],
        ["50/s", "50.0"],
        ["100/s", "100.0"],
    ]
    assert "30 in 0.4 s: 30 ok" in out


def test_partial_answers_are_degraded(run: Any, fake_router: Any) -> None:
    fake_router.answer = fake_router.partial
    code, out, _ = run("--rate", "100", "--duration", "0.2")
    assert code == 3
    assert "20 SHARD_UNAVAILABLE" in out
    assert "0.5000" in out


def test_requests_that_fail_are_a_failure_unless_they_may(run: Any, fake_router: Any) -> None:
    def sometimes(number: int) -> Any:
        return fake_router.fail(number) if number % 4 == 0 else fake_router.full(number)

    fake_router.answer = sometimes
    code, out, _ = run("--rate", "100", "--duration", "0.2", "--output", "json")
    found = json.loads(out)
    assert (code, found["errors"], found["failed_share"]) == (1, {"UNAVAILABLE": 5}, 0.25)
    (violation,) = found["violations"]
    assert violation == "25.0000% of the requests failed, at most 0.0000% may: 5 UNAVAILABLE"
    code, _, _ = run("--rate", "100", "--duration", "0.2", "--max-errors", "0.3")
    assert code == 0


def test_a_percentile_may_be_a_gate(run: Any) -> None:
    words = ("--rate", "100", "--duration", "0.2", "--max-p99")
    assert run(*words, "20000")[0] == 0
    code, out, _ = run(*words, "0.001")
    assert code == 1
    assert "the 99th percentile may be 0.001 ms, it was" in out


def test_the_limit_of_requests_in_flight_is_said_aloud(run: Any, fake_router: Any) -> None:
    fake_router.hold.clear()
    code, out, _ = run(
        "--rate", "100", "--duration", "0.2", "--max-in-flight", "5", "--deadline", "0.5"
    )
    assert code == 1
    assert "15 IN_FLIGHT_LIMIT" in out
    assert "WARNING: 15 requests were not sent" in out


@pytest.fixture
def may_be_interrupted() -> Iterator[None]:
    # Whoever is started in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("may_be_interrupted")
def test_a_ctrl_c_shows_what_was_measured(run: Any, fake_router: Any) -> None:
    def interrupt() -> None:
        while len(fake_router.asked) < 10:
            fake_router.reached.wait(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, err = run("--rate", "100", "--duration", "3600", "--output", "json")
    thread.join()
    found = json.loads(out)
    assert (code, found["interrupted"], err) == (130, True, "")
    assert 5 <= found["ok"] < 1000
    assert found["seconds"] < 60


def test_the_peak_is_looked_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "violations", lambda report, *_: _too_many(report, 130))
    code, out, _ = run("--find-peak", "40", "--duration", "0.1", "--output", "json")
    found = json.loads(out)
    assert code == 0
    assert [one["wanted_rate"] for one in found["trials"]][:4] == [40.0, 80.0, 160.0, 120.0]
    assert [one["held"] for one in found["trials"]][:4] == [True, True, False, True]
    assert found["peak_rate"] == pytest.approx(130, rel=0.1)
    code, out, _ = run("--find-peak", "40", "--duration", "0.1")
    assert "requests per second" in out
    monkeypatch.setattr(bench, "violations", lambda *_: ["no"])
    code, out, _ = run("--find-peak", "0.4", "--duration", "3")
    assert (code, "none of the rates held" in out) == (1, True)


def _too_many(report: LoadReport, most: float) -> list[str]:
    return ["too many"] if report.stretches[0].rate > most else []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of the arguments --rate --find-peak is required"),
        (("--rate", "1", "--find-peak"), "not allowed with argument"),
        (("--rate", "0"), "must be above 0, got '0'"),
        (("--rate", "1,x"), "must be requests per second as 200, 100,200 or 100..400"),
        (("--rate", "-5"), "must be requests per second as 200, 100,200 or 100..400, got '-5'"),
        (("--find-peak", "0"), "must be above 0"),
        (("--rate", "1", "--pin", "a"), "must be numbers of processors as 0,1, got 'a'"),
        (("--rate", "1", "--processes", "0"), "must be a number from 1"),
        (("--rate", "1", "--max-errors", "2"), r"must be in 0\.\.1"),
        (("--rate", "1", "--duration", "0"), "must be a positive number of seconds"),
    ],
)
def test_wrong_options_are_named(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        verbs.run(["bench", *words])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_search_has_no_record(run: Any, tmp_path: Path) -> None:
    code, _, err = run("--find-peak", "--record", str(tmp_path / "r"))
    assert (code, err) == (2, "silvershard: --record goes with --rate, not with --find-peak\n")


def test_no_cluster_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.run(["bench", "--state", str(tmp_path), "--rate", "1"]) == 1
    assert "no cluster runs on" in capsys.readouterr().err


def test_rates_are_constant_in_steps_or_growing() -> None:
    assert bench.rates("200") == [(200.0, 200.0)]
    assert bench.rates("100,50..400") == [(100.0, 100.0), (50.0, 400.0)]
    options = argparse.Namespace(
        duration=6.0,
        warmup=1.5,
        arrivals="poisson",
        seed=4,
        deadline=1.0,
        max_in_flight=10,
        record=None,
    )
    load = bench.load_of(options, bench.rates("100,0..400"))
    assert load.stretches == (Stretch(3.0, 100, 100), Stretch(3.0, 0, 400))
    assert load.warmup == (Stretch(1.5, 100, 100),)
    assert (load.poisson, load.seed, load.deadline_s) == (True, 4, 1.0)


def test_without_a_file_the_users_of_the_data_set_are_asked_for(tmp_path: Path) -> None:
    options = argparse.Namespace(requests=None, users=2, seed=0, k=3, filter="")
    state = StateDir(tmp_path)
    write_users(state.users_file, np.array([1, 2]), np.array([5, 6]))
    assert bench.requests_of(options, state).source == str(state.users_file)
