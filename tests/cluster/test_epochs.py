from collections.abc import Callable
from typing import Any

from silvershard.cluster.epochs import next_epoch


def test_an_epoch_is_larger_than_every_earlier_one_whatever_the_clocks_say(
    make_redis: Callable[..., Any],
) -> None:
    url = make_redis().url()
    first = next_epoch(url, "shard-0-1", unix_us=lambda: 1_795_459_161_900_568)
    assert first == 1_795_459_161_900_568
    # A host whose clock is behind, and one whose clock stands still.
    assert next_epoch(url, "shard-0-1", unix_us=lambda: 5) == first + 1
    assert next_epoch(url, "shard-0-1", unix_us=lambda: first) == first + 2
    assert next_epoch(url, "shard-0-1", unix_us=lambda: first + 9) == first + 9
    assert next_epoch(url, "shard-1-1", unix_us=lambda: 5) == 5
    other = url.replace("prefix=silvershard", "prefix=other")
    assert next_epoch(other, "shard-0-1", unix_us=lambda: 6) == 6


def test_a_server_that_is_away_is_waited_for(make_redis: Callable[..., Any]) -> None:
    server = make_redis()
    assert next_epoch(server.url(), "shard-0-0", unix_us=lambda: 7) == 7
    server.kill()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            server.start()

    assert next_epoch(server.url(), "shard-0-0", unix_us=lambda: 7, sleep=sleep) == 8
    assert len(slept) == 2
