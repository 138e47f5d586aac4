import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.update_log import open_log
from silvershard.deploy import verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import ExitCode, Refused
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import (
    adopt_log,
    check_missing,
    existing_log,
    leave_log,
    log_url,
    made_log,
)
from silvershard.shard.errors import ConfigError, LogUnavailable
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline
from silvershard.shard.snapshot import canonical, open_snapshot


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    return made


@pytest.fixture
def config() -> Config:
    return load(None, environ={})


@pytest.fixture
def base(generation: Any) -> Outline:
    """A generation that holds no updates."""
    return read_outline(generation.path)


def used(state: StateDir, config: Config) -> int:
    """Make the log of a state directory; return its id."""
    log = open_log(log_url(state, config))
    adopt_log(state, log)
    log.close()
    return log.log_id


def test_the_log_is_a_file_of_the_state_directory_unless_the_settings_name_another(
    state: StateDir, config: Config
) -> None:
    assert log_url(state, config) == f"sqlite:///{state.updates_file}"
    named = load(None, environ={}, options={"updates.log": "redis://h:1/0"})
    assert log_url(state, named) == "redis://h:1/0"
    off = load(None, environ={}, options={"updates.enabled": False})
    assert log_url(state, off) == ""


def test_there_is_no_log_before_a_cluster_has_made_one(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    assert existing_log(state, config) is None
    open_log(log_url(state, config), 2).close()
    found = existing_log(state, config)
    assert found is not None
    assert found.num_partitions == 2
    found.close()
    # To look at it makes it nobody's.
    assert not state.control_file.exists()
    named = load(None, environ={}, options={"updates.log": f"sqlite:///{tmp_path}/none.sqlite"})
    assert existing_log(state, named) is None
    unreachable = load(None, environ={}, options={"updates.log": f"sqlite:///{tmp_path}"})
    with pytest.raises(LogUnavailable):
        existing_log(state, unreachable)
    assert existing_log(state, load(None, environ={}, options={"updates.enabled": False})) is None


def test_a_log_that_is_gone_is_refused_and_never_made_again(
    state: StateDir, config: Config, base: Outline
) -> None:
    own = used(state, config)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{state.updates_file}{suffix}").unlink(missing_ok=True)
    url = f"sqlite:///{state.updates_file}"
    message = f"update log {own} of {state.root} is gone, {url} holds none: .* --new-log"
    for look in (
        lambda: existing_log(state, config),
        lambda: made_log(state, config, base),
    ):
        with pytest.raises(Refused, match=message) as refused:
            look()
        assert refused.value.exit_code == ExitCode.REFUSED
    assert not state.updates_file.exists()


def test_another_log_is_refused_with_both_ids(
    state: StateDir, config: Config, tmp_path: Path
) -> None:
    own = used(state, config)
    kept = tmp_path / "kept.sqlite"
    state.updates_file.rename(kept)
    other = open_log(log_url(state, config))
    with pytest.raises(Refused, match=rf"has update log {own}, .* is log {other.log_id}"):
        existing_log(state, config)
    with pytest.raises(Refused, match=rf"has update log {own}, .* is log {other.log_id}"):
        adopt_log(state, other)
    other.close()
    kept.rename(state.updates_file)
    found = existing_log(state, config)
    assert found is not None
    assert (found.log_id, adopt_log(state, found)) == (own, adopt_log(state, found))
    found.close()


def test_updates_that_were_acked_are_not_switched_off(state: StateDir, config: Config) -> None:
    own = used(state, config)
    off = load(None, environ={}, options={"updates.enabled": False})
    with pytest.raises(Refused, match=rf"updates.enabled is false, .* has update log {own}"):
        existing_log(state, off)


def test_a_generation_that_holds_updates_needs_its_log(
    state: StateDir, config: Config, base: Outline
) -> None:
    check_missing(state, config, base)
    later = base._replace(log_id=7, cut=(3,))
    with pytest.raises(Refused, match="generation 1 holds updates of log 7, which is not there: s"):
        check_missing(state, config, later)
    with pytest.raises(Refused, match="generation 1 holds updates of log 7"):
        made_log(state, config, later)
    assert not state.updates_file.exists()


def test_the_number_of_partitions_stays(state: StateDir, config: Config, base: Outline) -> None:
    made = made_log(state, config, base)
    adopt_log(state, made)
    made.close()
    wide = load(None, environ={}, options={"updates.partitions": 4})
    with pytest.raises(ConfigError, match="4"):
        made_log(state, wide, base)


def published(state: StateDir, generation: Any, number: int, log_id: int, cut: list[int]) -> Path:
    """Link a generation into a state directory with a manifest of its own."""
    path = generation_dir(state.generations, number)
    for file in generation.path.rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            target = path / file.relative_to(generation.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    document = json.loads((generation.path / "manifest.json").read_bytes())
    del document["checksum"]
    document |= {"log_id": log_id, "cut": cut, "spec": {**document["spec"], "generation": number}}
    checksum = hashlib.sha256(canonical(document)).hexdigest()
    (path / "manifest.json").write_bytes(canonical({**document, "checksum": checksum}))
    return path


def test_a_person_leaves_a_log_and_is_told_what_is_lost(
    state: StateDir, config: Config, generation: Any
) -> None:
    own = used(state, config)
    published(state, generation, 1, 0, [])
    second = published(state, generation, 2, own, [12])
    assert leave_log(state, config) == []
    assert open_snapshot(second).manifest.cut == (12,)
    content = open_snapshot(second).manifest.content_hash
    state.updates_file.unlink()
    lock = state.lock()
    with pytest.raises(Refused, match="a cluster runs on"):
        leave_log(state, config)
    os.close(lock)
    said = leave_log(state, config)
    assert said == [
        f"generation 2 goes on without what update log {own} holds beyond 12: later updates are "
        "lost, and items that were deleted later come back",
        f"generation 1 goes on without what update log {own} holds: all updates are lost, and all "
        "items that were deleted come back",
    ]
    left = open_snapshot(second)
    left.verify()
    assert (left.manifest.log_id, left.manifest.cut) == (0, ())
    assert left.manifest.content_hash == content
    new = made_log(state, config, read_outline(second))
    assert adopt_log(state, new)
    assert new.log_id != own
    assert state.control.read().log_id == new.log_id
    new.close()
    assert leave_log(state, config) == []


def test_leaving_a_log_for_another_one_that_is_there_keeps_what_is_of_that_one(
    state: StateDir, config: Config, generation: Any
) -> None:
    own = used(state, config)
    state.updates_file.rename(state.root / "kept.sqlite")
    other = open_log(log_url(state, config))
    other.close()
    first = published(state, generation, 1, own, [3])
    second = published(state, generation, 2, other.log_id, [4])
    (said,) = leave_log(state, config)
    assert said.startswith(f"generation 1 goes on without what update log {own} holds beyond 3")
    assert open_snapshot(first).manifest.log_id == 0
    assert open_snapshot(second).manifest.cut == (4,)
    assert state.control.read().log_id == other.log_id


def run(state: StateDir, *words: str) -> int:
    return verbs.run([*words, "--state", str(state.root)])


def test_every_verb_that_depends_on_the_log_refuses_another_one_until_it_is_left(
    state: StateDir,
    config: Config,
    generation: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"file://{tmp_path}/copies"
    published(state, generation, 1, 0, [])
    assert run(state, "snapshots", "--push", url) == ExitCode.OK
    own = used(state, config)
    state.updates_file.unlink()
    for words in (
        ("up",),
        ("publish", "--data", str(tmp_path)),
        ("publish", "--recluster"),
        ("restore", url, "1"),
        ("snapshots", "--prune", "1"),
    ):
        capsys.readouterr()
        assert run(state, *words) == ExitCode.REFUSED
        said = capsys.readouterr().err
        assert f"update log {own} of {state.root} is gone, sqlite:///{state.updates_file}" in said
    assert not state.updates_file.exists()
    capsys.readouterr()
    assert run(state, "restore", url, "1", "--new-log") == ExitCode.OK
    assert f"generation 1 goes on without what update log {own} holds: all updates are lost" in (
        capsys.readouterr().out
    )
    assert state.control.read().log_id == 0
    # Another log is another one for the next verb as well.
    first = used(state, config)
    state.updates_file.unlink()
    second = open_log(log_url(state, config))
    second.close()
    assert run(state, "up") == ExitCode.REFUSED
    assert f"has update log {first}" in capsys.readouterr().err
    assert run(state, "publish", "--recluster", "--new-log") == ExitCode.OK
    assert open_snapshot(generation_dir(state.generations, 2)).manifest.log_id == second.log_id
