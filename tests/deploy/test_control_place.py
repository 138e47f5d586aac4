import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.control_place import URL_FILE, control_store, move_control
from silvershard.deploy.control_store import Control, FileControlStore
from silvershard.deploy.errors import Refused
from silvershard.deploy.redis_control import RedisControlStore
from silvershard.shard.errors import ConfigError


@pytest.fixture
def server(make_redis: Callable[..., Any]) -> Iterator[Any]:
    one = make_redis()
    yield one
    one.kill()


def test_a_directory_that_names_no_server_has_a_file(tmp_path: Path) -> None:
    store = control_store(tmp_path)
    assert isinstance(store, FileControlStore)
    assert store.path == tmp_path / "control.sqlite"
    move_control(tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_what_was_written_moves_to_the_server_and_stays_there(tmp_path: Path, server: Any) -> None:
    control_store(tmp_path).write(Control(live=3, state_id="mine"))
    control_store(tmp_path).change(lambda now: now.pointed("live", 4))
    for _ in range(2):
        move_control(tmp_path, server.url())
        store = control_store(tmp_path)
        assert isinstance(store, RedisControlStore)
        moved = store.read()
        assert (moved.live, moved.previous, moved.state_id, moved.version) == (4, 3, "mine", 1)
    assert stat.S_IMODE((tmp_path / URL_FILE).stat().st_mode) == 0o600
    # No url leaves it where it is.
    move_control(tmp_path, "")
    assert isinstance(control_store(tmp_path), RedisControlStore)


def test_a_new_directory_joins_what_the_server_has(tmp_path: Path, server: Any) -> None:
    RedisControlStore(server.url()).write(Control(live=7, state_id="theirs"))
    move_control(tmp_path, server.url())
    assert control_store(tmp_path).read().live == 7


def test_the_store_of_another_cluster_is_not_overwritten(tmp_path: Path, server: Any) -> None:
    control_store(tmp_path).write(Control(live=3, state_id="mine"))
    RedisControlStore(server.url()).write(Control(live=7, state_id="theirs"))
    with pytest.raises(Refused, match="is that of another cluster: name another prefix"):
        move_control(tmp_path, server.url())
    assert isinstance(control_store(tmp_path), FileControlStore)
    assert RedisControlStore(server.url()).read().live == 7
    move_control(tmp_path, server.url("other"))
    assert control_store(tmp_path).read().live == 3


@pytest.mark.parametrize("state_id", ["mine", ""])
def test_a_move_that_was_interrupted_is_finished(
    tmp_path: Path, server: Any, state_id: str
) -> None:
    control_store(tmp_path).write(Control(live=3, state_id=state_id))
    move_control(tmp_path, server.url())
    (tmp_path / URL_FILE).unlink()
    move_control(tmp_path, server.url())
    assert control_store(tmp_path).read() == Control(version=1, live=3, state_id=state_id)


def test_without_the_client_of_redis_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("deploy.redis_control", "cluster.redis_server"):
        monkeypatch.delitem(sys.modules, f"silvershard.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    (tmp_path / URL_FILE).write_text("redis://127.0.0.1:1/0\n")
    with pytest.raises(ConfigError, match=r"pip install 'silvershard\[redis\]'"):
        control_store(tmp_path)
