import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import doctor_verb, verbs
from silvershard.deploy.config import load
from silvershard.deploy.doctor import Check
from silvershard.deploy.doctor_verb import mode_of, read_machine, render, stock_of
from silvershard.deploy.head import Head
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir

Run = tuple[int, str]


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SILVERSHARD", "RAY_")):
            monkeypatch.delenv(name)


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> Run:
    code = verbs.run(["doctor", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return code, printed.out


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warn", 3), ("fail", 1)])
def test_the_worst_verdict_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: Any, code: int
) -> None:
    checks = [Check("cpu", "ok", "fast"), Check("disk", verdict, "full", "free some")]
    monkeypatch.setattr(doctor_verb, "examine", lambda *_, **__: checks)
    found, out = answered(capsys, "--output", "json")
    assert found == code
    assert json.loads(out) == {
        "verdict": verdict,
        "checks": [
            {"name": "cpu", "verdict": "ok", "found": "fast", "advice": ""},
            {"name": "disk", "verdict": verdict, "found": "full", "advice": "free some"},
        ],
    }


def test_people_get_a_line_per_check_and_a_sum() -> None:
    checks = [
        Check("cpu", "ok", "fast"),
        Check("open files", "warn", "few", "more"),
        Check("disk", "fail", "full", "free some"),
    ]
    assert render(checks).splitlines() == [
        "ok    cpu         fast",
        "warn  open files  few → more",
        "fail  disk        full → free some",
        "1 ok, 1 warnings, 1 failures",
    ]


def test_this_machine_is_looked_at_for_real_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = answered(capsys, "--output", "json")
    document = json.loads(out)
    verdicts = {one["name"]: one["verdict"] for one in document["checks"]}
    assert {"cpu", "memory", "shared memory", "fsync", "versions", "operators"} <= set(verdicts)
    assert (verdicts["versions"], verdicts["builds"]) == ("ok", "ok")
    assert code == {"ok": 0, "warn": 3, "fail": 1}[document["verdict"]]
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_here_is_found_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        Path("c.yaml").write_text(f"listen: {{port: {port}}}\n")
        code, out = answered(capsys, "--config", "c.yaml")
    assert code == 1
    (line,) = [one for one in out.splitlines() if f" port {port} " in one]
    assert line.startswith("fail")
    assert f"(pid {os.getpid()}) listens there" in line


def test_the_head_is_looked_at_only_where_there_is_one_to_join(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def read_head(address: str) -> Head:
        asked.append(address)
        return Head(address, problem="timed out")

    monkeypatch.setattr(doctor_verb, "read_head", read_head)
    answered(capsys)
    assert asked == []
    code, out = answered(capsys, "--join", "head:6379")
    assert (code, asked) == (1, ["head:6379"])
    assert "head:6379: timed out" in out
    assert "Ray settings" in out


def test_an_address_without_a_port_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        verbs.run(["doctor", "--join", "head"])
    assert raised.value.code == 2
    assert "must be host:port" in capsys.readouterr().err


def test_the_newest_generation_and_the_cluster_that_runs_are_known(idle_state: StateDir) -> None:
    config = load(None, environ={})
    stock = stock_of(idle_state, config)
    assert stock.is_running
    assert os.getpid() in stock.pids
    assert stock.ports == {9}
    assert stock.loaded_bytes > 0
    idle_state.clear_record()
    assert stock_of(idle_state, config) == (False, frozenset(), frozenset(), stock.loaded_bytes)


def test_a_state_directory_that_is_not_there_or_damaged_is_no_error(tmp_path: Path) -> None:
    state, config = StateDir(tmp_path / "s"), load(None, environ={})
    assert stock_of(state, config) == (False, frozenset(), frozenset(), 0)
    state.create()
    generation_dir(state.generations, 1).mkdir(parents=True)
    said: list[str] = []
    assert stock_of(state, config, said.append).loaded_bytes == 0
    assert len(said) == 1
    assert "the size of the newest generation is not known" in said[0]


def test_a_machine_is_read_whole(tmp_path: Path) -> None:
    found = read_machine(StateDir(tmp_path / "none"))
    assert found.disk.path == str(tmp_path)
    assert found.cpu.usable > 0


def test_the_mode_of_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert mode_of(tmp_path / "none") is None
    (tmp_path / "file").touch(mode=0o600)
    assert (mode_of(tmp_path / "file") or 0) & 0o777 == 0o600
