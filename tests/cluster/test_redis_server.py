import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.cluster.redis_server import NotDurable, RedisServer, ServerUnavailable
from silvershard.shard.errors import ConfigError


@pytest.fixture
def server(make_redis: Callable[..., Any]) -> Iterator[Any]:
    one = make_redis()
    yield one
    one.kill()


def test_the_url_is_shown_without_password_and_options_of_our_own() -> None:
    made = RedisServer("redis://me:secret@somewhere:7/3?prefix=films&trust_durability=1", 1.0)
    assert (made.url, made.prefix) == ("redis://somewhere:7/3?prefix=films", "films")
    assert RedisServer("redis://here", 1.0).url == "redis://here:6379?prefix=silvershard"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h?trust_durability=2", "trust_durability 0 or 1 .*, got '2'"),
        ("redis://h?prefix=", "a prefix that is not empty, got '0' and ''"),
        ("redis://h?socket_timeout=soon", "the url of a Redis server cannot be used"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RedisServer(url, 1.0)


def test_a_call_waits_for_a_server_that_comes_back(server: Any) -> None:
    made = RedisServer(server.url(), 20.0)
    made.call(lambda: made.client.set("key", "value"))
    server.kill()
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(made.call(lambda: made.client.get("key")))
    )
    asking.start()
    server.start()
    asking.join(30)
    assert found == [b"value"]
    made.close()


def test_a_server_that_stays_away_is_an_error_in_time(server: Any) -> None:
    made = RedisServer(server.url(), 0.1)
    server.kill()
    with pytest.raises(ServerUnavailable, match="cannot be reached"):
        made.call(made.client.ping)


def test_a_server_that_is_not_durable_is_refused_at_every_connection(server: Any) -> None:
    made = RedisServer(server.url(), 5.0)
    made.call(lambda: made.client.config_set("appendfsync", "everysec"))
    made.client.connection_pool.disconnect()
    with pytest.raises(NotDurable, match="appendfsync of the server must be always"):
        made.call(made.client.ping)


def test_closing_lets_calls_end_and_refuses_new_ones(server: Any) -> None:
    made = RedisServer(server.url(), 5.0)
    begun, free = threading.Event(), threading.Event()

    def work() -> Any:
        begun.set()
        assert free.wait(10)
        return made.client.ping()

    found: list[Any] = []
    calling = threading.Thread(target=lambda: found.append(made.call(work)))
    calling.start()
    assert begun.wait(10)
    made.close()
    with pytest.raises(ServerUnavailable, match="is closed"):
        made.call(made.client.ping)
    free.set()
    calling.join(10)
    assert found == [True]
