"""A cluster of any number of shards answers its golden requests as the published model does."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from silvershard.cluster.client import Client, RequestRefused
from silvershard.deploy import golden
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir

Cluster = Callable[..., AbstractContextManager[Client]]


@pytest.fixture
def state(generation, tmp_path: Path) -> StateDir:
    """A state directory with a copy of the generation."""
    directory = StateDir(tmp_path / "state")
    directory.create()
    shutil.copytree(generation.path, directory.generations / generation.path.name)
    return directory


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_served_answers_equal_the_golden_ones(
    generation, state: StateDir, cluster: Cluster, tmp_path: Path, num_shards: int
) -> None:
    with cluster(generation.path, num_shards, tmp_path) as client:
        document = golden.check(state, client.address, timeout_s=60)
    assert document == {"generation": 1, "requests": 24, "differences": []}
    assert golden.render(document).startswith("24 golden requests of generation 1 are answered")


def test_other_answers_are_named(
    generation, state: StateDir, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = golden.read_golden

    def read_wrongly(snapshot):
        cases = list(read(snapshot).cases)
        answer = cases[4].answer
        cases[4] = cases[4].model_copy(
            update={"answer": answer.model_copy(update={"item_ids": (7, *answer.item_ids[1:])})}
        )
        return read(snapshot).model_copy(update={"cases": tuple(cases)})

    monkeypatch.setattr(golden, "read_golden", read_wrongly)
    with cluster(generation.path, 2, tmp_path) as client:
        document = golden.check(state, client.address, timeout_s=60)
    (found,) = document["differences"]
    assert found["text"].startswith("golden request 4: got first, required second: rank 0: item")
    assert found["text"] in golden.render(document)
    assert "1 of 24 golden requests" in golden.render(document)


def test_a_cluster_of_other_content_is_refused(
    generation, tiny_generation, state: StateDir, cluster: Cluster, tmp_path: Path
) -> None:
    with (
        cluster(tiny_generation.path, 1, tmp_path) as client,
        pytest.raises(CommandError, match="serves generation 1 with content"),
    ):
        golden.check(state, client.address, timeout_s=60)


def test_a_cluster_of_another_generation_is_refused(
    generation, state: StateDir, cluster: Cluster, tmp_path: Path
) -> None:
    (state.generations / generation.path.name).rename(state.generations / "gen-000002")
    with (
        cluster(generation.path, 1, tmp_path) as client,
        pytest.raises(RequestRefused, match="generation"),
    ):
        golden.check(state, client.address, timeout_s=60)
