"""The public update service of a router: it hands everything on to the sequencer."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.codec import Refusal
from silvershard.cluster.dialer import PLAIN, Dials
from silvershard.cluster.listen import LINK_OPTIONS
from silvershard.cluster.service import DETAILS, PUSHBACK, abort, refused_by
from silvershard.shard.errors import RetrievalError

SERVICE = retrieval_pb2.DESCRIPTOR.services_by_name["Updates"].full_name

_SEQUENCER = update_pb2.DESCRIPTOR.services_by_name["Sequencer"].full_name
_APPLY, _STREAM = f"/{_SEQUENCER}/Apply", f"/{_SEQUENCER}/StreamUpdates"
# While calls wait for a sequencer, a move is noticed so soon.
_LOOK_EVERY_S = 0.05
# So long a call may wait for the sequencer that takes the place of another one.
_MOVES_S = 5.0
# A sequencer that moved away has this long for what it still answers.
_GRACE_S = 0.5


class _Link:
    """A sequencer, and the calls that wait for it."""

    def __init__(self, address: str, dialer: Dials) -> None:
        self.address = address
        self.calls: set[grpc.aio.Call] = set()
        self.channel = dialer.aio_channel(address, LINK_OPTIONS)
        self.apply = self.channel.unary_unary(_APPLY)
        self.stream = self.channel.stream_stream(_STREAM)

    async def close(self, grace_s: float) -> None:
        """Break off what is not answered in time, and disconnect."""
        until_s = time.monotonic() + grace_s
        try:
            while self.calls and time.monotonic() < until_s:
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            for call in tuple(self.calls):
                call.cancel()
            await self.channel.close()


class UpdateService:
    """``silvershard.v1.Updates`` in front of the sequencer, on one channel at a time.

    Messages pass as they are: the sequencer alone reads them, and its answers and refusals are
    those of this service. One that has lost the log to another one says so and has written nothing:
    the call goes to the other one, for which it may wait. A call that broke off may or may not be
    logged; sent again with the same version it is harmless. Calls that wait for a sequencer that
    has moved, as one that hangs while another took its place, break off.
    """

    def __init__(self, sequencer: Callable[[], str | None], dialer: Dials = PLAIN) -> None:
        """Make the service.

        Args:
            sequencer: returns host:port of the sequencer now; None: there is none.
            dialer: opens the channel to it.
        """
        self._sequencer = sequencer
        self._dialer = dialer
        self._link: _Link | None = None
        self._watch: asyncio.Task[None] | None = None
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
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        link, self._link = self._link, None
        if link is not None:
            await link.close(0.0)

    def _connected(self) -> _Link:
        """Return the link to the sequencer.

        Raises:
            Refusal: if there is none.
        """
        address = self._sequencer()
        if self._link is not None and self._link.address != address:
            self._leave(self._link)
        if not address:
            raise Refusal(
                "UNAVAILABLE", "no sequencer takes updates at present", "SEQUENCER_UNAVAILABLE"
            )
        if self._link is None:
            self._link = _Link(address, self._dialer)
        return self._link

    def _leave(self, link: _Link) -> None:
        """Disconnect from a sequencer that has moved."""
        self._link = None
        task = asyncio.create_task(link.close(_GRACE_S))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @contextlib.contextmanager
    def _waiting(self, link: _Link, call: grpc.aio.Call) -> Iterator[None]:
        """Have a call break off where its sequencer has moved.

        Raises:
            Refusal: instead of ``CancelledError`` where it did.
        """
        link.calls.add(call)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._notice_moves())
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _unknown("it has moved") from None
        finally:
            link.calls.discard(call)

    async def _notice_moves(self) -> None:
        """Leave a sequencer that has moved, as long as calls wait for one."""
        while self._link is not None and self._link.calls:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._link is not None and self._link.address != self._sequencer():
                self._leave(self._link)

    async def _apply(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        give_up_s = time.monotonic() + min(context.time_remaining() or _MOVES_S, _MOVES_S)
        try:
            while True:
                link = self._connected()
                call = link.apply(request, timeout=context.time_remaining())
                try:
                    with self._waiting(link, call):
                        answer: bytes = await call
                    break
                except grpc.aio.AioRpcError as error:
                    # Nothing is written by who has lost the log, so the next one may be asked.
                    fenced = refused_by(error).reason == "FENCED"
                    if not fenced or not await self._has_moved(link.address, give_up_s):
                        raise
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        except RetrievalError as error:
            await abort(context, error)
        return answer

    async def _has_moved(self, address: str, give_up_s: float) -> bool:
        """Wait until another sequencer is known; return whether there is one in time."""
        while self._sequencer() in (address, "", None):
            if time.monotonic() >= give_up_s:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
        return True

    async def _stream(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        try:
            link = self._connected()
            call = link.stream(timeout=context.time_remaining())
            sender = asyncio.create_task(_send_on(context, call))
            try:
                with self._waiting(link, call):
                    while (answer := await call.read()) is not grpc.aio.EOF:
                        await context.write(answer)
            finally:
                sender.cancel()
                call.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        except RetrievalError as error:
            await abort(context, error)


def _unknown(reason: str) -> Refusal:
    return Refusal(
        "UNAVAILABLE",
        f"the sequencer did not answer, so what became of the updates is unknown: {reason}",
        "SEQUENCER_UNAVAILABLE",
    )


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
        await abort(context, _unknown(error.details() or ""))
    await context.abort(error.code(), error.details() or "", kept)
    raise AssertionError("abort always raises")
