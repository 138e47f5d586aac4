import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import verbs
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir

HOSTS = "[{name: a, cpus: 4, memory: 16GiB}, {name: b, cpus: 4, memory: 16GiB, zone: z}]"


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(generation.path, generation_dir(made.generations, 1))
    return made


def run(state: StateDir, *words: str) -> int:
    try:
        return verbs.run(["plan", *words, "--state", str(state.root), "--no-measure"])
    except SystemExit as error:
        return int(error.code or 0)


def test_a_plan_is_a_table_or_json(state: StateDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "latest", "--hosts", HOSTS, "--shards", "3", "--replicas", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith("generation 1, 600 documents: 3 shards x 2 replicas\n")
    assert "fp16 cache" in out
    words = ("1", "--hosts", HOSTS, "--standbys", "1", "--spread", "zone", "--output", "json")
    assert run(state, *words) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["standbys"], document["spread"]) == (1, "zone")
    assert [one["host"] for one in document["hosts"]] == ["a", "b"]


def test_an_impossible_plan_is_refused_with_its_numbers(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = "[{name: a, cpus: 1, memory: 1300MiB}]"
    assert run(state, "--hosts", hosts, "--output", "json") == ExitCode.REFUSED
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert not document["possible"]
    assert said.err == f"silvershard: this plan is impossible: {document['refused']}\n"
    assert "MiB" in document["refused"]


def test_a_host_that_cannot_be_used_is_wrong_usage(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(state, "--hosts", "[{name: a, cpus: 1}]") == ExitCode.USAGE
    said = "silvershard: --hosts: host 1 (a): memory: required field is missing\n"
    assert capsys.readouterr().err == said
    assert run(state, "--shards", "1000", "--hosts", HOSTS) == ExitCode.USAGE
    assert run(state, "0") == ExitCode.USAGE
    assert run(state, "--spread", "rack") == ExitCode.USAGE


def test_without_a_generation_there_is_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(StateDir(tmp_path / "none")) == ExitCode.FAILED
    assert "no generation is published" in capsys.readouterr().err
