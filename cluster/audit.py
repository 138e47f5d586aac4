"""The audit log: one JSON line per change by the admin plane, and per call that was refused."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from silvershard.cluster.roles import CALLER, needed

_log = logging.getLogger(__name__)

_MAX_REQUEST_CHARS = 2000
_MAX_LINE_BYTES = 4096
# Refused calls are noted so often at most, with as many at once.
_REFUSED_PER_S = 1.0
_REFUSED_BURST = 50.0


class AuditLog:
    """A file that lines are appended to; several processes may share it.

    Each line opens the file anew, so that it may be moved away. A line that cannot be written is
    logged: the cluster must stay operable when a disk is full.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Name the file, which the first line makes, mode 0600.

        Args:
            path: of the file.
            clock: for the limit of refused calls.
            wall: in seconds since 1970.
        """
        self._path = path
        self._clock = clock
        self._wall = wall
        self._room = _REFUSED_BURST
        self._filled_s = clock()
        self._suppressed = 0

    def done(self, who: str, method: str, request: Any, code: str, *, peer: str) -> None:
        """Note a change that somebody asked for, and the status of the answer."""
        self._append("admin", who, method, code, peer, request=_described(request))

    def refused(self, who: str, method: str, code: str, reason: str, *, peer: str) -> None:
        """Note a refused call; of many at once most are only counted, in the next line."""
        now_s = self._clock()
        grown = self._room + (now_s - self._filled_s) * _REFUSED_PER_S
        self._room, self._filled_s = min(grown, _REFUSED_BURST), now_s
        if self._room < 1.0:
            self._suppressed += 1
            return
        self._room -= 1.0
        suppressed, self._suppressed = self._suppressed, 0
        # The name of a method that is refused is the caller's own text.
        self._append("refused", who, method[:200], code, peer, reason=reason, suppressed=suppressed)

    def read(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest lines, the newest last; a damaged one is left out.

        Args:
            limit: most lines.
        """
        try:
            with self._path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                begin = max(end - limit * _MAX_LINE_BYTES, 0)
                file.seek(begin)
                lines = file.read(end - begin).splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines[-limit:]:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _append(
        self, event: str, who: str, method: str, code: str, peer: str, **fields: Any
    ) -> None:
        time_text = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
        line = {"time": time_text, "event": event, "who": who, "peer": peer, "method": method}
        content = json.dumps({**line, "code": code, **fields}, ensure_ascii=True) + "\n"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, content.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.error("the audit log lacks a line: %s: %s", self._path, error.strerror)


def _described(request: Any) -> Any:
    if not isinstance(request, Message):
        return "malformed"
    found = MessageToDict(request, preserving_proto_field_name=True)
    text = json.dumps(found)
    return found if len(text) <= _MAX_REQUEST_CHARS else text[:_MAX_REQUEST_CHARS]


class AuditTrail(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Notes every call that may change something: whoever needs the role ``admin`` for it."""

    def __init__(self, log: AuditLog) -> None:
        """Note calls in a log."""
        self._log = log

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of a call, noted if it may change something."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.unary_unary is None or needed(method) != "admin":
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._noted(handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _noted(
        self, behaviour: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]], method: str
    ) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def noted(request: Any, context: grpc.aio.ServicerContext) -> Any:
            code = "OK"
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except BaseException:
                found = context.code()
                code = found.name if isinstance(found, grpc.StatusCode) else "UNKNOWN"
                raise
            finally:
                who = CALLER.get().name
                self._log.done(who, method, request, code, peer=context.peer())

        return noted
