import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality_ours
from benchmarks.quality_ours import histories_of
from silvershard.deploy.config import Config
from silvershard.deploy.recipe import prepare


def test_both_rankings_of_a_training_are_full_and_hold_nothing_that_was_seen(
    films_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = {
        "steps": 3,
        "evaluate_every": 3,
        "ranker_steps": 5,
        "batch": 32,
        "encoder": {"kind": "hstu", "max_length": 8},
    }
    job = {"data": str(films_folder), "out": str(tmp_path / "out.npz"), "k": 20, "seed": 1}
    (tmp_path / "job.json").write_text(json.dumps({**job, "training": training}))
    monkeypatch.setattr(sys, "argv", ["quality_ours.py", str(tmp_path / "job.json")])
    quality_ours.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["step"] == 3
    assert report["peak_mib"] >= report["start_mib"] > 0
    assert set(report["validation_ndcg"]) == {"towers", "served"}
    histories = histories_of(prepare(Config(), data=films_folder, report=lambda line: None))
    with np.load(tmp_path / "out.npz") as rankings:
        assert set(rankings.files) == {"towers", "served"}
        for name in rankings.files:
            ranked = rankings[name]
            assert ranked.shape == (len(histories), 20)
            for row, history in zip(ranked.tolist(), histories, strict=True):
                assert len(set(row)) == 20
                assert min(row) >= 0
                assert not set(row) & set(history)
