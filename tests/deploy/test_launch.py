import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import Client, Query, Result
from silvershard.cluster.config import ListenSection
from silvershard.cluster.tokens import TokenFile
from silvershard.deploy import golden, launch, operate
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.processes import Process, is_alive, send_signal, wait_gone
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.errors import ConfigError, SnapshotError
from silvershard.shard.generations import generation_dir
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 60.0


def until(true: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def processes_of(record: ClusterRecord) -> list[Process]:
    return [record.guard, record.driver, *record.processes]


def published(root: Path, generation: Any) -> StateDir:
    """Return a state directory with the generation of the fixture as its first."""
    state = StateDir(root)
    state.create()
    state.generations.mkdir()
    generation_dir(state.generations, 1).symlink_to(generation.path)
    return state


def latest(state: StateDir) -> ClusterRecord:
    record = state.read_record()
    assert record is not None
    return record


@contextmanager
def started(state: StateDir, *, shards: int = 1) -> Iterator[ClusterRecord]:
    """Run a cluster that ends with the test, and with the test process."""
    options = {"listen.port": 0, "model.name": "films", "sharding.shards": shards}
    config = load(None, environ={}, options=options)
    record = launch.start(state, config, detached=False)
    try:
        yield record
    finally:
        launch.stop(state, timeout_s=20.0)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, generation: Any) -> Iterator[StateDir]:
    directory = published(tmp_path_factory.mktemp("state") / "s", generation)
    with started(directory, shards=3):
        yield directory


def test_a_free_port_is_accepted_and_one_in_use_is_not() -> None:
    launch.check_listen(ListenSection(port=0))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(CommandError, match=f"cannot listen on 127.0.0.1:{port}"):
            launch.check_listen(ListenSection(port=port))
    launch.check_listen(ListenSection(port=port))


@pytest.mark.parametrize("key", ["listen.host", "admin.host"])
def test_others_may_reach_a_port_only_with_tls_and_tokens(
    tmp_path: Path, authority: Any, key: str
) -> None:
    path = tmp_path / "tokens.json"
    TokenFile().write(path)
    tls = {f"security.tls.{one}": value for one, value in authority.section().items()}
    tokens = {"security.tokens": str(path)}

    def check(**options: object) -> None:
        launch.check_security(load(None, environ={}, options={key: "0.0.0.0", **options}))

    for lacking, missing in (
        ({}, "security.tls and security.tokens"),
        (tls, "security.tokens"),
        (tokens, "security.tls"),
    ):
        with pytest.raises(Refused, match=f"{key} must be a loopback address without {missing},"):
            check(**lacking)
    check(**tls, **tokens)
    check(**{"security.insecure": True})
    if key == "admin.host":
        check(**{"admin.enabled": False})


def test_files_of_security_are_checked_before_anything_is_started(
    tmp_path: Path, authority: Any
) -> None:
    state = StateDir(tmp_path / "s")
    expired = authority.section("old", days=-1.0)
    tls = {f"security.tls.{one}": value for one, value in expired.items()}
    for options, message in (
        (tls, "security.tls.certificate .* expired"),
        ({"security.tokens": str(tmp_path / "none")}, "security.tokens .* No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch.start(state, load(None, environ={}, options=options))
    assert not state.root.exists()


def test_a_port_of_http_is_looked_at_before_anything_is_started() -> None:
    def settings(**more: object) -> Config:
        return load(None, environ={}, options={f"observability.{one}": more[one] for one in more})

    launch.check_http(settings(http=""))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"cannot listen on {address}") as raised:
            launch.check_http(settings(http=address))
        assert raised.value.exit_code == ExitCode.FAILED
    launch.check_http(settings(http=address))
    with pytest.raises(Refused, match=r"observability\.insecure"):
        launch.check_http(settings(http="0.0.0.0:0"))
    launch.check_http(settings(http="0.0.0.0:0", insecure=True))


def test_the_newest_generation_is_chosen(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    for number in (1, 2, 10):
        generation_dir(state.generations, number).mkdir(parents=True)
    assert launch.choose_generation(state, None) == (10, generation_dir(state.generations, 10))
    assert launch.choose_generation(state, 2) == (2, generation_dir(state.generations, 2))


def test_what_was_live_last_is_chosen_before_the_newest(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    for number in (1, 2, 10):
        generation_dir(state.generations, number).mkdir(parents=True)
    store = state.control
    store.change(lambda now: now.pointed("live", 2))
    assert launch.choose_generation(state, None)[0] == 2
    assert launch.choose_generation(state, 0)[0] == 10
    store.change(lambda now: now.pointed("live", 7))
    assert launch.choose_generation(state, None)[0] == 10


def test_stopping_where_nothing_runs_is_no_error(tmp_path: Path) -> None:
    for directory in (tmp_path / "none", tmp_path):
        stopped = launch.stop(StateDir(directory), timeout_s=1.0)
        assert stopped == launch.Stopped(was_running=False, leftovers=0, killed=0)


@pytest.mark.ray
def test_the_cluster_serves_every_document(state: StateDir, generation: Any) -> None:
    record = latest(state)
    assert [shard.state for shard in record.shards] == ["serving"] * 3
    assert record.documents == len(generation.catalogue) == 600
    assert record.coverage == 1.0
    assert len({shard.pid for shard in record.shards}) == 3
    with Client(record.address) as client:
        result = client.retrieve(k=5, return_fields=["title"])
    assert len(result.item_ids) == 5
    assert result.coverage.documents == 1.0
    assert result.generation == 1


@pytest.mark.ray
def test_three_shard_processes_answer_the_golden_requests(state: StateDir) -> None:
    document = golden.check(state, latest(state).address, timeout_s=30.0)
    assert document == {"generation": 1, "requests": 24, "differences": []}


@pytest.mark.ray
def test_three_shard_processes_give_the_bytes_of_the_module(
    state: StateDir, generation: Any, request_maker: Any
) -> None:
    whole = load_retriever(generation.path)[0]
    requests = request_maker(generation, 60, seed=31)
    with Client(latest(state).address, timeout_s=30.0) as client:
        batch = client.retrieve_batch([Query(**one.__dict__) for one in requests])
        alone = [client.retrieve(Query(**one.__dict__)) for one in requests[:20]]
    for request, got in [*zip(requests, batch, strict=True), *zip(requests, alone, strict=False)]:
        wanted = whole([request])[0]
        assert isinstance(got, Result), got
        assert got.coverage.documents == 1.0
        assert got.item_ids.tolist() == wanted.item_ids.tolist()
        assert got.scores.tobytes() == wanted.scores.numpy().tobytes()


@pytest.mark.ray
def test_status_says_what_runs(state: StateDir) -> None:
    until(lambda: operate.status(state)[1] == ExitCode.OK, "the cluster is not whole")
    document, _ = operate.status(state)
    assert document["state"] == "up"
    assert document["coverage"] == 1.0
    shown = operate.render_cluster(document)
    for shard in latest(state).shards:
        assert str(shard.pid) in shown
        assert shard.address in shown


@pytest.mark.ray
def test_the_python_example_of_the_readme_runs(
    state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    listen = ListenSection()
    said = f"{listen.host}:{listen.port}"
    assert example.count(said) == 1
    exec(compile(example.replace(said, latest(state).address), "README.md", "exec"), {})
    titles, rest = capsys.readouterr().out.split("] [", 1)
    assert titles.count("'Film ") == 10
    assert " 1.0 1 " in rest
    assert "(probes=" in rest


@pytest.mark.ray
def test_a_second_start_on_the_directory_is_refused(state: StateDir) -> None:
    config = load(None, environ={}, options={"listen.port": 0})
    record = latest(state)
    with pytest.raises(Refused, match=rf"pid {record.guard.pid} at {record.address}"):
        launch.start(state, config)
    assert is_alive(record.guard)


@pytest.mark.ray
def test_a_killed_shard_comes_back_in_a_new_place(state: StateDir) -> None:
    before = latest(state).shards[1]
    version = latest(state).map_version
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: latest(state).coverage < 1.0, "the loss was not noticed")
    document, code = operate.status(state)
    assert (document["state"], code) == ("degraded", ExitCode.DEGRADED)
    assert document["coverage"] == (600 - before.documents) / 600
    until(lambda: latest(state).is_whole, "the shard did not come back")
    after = latest(state).shards[1]
    assert after.pid != before.pid
    assert after.epoch > before.epoch
    assert after.restarts == before.restarts + 1
    assert latest(state).map_version > version
    with Client(latest(state).address) as client:
        until(
            lambda: client.retrieve(k=1, min_coverage=0.0).coverage.documents == 1.0,
            "the router did not find the shard again",
        )
    # Ray explains the death in the log, without colours.
    until(lambda: b"(raylet) A worker died" in state.daemon_log.read_bytes(), "Ray said nothing")
    assert b"\x1b" not in state.daemon_log.read_bytes()


@pytest.mark.ray
def test_a_killed_router_comes_back_at_its_address(state: StateDir) -> None:
    before = latest(state)
    os.kill(before.router.pid, signal.SIGKILL)
    until(lambda: latest(state).router.restarts == before.router.restarts + 1, "no restart")
    until(lambda: latest(state).is_whole, "the router did not come back")
    assert latest(state).address == before.address
    assert latest(state).router.pid != before.router.pid
    with Client(before.address) as client:
        client.wait_until_ready(WAIT_S)
        assert client.retrieve(k=1).coverage.documents == 1.0


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_left_of_a_crashed_cluster_is_ended_by_down(
    tmp_path: Path, generation: Any
) -> None:
    state = published(tmp_path / "s", generation)
    with started(state) as record:
        # The record lists all processes within a second of being ready.
        until(lambda: len(latest(state).processes) >= 5, "no census")
        family = processes_of(latest(state))
        for process in (record.guard, record.driver):
            send_signal(process, signal.SIGSTOP)
        for process in (record.guard, record.driver):
            send_signal(process, signal.SIGKILL)
        assert wait_gone([record.guard, record.driver], 5.0) == []
        stopped = launch.stop(state, timeout_s=20.0)
        assert not stopped.was_running
        assert wait_gone(family, 5.0) == []
        assert state.read_record() is None
        assert not Path(record.ray_dir).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_ends_when_its_guard_is_killed(tmp_path: Path, generation: Any) -> None:
    state = published(tmp_path / "s", generation)
    with started(state) as record:
        until(lambda: len(latest(state).processes) >= 5, "no census")
        family = processes_of(latest(state))
        send_signal(record.guard, signal.SIGKILL)
        assert wait_gone(family, 30.0) == []
        assert not state.is_locked()
        assert not Path(record.ray_dir).exists()
        assert state.read_record() is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def ray_dirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The directories made for Ray during the test."""
    made: list[str] = []
    make = launch._make_ray_dir

    def noted() -> str:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(launch, "_make_ray_dir", noted)
    return made


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_a_broken_snapshot_is_named_and_nothing_is_left(
    tmp_path: Path, generation: Any, damage: Callable[[Path], None], ray_dirs: list[str]
) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    snapshot = generation_dir(state.generations, 1)
    shutil.copytree(generation.path, snapshot)
    name = max(open_snapshot(snapshot).manifest.files)
    assert name.startswith("tables/")
    damage(snapshot / name)
    config = load(None, environ={}, options={"listen.port": 0})
    with pytest.raises(SnapshotError, match=f"{name} is (missing|damaged)"):
        launch.start(state, config, verify=lambda path: operate.verify_snapshot(path, 2))
    assert not state.is_locked()
    assert state.read_record() is None
    assert len(ray_dirs) == 1
    assert not Path(ray_dirs[0]).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_snapshot_that_only_a_shard_finds_broken_is_named_too(
    tmp_path: Path, generation: Any
) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    shutil.copytree(generation.path, generation_dir(state.generations, 1))
    flip(generation_dir(state.generations, 1) / "dense.safetensors")
    config = load(None, environ={}, options={"listen.port": 0, "sharding.shards": 1})
    with pytest.raises(CommandError, match=r"shard \d could not start.*dense.safetensors is dama"):
        launch.start(state, config)
    assert not state.is_locked()


PARENT = """
import sys, time
from pathlib import Path
from silvershard.deploy import launch
from silvershard.deploy.config import load
from silvershard.deploy.state import StateDir
config = load(None, environ={}, options={"listen.port": 0, "sharding.shards": 1})
record = launch.start(StateDir(Path(sys.argv[1])), config, detached=False)
print(record.model_dump_json(), flush=True)
time.sleep(60)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_is_not_detached_ends_with_its_parent(
    tmp_path: Path, generation: Any
) -> None:
    state = published(tmp_path / "s", generation)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, str(state.root)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        record = ClusterRecord.model_validate(json.loads(parent.stdout.readline()))
        parent.kill()
    assert wait_gone(processes_of(record), 30.0) == []
    until(lambda: not state.is_locked(), "the lock is still held")


def test_what_is_launched_is_stated_in_full() -> None:
    launched = launch.Launch(config=Config(), generation=1, snapshot="x")
    assert launch.Launch.model_validate_json(launched.model_dump_json()) == launched
