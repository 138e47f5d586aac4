import os
import pickle
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from silvershard.deploy import distributed_process
from silvershard.deploy.distributed import JOB, Event, Job
from silvershard.model.training_config import TrainingConfig


def events_of(job: Job, rank: int, folder: Path) -> tuple[int, list[Event]]:
    """What a process says in this one, and its exit code."""
    heard, told = Pipe(duplex=False)
    with heard, told:
        code = distributed_process.run(job, rank, folder / "meeting", told)
        said = []
        while heard.poll():
            said.append(pickle.loads(heard.recv_bytes()))
    return code, said


def job(**settings: Any) -> Job:
    config = TrainingConfig.model_validate({"processes": 1, **settings})
    return Job({"config": config, "checkpoint_every": 10}, progress=False)


def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    code, said = events_of(job(device="cuda", processes=count), 0, tmp_path)
    assert code == 1
    assert said == [
        Event(
            "refused",
            f"training.device cuda needs {count} GPUs, one for each of training.processes, "
            f"got {count - 1}",
        )
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ValueError("steps are few"), Event("refused", "steps are few")),
        (MemoryError("much\nmore"), Event("failed", "MemoryError: much")),
        (
            RuntimeError("[gloo] Connection closed by peer\nlong"),
            Event("deserted", "RuntimeError: [gloo] Connection closed by peer"),
        ),
        (RuntimeError("a shape is wrong"), Event("failed", "RuntimeError: a shape is wrong")),
    ],
)
def test_what_goes_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, event: Event
) -> None:
    def fail(**arguments: object) -> None:
        raise error

    monkeypatch.setattr(distributed_process, "train", fail)
    assert events_of(job(), 0, tmp_path) == (1, [event])


def test_the_first_process_tells_the_model_and_its_way_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(**arguments: Any) -> str:
        watch = arguments["watch"]
        assert (watch.checkpoint_every, watch.progress) == (10, False)
        watch.on_log("a row")
        watch.on_checkpoint("a checkpoint")
        return "a model"

    monkeypatch.setattr(distributed_process, "train", train)
    said = [Event("log", "a row"), Event("checkpoint", "a checkpoint"), Event("trained", "a model")]
    assert events_of(job(), 0, tmp_path) == (0, said)


def test_a_process_without_its_parent_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / JOB).write_bytes(pickle.dumps(job()))
    heard, told = Pipe(duplex=False)
    with heard, told:
        done = subprocess.run(
            [
                *(sys.executable, "-P", "-m", "silvershard.deploy.distributed_process"),
                *("--folder", str(tmp_path), "--rank", "0"),
                *("--events", str(told.fileno()), "--parent", str(os.getpid() + 1)),
            ],
            pass_fds=(told.fileno(),),
            check=False,
        )
        assert not heard.poll()
    assert done.returncode == -9
