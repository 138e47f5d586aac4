import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.processes import identify, is_alive, myself
from silvershard.deploy.state import (
    ClusterRecord,
    RouterRecord,
    SequencerRecord,
    ShardRecord,
    StateDir,
    remove_ray_dir,
    write_atomic,
)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    directory = StateDir(tmp_path / "state")
    directory.create()
    return directory


def record(**changes: object) -> ClusterRecord:
    shards = tuple(ShardRecord(shard=at, state="serving", documents=5) for at in range(2))
    whole = ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="127.0.0.1:8001",
        model="films",
        generation=3,
        documents=10,
        router=RouterRecord(state="serving"),
        shards=shards,
        ray_dir="",
        since_unix_s=0.0,
    )
    return whole.model_copy(update=changes)


def test_the_option_beats_the_variable_which_beats_the_default(tmp_path: Path) -> None:
    environ = {"SILVERSHARD_STATE": str(tmp_path / "b")}
    assert StateDir.named(tmp_path / "a", environ).root == tmp_path / "a"
    assert StateDir.named(None, environ).root == tmp_path / "b"
    assert StateDir.named(None, {}).root == Path.cwd() / ".silvershard"


def test_the_directory_is_for_its_owner_only(state: StateDir) -> None:
    assert stat.S_IMODE(state.root.stat().st_mode) == 0o700


def test_a_directory_that_is_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    root = tmp_path / "state"
    root.mkdir()
    (root / "config.yaml").write_text("")
    for mode in (0o755, 0o750, 0o701):
        root.chmod(mode)
        StateDir(root).create()
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
    (root / "notes.txt").write_text("")
    StateDir(root).create()


def test_a_directory_with_other_things_is_not_made_private_unasked(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir()
    (root / "notes.txt").write_text("")
    root.chmod(0o755)
    with pytest.raises(Refused, match=rf"{root} is open to other users and holds notes\.txt"):
        StateDir(root).create()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert [path.name for path in root.iterdir()] == ["notes.txt"]


def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(Refused, match=rf"{tmp_path} belongs to another user \(uid \d+\).*--state"):
        StateDir(tmp_path).create()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="file/state cannot be made: Not a directory"):
        StateDir(tmp_path / "file" / "state").create()


def test_a_second_lock_is_refused_naming_the_process(state: StateDir) -> None:
    assert not state.is_locked()
    lock = state.lock()
    state.write_record(record())
    assert state.is_locked()
    with pytest.raises(Refused, match=rf"pid {os.getpid()} at 127\.0\.0\.1:8001; stop it with"):
        state.lock()
    os.close(lock)
    assert not state.is_locked()


def test_the_lock_lives_as_long_as_a_process_that_inherited_it(state: StateDir) -> None:
    lock = state.lock()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=[lock],
    ) as child:
        os.close(lock)
        assert state.is_locked()
        child.kill()
        child.wait()
    assert not state.is_locked()


def test_train_and_publish_exclude_each_other(state: StateDir) -> None:
    with (
        state.working("train"),
        pytest.raises(Refused, match=r"publish on .* is refused"),
        state.working("publish"),
    ):
        pass
    with state.working("publish"):
        pass


def test_a_record_is_read_as_it_was_written(state: StateDir) -> None:
    assert state.read_record() is None
    state.write_record(record())
    assert state.read_record() == record()
    state.clear_record()
    assert state.read_record() is None


def test_a_damaged_record_is_named(state: StateDir) -> None:
    state.record_file.write_text("{}")
    with pytest.raises(CommandError, match=r"cluster\.json: guard: field required"):
        state.read_record()


def test_coverage_counts_the_documents_of_serving_shards() -> None:
    lost = ShardRecord(shard=1, state="restarting", documents=4, reason="process 5 ended")
    part = record(shards=(ShardRecord(shard=0, state="serving", documents=6), lost))
    assert part.coverage == 0.6
    assert not part.is_whole
    assert record().coverage == 1.0
    assert record().is_whole
    assert not record(router=RouterRecord(state="restarting")).is_whole
    assert record(shards=(), documents=0).coverage == 1.0


def test_leftovers_are_ended_and_strangers_are_not(state: StateDir, tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    ray_dir = tmp_path / "silvershard-abc"
    ray_dir.mkdir()
    with (
        subprocess.Popen(program, stdin=subprocess.PIPE) as own,
        subprocess.Popen(program, stdin=subprocess.PIPE) as stranger,
    ):
        mine, other = identify(own.pid), identify(stranger.pid)
        assert mine is not None
        assert other is not None
        reused = other.model_copy(update={"started": other.started - 1})
        gone = mine.model_copy(update={"pid": 1 << 22})
        state.write_record(
            record(guard=gone, driver=gone, processes=(mine, reused), ray_dir=str(ray_dir))
        )
        assert state.clean_leftovers() == 1
        assert not is_alive(mine)
        assert is_alive(other)
        stranger.kill()
    assert not ray_dir.exists()
    assert state.read_record() is None
    assert state.clean_leftovers() == 0


def test_only_directories_of_our_name_are_removed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    remove_ray_dir(str(tmp_path / "other"))
    remove_ray_dir("")
    assert (tmp_path / "other").is_dir()


def test_a_write_that_fails_leaves_the_old_file(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = state.root / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_record_of_another_boot_is_no_running_cluster(state: StateDir) -> None:
    elsewhere = myself().model_copy(update={"boot": "another"})
    state.write_record(record(guard=elsewhere, driver=elsewhere))
    began_s = time.monotonic()
    assert state.clean_leftovers() == 0
    assert time.monotonic() - began_s < 1.0


def test_a_cluster_is_whole_with_its_sequencer_and_every_replica() -> None:
    assert record().is_whole
    away = SequencerRecord(state="restarting")
    assert not record(sequencer=away).is_whole
    assert record(sequencer=away.model_copy(update={"state": "serving"})).is_whole
    copy = ShardRecord(shard=1, replica=1, state="starting", documents=5)
    lost = record(shards=(*record().shards, copy))
    assert (lost.coverage, lost.is_whole) == (1.0, False)


def test_what_outlives_a_cluster_is_kept_when_its_record_is_cleared(state: StateDir) -> None:
    state.write_record(record())
    state.shard_map_file.write_text("{}")
    kept = (state.control_file, state.updates_file)
    for path in kept:
        path.write_text("x")
    state.coming_map_file.write_text("{}")
    state.clear_record()
    assert not state.record_file.exists()
    assert not state.coming_map_file.exists()
    assert not state.shard_map_file.exists()
    assert all(path.exists() for path in kept)
