import csv
import math
from pathlib import Path

import pytest
import torch

from silvershard.deploy.errors import CommandError
from silvershard.deploy.training_files import CHECKPOINT, LOG, TrainingFiles
from silvershard.model.training import Checkpoint, LogRow, Progress


def checkpoint(phase: str = "towers", done: int = 20) -> Checkpoint:
    progress = Progress(
        phase=phase, done=done, losses={"towers": (1.5, 0.1)}, kept={"towers": 3}, reached={}
    )
    return Checkpoint(progress, {"model.x": torch.arange(3.0), "random": torch.get_rng_state()})


def row(phase: str, step: int) -> LogRow:
    return LogRow(phase, step, 1.25, 0.003, math.nan, 2.5)


@pytest.fixture
def files(tmp_path: Path) -> TrainingFiles:
    return TrainingFiles(tmp_path / "training", "one")


def logged(files: TrainingFiles) -> list[list[str]]:
    with (files.folder / LOG).open(newline="") as file:
        return list(csv.reader(file))


def test_a_checkpoint_comes_back_as_it_was_written(files: TrainingFiles) -> None:
    files.write_checkpoint(checkpoint(done=10))
    files.write_checkpoint(checkpoint())
    again = files.resume()
    assert again.progress == checkpoint().progress
    assert again.tensors["model.x"].tolist() == [0.0, 1.0, 2.0]
    assert again.tensors["random"].dtype == torch.uint8
    assert sorted(path.name for path in files.folder.iterdir()) == [CHECKPOINT, LOG]


def test_the_log_is_a_table_that_resuming_cuts_back(files: TrainingFiles) -> None:
    for one in (row("towers", 10), row("towers", 20), row("towers", 30), row("reranker", 1)):
        files.log(one)
    header, first = logged(files)[:2]
    assert header == ["phase", "step", "loss", "learning_rate", "ndcg", "seconds"]
    assert first == ["towers", "10", "1.25", "0.003", "", "2.5"]
    files.write_checkpoint(checkpoint())
    files.resume()
    assert [line[:2] for line in logged(files)[1:]] == [["towers", "10"], ["towers", "20"]]
    files.write_checkpoint(checkpoint("reranker", 1))
    files.log(row("reranker", 1))
    files.log(row("reranker", 2))
    files.resume()
    assert [line[1] for line in logged(files)[1:]] == ["10", "20", "1"]


def test_a_new_training_keeps_the_old_files_until_it_writes(files: TrainingFiles) -> None:
    files.write_checkpoint(checkpoint())
    files.log(row("towers", 30))
    again = TrainingFiles(files.folder, "one")
    assert len(logged(again)) == 2
    again.log(row("towers", 10))
    assert [line[1] for line in logged(again)] == ["step", "10"]
    with pytest.raises(CommandError, match="there is no checkpoint in"):
        again.resume()


def test_resuming_removes_what_a_kill_left_behind(files: TrainingFiles) -> None:
    files.write_checkpoint(checkpoint())
    (files.folder / f".{CHECKPOINT}.123.tmp").write_bytes(b"part")
    with (files.folder / LOG).open("a") as file:
        file.write("towers,x,1,1,,1\n")
    TrainingFiles(files.folder, "one").resume()
    assert sorted(path.name for path in files.folder.iterdir()) == [CHECKPOINT, LOG]
    assert len(logged(files)) == 1


def test_a_checkpoint_of_another_training_is_refused(files: TrainingFiles) -> None:
    files.write_checkpoint(checkpoint())
    with pytest.raises(CommandError, match="other settings, seed or data"):
        TrainingFiles(files.folder, "another").resume()


def test_a_damaged_checkpoint_is_refused_by_name(files: TrainingFiles) -> None:
    files.write_checkpoint(checkpoint())
    path = files.folder / CHECKPOINT
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CommandError, match=r"checkpoint\.safetensors cannot be used"):
        files.resume()
