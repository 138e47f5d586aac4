"""The public update service of a router: it hands everything on to the sequencer."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import NoReturn

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.codec import Refusal
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.service import DETAILS, PUSHBACK, abort
from silvershard.shard.errors import RetrievalError

SERVICE = retrieval_pb2.DESCRIPTOR.services_by_name["Updates"].full_name

_SEQUENCER = update_pb2.DESCRIPTOR.services_by_name["Sequencer"].full_name
# A sequencer that moved away has this long for what it still answers.
_GRACE_S = 5.0


class UpdateService:
    """``silvershard.v1.Updates`` in front of the sequencer, on one channel at a time.

    Messages pass as they are: the sequencer alone reads them, and its answers and refusals are
    those of this service. A call that broke off may or may not be logged; sent again with the same
    version it is harmless.
    """

    def __init__(self, sequencer: Callable[[], str | None]) -> None:
        """Make the service.

        Args:
            sequencer: returns host:port of the sequencer now; None: there is none.
        """
        self._sequencer = sequencer
        self._address = ""
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server that is not started yet."""
        # Without parsers a message is its bytes.
        handlers = {
            "Apply": grpc.unary_unary_rpc_method_handler(self._apply),
            "StreamUpdates": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def aclose(self) -> None:
        """Disconnect; calls in flight fail."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _connected(self) -> grpc.aio.Channel:
        """Return a channel to the sequencer.

        Raises:
            Refusal: if there is none.
        """
        address = self._sequencer()
        if not address:
            raise Refusal(
                "UNAVAILABLE", "no sequencer takes updates at present", "SEQUENCER_UNAVAILABLE"
            )
        if address != self._address or self._channel is None:
            if self._channel is not None:
                task = asyncio.create_task(self._channel.close(_GRACE_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            self._channel = grpc.aio.insecure_channel(address, options=LINK_OPTIONS)
            self._address = address
        return self._channel

    async def _apply(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            call = self._connected().unary_unary(f"/{_SEQUENCER}/Apply")
            answer: bytes = await call(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        except RetrievalError as error:
            await abort(context, error)
        return answer

    async def _stream(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        try:
            stream = self._connected().stream_stream(f"/{_SEQUENCER}/StreamUpdates")
        except RetrievalError as error:
            await abort(context, error)
        call = stream(timeout=context.time_remaining())
        sender = asyncio.create_task(_send_on(context, call))
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                await context.write(answer)
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        finally:
            sender.cancel()
            call.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def _send_on(context: grpc.aio.ServicerContext, call: grpc.aio.StreamStreamCall) -> None:
    """Send on what the client sends, until either side has ended."""
    # Why the other side has ended is what reading from it tells.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while (request := await context.read()) is not grpc.aio.EOF:
            await call.write(request)
        await call.done_writing()


async def _pass_on(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> NoReturn:
    """End a call with the status of the call behind it."""
    kept = tuple(
        (key, value) for key, value in error.trailing_metadata() if key in (DETAILS, PUSHBACK)
    )
    if error.code() is grpc.StatusCode.UNAVAILABLE and not kept:
        refusal = Refusal(
            "UNAVAILABLE",
            f"the sequencer did not answer, so what became of the updates is unknown: "
            f"{error.details()}",
            "SEQUENCER_UNAVAILABLE",
        )
        await abort(context, refusal)
    await context.abort(error.code(), error.details() or "", kept)
    raise AssertionError("abort always raises")
