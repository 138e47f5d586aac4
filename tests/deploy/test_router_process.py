import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.client import Client
from silvershard.cluster.config import ListenSection, ObservabilitySection, RouterConfig
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.processes import identify, kill_all, wait_gone
from silvershard.deploy.router_process import main, read_config
from silvershard.shard.errors import ConfigError
from silvershard.shard.load import load_executor

COMMAND = [sys.executable, "-P", "-m", "silvershard.deploy.router_process", "--config"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    config = RouterConfig(
        map_path=str(tmp_path / "map.json"),
        listen=ListenSection(port=0),
        observability=ObservabilitySection(http="127.0.0.1:0"),
    )
    path = tmp_path / "router.json"
    path.write_text(config.model_dump_json())
    return path


@pytest.fixture
def shard_map(generation: Any, tmp_path: Path) -> Iterator[ShardMap]:
    """The map of one shard, which serves on a thread of this process."""
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
    written = ShardMap(
        version=1, generation=1, snapshot=str(generation.path), num_shards=1, entries=(entry,)
    )
    written.write_atomic(tmp_path / "map.json")
    yield written
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_process_listens_says_so_serves_and_ends_on_sigterm(
    shard_map: ShardMap, config_file: Path, tmp_path: Path
) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [*COMMAND, str(config_file)], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = json.loads(process.stdout.readline())
            assert (line["event"], line["pid"]) == ("listening", process.pid)
            with Client(line["address"], timeout_s=20) as client:
                client.wait_until_ready(20)
                assert len(client.retrieve(k=7).item_ids) == 7
            with urllib.request.urlopen(f"http://{line['http']}/metrics", timeout=10) as page:
                assert 'silvershard_requests_total{code="OK"} 1\n' in page.read().decode()
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()
    lines = [json.loads(one) for one in (tmp_path / "log").read_text().splitlines()]
    assert any("serving generation 1" in one["message"] for one in lines)


def test_the_router_listens_and_ends_with_its_parent(config_file: Path) -> None:
    inner = [*COMMAND, str(config_file), "--parent"]
    # The parent waits until the router listens, and ends when its input does.
    outer = (
        "import os, subprocess, sys\n"
        f"router = subprocess.Popen([*{inner!r}, str(os.getpid())], "
        "stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "print(router.stdout.readline().decode(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        line = json.loads(parent.stdout.readline())
        assert line["event"] == "listening"
        router = identify(line["pid"])
        assert router is not None
        parent.kill()
    try:
        assert wait_gone([router], 15.0) == []
    finally:
        kill_all([router])


def test_a_router_whose_parent_is_gone_already_never_starts(config_file: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(config_file), "--parent", "4194304"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, b"", b"")


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
        config = RouterConfig(map_path="map.json", listen=ListenSection(port=port))
        code, lines = run_main(config.model_dump_json())
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in lines[-1]["message"]
    assert all("trace" not in one for one in lines)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "file: Invalid JSON"),
        ("{}", "map_path: Field required"),
        (
            '{"map_path": "m", "admission": {"queue": 0}}',
            "admission.queue: Input should be greater",
        ),
        ('{"map_path": "m", "surprise": 1}', "surprise: Extra inputs"),
        (
            '{"map_path": "m", "listen": {"host": "0.0.0.0"}}',
            "must be a loopback address without security.tls and security.tokens, got '0.0.0.0'",
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
