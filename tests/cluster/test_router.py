import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import retrieval_pb2, retrieval_pb2_grpc
from silvershard.cluster.client import Client, RequestRefused
from silvershard.cluster.config import (
    AdmissionSection,
    ConcurrencySection,
    ListenSection,
    ObservabilitySection,
    PingSection,
    RouterConfig,
)
from silvershard.cluster.hosting import Loaded
from silvershard.cluster.router import Router
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.model.request import Request
from silvershard.shard.errors import SnapshotError, StateError
from silvershard.shard.snapshot import open_snapshot

SHARD_PROCESS = Path(__file__).parent / "shard_process.py"


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the state that was waited for did not come"
        time.sleep(0.002)


@pytest.fixture
def make_router(loop_thread: Any, tmp_path: Path) -> Iterator[Callable[..., Router]]:
    """``make_router(**config)`` starts a router that follows ``tmp_path / "map.json"``."""
    routers: list[Router] = []

    def make(**config: Any) -> Router:
        fields = {
            "map_path": str(tmp_path / "map.json"),
            "poll_ms": 5,
            "drain_s": 2.0,
            "listen": ListenSection(port=0),
            "ping": PingSection(every_ms=20, suspect_after=20, eject_after=50),
        }
        router = Router(RouterConfig(**{**fields, **config}))
        routers.append(router)
        loop_thread.call(router.start())
        return router

    yield make
    for router in routers:
        loop_thread.call(router.stop())


@pytest.fixture
def make_server(loop_thread: Any) -> Iterator[Callable[..., ShardServer]]:
    servers: list[ShardServer] = []

    def make(executor: Any, **options: Any) -> ShardServer:
        server = ShardServer(executor, **options)
        servers.append(server)
        loop_thread.call(server.start())
        return server

    yield make
    for server in servers:
        loop_thread.call(server.stop(0))


@pytest.fixture
def write_map(tmp_path: Path, generation: Any, map_entry: Any) -> Callable[..., ShardMap]:
    """``write_map(*served)`` writes a map of servers in this process, or of entries."""

    def write(*served: ShardServer | ShardEntry, version: int = 1, **more: Any) -> ShardMap:
        entries = tuple(map_entry(one) if isinstance(one, ShardServer) else one for one in served)
        fields = {"generation": 1, "snapshot": str(generation.path), "num_shards": 2}
        shard_map = ShardMap(**{**fields, **more}, version=version, entries=entries)
        shard_map.write_atomic(tmp_path / "map.json")
        return shard_map

    return write


@pytest.fixture
def client_of() -> Iterator[Callable[[Any], Client]]:
    with contextlib.ExitStack() as stack:
        yield lambda address: stack.enter_context(Client(address, timeout_s=20))


def health(address: str, name: str, timeout_s: float = 5.0) -> str:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_without_a_map_the_router_is_not_ready_and_picks_it_up(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
) -> None:
    router = make_router()
    client = client_of(router.address)
    assert health(router.address, "") == "NOT_SERVING"
    assert health(router.address, "silvershard.v1.Retrieval") == "NOT_SERVING"
    assert not client.is_ready()
    with pytest.raises(RequestRefused) as raised:
        client.retrieve(k=1)
    assert (raised.value.code, raised.value.reason) == ("UNAVAILABLE", "NOT_READY")
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers)
    client.wait_until_ready(10)
    assert client.retrieve(k=1).coverage.documents == 1.0
    until(lambda: health(router.address, "model/films") == "SERVING")


def test_readiness_is_latched_while_the_health_of_the_model_follows_the_coverage(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(servers[0])
    router = make_router()
    client = client_of(router.address)
    assert client.retrieve(k=1, min_coverage=0.0).is_partial
    assert health(router.address, "") == "NOT_SERVING"
    assert health(router.address, "model/films") == "NOT_SERVING"
    write_map(*servers, version=2)
    client.wait_until_ready(10)
    until(lambda: health(router.address, "model/films") == "SERVING")
    loop_thread.call(servers[1].stop(0))
    until(lambda: health(router.address, "model/films") == "NOT_SERVING")
    assert client.is_ready()


def page(router: Router, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(router.http_address, timeout=10)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_over_http_it_says_how_it_is_what_it_serves_and_what_it_counted(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    router = make_router(observability=ObservabilitySection(http="127.0.0.1:0"))
    assert page(router, "/livez") == (200, "ok\n")
    assert page(router, "/readyz")[0] == 503
    client = client_of(router.address)
    with pytest.raises(RequestRefused):
        client.retrieve(k=1)
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers, version=4)
    client.wait_until_ready(10)
    until(lambda: page(router, "/healthz")[0] == 200)
    assert page(router, "/readyz")[0] == 200
    about = json.loads(page(router, "/version")[1])
    answer = client.retrieve(k=1)
    assert about["generation"] == answer.generation == 1
    assert about["content_hash"] == answer.content_hash
    assert (about["model"], about["shard_map_version"]) == ("films", 4)
    loop_thread.call(servers[1].stop(0))
    until(lambda: page(router, "/healthz")[0] == 503)
    # Latched, as the health of gRPC is.
    assert page(router, "/readyz")[0] == 200
    assert 0 < json.loads(page(router, "/healthz")[1])["coverage"] < 1
    assert client.retrieve(k=1, min_coverage=0.0).is_partial
    lines = page(router, "/metrics")[1].splitlines()
    assert 'silvershard_requests_total{code="OK"} 2' in lines
    # The client asked again twice before it gave up.
    assert 'silvershard_requests_total{code="UNAVAILABLE"} 3' in lines
    assert "silvershard_coverage_ratio_count 2" in lines
    assert "silvershard_queue_depth 0" in lines
    assert "silvershard_inflight_requests 0" in lines
    assert any(one.startswith("silvershard_degraded_total{") for one in lines)


def test_a_router_that_stops_is_not_ready_but_answers_until_it_has_drained(
    make_router: Any, loop_thread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = make_router(observability=ObservabilitySection(http="127.0.0.1:0"))
    seen: list[tuple[int, int]] = []
    close = router._connections.aclose

    async def look_and_close() -> None:
        states = await asyncio.to_thread(lambda: (page(router, "/livez"), page(router, "/readyz")))
        seen.append((states[0][0], states[1][0]))
        assert json.loads(states[1][1])["state"] == "draining"
        await close()

    monkeypatch.setattr(router._connections, "aclose", look_and_close)
    loop_thread.call(router.stop())
    assert seen == [(200, 503)]
    with pytest.raises(ConnectionRefusedError):
        page(router, "/livez")


def test_a_port_of_http_in_use_is_an_error_that_leaves_nothing(make_router: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StateError, match=rf"127\.0\.0\.1:{port}: address already in use"):
            make_router(observability=ObservabilitySection(http=f"127.0.0.1:{port}"))


def test_a_damaged_map_is_logged_once_and_the_last_good_one_is_kept(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    generation: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers)
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)

    def complaints(text: str) -> int:
        return sum(text in one.getMessage() for one in caplog.records)

    (tmp_path / "half").write_text("{")
    os.replace(tmp_path / "half", tmp_path / "map.json")
    until(lambda: complaints("Invalid JSON") == 1)
    write_map(*servers, version=2, generation=9)
    until(lambda: complaints("names generation 9, its snapshot holds 1") == 1)
    write_map(*servers, version=3, snapshot=str(tmp_path / "nowhere"))
    until(lambda: complaints("nowhere") == 1)
    write_map(*servers, version=4, num_shards=65)
    until(lambda: complaints("num_shards must be in 1..64") == 1)
    (tmp_path / "map.json").unlink()
    time.sleep(0.01)
    result = client.retrieve(k=3)
    assert result.shard_map_version == 1
    assert result.coverage.documents == 1.0
    assert complaints("the last good shard map is kept") == 4
    assert router._retired == set()
    write_map(*servers, version=5)
    until(lambda: client.retrieve(k=3).shard_map_version == 5)


def test_an_older_map_is_refused_but_that_of_another_start_of_the_cluster_is_taken(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers, version=7, origin="one")
    client = client_of(make_router().address)
    client.wait_until_ready(10)
    # It names a process that has left, as an older map may.
    write_map(servers[0], version=6, origin="one")
    until(lambda: "shard map version must be at least 7, which is served, got 6" in caplog.text)
    result = client.retrieve(k=3)
    assert (result.shard_map_version, result.coverage.documents) == (7, 1.0)
    write_map(*servers, version=8, origin="one")
    until(lambda: client.retrieve(k=3).shard_map_version == 8)
    write_map(*servers, version=1, origin="other")
    until(lambda: client.retrieve(k=3).shard_map_version == 1)


def test_a_snapshot_that_is_unreadable_for_a_moment_is_tried_again(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    tmp_path: Path,
    generation: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("silvershard.cluster.router._RETRY_S", 0.01)
    tries: list[Path] = []

    def counted(path: Path) -> Any:
        tries.append(path)
        return open_snapshot(path)

    monkeypatch.setattr("silvershard.cluster.router.open_snapshot", counted)
    late = tmp_path / "mounted-late"
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers, snapshot=str(late))
    client = client_of(make_router().address)
    until(lambda: len(tries) >= 3)
    assert not client.is_ready()
    assert caplog.text.count("manifest.json is missing") == 1
    late.symlink_to(generation.path)
    client.wait_until_ready(10)
    assert client.retrieve(k=3).shard_map_version == 1
    taken = len(tries)
    time.sleep(0.01)
    assert len(tries) == taken


def test_a_refused_map_is_not_read_again_before_its_time(
    make_router: Any, write_map: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Path] = []

    def refused(path: Path) -> Any:
        tries.append(path)
        raise SnapshotError(str(path), "unreadable")

    monkeypatch.setattr("silvershard.cluster.router.open_snapshot", refused)
    write_map()
    router = make_router()
    looks: list[int] = []
    follow = router.follow

    async def counted() -> None:
        looks.append(1)
        await follow()

    monkeypatch.setattr(router, "follow", counted)
    until(lambda: len(looks) >= 5)
    assert len(tries) == 1
    write_map(version=2)
    until(lambda: len(tries) == 2)


def test_an_error_while_following_the_map_is_logged_and_does_not_end_the_following(
    make_router: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router = make_router()
    looks: list[int] = []

    async def follow() -> None:
        looks.append(1)
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(router, "follow", follow)
    until(lambda: len(looks) >= 2)
    assert "ZeroDivisionError: odd" in caplog.text


def test_another_cut_of_the_same_generation_gives_the_same_answers(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    ask_whole: Any,
) -> None:
    two = [make_server(executor) for executor in make_executors(2)]
    three = [make_server(executor) for executor in make_executors(3)]
    write_map(*two)
    client = client_of(make_router().address)
    client.wait_until_ready(10)
    expected = ask_whole(Request(k=30)).item_ids.tolist()
    assert client.retrieve(k=30).item_ids.tolist() == expected
    write_map(*three, version=2, num_shards=3)

    def is_served() -> bool:
        result = client.retrieve(k=30, min_coverage=1.0)
        assert result.item_ids.tolist() == expected
        return result.coverage.shards_full == 3

    # Whoever asks while the map changes is answered by one of the two, wholly.
    until(is_served)


def test_the_old_cut_serves_until_every_shard_of_the_new_one_was_met(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    map_entry: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("silvershard.cluster.router._MEET_S", 600.0)
    two = [make_server(executor) for executor in make_executors(2)]
    three = [make_server(executor) for executor in make_executors(3)]
    write_map(*two)
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)
    entries = [map_entry(one) for one in three]
    nowhere = entries[2].model_copy(update={"address": "127.0.0.1:1"})
    write_map(*entries[:2], nowhere, version=2, num_shards=3)
    until(lambda: bool(router._coming))
    coming = router._coming[1]
    until(lambda: all(link.reached for one in (0, 1) for link in coming.links.replicas(one)))
    for _ in range(5):
        result = client.retrieve(k=30, min_coverage=1.0)
        assert (result.coverage.shards_total, result.shard_map_version) == (2, 1)
    write_map(*three, version=3, num_shards=3)
    until(lambda: client.retrieve(k=30, min_coverage=1.0).shard_map_version == 3)
    assert client.retrieve(k=30).coverage.shards_total == 3
    # What was met is what serves, and nothing is met twice.
    assert router._held[1] is coming
    assert router._coming == {}
    # A map of the old cut that comes while another one is being met ends that.
    write_map(*two, nowhere.model_copy(update={"shard": 2}), version=4, num_shards=4)
    until(lambda: bool(router._coming))
    write_map(*three, version=5, num_shards=3)
    until(lambda: client.retrieve(k=30, min_coverage=1.0).shard_map_version == 5)
    assert router._coming == {}
    assert router._held[1] is coming


def test_a_shard_of_the_new_cut_that_cannot_be_met_is_not_waited_for_forever(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    map_entry: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("silvershard.cluster.router._MEET_S", 0.05)
    two = [make_server(executor) for executor in make_executors(2)]
    three = [make_server(executor) for executor in make_executors(3)]
    write_map(*two)
    client = client_of(make_router().address)
    client.wait_until_ready(10)
    write_map(*three[:2], version=2, num_shards=3)
    until(lambda: client.retrieve(k=30, min_coverage=0.1).coverage.shards_total == 3)
    result = client.retrieve(k=30, min_coverage=0.1)
    assert result.coverage.documents < 1.0
    assert result.coverage.shards_failed == 1


def test_a_second_replica_serves_when_the_first_is_gone(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    spare = make_server(make_executors(2)[0], replica=1)
    write_map(*servers, spare)
    client = client_of(make_router().address)
    client.wait_until_ready(10)
    loop_thread.call(servers[0].stop(0))
    for _ in range(3):
        assert client.retrieve(k=5, min_coverage=1.0).coverage.documents == 1.0


def test_stopping_answers_what_is_in_flight(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    executors = make_executors(2)
    reached, let_go = threading.Event(), threading.Event()
    real_open = executors[0].open

    def held(*arguments: Any) -> Any:
        reached.set()
        assert let_go.wait(20)
        return real_open(*arguments)

    executors[0].open = held
    write_map(*map(make_server, executors))
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(client.retrieve(k=4)))
    thread.start()
    assert reached.wait(5)
    stopping = loop_thread.submit(router.stop())
    until(lambda: health_is_gone(router.address))
    let_go.set()
    thread.join(10)
    stopping.result(10)
    assert len(results[0].item_ids) == 4


def health_is_gone(address: str) -> bool:
    # A connection that is made while the port closes is answered by nobody.
    return health(address, "", 1.0) in ("NOT_SERVING", "UNAVAILABLE", "DEADLINE_EXCEEDED")


# ---- several generations of the same processes


class Renamed:
    """An executor that claims to be another generation."""

    def __init__(self, executor: Any, generation: int) -> None:
        self.executor = executor
        self.spec = executor.spec.model_copy(update={"generation": generation})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)


@pytest.fixture
def two_generations(
    make_server: Any, make_executors: Any, monkeypatch: pytest.MonkeyPatch, loop_thread: Any
) -> list[ShardServer]:
    """Servers that hold generations 1 and 2, of which a router reads both from one snapshot."""

    def opened(path: Path) -> Any:
        if path.name == "damaged":
            raise SnapshotError(str(path), "manifest.json is missing")
        snapshot = open_snapshot(path.parent if path.name == "two" else path)
        manifest = snapshot.manifest
        if path.name == "two":
            spec = manifest.spec.model_copy(update={"generation": 2})
            manifest = SimpleNamespace(spec=spec, content_hash="two", calibration=None)
        return SimpleNamespace(manifest=manifest)

    monkeypatch.setattr("silvershard.cluster.router.open_snapshot", opened)
    servers = [make_server(executor) for executor in make_executors(2)]
    for server, executor in zip(servers, make_executors(2), strict=True):
        server.hosting.add(Loaded(Renamed(executor, 2)))  # type: ignore[arg-type]
    return servers


def test_another_generation_of_the_same_processes_takes_over_without_a_new_connection(
    two_generations: Any, make_router: Any, write_map: Any, client_of: Any, generation: Any
) -> None:
    one, two = str(generation.path), str(generation.path / "two")
    write_map(*two_generations)
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)
    assert client.retrieve(k=3).generation == 1

    def connections() -> set[int]:
        return {id(held) for held, _ in router._connections._held.values()}

    before = connections()
    write_map(*two_generations, version=2, generation=2, snapshot=two, snapshots={1: one})
    until(lambda: client.retrieve(k=3).generation == 2)
    live = client.retrieve(k=3, min_coverage=1.0)
    assert (live.content_hash, live.shard_map_version) == ("two", 2)
    pinned = client.retrieve(k=3, generation=1)
    assert (pinned.generation, pinned.coverage.documents) == (1, 1.0)
    assert connections() == before
    coordinator = router._held[2].coordinator
    write_map(*two_generations, version=3, snapshots={2: two})
    until(lambda: client.retrieve(k=3).generation == 1)
    assert client.retrieve(k=3, generation=2).generation == 2
    # The generation that was live stays as it was, with all that is in flight.
    assert router._held[2].coordinator is coordinator
    write_map(*two_generations, version=4)
    until(lambda: 2 not in router._held)
    with pytest.raises(RequestRefused, match="generation 2 is not served; 1 is") as raised:
        client.retrieve(k=3, generation=2)
    assert (raised.value.code, raised.value.reason) == ("ABORTED", "GENERATION_NOT_SERVED")
    assert len(router._retired) >= 1
    assert connections() == before


def test_an_alias_is_answered_by_its_generation(
    two_generations: Any, make_router: Any, write_map: Any, client_of: Any, generation: Any
) -> None:
    two = str(generation.path / "two")
    write_map(*two_generations, snapshots={2: two}, aliases={"canary": 2})
    router = make_router()
    client_of(router.address).wait_until_ready(10)
    with grpc.insecure_channel(router.address) as channel:
        stub = retrieval_pb2_grpc.RetrievalStub(channel)

        def ask(**fields: Any) -> Any:
            return stub.Retrieve(retrieval_pb2.RetrieveRequest(k=1, **fields), timeout=10)

        assert ask(alias="canary").version.generation == 2
        assert ask(alias="live").version.generation == 1
        assert ask(generation=2).version.generation == 2
        batch = retrieval_pb2.RetrieveBatchRequest(
            requests=[
                retrieval_pb2.RetrieveRequest(k=1, alias=alias)
                for alias in ("live", "canary", "live", "nobody")
            ]
        )
        items = stub.RetrieveBatch(batch, timeout=10).items
        assert [one.response.version.generation for one in items] == [1, 2, 1, 0]
        assert "there is 'canary' and 'live'" in items[3].reason


def test_a_generation_beside_the_live_one_that_cannot_be_read_is_not_offered(
    two_generations: Any,
    make_router: Any,
    write_map: Any,
    client_of: Any,
    generation: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = str(generation.path / "damaged")
    write_map(*two_generations, snapshots={2: damaged}, aliases={"canary": 2})
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)
    assert client.retrieve(k=3).generation == 1
    assert "generation 2 is not offered" in caplog.text
    assert router._offer is not None
    assert router._offer.aliases == {}


def test_updates_go_to_the_sequencer_that_the_map_names(
    make_router: Any, make_server: Any, make_executors: Any, write_map: Any, client_of: Any
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(*servers)
    router = make_router()
    client_of(router.address).wait_until_ready(10)
    with grpc.insecure_channel(router.address) as channel:
        stub = retrieval_pb2_grpc.UpdatesStub(channel)

        def complaint() -> str:
            with pytest.raises(grpc.RpcError) as raised:
                stub.Apply(retrieval_pb2.ApplyRequest(), timeout=10)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            return str(raised.value.details())

        assert complaint() == "no sequencer takes updates at present"
        write_map(*servers, version=2, sequencer="127.0.0.1:1")
        until(lambda: "the sequencer did not answer" in complaint())


# ---- processes of their own


class ShardProcess:
    """A shard that can be killed and stopped for real."""

    def __init__(self, snapshot: Path, shard: int, hang_in: str = "") -> None:
        command = [
            sys.executable,
            "-P",
            str(SHARD_PROCESS),
            str(snapshot),
            str(shard),
            "2",
            hang_in,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.entry = ShardEntry.model_validate_json(self.process.stdout.readline())

    def wait_until_it_hangs(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "reached\n"

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def make_shard_process(generation: Any) -> Iterator[Callable[..., ShardProcess]]:
    made: list[ShardProcess] = []

    def make(shard: int, hang_in: str = "") -> ShardProcess:
        made.append(ShardProcess(generation.path, shard, hang_in))
        return made[-1]

    yield make
    for one in made:
        one.end()


class Asking:
    """A request that runs beside the test."""

    def __init__(self, client: Client, **fields: Any) -> None:
        self.fate: Any = None
        self.spent_s = 0.0
        self._thread = threading.Thread(target=self._run, args=(client, fields))
        self._thread.start()

    def _run(self, client: Client, fields: dict[str, Any]) -> None:
        started_s = time.monotonic()
        try:
            self.fate = client.retrieve(**fields)
        except RequestRefused as error:
            self.fate = error
        self.spent_s = time.monotonic() - started_s

    def result(self) -> Any:
        self._thread.join(30)
        return self.fate


def serves_map(router: Router, version: int) -> bool:
    """True once the router has taken over a map and reached the first shard in it."""
    offer = router._offer
    if offer is None or offer.generations[1].map_version != version:
        return False
    return router._held[1].links.replicas(0)[0].reached


@pytest.mark.slow
def test_a_shard_killed_in_mid_query_gives_exact_coverage_or_unavailable_and_its_successor_is_used(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    make_shard_process: Any,
    client_of: Any,
    ask_whole: Any,
    expect: Any,
) -> None:
    executors = make_executors(2)
    other = make_server(executors[1])
    share = executors[1].documents / 600
    wanted = Request(k=30)
    alone = expect([make_executors(2)[1]], wanted)[0]
    victims = [make_shard_process(0, "close") for _ in range(2)]
    router = make_router()
    client = client_of(router.address)
    for version, (victim, minimum) in enumerate(zip(victims, (0.0, 0.99), strict=True), 1):
        write_map(victim.entry, other, version=version)
        if version == 1:
            client.wait_until_ready(10)
        until(partial(serves_map, router, version))
        asking = Asking(client, k=30, min_coverage=minimum)
        victim.wait_until_it_hangs()
        victim.signal(signal.SIGKILL)
        fate = asking.result()
        assert asking.spent_s < 5
        if minimum:
            assert isinstance(fate, RequestRefused)
            assert fate.code == "UNAVAILABLE"
        else:
            assert fate.item_ids.tolist() == alone
        assert fate.coverage.documents == share
        assert fate.coverage.reasons == ("SHARD_UNAVAILABLE",)
    successor = make_shard_process(0)
    write_map(successor.entry, other, version=3)
    until(lambda: client.retrieve(k=1, min_coverage=0.0).coverage.documents == 1.0)
    result = client.retrieve(k=30)
    assert result.item_ids.tolist() == ask_whole(wanted).item_ids.tolist()


@pytest.mark.slow
def test_a_stopped_shard_costs_its_time_once_and_is_used_again_when_it_goes_on(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    make_shard_process: Any,
    client_of: Any,
) -> None:
    executors = make_executors(2)
    victim = make_shard_process(0)
    write_map(victim.entry, make_server(executors[1]))
    ping = PingSection(every_ms=50, suspect_after=10, eject_after=40)
    router = make_router(ping=ping)
    client = client_of(router.address)
    client.wait_until_ready(10)
    assert client.retrieve(k=3).coverage.documents == 1.0
    victim.signal(signal.SIGSTOP)
    started_s = time.monotonic()
    with pytest.raises(RequestRefused) as raised:
        client.retrieve(k=3, min_coverage=0.99, timeout_s=5.0)
    assert time.monotonic() - started_s < 5.5
    assert raised.value.code in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    assert raised.value.coverage is not None
    assert raised.value.coverage.documents == executors[1].documents / 600
    until(lambda: router._held[1].links.replicas(0)[0].state.value in ("ejected", "down"))
    for _ in range(5):
        started_s = time.monotonic()
        result = client.retrieve(k=3, min_coverage=0.0, timeout_s=10.0)
        # Far from the time limit: the stopped shard is not waited for again.
        assert time.monotonic() - started_s < 4.0
        assert result.coverage.documents == executors[1].documents / 600
    victim.signal(signal.SIGCONT)
    until(lambda: client.retrieve(k=3, min_coverage=0.0).coverage.documents == 1.0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL])
def test_a_replica_of_two_that_is_stopped_or_killed_fails_no_request(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    make_shard_process: Any,
    client_of: Any,
    ask_whole: Any,
    signum: int,
) -> None:
    executors = make_executors(2)
    victim = make_shard_process(0)
    spare = make_server(executors[0], replica=1)
    write_map(victim.entry, spare, make_server(executors[1]))
    router = make_router(ping=PingSection())
    client = client_of(router.address)
    client.wait_until_ready(10)
    replicas = router._held[1].links.replicas
    until(lambda: all(link.reached for link in replicas(0)))
    expected = ask_whole(Request(k=5)).item_ids.tolist()
    # Until it is known how long answers take.
    for _ in range(40):
        client.retrieve(k=5, min_coverage=1.0)
    asked = [Asking(client, k=5, min_coverage=1.0, timeout_s=5.0) for _ in range(8)]
    victim.signal(signum)
    asked += [Asking(client, k=5, min_coverage=1.0, timeout_s=5.0) for _ in range(8)]
    gone = ("ejected", "down")
    while replicas(0)[0].state.value not in gone or len(asked) < 60:
        asked.append(Asking(client, k=5, min_coverage=1.0, timeout_s=5.0))
        asked[-8].result()
    for one in asked:
        assert one.result().item_ids.tolist() == expected
        assert one.result().coverage.documents == 1.0


def test_retries_burst_to_the_batches_that_may_run(tmp_path: Path) -> None:
    admission = AdmissionSection(concurrency=ConcurrencySection(min=1, max=7))
    router = Router(RouterConfig(map_path=str(tmp_path / "map.json"), admission=admission))
    assert sum(router._extra.may_retry(refused=False) for _ in range(100)) == 7
