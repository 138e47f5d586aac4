import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.dialer import PLAIN
from silvershard.deploy import quality_report, recipe, verbs
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError
from silvershard.deploy.evaluate import (
    DEPTHS,
    Evaluation,
    IndexQuality,
    Row,
    Served,
    TaskRows,
)
from silvershard.deploy.processes import myself
from silvershard.deploy.state import ClusterRecord, RouterRecord, StateDir
from silvershard.model.catalogue import Catalogue
from silvershard.model.quality import Interval
from silvershard.shard.generations import generation_dir


def row(name: str, *hits: float) -> Row:
    """A row whose every metric at every depth is ``hits``, but 1/10 of them at rank 10."""

    def metric() -> dict[int, Any]:
        return {k: np.array(hits) * (0.1 if k == 10 else 1.0) for k in DEPTHS}

    return Row(name, metric(), metric(), metric(), {k: k / 1000 for k in DEPTHS})


@pytest.fixture
def evaluation() -> Evaluation:
    served = Served(
        np.zeros((2, 100), dtype=np.int64), {"ann": 1500, "total": 2500}, 1.0, "probe(x)"
    )
    return Evaluation(
        rows=(row("popularity", 0.0, 1.0), row("silvershard", 1.0, 1.0)),
        tasks=(TaskRows("liked", (row("task alone", 1.0), row("value", 0.5))),),
        cold=(row("popularity", 1.0), row("silvershard", 0.0)),
        lift_hit_rate=Interval(0.5, 0.25, 0.75),
        lift_ndcg=Interval(0.05, -0.25, 0.1),
        index_quality=IndexQuality(0.9999, 0.99, 0.98, 0.97, 1000, 8, 4, 64),
        served=served,
        users=2,
        held_out=5,
        split="temporal: some",
    )


def test_the_document_has_every_metric_at_every_depth(evaluation: Evaluation) -> None:
    document = quality_report.document(evaluation)
    json.dumps(document, allow_nan=False)
    names = {
        f"{metric}_at_{k}"
        for metric in ("hit_rate", "ndcg", "recall", "coverage")
        for k in (10, 20, 100)
    }
    table = document["table"]
    assert set(table["popularity"]) == names
    assert table["popularity"]["hit_rate_at_10"] == 0.05
    assert table["popularity"]["recall_at_100"] == 0.5
    assert table["silvershard"]["coverage_at_20"] == 0.02
    assert document["tasks"]["liked"]["value"]["users"] == 1
    assert set(document["tasks"]["liked"]["value"]) == {"users", *names}
    assert document["cold"]["silvershard"]["ndcg_at_20"] == 0.0
    assert (document["users"], document["held_out"], document["split"]) == (2, 5, "temporal: some")
    assert document["lift_over_popularity"]["ndcg_at_10"] == {
        "mean": 0.05,
        "low": -0.25,
        "high": 0.1,
    }
    assert set(document["scan_refine_recall"]) == {"at_1000", "at_100"}


def test_a_table_of_nobody_has_no_numbers(evaluation: Evaluation) -> None:
    nobody = evaluation._replace(tasks=(TaskRows("liked", (row("value"),)),))
    document = quality_report.document(nobody)
    assert document["tasks"]["liked"]["value"]["users"] == 0
    assert document["tasks"]["liked"]["value"]["ndcg_at_10"] is None
    json.dumps(document, allow_nan=False)
    (line,) = [one for one in quality_report.render(nobody).splitlines() if "liked" in one]
    assert line.split() == ["liked", "value", "0", "-", "-", "-", "-", "0.0100"]


def test_the_tables_fit_a_terminal_and_show_the_numbers(evaluation: Evaluation) -> None:
    text = quality_report.render(evaluation)
    lines = text.splitlines()
    assert lines[0] == "Quality on 5 held-out interactions of 2 users"
    assert "  split            temporal: some" in lines
    (line,) = [one for one in lines if one.startswith("  silvershard") and "0.1000" in one]
    assert line.split() == ["silvershard", "0.1000", "0.1000", "1.0000", "1.0000", "0.0100"]
    assert "1 users without a history" in text
    assert "HitRate@10 +0.5000 (95 %: +0.2500 to +0.7500)" in text
    tables = [one for one in lines if "0.0100" in one]
    assert len(tables) == 6
    assert max(map(len, tables)) <= 100
    alone = quality_report.render(evaluation._replace(tasks=(), cold=()))
    assert "without a history" not in alone
    assert "positive for" not in alone


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, films_folder: Path) -> StateDir:
    """A state directory with a model of a temporal split and its generation."""
    options = {"training.steps": 4, "training.ranker_steps": 2, "training.dim": 16}
    config = load(
        None, environ={}, options={**options, "training.split": "temporal", "index.clusters": 16}
    )
    state = StateDir(tmp_path_factory.mktemp("state"))
    state.create()
    data = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
    recipe.train_model(state, config, data, progress=False)
    recipe.publish(state, config, data, recipe.load_model(state.model_dir))
    return state


def test_a_generation_of_another_split_or_data_is_not_measured(
    trained: StateDir, films_folder: Path
) -> None:
    def catalogue(split: str) -> Catalogue:
        config = load(None, environ={}, options={"training.split": split})
        found = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
        return found.catalogue

    path = generation_dir(trained.generations, 1)
    quality_report.check_origin(path, catalogue("temporal"))
    with pytest.raises(CommandError, match="from other data, or trained on another split"):
        quality_report.check_origin(path, catalogue("leave_last_out"))
    with pytest.raises(CommandError, match="from other data, or trained on another split"):
        quality_report.check_origin(path, catalogue("temporal").take(np.arange(399)))


def test_a_cluster_is_measured_on_the_data_and_split_of_its_model(
    trained: StateDir, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.write_record(
        ClusterRecord(
            guard=myself(),
            driver=myself(),
            address="here:1",
            model="movielens",
            generation=1,
            documents=400,
            router=RouterRecord(state="serving"),
            shards=(),
            ray_dir="",
            since_unix_s=0.0,
        )
    )
    asked: list[Any] = []

    def evaluate(*given: Any, **options: Any) -> Evaluation:
        asked.append((given, options))
        return evaluation

    monkeypatch.setattr(quality_report, "evaluate", evaluate)
    # The settings in force say another split than the model was trained on.
    config = load(None, environ={})
    found = quality_report.measure(trained, config, environ={}, report=lambda _: None)
    assert found is evaluation
    (((prepared, path, address), options),) = asked
    assert prepared.split.test_from is not None
    assert (path, address) == (generation_dir(trained.generations, 1), "here:1")
    assert options == {"max_requests": 256, "min_rating": {"liked": 4.0}, "dialer": PLAIN}


@pytest.mark.parametrize(("coverage", "code"), [(1.0, 0), (0.5, 3)])
def test_the_verb_prints_the_document_and_says_when_documents_were_missing(
    evaluation: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    coverage: float,
    code: int,
) -> None:
    found = evaluation._replace(served=evaluation.served._replace(coverage=coverage))
    monkeypatch.setattr(quality_report, "measure", lambda *_, **__: found)
    assert verbs.run(["evaluate", "--state", str(tmp_path), "--output", "json"]) == code
    assert json.loads(capsys.readouterr().out) == quality_report.document(found)


def test_without_a_cluster_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no cluster runs on"):
        quality_report.measure(StateDir(tmp_path), load(None, environ={}))
