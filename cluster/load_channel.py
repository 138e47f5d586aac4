"""How a load reaches routers: bytes out, bytes in, and nothing is parsed on the way."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.config import MEBIBYTE
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.load import OK, Reply
from silvershard.cluster.service import DETAILS
from silvershard.shard.errors import DeadlineExceeded

_SERVICE = retrieval_pb2.DESCRIPTOR.services_by_name["Retrieval"].full_name
_METHOD = f"/{_SERVICE}/Retrieve"

_OPTIONS = [
    ("grpc.max_receive_message_length", 256 * MEBIBYTE),
    ("grpc.max_metadata_size", 64 << 10),
    # A router that comes back is used again at once, and no sooner than a client would.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


class LoadChannels:
    """Connections to all routers of a load, which take turns; an asynchronous context manager."""

    def __init__(
        self, addresses: Sequence[str], requests: Sequence[bytes], dialer: Dialer = PLAIN
    ) -> None:
        """Make channels that connect with their first use; needs a running event loop.

        Args:
            addresses: of the routers, at least one.
            requests: serialised ``RetrieveRequest`` messages, which take turns, too.
            dialer: opens channels.
        """
        self._addresses = addresses
        self._requests = requests
        self._channels = [dialer.aio_channel(one, _OPTIONS) for one in addresses]
        self._calls: list[Any] = [channel.unary_unary(_METHOD) for channel in self._channels]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def connect(self, timeout_s: float) -> None:
        """Wait until every router is connected.

        Raises:
            DeadlineExceeded: naming one that is not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for address, channel in zip(self._addresses, self._channels, strict=True):
                    waiting = address
                    await channel.channel_ready()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the router at {waiting} could not be reached within {timeout_s:.1f} s"
            ) from None

    def router_of(self, number: int) -> str:
        """Return the address of the router that request ``number`` goes to."""
        return self._addresses[number % len(self._addresses)]

    def request_of(self, number: int) -> int:
        """Return the index of the request that is sent as request ``number``."""
        return number % len(self._requests)

    async def send(self, number: int, timeout_s: float) -> Reply:
        """Send request ``number`` and return what came of it."""
        call = self._calls[number % len(self._calls)]
        try:
            body = await call(self._requests[self.request_of(number)], timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get(DETAILS, b"")
            return Reply(error.code().name, details if isinstance(details, bytes) else b"")
        return Reply(OK, body)
