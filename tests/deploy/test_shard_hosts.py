import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silvershard.cluster.shard_map import ShardEntry
from silvershard.deploy.shard_host import Held
from silvershard.deploy.shard_hosts import ShardHosts, reconcile


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


class Wishing(FakeHost):
    """A process that notes what it is wished for."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")
        self.wishes: list[tuple[str, int]] = []

    def prepare(self, generation: int, snapshot: str) -> None:
        assert snapshot == f"gen-{generation}"
        self.wishes.append(("prepare", generation))

    def retire(self, generation: int) -> None:
        self.wishes.append(("retire", generation))


def wishes(states: dict[int, str], wanted: set[int], live: int) -> list[tuple[str, int]]:
    host = Wishing()
    holding = {number: held(state) for number, state in states.items()}
    reconcile(host, holding, wanted, live=live, path=lambda one: Path(f"gen-{one}"))
    return host.wishes


def test_a_process_is_wished_to_hold_what_it_shall() -> None:
    assert wishes({1: "prepared"}, {1}, 1) == []
    assert wishes({}, {1, 2, 3}, 2) == [("prepare", 2), ("prepare", 1), ("prepare", 3)]
    # What is given up makes the room for what comes.
    assert wishes({1: "prepared", 4: "failed"}, {1, 2}, 1) == [("retire", 4)]
    # Only the live one is tried again.
    assert wishes({1: "failed", 2: "failed"}, {1, 2}, 2) == [("prepare", 2)]


def test_processes_take_the_places_of_others() -> None:
    made: list[Any] = []

    def connect(address: str) -> Any:
        made.append(FakeHost(address))
        return made[-1]

    hosts, others = ShardHosts(connect), ShardHosts(connect)
    first: Any = [FakeWatch(0), FakeWatch(1)]
    second: Any = [FakeWatch(1)]
    for one in first:
        one.serve()
    second[0].serve(epoch=2)
    hosts.follow(first)
    others.follow(second)
    hosts.relieve(others)
    assert [one.closed for one in made] == [False, True, False]
    hosts.follow([first[0], second[0]])
    assert [one.closed for one in made] == [False, True, False]
    assert hosts.entries[1, 0].epoch == 2
    assert hosts.by_key[1, 0] is made[2]


def test_entries_of_some_processes_say_what_they_serve() -> None:
    watches = [FakeWatch(1), FakeWatch(0)]
    for watch in watches:
        watch.serve()
    hosts = ShardHosts(FakeHost)  # type: ignore[arg-type]
    hosts.follow(watches)  # type: ignore[arg-type]
    found = hosts.entries_of({(0, 0), (1, 0)}, lambda shard: 10 + shard)
    assert [(one.shard, one.documents) for one in found] == [(0, 10), (1, 11)]
    assert [one.shard for one in hosts.entries_of({(1, 0)}, lambda _: 0)] == [1]
    hosts.close()
