import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import restart, scale, scale_routers, verbs
from silvershard.deploy.errors import ExitCode


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def fake(state: Any, config: Any, **given: Any) -> dict[str, Any]:
        calls.append({"root": state.root, "shards_of_settings": config.sharding.shards, **given})
        given["report"]("a plan")
        size = {"shards": 2, "replicas": 1, "standby": 0}
        after = {**size, "shards": 3}
        return {"before": size, "after": after, "done": not given["dry_run"], "seconds": 1.5}

    monkeypatch.setattr(scale, "scale", fake)
    return calls


def test_the_numbers_are_those_wanted_and_not_those_of_the_settings(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--state", str(tmp_path), "--shards", "3", "--standby", "1", "--timeout", "7"]
    assert verbs.run(["scale", *options]) == ExitCode.OK
    (call,) = asked
    assert (call["root"], call["shards_of_settings"]) == (tmp_path, 2)
    assert (call["shards"], call["replicas"], call["standby"]) == (3, None, 1)
    assert (call["timeout_s"], call["dry_run"]) == (7.0, False)
    assert capsys.readouterr().out.splitlines() == [
        "a plan",
        "scaled from 2 shards x 1 replica to 3 shards x 1 replica in 1.5 s",
    ]


def test_a_dry_run_as_json(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--state", str(tmp_path), "--replicas", "2", "--dry-run", "--output", "json"]
    assert verbs.run(["scale", *options]) == ExitCode.OK
    assert (asked[0]["replicas"], asked[0]["dry_run"]) == (2, True)
    assert asked[0]["timeout_s"] == 900.0
    said = capsys.readouterr()
    assert json.loads(said.out)["done"] is False
    assert said.err.strip() == "a plan"


def test_routers_are_changed_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[int, bool]] = []

    def fake(state: Any, number: int, **given: Any) -> dict[str, Any]:
        calls.append((number, given["dry_run"]))
        return {"before": 1, "after": number, "done": True, "seconds": 2.5}

    monkeypatch.setattr(scale_routers, "scale_routers", fake)
    assert verbs.run(["scale", "--state", str(tmp_path), "--routers", "3"]) == ExitCode.OK
    assert calls == [(3, False)]
    assert capsys.readouterr().out.strip() == "scaled from 1 to 3 routers in 2.5 s"
    with pytest.raises(SystemExit) as ended:
        verbs.run(["scale", "--state", str(tmp_path), "--routers", "3", "--shards", "2"])
    assert ended.value.code == ExitCode.USAGE
    assert "--routers is changed by itself" in capsys.readouterr().err


def test_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def fake(state: Any, **given: Any) -> dict[str, Any]:
        calls.append({"root": state.root, **given})
        return {"processes": 2, "routers": 2, "extra": True, "done": True, "seconds": 3.5}

    monkeypatch.setattr(restart, "restart", fake)
    assert verbs.run(["restart", "--state", str(tmp_path), "--timeout", "7"]) == ExitCode.OK
    assert (calls[0]["root"], calls[0]["timeout_s"], calls[0]["dry_run"]) == (tmp_path, 7.0, False)
    assert capsys.readouterr().out.strip() == (
        "restarted 2 shard processes and 2 routers one after the other in 3.5 s"
    )
