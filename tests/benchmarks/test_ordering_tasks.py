import numpy as np
import pytest
import torch

from benchmarks.ordering import RANKERS, same_towers
from benchmarks.ordering_tasks import (
    PROBE_SHARES,
    Task,
    movielens_task,
    planted_task,
    train_rankers,
)
from benchmarks.planted import planted_world
from silvershard.deploy import movielens
from silvershard.model.ranker_training import RankerTraining


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_task(planted_world(60, 150, 12, seed=0), steps=4, ranker_steps=4)


def test_a_planted_task_holds_the_last_item_of_each_user_out(task: Task) -> None:
    world = planted_world(60, 150, 12, seed=0)
    assert np.array_equal(task.held_out, world.taken[:, -1])
    assert task.validation.item_ids.tolist() == world.taken[:, -2].tolist()
    assert task.training.item_ids.tolist() == world.taken[:, :-2].flatten().tolist()
    assert [list(one) for one in task.histories] == world.taken[:, :-1].tolist()
    assert [one["history"] for one in task.features] == world.taken[:, :-1].tolist()
    assert task.probes["all"] == task.clusters
    assert task.probes["few"] == round(PROBE_SHARES["few"] * task.clusters)


def test_rerankers_are_trained_on_the_same_towers(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few steps may be worse than none, which validation would go back to.
    monkeypatch.setattr(RankerTraining, "restore", lambda self: None)
    models = train_rankers(task, RANKERS, seed=1)
    assert [type(model.ranker).__name__ for model in models.values()] == [
        "MLPRanker",
        "MixtureOfLogitsRanker",
    ]
    first, second = models.values()
    assert same_towers(first, second)
    assert float(first.ranker.out.weight.abs().max()) > 0
    assert float(second.ranker.scale.abs().max()) > 0
    with torch.no_grad():
        second.user_head.bias[0] += 1.0
    assert not same_towers(first, second)


def test_generated_films_are_not_called_movielens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: object) -> object:
        raise OSError("no network")

    monkeypatch.delenv(movielens.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(movielens, "fetch", refuse)
    assert movielens_task() is None
