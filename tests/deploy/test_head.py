import json
import platform
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from silvershard.cluster.http_server import HttpServer, Page
from silvershard.deploy import head
from silvershard.deploy.head import ask_gcs, read_head, router_version


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of something that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_what_the_head_says_is_kept(listener: str) -> None:
    found = read_head(
        listener,
        ask=lambda address: {"ray_version": "2.60.0", "python_version": "3.11.7"},
        version=lambda host: f"0.1.0 of {host}",
    )
    assert (found.ray, found.python, found.silvershard) == (
        "2.60.0",
        "3.11.7",
        "0.1.0 of 127.0.0.1",
    )
    assert (found.problem, found.refused) == ("", "")
    assert 0 < found.round_trip_s < 3


def test_a_head_that_refuses_is_told_from_one_that_is_away(listener: str) -> None:
    def refuse(address: str) -> dict[str, str]:
        raise OSError("unauthenticated")

    found = read_head(listener, ask=refuse, version=lambda _: "")
    assert (found.problem, found.refused) == ("", "unauthenticated")
    found = read_head(listener, ask=lambda _: {}, version=lambda _: "")
    assert found.refused == "the GCS does not know its own version"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    assert "refused" in read_head(address).problem


def test_an_address_without_a_port_is_no_address() -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        read_head("head")


def test_what_is_no_gcs_does_not_answer_and_does_not_hang(
    listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_ASK_TIMEOUT_S", 0.01)
    with pytest.raises(OSError, match=r"no answer within 0\.01 s"):
        ask_gcs(listener)
    monkeypatch.setattr(head, "_ASK_TIMEOUT_S", 20.0)
    monkeypatch.setattr(
        head, "_ASK", "import sys; print('a\\nlast words', file=sys.stderr); exit(1)"
    )
    with pytest.raises(OSError, match="last words"):
        ask_gcs(listener)
    monkeypatch.setattr(head, "_ASK", "import os; os._exit(3)")
    with pytest.raises(OSError, match="exit code 3"):
        ask_gcs(listener)


def test_the_router_of_a_host_says_its_version() -> None:
    server = HttpServer({"/version": lambda: Page(200, json.dumps({"version": "9.9"}))})
    server.start("127.0.0.1:0")
    try:
        assert router_version("127.0.0.1", int(server.address.rpartition(":")[2])) == "9.9"
    finally:
        server.stop()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\nx"])
def test_what_is_no_router_has_no_version(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        assert router_version("127.0.0.1", server.getsockname()[1]) == ""
        thread.join()


RAY = """
import sys
from pathlib import Path
from silvershard.deploy.runtime import prepare_ray, start_ray

home = Path(sys.argv[1])
prepare_ray(home / "token", threads=1)
import ray

start_ray(
    address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 << 20,
    _temp_dir=str(home), log_to_driver=False, configure_logging=False,
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray of another process, whose token is in the environment."""
    pytest.importorskip("ray")
    with (
        tempfile.TemporaryDirectory(prefix="ray") as home,
        subprocess.Popen(
            [sys.executable, "-P", "-c", RAY, home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            address = process.stdout.readline().strip()
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{home}/token")
            yield address
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_head_says_its_versions_to_who_has_its_token(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_head(ray_address, version=lambda _: "")
    assert found.refused == ""
    assert found.python == platform.python_version()
    other = tmp_path / "token"
    other.write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    refused = read_head(ray_address, version=lambda _: "").refused
    assert refused
    assert len(refused.splitlines()) == 1
