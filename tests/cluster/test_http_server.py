import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from silvershard.cluster import http_server
from silvershard.cluster.http_server import HttpServer, Page, Pages, bind_http
from silvershard.shard.errors import ConfigError, StateError


def broken() -> Page:
    raise RuntimeError("no page")


@pytest.fixture
def serve() -> Iterator[Callable[[Pages], HttpServer]]:
    servers: list[HttpServer] = []

    def start(pages: Pages) -> HttpServer:
        server = HttpServer(pages)
        servers.append(server)
        server.start("127.0.0.1:0")
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(serve: Callable[[Pages], HttpServer]) -> HttpServer:
    return serve({"/a": lambda: Page(200, '{"ä": 1}'), "/no": lambda: Page(503, "x", "text/x")})


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), reply.headers["Content-Type"]
    finally:
        connection.close()


def raw(server: HttpServer, text: bytes) -> bytes:
    """What comes back for these bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        found = b""
        while more := client.recv(65536):
            found += more
    return found


def port_of(server: HttpServer) -> int:
    return int(server.address.rpartition(":")[2])


def test_pages_have_their_status_body_and_type(server: HttpServer) -> None:
    assert ask(server, "/a") == (200, '{"ä": 1}', "application/json")
    assert ask(server, "/a?verbose=1") == (200, '{"ä": 1}', "application/json")
    assert ask(server, "/no") == (503, "x", "text/x")
    assert ask(server, "/a", "HEAD") == (200, "", "application/json")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/a/", 404), ("POST", "/a", 405), ("DELETE", "/b", 405)],
)
def test_what_is_not_served_is_refused(
    server: HttpServer, method: str, path: str, status: int
) -> None:
    assert ask(server, path, method)[0] == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /a\r\n\r\n", b"400"),
        (b"GET /a SMTP/1.0\r\n\r\n", b"400"),
        (b"GET /a HTTP/1.1\r\n", b"400"),
        (b"", b"400"),
        (b"\xff\xfe\x00\r\n\r\n", b"400"),
        (b"GET /a HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", b"431"),
    ],
)
def test_bytes_that_are_no_request_are_refused(
    server: HttpServer, sent: bytes, status: bytes
) -> None:
    assert raw(server, sent).startswith(b"HTTP/1.1 " + status)
    assert ask(server, "/a")[0] == 200


def test_a_page_that_fails_is_logged_and_the_next_one_served(
    serve: Callable[[Pages], HttpServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve({"/broken": broken, "/a": lambda: Page(200, "a")})
    assert ask(server, "/broken")[:2] == (500, "internal server error\n")
    assert "the page /broken failed" in caplog.text
    assert ask(server, "/a")[0] == 200


def test_probes_are_answered_while_the_process_is_busy(server: HttpServer) -> None:
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(1000))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for one in workers:
        one.start()
    try:
        assert [ask(server, "/a")[0] for _ in range(5)] == [200] * 5
    finally:
        over.set()
        for one in workers:
            one.join()


def test_clients_that_say_nothing_hold_nobody_up_and_are_closed(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_READ_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as silent:
        silent.sendall(b"GET /a HT")
        assert ask(server, "/a")[0] == 200
        assert silent.recv(100) == b""


def test_more_clients_than_it_has_room_for_are_cut_off(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_MAX_CONNECTIONS", 1)
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as first:
        first.sendall(b"GET ")
        # It may be cut off at any step.
        with contextlib.suppress(OSError):
            assert raw(server, b"GET /a HTTP/1.1\r\n\r\n") == b""
        first.sendall(b"/a HTTP/1.1\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")


def test_a_port_in_use_is_named_with_what_to_set(server: HttpServer) -> None:
    with pytest.raises(StateError, match=rf"{server.address}: address already in use; choose"):
        HttpServer({}).start(server.address)
    with pytest.raises(StateError, match=r"cannot listen on 203\.0\.113\.1:0: cannot assign"):
        bind_http("203.0.113.1:0", insecure=True)


def test_an_address_that_others_can_reach_needs_a_word(server: HttpServer) -> None:
    with pytest.raises(ConfigError, match=r"loopback address.*got '0\.0\.0\.0'.*insecure"):
        HttpServer({}).start("0.0.0.0:0")
    with pytest.raises(ConfigError, match=r"observability\.http must be host:port"):
        HttpServer({}).start("nowhere")
    open_to_all = HttpServer({"/a": lambda: Page(200, "a")})
    open_to_all.start("0.0.0.0:0", insecure=True)
    try:
        assert raw(open_to_all, b"GET /a HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\na")
    finally:
        open_to_all.stop()


def test_after_the_end_the_port_is_free_and_nobody_is_connected() -> None:
    # Connected at the very end: some are accepted by then, some are not.
    for _ in range(20):
        server = HttpServer({})
        server.stop()
        server.start("[::1]:0")
        assert server.address.startswith("[::1]:")
        port = port_of(server)
        with socket.create_connection(("::1", port), timeout=10) as waiting:
            server.stop()
            server.stop()
            with contextlib.suppress(ConnectionResetError):
                assert waiting.recv(100) == b""
        bind_http(f"[::1]:{port}").close()
    assert "http" not in {one.name for one in threading.enumerate()}
