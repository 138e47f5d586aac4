import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.deploy.config import load
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.log_pins import (
    check_log,
    drop_pins,
    other_pins,
    pin_generation,
    pin_generations,
    release_pins,
    trim_log,
)
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import log_url
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


def pins(log: UpdateLog, state: StateDir) -> dict[str, tuple[int, ...]]:
    """Return the pins of a state directory by generation."""
    own = f"{state.control.read().state_id}/"
    assert len(own) > 16
    return {name.removeprefix(own): cut for name, cut in log.pins().items() if name.startswith(own)}


def test_every_generation_keeps_what_it_will_be_brought_up_to_date_from(
    state: StateDir, log: UpdateLog
) -> None:
    fill(log, 20)
    outline(state, 1)
    outline(state, 2, log.log_id, (8,))
    outline(state, 3, log.log_id + 1, (3,))
    pin_generation(log, state, 9, (1,))
    pin_generations(log, state)
    # One that is being published is pinned before it is there.
    assert pins(log, state).keys() == {"gen-000001", "gen-000002", "gen-000009"}
    drop_pins(log, state)
    assert pins(log, state) == {"gen-000001": (0,), "gen-000002": (8,)}
    assert trim_log(log) == [0]
    (state.generations / "gen-000001" / "manifest.json").unlink()
    (state.generations / "gen-000001").rmdir()
    drop_pins(log, state)
    assert trim_log(log) == [8]
    assert [one.position for one in log.read(0, 8, 100)] == list(range(9, 21))


def test_a_damaged_generation_keeps_its_pin(state: StateDir, log: UpdateLog) -> None:
    fill(log, 5)
    outline(state, 1)
    pin_generations(log, state)
    (state.generations / "gen-000001" / "manifest.json").write_text("{")
    pin_generations(log, state)
    drop_pins(log, state)
    assert pins(log, state) == {"gen-000001": (0,)}


def test_a_generation_that_needs_what_was_trimmed_is_refused(
    state: StateDir, log: UpdateLog
) -> None:
    fill(log, 20)
    first, second = outline(state, 1), outline(state, 2, log.log_id, (8,))
    check_log(log, first)
    pin_generation(log, state, 2, (8,))
    trim_log(log)
    with pytest.raises(Refused, match=r"beyond position 0 of partition 0, .* trimmed up to 8"):
        check_log(log, first)
    check_log(log, second)
    pin_generations(log, state)
    assert pins(log, state) == {"gen-000002": (8,)}


def test_a_generation_of_another_log_is_refused(state: StateDir, log: UpdateLog) -> None:
    other = outline(state, 1, log.log_id + 1, (3,))
    with pytest.raises(Refused, match=f"generation 1 holds updates of log {log.log_id + 1}, .* is"):
        check_log(log, other)
    wide = outline(state, 2, log.log_id, (3, 4))
    with pytest.raises(CommandError, match=r"a cut of 2 partitions, .* has 1"):
        check_log(log, wide)


def test_state_directories_of_one_log_leave_each_other_their_pins(
    state: StateDir, log: UpdateLog, tmp_path: Path
) -> None:
    fill(log, 20)
    other = StateDir(tmp_path / "other")
    other.create()
    outline(state, 1, log.log_id, (15,))
    outline(other, 1, log.log_id, (5,))
    outline(other, 2, log.log_id, (9,))
    pin_generations(log, other)
    pin_generations(log, state)
    assert trim_log(log) == [5]
    assert pins(log, state) == {"gen-000001": (15,)}
    assert pins(log, other) == {"gen-000001": (5,), "gen-000002": (9,)}
    (other.generations / "gen-000001" / "manifest.json").unlink()
    (other.generations / "gen-000001").rmdir()
    drop_pins(log, other)
    assert trim_log(log) == [9]
    assert pins(log, state) == {"gen-000001": (15,)}
    names = [one.control.read().state_id for one in (state, other)]
    assert other_pins(log, state) == {names[1]: {2: (9,)}}
    with pytest.raises(Refused, match=f"{names[0]} is .* itself"):
        release_pins(log, state, names[0])
    with pytest.raises(Refused, match=f"{names[0]} is .* itself"):
        release_pins(log, state, names[0], dry_run=True)
    assert release_pins(log, state, names[1], dry_run=True) == 1
    # What is gone cannot release its own.
    assert release_pins(log, state, names[1]) == 1
    assert release_pins(log, state, names[1]) == 0
    assert trim_log(log) == [15]


def test_a_log_that_ends_before_a_generation_was_cut_is_refused(
    state: StateDir, log: UpdateLog
) -> None:
    fill(log, 20)
    beyond = outline(state, 1, log.log_id, (21,))
    with pytest.raises(Refused, match=r"up to position 21 of partition 0, which ends at 20 now"):
        check_log(log, beyond)
    check_log(log, outline(state, 2, log.log_id, (20,)))
