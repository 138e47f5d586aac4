import asyncio
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.client import Client
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import Control
from silvershard.deploy.local_routers import LocalRouters
from silvershard.deploy.processes import identify, is_alive
from silvershard.deploy.router_watch import RouterWatch
from silvershard.deploy.state import RouterPhase, RouterRecord, StateDir
from silvershard.shard.load import load_executor


class FakeRouter:
    """A router without a process."""

    def __init__(self, config: Config, number: int) -> None:
        self.config = config
        self.number = number
        self.phase: RouterPhase = "starting"
        self.address = ""
        self.http = ""
        self.refused = ""
        self.has_failed = False
        self.is_replacing = False
        self.did: list[str] = []
        self.stopped = False

    @property
    def record(self) -> RouterRecord:
        return RouterRecord(state=self.phase, pid=1 + self.number)

    def start(self) -> None:
        self.did.append("start")

    def poll(self) -> None:
        pass

    def serve(self, port: int = 8001) -> None:
        self.phase, self.address = "serving", f"127.0.0.1:{port}"
        self.http = f"127.0.0.1:{9000 + self.number}"

    def replace(self) -> None:
        self.did.append("replace")
        self.is_replacing = True

    def begin_stop(self) -> None:
        self.did.append("begin_stop")

    def end_stop(self) -> None:
        self.did.append("end_stop")

    def has_stopped(self) -> bool:
        return self.stopped

    def last_words(self) -> str:
        return f"words of {self.number}"


def fakes(tmp_path: Path, **options: Any) -> tuple[LocalRouters, list[FakeRouter]]:
    made: list[FakeRouter] = []

    def make(config: Config, number: int) -> Any:
        made.append(FakeRouter(config, number))
        return made[-1]

    config = load(None, environ={}, options=options)
    return LocalRouters(StateDir(tmp_path), config, make=make), made


def test_one_router_is_shown_as_the_only_one(tmp_path: Path) -> None:
    routers, (first,) = fakes(tmp_path)
    assert (routers.phase, routers.address, routers.records) == ("starting", "", ())
    routers.start()
    first.serve()
    routers.poll()
    assert (routers.phase, routers.address, routers.http) == (
        "serving",
        "127.0.0.1:8001",
        "127.0.0.1:9000",
    )
    assert (routers.record.pid, routers.records) == (1, ())


def test_further_routers_follow_on_the_port_of_the_first(tmp_path: Path) -> None:
    routers, made = fakes(tmp_path, **{"runtime.routers": 3, "listen.port": 0})
    routers.start()
    routers.poll()
    # Nobody knows yet which port it will be.
    assert len(made) == 1
    made[0].serve(4711)
    assert routers.phase == "starting"
    routers.poll()
    routers.poll()
    assert [one.did for one in made] == [["start"]] * 3
    assert [one.config.listen.port for one in made] == [0, 4711, 4711]
    assert [one.config.observability.http for one in made[1:]] == ["127.0.0.1:0"] * 2
    made[1].serve(4711)
    assert routers.phase == "starting"
    made[2].serve(4711)
    assert (routers.phase, routers.is_sized) == ("serving", True)
    assert [(one.pid, one.address, one.http) for one in routers.records] == [
        (1 + number, "127.0.0.1:4711", f"127.0.0.1:{9000 + number}") for number in range(3)
    ]
    made[1].phase = "restarting"
    assert routers.phase == "restarting"
    made[1].has_failed = True
    assert (routers.has_failed, routers.last_words()) == (True, "words of 1")


def serving(tmp_path: Path, number: int) -> tuple[LocalRouters, list[FakeRouter]]:
    routers, made = fakes(tmp_path, **{"runtime.routers": number})
    routers.start()
    made[0].serve()
    for _ in range(1, number):
        routers.poll()
        made[-1].serve()
    return routers, made


def test_routers_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    routers, made = serving(tmp_path, 2)
    routers.replace()
    routers.poll()
    assert routers.is_replacing
    assert [one.did[1:] for one in made] == [["replace"], []]
    made[0].is_replacing = False
    routers.poll()
    assert routers.is_replacing
    assert [one.did[1:] for one in made] == [["replace"], ["replace"]]
    made[1].is_replacing = False
    routers.poll()
    assert (routers.is_replacing, routers.refused) == (False, "")


def test_the_rest_is_left_alone_where_one_cannot_be_replaced(tmp_path: Path) -> None:
    routers, made = serving(tmp_path, 2)
    routers.replace()
    made[0].is_replacing, made[0].refused = False, "it could not start"
    routers.poll()
    assert (routers.is_replacing, routers.refused) == (False, "it could not start")
    assert made[1].did == ["start"]


def test_there_are_more_or_fewer_of_them(tmp_path: Path) -> None:
    routers, made = serving(tmp_path, 1)
    routers.resize(2)
    assert (routers.phase, routers.is_sized) == ("starting", False)
    routers.poll()
    made[1].serve()
    assert routers.is_sized
    routers.replace()
    routers.resize(1)
    assert made[1].did == ["start", "begin_stop"]
    # What it was asked before is still being answered.
    assert not routers.is_sized
    made[1].stopped = True
    routers.poll()
    assert routers.is_sized
    made[0].is_replacing = False
    routers.poll()
    assert not routers.is_replacing
    routers.stop()
    assert made[0].did[-2:] == ["begin_stop", "end_stop"]
    assert made[1].did[-1] == "begin_stop"


def test_the_control_store_says_how_many_there_shall_be(tmp_path: Path) -> None:
    routers, made = serving(tmp_path, 2)
    routers.follow(Control())
    assert routers.is_sized
    routers.follow(Control(routers=3))
    routers.poll()
    assert len(made) == 3
    routers.follow(Control(routers=1))
    assert [one.did[-1] for one in made] == ["start", "begin_stop", "begin_stop"]


@pytest.fixture
def state(generation: Any, tmp_path: Path) -> Iterator[StateDir]:
    """A state directory whose map names a shard on a thread of this process."""
    directory = StateDir(tmp_path)
    directory.create()
    server = ShardServer(load_executor(generation.path, 0, 1))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
    entry = ShardEntry(
        shard=0,
        replica=0,
        address=server.address,
        epoch=server.epoch,
        documents=server.executor.documents,
        pid=os.getpid(),
    )
    ShardMap(
        version=1, generation=1, snapshot=str(generation.path), num_shards=1, entries=(entry,)
    ).write_atomic(directory.shard_map_file)
    try:
        yield directory
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Load(threading.Thread):
    """Asks all the time, on one connection after the other."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.answered = 0
        self.failures: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            with Client(self.address, timeout_s=30.0) as client:
                for _ in range(20):
                    try:
                        found = client.retrieve(k=3)
                        assert found.coverage.documents == 1.0
                        self.answered += 1
                    except Exception as error:  # noqa: BLE001  # the test says which
                        self.failures.append(str(error))


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + 100
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def test_no_request_fails_while_routers_are_replaced_added_and_ended(state: StateDir) -> None:
    config = load(None, environ={}, options={"listen.port": 0, "runtime.routers": 2})
    routers = LocalRouters(state, config)
    routers.start()
    loads: list[Load] = []
    try:
        until(lambda: routers.poll() or routers.is_sized, "they do not serve")
        before = [one.pid for one in routers.records]
        alive = [identify(pid) for pid in before]
        loads = [Load(routers.address) for _ in range(2)]
        for one in loads:
            one.start()
        until(lambda: all(one.answered > 5 for one in loads), "nobody answers")
        routers.replace()
        until(lambda: routers.poll() or not routers.is_replacing, "they are not replaced")
        assert routers.refused == ""
        assert not any(one is not None and is_alive(one) for one in alive)
        assert not {one.pid for one in routers.records} & set(before)
        assert [one.restarts for one in routers.records] == [0, 0]
        routers.resize(3)
        until(lambda: routers.poll() or routers.is_sized, "no third one")
        pages = [ready(one.http) for one in routers.records]
        assert pages == [True] * 3
        routers.resize(1)
        until(lambda: routers.poll() or routers.is_sized, "they do not end")
        answered = [one.answered for one in loads]
        until(
            lambda: all(
                one.answered > 20 + then for one, then in zip(loads, answered, strict=True)
            ),
            "nobody answers any more",
        )
    finally:
        for one in loads:
            one.ended.set()
        for one in loads:
            one.join(60)
        routers.stop()
    assert [one.failures for one in loads] == [[], []]


def ready(http: str) -> bool:
    with urllib.request.urlopen(f"http://{http}/readyz", timeout=20) as answer:
        return bool(json.load(answer)["ready"])


def test_a_router_that_cannot_reach_every_shard_takes_nobody_s_place(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.deploy.router_watch._REPLACE_S", 2.0)
    watch = RouterWatch(state, load(None, environ={}, options={"listen.port": 0}))
    try:
        watch.start()
        until(lambda: watch.poll() or watch.phase == "serving", "it does not serve")
        before = watch.record.pid
        state.shard_map_file.unlink()
        watch.replace()
        assert watch.is_replacing
        until(lambda: watch.poll() or not watch.is_replacing, "it waits")
        assert watch.refused == ("the one in its place ended: not every shard was reached in 2 s")
        assert (watch.record.pid, watch.phase) == (before, "serving")
        with Client(watch.address) as client:
            assert client.retrieve(k=1).coverage.documents == 1.0
    finally:
        watch.stop()
