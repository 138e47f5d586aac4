import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from silvershard.deploy import distributed, recipe
from silvershard.deploy.config import load
from silvershard.deploy.distributed import Event, train_on_processes
from silvershard.deploy.errors import CommandError
from silvershard.deploy.processes import descendants
from silvershard.deploy.state import StateDir
from silvershard.deploy.training_files import TrainingFiles
from silvershard.model.catalogue import Ragged
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.joint_config import JointConfig
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training import Checkpoint, LogRow, Trained, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions

NUM_FILMS, NUM_USERS, LENGTH, GROUPS = 60, 40, 9, 4

# Float32 rounds to 6e-8; sums of another order were seen to move a loss by 8e-8 in 30 steps.
TOLERANCE = 1e-5

SCHEMA = Schema(
    user_features=(UserFeature(name="history", max_length=8),),
    item_features=(
        UserFeature(name="film", max_length=1),
        UserFeature(name="genres", dtype="string"),
    ),
    signals=("popularity",),
    heads=("rated", "liked"),
    tasks=("rated", "liked"),
)
FEATURES = {
    "film": Ragged.from_rows([[film] for film in range(NUM_FILMS)]),
    "genres": Ragged.from_rows([[f"genre {film % GROUPS}"] for film in range(NUM_FILMS)]),
}
SIGNALS = np.linspace(0, 1, NUM_FILMS, dtype=np.float32)[:, None]
# Neither the positions nor the items of a batch are a multiple of two.
CONFIG = TrainingConfig(
    item="film",
    dim=16,
    steps=24,
    batch=33,
    negatives=64,
    clusters=4,
    learning_rate=0.01,
    evaluate_every=12,
    encoder=HSTUEncoderConfig(max_length=6, dropout=0.0),
    ranker_steps=6,
    ranker_batch=16,
    ranker_hard=4,
    ranker_depth=20,
)


def interactions() -> tuple[Interactions, Interactions]:
    """Users who watch the films of one group; the last of each is held out."""
    rng = np.random.default_rng(0)
    watched = np.stack(
        [
            rng.permutation(NUM_FILMS // GROUPS)[:LENGTH] * GROUPS + user % GROUPS
            for user in range(NUM_USERS)
        ]
    )
    ratings = rng.integers(2, 6, watched.shape).astype(np.float32)
    users = np.arange(NUM_USERS)
    return (
        Interactions(
            np.repeat(users, LENGTH - 1), watched[:, :-1].ravel(), ratings[:, :-1].ravel()
        ),
        Interactions(users, watched[:, -1], ratings[:, -1]),
    )


TRAIN, VALID = interactions()


class Run(NamedTuple):
    trained: Trained
    rows: list[LogRow]
    checkpoints: list[Checkpoint]


def run(
    how: Callable[..., Trained] = train, resume: Checkpoint | None = None, **changes: Any
) -> Run:
    rows: list[LogRow] = []
    checkpoints: list[Checkpoint] = []
    watch = Watch(
        on_log=rows.append,
        on_checkpoint=checkpoints.append,
        checkpoint_every=10,
        progress=False,
    )
    config = CONFIG.model_copy(update=changes)
    trained = how(
        SCHEMA,
        FEATURES,
        SIGNALS,
        TRAIN,
        config,
        validation=VALID,
        seed=3,
        watch=watch,
        resume=resume,
    )
    return Run(trained, rows, checkpoints)


def assert_equal_curves(found: Run, expected: Run) -> None:
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert (one.phase, one.step) == (other.phase, other.step)
        assert one.learning_rate == other.learning_rate
        assert one.loss == pytest.approx(other.loss, rel=TOLERANCE)
        assert one.ndcg == pytest.approx(other.ndcg, abs=0.02, nan_ok=True)
    for name, value in expected.trained.model.state_dict().items():
        if value.is_floating_point():
            mine = found.trained.model.state_dict()[name]
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = {one.pid for one in descendants(os.getpid())}
    yield
    assert {one.pid for one in descendants(os.getpid())} <= before


@pytest.fixture(scope="module")
def alone() -> Run:
    return run()


@pytest.fixture(scope="module")
def together() -> Run:
    return run(train_on_processes, processes=2)


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(alone: Run, together: Run) -> None:
    assert_equal_curves(together, alone)
    assert together.rows[0].loss > together.rows[2].loss
    assert together.trained.tower_ndcg == pytest.approx(alone.trained.tower_ndcg, abs=0.02)
    assert not together.trained.model.training


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_two(alone: Run, together: Run) -> None:
    stops = [(one.progress.phase, one.progress.done) for one in together.checkpoints]
    assert stops == [(one.progress.phase, one.progress.done) for one in alone.checkpoints]
    for mine, other in zip(together.checkpoints, alone.checkpoints, strict=True):
        assert mine.tensors.keys() == other.tensors.keys()
        assert torch.equal(mine.tensors["random"], other.tensors["random"])
        for name, value in other.tensors.items():
            assert mine.tensors[name].shape == value.shape, name
            if value.is_floating_point():
                # Adam does not see a factor of all gradients; its moments do.
                error = (mine.tensors[name] - value).abs().max()
                assert error <= 0.01 * value.abs().max(), name
    again = run(resume=together.checkpoints[0])
    rest = [row for row in alone.rows if row.phase != "towers" or row.step > 10]
    assert_equal_curves(again, alone._replace(rows=rest))


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_of_one_and_train_an_index() -> None:
    changes: dict[str, Any] = {"joint": JointConfig(), "encoder": None, "steps": 14}
    whole = run(**changes)
    again = run(train_on_processes, whole.checkpoints[0], processes=2, **changes)
    rest = [row for row in whole.rows if row.phase != "towers" or row.step > 10]
    assert_equal_curves(again, whole._replace(rows=rest))
    assert again.trained.centroids is not None
    assert whole.trained.centroids is not None
    torch.testing.assert_close(
        again.trained.centroids, whole.trained.centroids, rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_the_death_of_a_process_ends_all_of_them_and_is_named() -> None:
    def kill(row: LogRow) -> None:
        for one in descendants(os.getpid()):
            command = Path(f"/proc/{one.pid}/cmdline").read_bytes().split(b"\0")
            if b"--rank" in command and command[command.index(b"--rank") + 1] == b"1":
                os.kill(one.pid, signal.SIGKILL)

    with pytest.raises(CommandError, match="training process 2 of 2 was ended by SIGKILL; go on"):
        train_on_processes(
            SCHEMA,
            FEATURES,
            SIGNALS,
            TRAIN,
            CONFIG.model_copy(update={"processes": 2, "steps": 100_000, "encoder": None}),
            watch=Watch(on_log=kill, progress=False),
        )


@pytest.mark.slow
def test_the_recipe_trains_on_two_processes_and_goes_on_with_one(
    films_folder: Path, tmp_path: Path
) -> None:
    options = {
        "training.steps": 6,
        "training.ranker_steps": 2,
        "training.dim": 12,
        "index.clusters": 8,
        "model.checkpoint_every": 4,
    }
    one, two = (
        load(None, environ={}, options={**options, "training.processes": count}) for count in (1, 2)
    )
    prepared = recipe.prepare(one, data=films_folder, environ={}, report=lambda _: None)
    state = StateDir(tmp_path)

    class Stopped(Exception):
        pass

    def stop(self: TrainingFiles, checkpoint: Checkpoint) -> None:
        write(self, checkpoint)
        raise Stopped

    write = TrainingFiles.write_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFiles, "write_checkpoint", stop)
        with pytest.raises(Stopped):
            recipe.train_model(state, two, prepared, progress=False)
    trained = recipe.train_model(state, one, prepared, progress=False, resume=True)
    loaded = recipe.load_model(state.model_dir)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    whole = recipe.train_model(StateDir(tmp_path / "whole"), one, prepared, progress=False)
    assert trained.tower_losses == pytest.approx(whole.tower_losses, rel=TOLERANCE)


Actors = Callable[..., Callable[..., Trained]]

ACTOR = """
import os, signal, sys, time
from multiprocessing.connection import Connection
rank = sys.argv[sys.argv.index("--rank") + 1]
events = Connection(int(sys.argv[sys.argv.index("--events") + 1]), readable=False)
place = {folder!r} + "/" + rank
for number in range(9):
    if os.path.exists(f"{{place}}.{{number}}"):
        with open(f"{{place}}.{{number}}", "rb") as file:
            events.send_bytes(file.read())
exec(open(f"{{place}}.py").read())
"""
ENDS, FAILS = "", "sys.exit(1)"
DIES, HANGS = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Actors:
    """``actors((does, *events), …)`` has one process each that says events and does something."""

    def prepare(*parts: tuple[Any, ...]) -> Callable[..., Trained]:
        for rank, (does, *events) in enumerate(parts):
            (tmp_path / f"{rank}.py").write_text(does)
            for number, event in enumerate(events):
                (tmp_path / f"{rank}.{number}").write_bytes(pickle.dumps(event))
        monkeypatch.setattr(distributed, "_PROGRAM", ("-c", ACTOR.format(folder=str(tmp_path))))
        monkeypatch.setattr(distributed, "_LAST_WORDS_S", 0.5)
        config = CONFIG.model_copy(update={"processes": len(parts)})

        def start(watch: Watch | None = None) -> Trained:
            return train_on_processes(SCHEMA, FEATURES, SIGNALS, TRAIN, config, watch=watch)

        return start

    return prepare


LOST = Event("deserted", "RuntimeError: Connection closed by peer")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((FAILS, LOST), (DIES,)), "training process 2 of 2 was ended by SIGKILL"),
        (((FAILS, LOST), (FAILS,)), "training process 2 of 2 ended with code 1"),
        (
            ((FAILS, LOST), (FAILS, Event("failed", "MemoryError: too much"))),
            "training process 2 of 2 failed: MemoryError: too much",
        ),
        (
            ((FAILS, LOST), (HANGS,), (FAILS, LOST)),
            r"training process 2 of 3 did not answer the others for 600 s \(training\.process_time",
        ),
        (((FAILS, LOST), (FAILS, LOST)), "lost each other: RuntimeError: Connection closed"),
        (((ENDS,), (ENDS,)), "they ended without a model"),
    ],
)
def test_the_process_that_failed_first_is_named(
    actors: Actors, parts: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        actors(*parts)()


def test_a_training_that_cannot_work_is_refused_as_on_one_process(actors: Actors) -> None:
    refused = Event("refused", "the loss of towers must be finite")
    with pytest.raises(ValueError, match="the loss of towers must be finite"):
        actors((FAILS, LOST), (FAILS, refused))()


def test_an_interruption_ends_every_process(actors: Actors) -> None:
    row = LogRow("towers", 10, 1.0, 0.1, math.nan, 1.0)

    def interrupt(row: LogRow) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actors((HANGS, Event("log", row)), (HANGS,))(Watch(on_log=interrupt, progress=False))


def test_what_the_first_process_says_is_passed_on(actors: Actors) -> None:
    row = LogRow("towers", 10, 1.0, 0.1, 0.2, 1.0)
    heard: list[LogRow] = []
    start = actors((ENDS, Event("log", row), Event("trained", "a model")), (ENDS,))
    assert start(Watch(on_log=heard.append, progress=False)) == "a model"
    assert heard == [row]
