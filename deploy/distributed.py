"""Training on several processes of this machine, started, heard and ended by this one.

The first process leads: what it logs, its checkpoints and the trained model come here through a
pipe, and are treated as those of a training in this process. Whatever happens, none of the
processes outlives the call.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from silvershard.deploy.errors import CommandError
from silvershard.model.catalogue import Ragged
from silvershard.model.schema import Schema
from silvershard.model.training import Checkpoint, Trained, Watch
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions
from silvershard.model.training_texts import TrainingTexts

JOB = "job.pickle"
MEETING = "meeting"
_PROGRAM = ("-m", "silvershard.deploy.distributed_process")
# Once one process has failed the others fail too; this long they may say why.
_LAST_WORDS_S = 2.0

Kind = Literal["log", "checkpoint", "trained", "refused", "failed", "deserted"]


class Job(NamedTuple):
    """What every process is told; it lies in a file that only this user can read."""

    arguments: dict[str, Any]
    """Of ``training.assist``."""
    progress: bool
    """Whether the one that leads shows progress bars."""


class Event(NamedTuple):
    """What a process says."""

    kind: Kind
    content: Any
    """A log row, a checkpoint or what was trained; else what went wrong, as text."""


class _Process:
    """One process of a training and what it has said so far."""

    def __init__(self, rank: int, config: TrainingConfig, folder: Path) -> None:
        self.rank = rank
        self.problem: Event | None = None
        self.ended = False
        self.events, told = Pipe(duplex=False)
        command = [
            *(sys.executable, "-P", *_PROGRAM),
            *("--folder", str(folder), "--rank", str(rank)),
            *("--events", str(told.fileno()), "--parent", str(os.getpid())),
        ]
        try:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(told.fileno(),),
                # All of them are on this machine.
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
            )
        finally:
            told.close()

    def hear(self) -> Event | None:
        """Return what the process says next; None where it has ended."""
        try:
            event: Event = pickle.loads(self.events.recv_bytes())
        except (EOFError, OSError):
            self._popen.wait()
            self.ended = True
            return None
        return event

    @property
    def code(self) -> int:
        """Return the exit code; negative for a signal."""
        return self._popen.wait()

    def end(self) -> None:
        """End the process, if it still runs, and wait for its end."""
        self._popen.kill()
        self._popen.wait()
        self.events.close()


def train_on_processes(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
    *,
    validation: Interactions | None = None,
    seed: int = 0,
    watch: Watch | None = None,
    resume: Checkpoint | None = None,
    texts: TrainingTexts | None = None,
) -> Trained:
    """Train as ``training.train`` does, with the towers on ``config.processes`` processes.

    Args:
        schema: as all arguments, that of ``training.train``.
        features: raw ids of each item feature.
        signals: of the items.
        interactions: what the model learns from.
        config: the recipe.
        validation: the next item of some users.
        seed: of everything that is drawn.
        watch: hears of the training, in this process.
        resume: a checkpoint of a training on any number of processes.
        texts: of the items and of those who ask for them.

    Raises:
        ValueError: as ``training.train`` does.
        CommandError: if a process fails or ends, or one does not answer the others for
            ``config.process_timeout_s``, naming it.
    """
    watch = watch or Watch()
    job = Job(
        {
            "schema": schema,
            "features": dict(features),
            "signals": signals,
            "interactions": interactions,
            "config": config,
            "checkpoint_every": watch.checkpoint_every,
            "validation": validation,
            "seed": seed,
            "resume": resume,
            "texts": texts,
        },
        watch.progress,
    )
    processes: list[_Process] = []
    with tempfile.TemporaryDirectory(prefix="silvershard-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps(job))
        try:
            for rank in range(config.processes):
                processes.append(_Process(rank, config, folder))
            return _hear(processes, config, watch)
        finally:
            for process in processes:
                process.end()


def _hear(processes: list[_Process], config: TrainingConfig, watch: Watch) -> Trained:
    """Pass on what the processes say until the first of them has trained the model."""
    trained: Trained | None = None
    give_up_s: float | None = None
    while running := {one.events: one for one in processes if not one.ended}:
        left_s = None if give_up_s is None else give_up_s - time.monotonic()
        ready = wait(list(running), left_s) if left_s is None or left_s > 0 else []
        if give_up_s is not None and not ready:
            break
        for events in ready:
            assert isinstance(events, Connection)
            process = running[events]
            event = process.hear()
            if event is None:
                if process.code:
                    give_up_s = give_up_s or time.monotonic() + _LAST_WORDS_S
            elif event.kind == "log" and watch.on_log is not None:
                watch.on_log(event.content)
            elif event.kind == "checkpoint" and watch.on_checkpoint is not None:
                watch.on_checkpoint(event.content)
            elif event.kind == "trained":
                trained = event.content
            elif event.kind in ("refused", "failed", "deserted"):
                process.problem = event
                give_up_s = give_up_s or time.monotonic() + _LAST_WORDS_S
    if trained is None or give_up_s is not None:
        raise _reason(processes, config)
    return trained


def _reason(processes: list[_Process], config: TrainingConfig) -> Exception:
    """Return what went wrong first: others fail because of it."""
    many = len(processes)
    for one in processes:
        if one.problem is not None and one.problem.kind == "refused":
            return ValueError(one.problem.content)
    for one in processes:
        if one.problem is not None and one.problem.kind == "failed":
            return CommandError(
                f"training process {one.rank + 1} of {many} failed: {one.problem.content}"
            )
    for one in processes:
        if one.problem is None and one.ended and one.code:
            return CommandError(
                f"training process {one.rank + 1} of {many} {_how(one.code)}; "
                "go on from the last checkpoint with --resume"
            )
    silent = [str(one.rank + 1) for one in processes if one.problem is None and not one.ended]
    if silent:
        return CommandError(
            f"training process {', '.join(silent)} of {many} did not answer the others for "
            f"{config.process_timeout_s:g} s (training.process_timeout_s); "
            "go on from the last checkpoint with --resume"
        )
    problem = processes[0].problem
    said = "they ended without a model" if problem is None else problem.content
    return CommandError(f"the training processes lost each other: {said}")


def _how(code: int) -> str:
    """Say how a process ended."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
