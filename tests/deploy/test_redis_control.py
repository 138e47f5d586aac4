import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.deploy.control_store import Conflict, Control
from silvershard.deploy.redis_control import RedisControlStore
from silvershard.shard.errors import ConfigError, StateError


@pytest.fixture
def server(make_redis: Callable[..., Any]) -> Iterator[Any]:
    one = make_redis()
    yield one
    one.kill()


@pytest.fixture
def store(server: Any) -> RedisControlStore:
    return RedisControlStore(server.url())


def test_a_change_is_read_back_by_whoever_asks(store: RedisControlStore, server: Any) -> None:
    assert store.read() == Control()
    written = store.write(Control(live=3))
    assert written == Control(version=1, live=3)
    assert RedisControlStore(server.url()).read() == written
    assert RedisControlStore(server.url("other")).read() == Control()
    assert store.write(written.pointed("live", 4)) == Control(version=2, live=4, previous=3)


def test_a_change_of_what_somebody_else_changed_is_refused(store: RedisControlStore) -> None:
    store.write(Control(live=1))
    with pytest.raises(Conflict, match="after version 0"):
        store.write(Control(live=9))
    second = store.read()
    store.write(second.pointed("live", 2))
    with pytest.raises(Conflict, match="after version 1"):
        store.write(second.pointed("live", 3))
    assert store.read().live == 2


def test_changes_of_many_threads_are_all_taken(server: Any) -> None:
    def add(number: int) -> None:
        mine = RedisControlStore(server.url())
        for _ in range(5):
            mine.change(lambda now: now.model_copy(update={"canary": now.canary + number}))

    threads = [threading.Thread(target=add, args=(number,)) for number in (1, 10, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert RedisControlStore(server.url()).read() == Control(version=15, canary=555)


def test_a_change_whose_answer_was_lost_is_no_conflict(
    store: RedisControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store._replace

    def twice(**arguments: Any) -> Any:
        made(**arguments)
        return made(**arguments)

    monkeypatch.setattr(store, "_replace", twice)
    assert store.write(Control(live=1)).version == 1
    assert store.read().live == 1


def test_a_change_survives_a_server_that_is_killed(store: RedisControlStore, server: Any) -> None:
    store.write(Control(live=5))
    server.kill()
    with pytest.raises(StateError, match=r"control store redis://.*: cannot be reached"):
        RedisControlStore(server.url(), 0.2).read()
    server.start()
    assert store.read().live == 5


def test_a_server_that_could_lose_a_change_is_refused(make_redis: Callable[..., Any]) -> None:
    server = make_redis(appendfsync="everysec")
    with pytest.raises(StateError, match="appendfsync of the server must be always"):
        RedisControlStore(server.url()).write(Control(live=1))
    server.kill()


def test_what_is_no_document_is_named(store: RedisControlStore) -> None:
    store._server.client.hset("silvershard:control", mapping={"version": 1, "document": "{"})
    with pytest.raises(StateError, match=r"control store redis://.*: content: Invalid JSON"):
        store.read()


def test_a_password_is_never_shown(make_redis: Callable[..., Any]) -> None:
    server = make_redis(requirepass="secret")
    wrong = server.url().replace("//", "//:guessed@")
    with pytest.raises(StateError, match="access was refused") as caught:
        RedisControlStore(wrong).read()
    assert "guessed" not in str(caught.value)
    server.kill()


def test_a_url_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefix that is not empty"):
        RedisControlStore("redis://127.0.0.1:1/0?prefix=")
