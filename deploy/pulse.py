"""Whether a process still answers: health checks, one after the other, of what seems to run."""

import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster.dialer import PLAIN, Dials

_EVERY_S = 0.5
_TIMEOUT_S = 1.0


class Pulse:
    """Asks a gRPC server for its health, and counts how often in a row it stayed silent.

    Whatever it says is a sign of life, also that it serves nothing or cannot be reached: whether a
    process runs, and what it serves, is seen elsewhere. Only questions that were asked count, so
    that an owner who stood still himself takes nobody for hung.
    """

    def __init__(
        self,
        address: str,
        dialer: Dials = PLAIN,
        *,
        every_s: float = _EVERY_S,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a channel; nothing is asked yet.

        Args:
            address: ``host:port``.
            dialer: opens the channel.
            every_s: least time between two questions.
            timeout_s: how long an answer may take.
            clock: for the pauses.
        """
        self.status: int | None = None
        """What it said last, of ``HealthCheckResponse.ServingStatus``; None: nothing useful."""
        self._missed = 0
        self._channel = dialer.channel(address)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._asked: Any = None
        """The question that is on its way."""
        self._ask_at_s = clock()

    @property
    def silent_s(self) -> float:
        """Return for how long questions have been waited for in vain."""
        return self._missed * self._timeout_s

    def poll(self) -> None:
        """Take the answer that has come, and ask again when that is due; never waits."""
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            code = asked.code()
            self._missed += 1
            if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._missed = 0
            self.status = asked.result().status if code is grpc.StatusCode.OK else None
        if self._asked is None and self._clock() >= self._ask_at_s:
            self._ask_at_s = self._clock() + self._every_s
            request = health_pb2.HealthCheckRequest(service="")
            self._asked = self._stub.Check.future(request, timeout=self._timeout_s)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


Feel = Callable[[str], Pulse]
"""Takes the pulse of the process at an address."""
