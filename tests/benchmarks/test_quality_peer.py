import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality_peer
from benchmarks.quality_peer import (
    Contest,
    Judge,
    Outcome,
    Recipe,
    Red,
    compare,
    differing,
    export_split,
    quick,
)
from silvershard.deploy.config import Config
from silvershard.deploy.recipe import Prepared, prepare

FAKE = """
import json, sys
import numpy as np

with open(sys.argv[1]) as file:
    job = json.load(file)
if job.get("model") == "broken":
    sys.exit("no such model")
with np.load(job["split"]) as arrays:
    targets = arrays["test_items"]
with np.load(job["ranking"] if "ranking" in job else job["settings"]["ranking"]) as arrays:
    ranked = arrays["ranked"]
place = (ranked[:, :10] == targets[:, None]).argmax(1)
hit = (ranked[:, :10] == targets[:, None]).any(1)
scored = {"hit_rate": float(hit.mean()), "ndcg": float((hit / np.log2(place + 2)).mean())}
scored["ndcg"] += job.get("seed", 0) * 1e-6
np.savez(job["out"], ranked=ranked)
print("a line that is no report")
print(json.dumps({"scored": scored, "cpu_s": 1.0, "seconds": 2.0, "peak_mib": 3.0}))
"""


@pytest.fixture(scope="module")
def prepared(films_folder: Path) -> Prepared:
    return prepare(Config(), data=films_folder, report=lambda line: None)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "fake_runner.py"
    script.write_text(FAKE)
    monkeypatch.setattr(quality_peer, "RUNNER", script)
    return script


@pytest.fixture
def contest(prepared: Prepared, fake: Path, tmp_path: Path) -> Contest:
    return Contest(prepared, Path(sys.executable), tmp_path)


def outcome(values: list[float]) -> Outcome:
    column = np.array(values)
    return Outcome("one", "ours", {"hit_rate": column, "ndcg": column}, {})


def test_the_exported_interactions_are_the_split_and_nothing_is_in_two_parts(
    prepared: Prepared, tmp_path: Path
) -> None:
    export_split(prepared, tmp_path / "split.npz")
    with np.load(tmp_path / "split.npz") as arrays:
        columns = dict(arrays)
    histories = prepared.split.test_histories
    for row, user in enumerate(columns["users"].tolist()):
        mine = columns["train_users"] == user
        known = [*columns["train_items"][mine].tolist(), int(columns["valid_items"][row])]
        assert known == histories.row(row).tolist()
        assert (np.diff(columns["train_times"][mine]) >= 0).all()
        assert columns["train_times"][mine][-1] <= columns["valid_times"][row]
        assert columns["valid_times"][row] <= columns["test_times"][row]
        assert columns["test_items"][row] not in known
    assert (columns["test_items"] == prepared.split.test_item_ids).all()


def test_a_ranking_of_popularity_is_worth_the_same_on_both_sides(contest: Contest) -> None:
    popular = contest.check_metrics()
    assert 0 < popular.values["hit_rate"].mean() < 1


def test_a_peer_that_scores_otherwise_is_red(
    contest: Contest, prepared: Prepared, tmp_path: Path
) -> None:
    given = tmp_path / "given.npz"
    np.savez(given, ranked=Judge(prepared).popular())
    recipe = Recipe("sasrec", {"ranking": str(given)}, epochs=1)
    (values,) = contest.train(recipe, 0).values.values()
    assert (values["ndcg"] == contest.check_metrics().values["ndcg"]).all()
    with pytest.raises(Red, match=r"sasrec: ndcg is .* here and .* there"):
        contest.train(recipe, 1)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ("seen", "an item that its user has seen"),
        ("unknown", "an unknown item"),
        ("twice", "an item twice"),
        ("short", "must have shape"),
    ],
)
def test_a_ranking_that_cannot_be_right_is_red(
    contest: Contest, prepared: Prepared, tmp_path: Path, spoil: str, problem: str
) -> None:
    tested = Judge(prepared)
    ranked = tested.popular()
    if spoil == "short":
        ranked = ranked[:-1]
    else:
        item = {
            "seen": tested.histories[-1][0],
            "unknown": int(tested.item_ids.max()) + 1,
            "twice": int(ranked[-1, 0]),
        }[spoil]
        ranked[-1, 5] = item
    given = tmp_path / "given.npz"
    np.savez(given, ranked=ranked)
    assert any(problem in one for one in tested.problems(ranked))
    if spoil != "short":
        with pytest.raises(Red, match=problem):
            contest.train(Recipe("sasrec", {"ranking": str(given)}, epochs=1), 0)


def test_metrics_that_differ_are_named() -> None:
    values = {"hit_rate": np.array([0.0, 1.0]), "ndcg": np.array([0.0, 0.5])}
    assert differing({"hit_rate": 0.5, "ndcg": 0.25}, values) == []
    (problem,) = differing({"hit_rate": 0.5, "ndcg": 0.26}, values)
    assert "ndcg" in problem


def test_a_comparison_tells_worse_level_and_better_apart() -> None:
    peer = outcome([0.5, 0.4, 0.6, 0.5] * 50)
    found = {
        name: compare(outcome([factor * one for one in peer.values["ndcg"]]), peer)["ndcg"]
        for name, factor in (("worse", 0.9), ("level", 0.97), ("better", 1.1))
    }
    verdicts = {name: (one["within"], one["better"]) for name, one in found.items()}
    assert verdicts == {"worse": (False, False), "level": (True, False), "better": (True, True)}
    assert found["better"]["relative"][0] == pytest.approx(0.1, abs=1e-4)


def test_a_quick_run_trains_less_with_the_same_settings() -> None:
    for recipe in quality_peer.PEERS:
        less = quick(recipe)
        assert (less.name, less.settings) == (recipe.name, recipe.settings)
        assert less.epochs < recipe.epochs
    for recipe in quality_peer.OURS_RECIPES:
        assert quick(recipe).settings["encoder"] == recipe.settings["encoder"]
        assert quick(recipe).settings["steps"] < Config().training.steps


def test_every_own_recipe_is_a_training() -> None:
    for recipe in quality_peer.OURS_RECIPES:
        config = Config.model_validate({"training": dict(recipe.settings)})
        assert config.training.encoder is not None
        assert config.training.dim == quality_peer.PEERS[0].settings["n_factors"]


def test_the_runner_imports_nothing_of_ours() -> None:
    tree = ast.parse(quality_peer.RUNNER.read_text())
    modules = {one.module or "" for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    modules |= {
        name.name for one in ast.walk(tree) if isinstance(one, ast.Import) for name in one.names
    }
    assert not {one for one in modules if one.split(".")[0] in ("silvershard", "benchmarks")}
