import os
import threading
from pathlib import Path

import pytest

from silvershard.cluster import secret_file
from silvershard.cluster.secret_file import check_private, make_secret, read_secret
from silvershard.shard.errors import ConfigError


def test_a_secret_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    before = os.umask(0)
    try:
        make_secret(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    secret = read_secret(path)
    assert len(secret) > 40
    make_secret(path)
    assert read_secret(path) == secret
    make_secret(tmp_path / "other")
    assert read_secret(tmp_path / "other") != secret
    assert sorted(one.name for one in tmp_path.iterdir()) == ["other", "secret"]


def test_those_who_make_it_at_the_same_time_get_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "secret", os.link
    barrier, found = threading.Barrier(2), []

    def together(source: Path, target: Path) -> None:
        barrier.wait(10)
        link(source, target)

    # Threads share the number of their process, which names what they write.
    monkeypatch.setattr(secret_file.os, "getpid", threading.get_ident)
    monkeypatch.setattr(secret_file.os, "link", together)

    def make() -> None:
        make_secret(path)
        found.append(read_secret(path))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    assert len(found) == 2
    assert len(set(found)) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    make_secret(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"owner alone, got mode {mode:04o}: chmod 600"):
        read_secret(path)


@pytest.mark.parametrize("content", ["", "short", "x" * 20 + " " + "y" * 20, "ü" * 40])
def test_what_is_no_secret_is_refused_and_not_repeated(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="must hold at least 32") as raised:
        read_secret(path)
    assert not content or content not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"security\.secret .*nowhere: No such file"):
        read_secret(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"security\.secret .*No such file"):
        make_secret(tmp_path / "no" / "folder")


def test_a_group_may_read_what_root_has_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mounted"
    path.write_text("x")
    path.chmod(0o440)

    class Status:
        st_uid, st_mode = 0, path.stat().st_mode

    monkeypatch.setattr(Path, "stat", lambda self: Status)
    monkeypatch.setattr(secret_file.os, "geteuid", lambda: 1000)
    check_private(path, "file")
    monkeypatch.setattr(secret_file.os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match=r"file .* owner alone"):
        check_private(path, "file")
