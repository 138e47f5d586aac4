from typing import Any

from silvershard.deploy.config import load
from silvershard.deploy.shard_set import ShardSet


class Handle:
    def __init__(self, *place: int) -> None:
        self.place = place
        self.asked = 0
        self.ended = False

    def restarts(self) -> int:
        self.asked += 1
        return 0

    def entry(self) -> Any:
        return None

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


def test_copies_come_and_go() -> None:
    config = load(None, environ={}, options={"sharding.shards": 2})
    handles: list[Handle] = []

    def start(*place: int) -> Handle:
        handles.append(Handle(*place))
        return handles[-1]

    processes = ShardSet(config.sharding, start, config.runtime)
    processes.start(range(2))
    assert [one.place for one in handles] == [(2, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)]
    processes.poll()
    assert [one.asked for one in handles] == [1] * 4
    assert [(one.shard, one.replica) for one in processes.of({1})] == [(0, 1), (1, 1)]
    processes.restart(1, 0)
    assert (handles[1].ended, handles[4].place) == (True, (2, 1, 0))
    assert [(one.shard, one.replica) for one in processes.watches] == [
        *((0, 0), (1, 0)),
        *((0, 1), (1, 1)),
    ]
    handles.remove(handles[1])
    processes.end(range(1, 2))
    assert [one.ended for one in handles] == [False, True, True, False]
    assert [(one.shard, one.replica) for one in processes.watches] == [(0, 0), (1, 0)]
    processes.add(1, 1)
    assert handles[4].place == (2, 1, 1)
    other = ShardSet(config.sharding, start, config.runtime)
    other.add(1, 0)
    before = processes.relieve(other.watches)
    assert [(one.shard, one.replica) for one in before] == [(1, 0)]
    assert processes.watches[1] is other.watches[0]
    assert not any(one.ended for one in handles[3:])
    for one in before:
        one.end()
    processes.end()
    assert all(one.ended for one in handles)
    assert processes.watches == []
