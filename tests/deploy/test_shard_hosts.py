import os
from collections.abc import Mapping
from typing import Any

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_hosts import ShardHosts


class FakeHost:
    def __init__(self, address: str) -> None:
        self.address = address
        self.held: Mapping[int, Held] | None = None
        self.polls = 0
        self.closed = False

    def poll(self) -> None:
        self.polls += 1

    def close(self) -> None:
        self.closed = True


class FakeWatch:
    def __init__(self, shard: int, replica: int = 0) -> None:
        self.shard, self.replica = shard, replica
        self.entry: ShardEntry | None = None

    def serve(self, epoch: int = 1) -> None:
        self.entry = ShardEntry(
            shard=self.shard,
            replica=self.replica,
            address=f"127.0.0.1:{9000 + self.shard}",
            epoch=epoch,
            documents=1,
            pid=os.getpid(),
        )


def held(state: str) -> Held:
    return Held(state, "", 9, (), (), 0.0, 0, 0, 0)


def test_there_is_one_way_to_each_incarnation() -> None:
    made: list[Any] = []

    def connect(address: str) -> Any:
        made.append(FakeHost(address))
        return made[-1]

    hosts = ShardHosts(connect)
    watches: Any = [FakeWatch(0), FakeWatch(1)]
    hosts.follow(watches)
    assert len(hosts) == 0
    watches[0].serve()
    hosts.follow(watches)
    hosts.follow(watches)
    assert [(one.address, one.polls) for one in made] == [("127.0.0.1:9000", 2)]
    watches[0].serve(epoch=2)
    hosts.follow(watches)
    assert [one.closed for one in made] == [True, False]
    assert hosts.entries == {(0, 0): watches[0].entry}
    watches[0].entry = None
    hosts.follow(watches)
    assert (len(hosts), made[1].closed) == (0, True)


def test_it_knows_who_has_prepared_what() -> None:
    made: dict[str, Any] = {}

    def connect(address: str) -> Any:
        return made.setdefault(address, FakeHost(address))

    hosts = ShardHosts(connect)
    watches: Any = [FakeWatch(0), FakeWatch(1)]
    for one in watches:
        one.serve()
    hosts.follow(watches)
    assert hosts.reports == {(0, 0): {}, (1, 0): {}}
    made["127.0.0.1:9000"].held = {4: held("prepared"), 5: held("loading")}
    made["127.0.0.1:9001"].held = {5: held("prepared")}
    assert hosts.prepared(4) == [(0, 0)]
    assert hosts.prepared(5) == [(1, 0)]
    hosts.close()
    assert (len(hosts), hosts.entries) == (0, {})
    assert all(one.closed for one in made.values())
