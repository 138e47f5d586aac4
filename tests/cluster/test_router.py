import contextlib
import json
import logging
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
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster.client import Client, RequestRefused
from silvershard.cluster.config import ListenSection, PingSection, QuerySection, RouterConfig
from silvershard.cluster.router import Router, main, read_config
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.model.request import Request
from silvershard.shard.errors import ConfigError

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
def write_map(tmp_path: Path, generation: Any) -> Callable[..., ShardMap]:
    def write(*entries: ShardEntry, version: int = 1, **more: Any) -> ShardMap:
        fields = {"generation": 1, "snapshot": str(generation.path), "num_shards": 2}
        shard_map = ShardMap(**{**fields, **more}, version=version, entries=entries)
        shard_map.write_atomic(tmp_path / "map.json")
        return shard_map

    return write


@pytest.fixture
def client_of() -> Iterator[Callable[[Any], Client]]:
    with contextlib.ExitStack() as stack:
        yield lambda address: stack.enter_context(Client(address, timeout_s=20))


def health(address: str, name: str) -> str:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_without_a_map_the_router_is_not_ready_and_picks_it_up(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
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
    write_map(*(map_entry(server) for server in servers))
    client.wait_until_ready(10)
    assert client.retrieve(k=1).coverage.documents == 1.0
    until(lambda: health(router.address, "model/films") == "SERVING")


def test_readiness_is_latched_while_the_health_of_the_model_follows_the_coverage(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    write_map(map_entry(servers[0]))
    router = make_router()
    client = client_of(router.address)
    assert client.retrieve(k=1, min_coverage=0.0).is_partial
    assert health(router.address, "") == "NOT_SERVING"
    assert health(router.address, "model/films") == "NOT_SERVING"
    write_map(*(map_entry(server) for server in servers), version=2)
    client.wait_until_ready(10)
    until(lambda: health(router.address, "model/films") == "SERVING")
    loop_thread.call(servers[1].stop(0))
    until(lambda: health(router.address, "model/films") == "NOT_SERVING")
    assert client.is_ready()


def test_a_damaged_map_is_logged_once_and_the_last_good_one_is_kept(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    client_of: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    generation: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    entries = [map_entry(server) for server in servers]
    write_map(*entries)
    router = make_router()
    client = client_of(router.address)
    client.wait_until_ready(10)

    def complaints(text: str) -> int:
        return sum(text in one.getMessage() for one in caplog.records)

    (tmp_path / "half").write_text("{")
    os.replace(tmp_path / "half", tmp_path / "map.json")
    until(lambda: complaints("Invalid JSON") == 1)
    write_map(*entries, version=2, generation=9)
    until(lambda: complaints("names generation 9, its snapshot holds 1") == 1)
    write_map(*entries, version=3, snapshot=str(tmp_path / "nowhere"))
    until(lambda: complaints("nowhere") == 1)
    write_map(*entries, version=4, num_shards=65)
    until(lambda: complaints("num_shards must be in 1..64") == 1)
    (tmp_path / "map.json").unlink()
    time.sleep(0.01)
    result = client.retrieve(k=3)
    assert result.shard_map_version == 1
    assert result.coverage.documents == 1.0
    assert complaints("the last good shard map is kept") == 4
    assert router._retired == set()
    write_map(*entries, version=5)
    until(lambda: client.retrieve(k=3).shard_map_version == 5)


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
    map_entry: Any,
    client_of: Any,
    ask_whole: Any,
) -> None:
    two = [make_server(executor) for executor in make_executors(2)]
    three = [make_server(executor) for executor in make_executors(3)]
    write_map(*(map_entry(server) for server in two))
    client = client_of(make_router().address)
    client.wait_until_ready(10)
    expected = ask_whole(Request(k=30)).item_ids.tolist()
    assert client.retrieve(k=30).item_ids.tolist() == expected
    write_map(*(map_entry(server) for server in three), version=2, num_shards=3)

    def is_served() -> bool:
        result = client.retrieve(k=30, min_coverage=1.0)
        assert result.item_ids.tolist() == expected
        return result.coverage.shards_full == 3

    # Whoever asks while the map changes is answered by one of the two, wholly.
    until(is_served)


def test_a_second_replica_serves_when_the_first_is_gone(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    client_of: Any,
    loop_thread: Any,
) -> None:
    servers = [make_server(executor) for executor in make_executors(2)]
    spare = make_server(make_executors(2)[0], replica=1)
    write_map(*(map_entry(server) for server in (*servers, spare)))
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
    map_entry: Any,
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
    write_map(*(map_entry(make_server(executor)) for executor in executors))
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
    return health(address, "") in ("NOT_SERVING", "UNAVAILABLE")


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
    serving = router._serving
    links = router._links.replicas(0)
    return serving is not None and serving.map_version == version and links[0].reached


@pytest.mark.slow
def test_a_shard_killed_in_mid_query_gives_exact_coverage_or_unavailable_and_its_successor_is_used(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    make_shard_process: Any,
    client_of: Any,
    ask_whole: Any,
    expect: Any,
) -> None:
    executors = make_executors(2)
    other = map_entry(make_server(executors[1]))
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


def test_a_stopped_shard_costs_its_time_once_and_is_used_again_when_it_goes_on(
    make_router: Any,
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    make_shard_process: Any,
    client_of: Any,
) -> None:
    executors = make_executors(2)
    victim = make_shard_process(0)
    write_map(victim.entry, map_entry(make_server(executors[1])))
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
    until(lambda: router._links.replicas(0)[0].state.value in ("ejected", "down"))
    for _ in range(5):
        started_s = time.monotonic()
        result = client.retrieve(k=3, min_coverage=0.0, timeout_s=10.0)
        # Far from the time limit: the stopped shard is not waited for again.
        assert time.monotonic() - started_s < 4.0
        assert result.coverage.documents == executors[1].documents / 600
    victim.signal(signal.SIGCONT)
    until(lambda: client.retrieve(k=3, min_coverage=0.0).coverage.documents == 1.0, 20)


def test_the_process_listens_says_so_serves_and_ends_on_sigterm(
    make_server: Any,
    make_executors: Any,
    write_map: Any,
    map_entry: Any,
    tmp_path: Path,
    client_of: Any,
) -> None:
    write_map(*(map_entry(make_server(executor)) for executor in make_executors(2)))
    config = RouterConfig(
        map_path=str(tmp_path / "map.json"), listen=ListenSection(port=0), parent_pid=os.getpid()
    )
    path = tmp_path / "router.json"
    path.write_text(config.model_dump_json())
    command = [sys.executable, "-P", "-m", "silvershard.cluster.router", "--config", str(path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["event"] == "listening"
        assert line["pid"] == process.pid
        client = client_of(line["address"])
        client.wait_until_ready(15)
        assert len(client.retrieve(k=7).item_ids) == 7
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
    lines = [json.loads(one) for one in (tmp_path / "log").read_text().splitlines()]
    assert any("serving generation 1" in one["message"] for one in lines)


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    config = RouterConfig(map_path=str(tmp_path / "map.json"), listen=ListenSection(port=0))
    path = tmp_path / "router.json"
    path.write_text(config.model_dump_json())
    # The parent waits until the router listens, and ends without a word.
    parent = (
        "import subprocess, sys\n"
        "router = subprocess.Popen([sys.executable, '-P', '-m', 'silvershard.cluster.router', "
        f"'--config', {str(path)!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "print(router.stdout.readline().decode(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=True
    )
    pid = json.loads(done.stdout)["pid"]

    def is_gone() -> bool:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return status.rsplit(")", 1)[1].split()[0] == "Z"

    until(is_gone, 15)


@pytest.fixture
def run_main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], tuple[int, list[dict[str, str]]]]]:
    """Runs the process main here, on a config file; gives its exit code and log lines."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr(root, "handlers", [])

    def run(text: str) -> tuple[int, list[dict[str, str]]]:
        path = tmp_path / "config.json"
        path.write_text(text)
        code = main(["--config", str(path)])
        printed = capsys.readouterr()
        assert printed.out == ""
        return code, [json.loads(one) for one in printed.err.splitlines()]

    yield run
    root.handlers = before
    root.setLevel(level)


def test_a_port_in_use_is_told_without_a_stack_trace(run_main: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = RouterConfig(
            map_path="map.json", die_with_parent=False, listen=ListenSection(port=port)
        )
        code, lines = run_main(config.model_dump_json())
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in lines[-1]["message"]
    assert all("trace" not in one for one in lines)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "file: Invalid JSON"),
        ("{}", "map_path: Field required"),
        ('{"map_path": "m", "query": {"queue": 0}}', "query.queue: Input should be greater"),
        ('{"map_path": "m", "surprise": 1}', "surprise: Extra inputs"),
        (
            '{"map_path": "m", "die_with_parent": false, "listen": {"host": "0.0.0.0"}}',
            "must be a loopback address while nothing is encrypted, got '0.0.0.0'",
        ),
    ],
)
def test_a_config_that_cannot_be_used_names_the_setting(
    run_main: Any, text: str, complaint: str
) -> None:
    code, lines = run_main(text)
    assert code == 2
    assert complaint in lines[-1]["message"]
    assert all("trace" not in one for one in lines)


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: No such file"):
        read_config(tmp_path / "nowhere.json")


def test_the_default_query_settings_are_those_of_the_contract() -> None:
    query = QuerySection()
    assert (query.max_batch, query.max_delay_us, query.queue) == (64, 500, 256)
    assert query.min_coverage == 0.9
