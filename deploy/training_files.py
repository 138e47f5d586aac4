"""The files of a training: a checkpoint to continue from and a log of its losses.

Both lie in one folder: ``checkpoint.safetensors`` holds the tensors and, as its metadata, where the
training stood and what it was of; ``log.csv`` has a line for every ten steps.
"""

import csv
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pydantic
import safetensors
import safetensors.torch

from silvershard.deploy.errors import CommandError
from silvershard.model.training import Checkpoint, LogRow, Progress

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.csv"
_PROGRESS = "progress"
_TRAINING = "training"
_PHASES = ("towers", "reranker", "semantic")


class TrainingFiles:
    """The folder of one training; a new one empties it with the first file that it writes.

    Args:
        folder: where its files are.
        training: what tells this training from others; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, training: str) -> None:
        self.folder = folder
        self._training = training
        self._replaces = True

    def _begin(self) -> None:
        """Empty the folder before the first file of a new training is written.

        Not earlier: a training that is refused leaves the files of the one before it.
        """
        if self._replaces:
            self._replaces = False
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._write_log(())

    def resume(self) -> Checkpoint:
        """Return the checkpoint, and cut the log back to it.

        Raises:
            CommandError: if there is none, it is damaged, or it is of another training.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            raise CommandError(f"there is no checkpoint in {self.folder}: train without --resume")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = Progress.model_validate_json(metadata.get(_PROGRESS, ""))
        except (OSError, safetensors.SafetensorError, pydantic.ValidationError) as error:
            problem = str(error).splitlines()[0]
            raise CommandError(
                f"{path} cannot be used: {problem}; train without --resume"
            ) from None
        if metadata.get(_TRAINING) != self._training:
            raise CommandError(
                f"{path} is of a training with other settings, seed or data: "
                "set them as they were, or train without --resume"
            )
        self._replaces = False
        for partial in self.folder.glob(f".{CHECKPOINT}.*"):
            partial.unlink()
        reached = _PHASES.index(progress.phase), progress.done
        kept = [row for row in self._read_log() if (_PHASES.index(row[0]), int(row[1])) <= reached]
        self._write_log(kept)
        return Checkpoint(progress, tensors)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; a reader finds the old one or the new one."""
        self._begin()
        path = self.folder / CHECKPOINT
        partial = path.with_name(f".{CHECKPOINT}.{os.getpid()}.tmp")
        metadata = {
            _PROGRESS: checkpoint.progress.model_dump_json(),
            _TRAINING: self._training,
        }
        safetensors.torch.save_file(checkpoint.tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)

    def log(self, row: LogRow) -> None:
        """Append a line to the log."""
        self._begin()
        cells = ["" if isinstance(one, float) and math.isnan(one) else one for one in row]
        with (self.folder / LOG).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(cells)

    def _read_log(self) -> list[list[str]]:
        path = self.folder / LOG
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        whole = [row for row in rows if len(row) == len(LogRow._fields)]
        return [row for row in whole if row[0] in _PHASES and row[1].isdecimal()]

    def _write_log(self, rows: Iterable[list[str]]) -> None:
        with (self.folder / LOG).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([LogRow._fields, *rows])
