import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from silvershard.deploy import demo, recipe
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError
from silvershard.deploy.processes import Process, descendants, wait_gone

SMALL = {
    "SILVERSHARD__TRAINING__STEPS": "8",
    "SILVERSHARD__TRAINING__RANKER_STEPS": "4",
    "SILVERSHARD__TRAINING__DIM": "16",
    "SILVERSHARD__INDEX__CLUSTERS": "16",
}


@pytest.fixture(scope="module")
def prepared(films_folder: Path) -> recipe.Prepared:
    return recipe.prepare(
        load(None, environ={}), data=films_folder, environ={}, report=lambda _: None
    )


@contextmanager
def running(folder: Path, temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run the demo on small data, its temporary files in a folder of their own."""
    environ = {name: text for name, text in os.environ.items() if "SILVERSHARD" not in name}
    # Ray's sockets below the folder must have short paths, which pytest's folders have not.
    with subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "silvershard.deploy.cli", "demo"),
            *("--data", str(folder)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environ, **SMALL, "TMPDIR": str(temporary)},
    ) as process:
        yield process
        process.terminate()


def test_the_user_shown_has_a_history_of_median_length(prepared: recipe.Prepared) -> None:
    shown = demo.choose_user(prepared, None)
    lengths = sorted(prepared.split.test_histories.lengths.tolist())
    assert len(shown.history) == lengths[(len(lengths) - 1) // 2]
    row = prepared.split.user_ids.tolist().index(shown.user)
    assert shown.held_out == prepared.split.test_item_ids[row]
    assert shown.held_out not in shown.history


def test_the_user_asked_for_is_shown(prepared: recipe.Prepared) -> None:
    assert demo.choose_user(prepared, 7).user == 7
    with pytest.raises(CommandError, match=r"--user 9999 is not a user of the data set"):
        demo.choose_user(prepared, 9999)


def test_films_are_shown_latest_first(prepared: recipe.Prepared) -> None:
    first, second = prepared.catalogue.item_ids[:2].tolist()
    lines = demo.films_table(prepared, [first, second]).splitlines()[2:]
    titles = prepared.catalogue.fields["title"]
    assert lines[0].strip().startswith(titles[1])
    assert lines[1].strip().startswith(titles[0])
    assert lines[0].endswith(str(second))


def test_a_temporary_state_directory_is_removed_and_a_named_one_kept(tmp_path: Path) -> None:
    with demo.state_directory(None) as state:
        assert state.root.is_dir()
    assert not state.root.exists()
    with demo.state_directory(tmp_path) as state:
        assert state.root == tmp_path
    assert tmp_path.is_dir()


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_shows_everything_and_leaves_nothing(films_folder: Path, tmp_path: Path) -> None:
    with running(films_folder, tmp_path) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f"data: {films_folder}: 400 movies, 80 users")
    assert f"Recommended, filter {demo.FILTER}" in out
    for text in ("HitRate@10", "NDCG@10", "Recall@100", "popularity", "coverage@10", "task alone"):
        assert text in out
    document = json.loads(lines[-1])
    assert document["shards"] == 2
    assert (document["generation"], document["coverage"]) == (1, 1.0)
    assert document["quality"]["users"] == 80
    assert set(document["quality"]["tasks"]) == {"rated", "liked"}
    assert document["quality"]["scan_refine_recall"]["at_400"] >= 0.999
    assert document["wall_s"] >= sum(document["seconds"].values()) - 1.0
    for stages in document["timings_us"].values():
        assert {"queue", "tower", "filter", "ann", "rerank", "value", "merge"} <= set(stages)
    for word in ("Warning", "WARN", "Traceback", "INFO", "ray::"):
        assert word not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing(films_folder: Path, tmp_path: Path) -> None:
    with running(films_folder, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line.startswith("serving") for line in process.stdout)
        family: list[Process] = descendants(process.pid)
        # Guard, driver, router, GCS, raylet and two shards at least.
        assert len(family) >= 7
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        process.wait()
        said = process.stderr.read()
    assert wait_gone(family, 30.0) == []
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "silvershard: interrupted; everything that this command started has ended"
    )
    assert list(tmp_path.iterdir()) == []
