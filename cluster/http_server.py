"""A small HTTP server for probes and metrics, on a thread of its own.

It has its own event loop, so that it answers while the process is busy, and it knows nothing of
the process but the pages it is given. It speaks as much HTTP/1.1 as probes and scrapers need: GET
and HEAD, one request per connection.

Source: RFC 9112, "HTTP/1.1".
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from silvershard.cluster.http_address import split_address
from silvershard.cluster.listen import is_loopback
from silvershard.shard.errors import ConfigError, StateError

_log = logging.getLogger(__name__)

_READ_TIMEOUT_S = 5.0
"""How long a client may take to send its request, and to take the answer."""
_MAX_HEAD_BYTES = 8192
_MAX_CONNECTIONS = 256
_BACKLOG = 64
_TURNS = 8
"""Turns of the event loop in which what it has just accepted becomes a connection."""


class Page(NamedTuple):
    """What one path answers."""

    status: int
    body: str
    content_type: str = "application/json"


Pages = Mapping[str, Callable[[], Page]]
"""Makes the page of each path; called on the thread of the server, so it must not wait."""


class HttpServer:
    """Serves pages from ``start`` to ``stop``."""

    def __init__(self, pages: Pages) -> None:
        """Make a server that does not listen yet."""
        self.address = ""
        """``host:port`` from ``start`` on."""
        self._pages = pages
        self._connections: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._end: Callable[[], object] = lambda: None

    def start(self, address: str, *, insecure: bool = False, shared: bool = False) -> None:
        """Bind the address and serve; ``address`` is set when this returns.

        Args:
            address: ``host:port``; port 0 lets the system choose a free one.
            insecure: allow an address that other machines can reach.
            shared: another server may share the port, and whoever asks finds one of them.

        Raises:
            ConfigError: if other machines can reach it and ``insecure`` is False.
            StateError: if the port is in use or the address is not of this machine.
        """
        listener = bind_http(address, insecure=insecure, shared=shared)
        host = split_address(address)[0]
        name = f"[{host}]" if ":" in host else host
        self.address = f"{name}:{listener.getsockname()[1]}"
        is_up = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, is_up)), daemon=True, name="http"
        )
        self._thread.start()
        is_up.wait()

    def stop(self) -> None:
        """Close the port and every connection; it is no error if it never started."""
        if self._thread is not None:
            self._end()
            self._thread.join()
            self._thread = None

    async def _serve(self, listener: socket.socket, is_up: threading.Event) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._end = lambda: loop.call_soon_threadsafe(ended.set)
        server = await asyncio.start_server(
            self._connected, sock=listener, limit=_MAX_HEAD_BYTES, backlog=_BACKLOG
        )
        is_up.set()
        await ended.wait()
        # A server that is closed forgets, and leaves open, what it has accepted a moment before.
        loop.remove_reader(listener)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                if len(self._connections) > _MAX_CONNECTIONS:
                    raise ConnectionAbortedError
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.CancelledError):
            # The client has left, is too slow or one too many, or the server ends.
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        finally:
            self._connections.discard(task)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """Return the reply to the request that comes in."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _reply(_plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), "GET")
        except asyncio.IncompleteReadError:
            return _reply(_plain(HTTPStatus.BAD_REQUEST), "GET")
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _reply(_plain(HTTPStatus.BAD_REQUEST), "GET")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _reply(_plain(HTTPStatus.METHOD_NOT_ALLOWED), method)
        make = self._pages.get(target.partition("?")[0])
        if make is None:
            return _reply(_plain(HTTPStatus.NOT_FOUND), method)
        try:
            page = make()
        except Exception:  # noqa: BLE001  # a process border; it is logged and the next one served
            _log.exception("the page %s failed", target)
            page = _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
        return _reply(page, method)


def bind_http(address: str, *, insecure: bool = False, shared: bool = False) -> socket.socket:
    """Return a socket bound to an address; arguments and errors as for ``HttpServer.start``."""
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ConfigError(f"observability.http {error}") from None
    if not insecure and not is_loopback(host):
        raise ConfigError(
            "observability.http must be a loopback address, because it asks nobody who they are, "
            f"got {host!r}; set observability.insecure to bind it all the same"
        )
    listener = None
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        listener.bind(name)
        # Another program that binds the same port is told only by a socket that listens.
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        problem = (error.strerror or str(error)).lower()
        raise StateError(
            f"cannot listen on {address}: {problem}; choose another observability.http, or an "
            "empty one for no HTTP"
        ) from None
    return listener


def _plain(status: HTTPStatus) -> Page:
    return Page(status, f"{status.phrase.lower()}\n", "text/plain; charset=utf-8")


def _reply(page: Page, method: str) -> bytes:
    body = page.body.encode()
    status = HTTPStatus(page.status)
    head = (
        f"HTTP/1.1 {int(status)} {status.phrase}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if method == "HEAD" else body)
