from collections.abc import Iterator
from pathlib import Path

import pytest

from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.log_cut import FROM_START, NOW, START, LogCut, cut_of_data
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import log_url
from silvershard.shard.generations import generation_dir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    generation_dir(made.generations, 1).mkdir(parents=True)
    return made


@pytest.fixture
def config() -> Config:
    return load(None, environ={})


@pytest.fixture
def log(state: StateDir, config: Config) -> Iterator[UpdateLog]:
    """A log of two partitions with 7 and 4 records."""
    made = open_log(log_url(state, config), 2)
    for partition, records in ((0, 7), (1, 4)):
        new = [NewRecord(one, 1, False, False, 0, b"x") for one in range(records)]
        made.append(partition, made.acquire(partition), new, 1)
    yield made
    made.close()


def pinned(state: StateDir, log: UpdateLog) -> tuple[int, ...] | None:
    state_id = state.control.read().state_id
    return log.pins().get(f"{state_id}/gen-000002")


def test_data_without_updates_are_of_the_start(
    state: StateDir, config: Config, log: UpdateLog
) -> None:
    assert cut_of_data(state, config, START) == FROM_START == LogCut(0, ())
    assert pinned(state, log) == (0, 0)
    assert state.control.read().log_id == log.log_id


def test_data_of_now_hold_all_updates(state: StateDir, config: Config, log: UpdateLog) -> None:
    log.trim(0, 3)
    assert cut_of_data(state, config, NOW) == LogCut(log.log_id, (7, 4))
    assert pinned(state, log) == (7, 4)
    assert (log.trim(0, 100), log.trim(1, 100)) == (7, 4)


@pytest.mark.parametrize("named", [False, True])
def test_data_that_were_exported_earlier_hold_what_was_acked_by_then(
    state: StateDir, config: Config, log: UpdateLog, named: bool
) -> None:
    log.trim(0, 3)
    token = f"{log.log_id}:5,0" if named else "5,0"
    assert cut_of_data(state, config, token) == LogCut(log.log_id, (5, 0))
    assert pinned(state, log) == (5, 0)


@pytest.mark.parametrize("token", ["yesterday", "", ":5,0", "5,", "5:x,0", "-1,0", "5,0,"])
def test_what_is_no_place_is_wrong_usage(
    state: StateDir, config: Config, log: UpdateLog, token: str
) -> None:
    with pytest.raises(CommandError, match=f"as in {log.log_id}:7,4, got {token}") as wrong:
        cut_of_data(state, config, token)
    assert wrong.value.exit_code == ExitCode.USAGE
    assert pinned(state, log) is None


def test_a_place_that_the_log_does_not_have_is_refused_with_numbers(
    state: StateDir, config: Config, log: UpdateLog
) -> None:
    with pytest.raises(CommandError, match="at most the end of the update log, 7,4, got 5,5"):
        cut_of_data(state, config, "5,5")
    with pytest.raises(CommandError, match=r"a cut of 1 partitions, .* has 2"):
        cut_of_data(state, config, "5")
    with pytest.raises(Refused, match=rf"holds updates of log 4711, .* is log {log.log_id}"):
        cut_of_data(state, config, "4711:5,4")
    log.trim(0, 6)
    with pytest.raises(Refused, match="beyond position 5 of partition 0, which is trimmed up to 6"):
        cut_of_data(state, config, "5,4")
    with pytest.raises(Refused, match=r"trimmed up to position 6 of partition 0: .* --data-as-of"):
        cut_of_data(state, config, START)
    assert pinned(state, log) is None


def test_without_a_log_there_is_no_place_in_it(state: StateDir, config: Config) -> None:
    assert cut_of_data(state, config, START) == FROM_START
    assert cut_of_data(state, config, NOW) == FROM_START
    with pytest.raises(CommandError, match="--data-as-of 5,4: there is no update log in"):
        cut_of_data(state, config, "5,4")
