import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.log_pins import (
    check_log,
    existing_log,
    log_url,
    pin_generations,
    trim_log,
)
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import LogUnavailable
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    return made


@pytest.fixture
def log(state: StateDir) -> Any:
    made = open_log(log_url(state, load(None, environ={})))
    yield made
    made.close()


def fill(log: UpdateLog, records: int) -> None:
    epoch = log.acquire(0)
    new = [NewRecord(one, 1, False, False, 0, b"x") for one in range(records)]
    log.append(0, epoch, new, 1)


def outline(
    state: StateDir, generation: int, log_id: int = 0, cut: tuple[int, ...] = ()
) -> Outline:
    path = generation_dir(state.generations, generation)
    path.mkdir(parents=True)
    document = {
        "spec": {"generation": generation, "model": "films", "partition_documents": [1]},
        "content_hash": "a",
        "files": {},
        "log_id": log_id,
        "cut": cut,
    }
    (path / "manifest.json").write_text(json.dumps(document))
    return read_outline(path)


def test_the_log_is_a_file_of_the_state_directory_unless_the_settings_name_another(
    state: StateDir,
) -> None:
    assert log_url(state, load(None, environ={})) == f"sqlite:///{state.updates_file}"
    named = load(None, environ={}, options={"updates.log": "redis://h:1/0"})
    assert log_url(state, named) == "redis://h:1/0"
    off = load(None, environ={}, options={"updates.enabled": False})
    assert log_url(state, off) == ""


def test_there_is_no_log_before_a_cluster_has_made_one(state: StateDir, tmp_path: Path) -> None:
    config = load(None, environ={})
    assert existing_log(state, config) is None
    open_log(log_url(state, config), 2).close()
    found = existing_log(state, config)
    assert found is not None
    assert found.num_partitions == 2
    found.close()
    named = load(None, environ={}, options={"updates.log": f"sqlite:///{tmp_path}/none.sqlite"})
    assert existing_log(state, named) is None
    unreachable = load(None, environ={}, options={"updates.log": f"sqlite:///{tmp_path}"})
    with pytest.raises(LogUnavailable):
        existing_log(state, unreachable)
    assert existing_log(state, load(None, environ={}, options={"updates.enabled": False})) is None


def test_every_generation_keeps_what_it_will_be_brought_up_to_date_from(
    state: StateDir, log: UpdateLog
) -> None:
    fill(log, 20)
    outline(state, 1)
    outline(state, 2, log.log_id, (8,))
    outline(state, 3, log.log_id + 1, (3,))
    log.pin("gen-000009", (1,))
    pin_generations(log, state.generations)
    assert log.pins() == {"gen-000001": (0,), "gen-000002": (8,)}
    assert trim_log(log) == [0]
    (state.generations / "gen-000001" / "manifest.json").unlink()
    (state.generations / "gen-000001").rmdir()
    pin_generations(log, state.generations)
    assert trim_log(log) == [8]
    assert [one.position for one in log.read(0, 8, 100)] == list(range(9, 21))


def test_a_damaged_generation_keeps_its_pin(state: StateDir, log: UpdateLog) -> None:
    fill(log, 5)
    outline(state, 1)
    pin_generations(log, state.generations)
    (state.generations / "gen-000001" / "manifest.json").write_text("{")
    pin_generations(log, state.generations)
    assert log.pins() == {"gen-000001": (0,)}


def test_a_generation_that_needs_what_was_trimmed_is_refused(
    state: StateDir, log: UpdateLog
) -> None:
    fill(log, 20)
    first, second = outline(state, 1), outline(state, 2, log.log_id, (8,))
    check_log(log, first)
    log.pin("gen-000002", (8,))
    trim_log(log)
    with pytest.raises(Refused, match=r"beyond position 0 of partition 0, .* trimmed up to 8"):
        check_log(log, first)
    check_log(log, second)
    pin_generations(log, state.generations)
    assert log.pins() == {"gen-000002": (8,)}


def test_a_generation_of_another_log_is_refused(state: StateDir, log: UpdateLog) -> None:
    other = outline(state, 1, log.log_id + 1, (3,))
    with pytest.raises(Refused, match=f"generation 1 holds updates of log {log.log_id + 1}, .* is"):
        check_log(log, other)
    wide = outline(state, 2, log.log_id, (3, 4))
    with pytest.raises(CommandError, match=r"a cut of 2 partitions, .* has 1"):
        check_log(log, wide)
