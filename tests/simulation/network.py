"""Channels and servers without a network: messages travel in virtual time, and may get lost.

They look like those of gRPC to whoever uses them. A connection between a client and an address is
a ``Path``; what its streams send arrives in order, while the path is whole and the receiver runs.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, Protocol

import grpc
import grpc.aio
from simulation.virtual_time import SimulatedLoop

LATENCY_S = 0.0001
KEEPALIVE_S = 1.5
"""A connection without a sign of the other end is given up after that; see ``LINK_OPTIONS``."""
CONNECT_S = 0.5

Deliver = Callable[[], None]


class Receiver(Protocol):
    """A process as the network sees it."""

    name: str
    is_dead: bool
    is_stopped: bool
    """It stands still; what arrives waits in ``inbox``."""
    inbox: list[Deliver]


class Fault(NamedTuple):
    """What becomes of the next message of one direction."""

    kind: str
    """drop, twice or late."""
    late_s: float = 0.0


class Path:
    """The way between a client and an address."""

    def __init__(self, network: "Network", client: Receiver, address: str, seed: int) -> None:
        self.client = client
        self.address = address
        self.calls: dict[Call, None] = {}
        self.faults: tuple[deque[Fault], deque[Fault]] = (deque(), deque())
        """To the server, and back."""
        self._network = network
        self._loop = network.loop
        self._draw = random.Random(seed)
        self._cuts = 0
        self._held: list[tuple[bool, Deliver]] = []
        self._last_s = [0.0, 0.0]
        self.hurt_s = float("-inf")
        """When a message was lost, repeated or late last."""

    @property
    def is_cut(self) -> bool:
        return self._cuts > 0

    def cut(self) -> None:
        """Cut the path; cuts add up."""
        self._cuts += 1
        if self._cuts == 1:
            calls = list(self.calls)
            self._loop.call_later(KEEPALIVE_S, self._give_up, calls)

    def heal(self) -> None:
        """Take a cut back; what was sent meanwhile arrives now."""
        self._cuts -= 1
        if not self._cuts:
            held, self._held = self._held, []
            for back, deliver in held:
                self.send(deliver, back=back)

    def _give_up(self, calls: list["Call"]) -> None:
        if self.is_cut:
            for call in calls:
                call.lose("keepalive watchdog timeout")

    def send(self, deliver: Deliver, *, back: bool, message: bool = False) -> None:
        """Let something arrive on the other side, in order."""
        if self._cuts:
            self._held.append((back, deliver))
            return
        at_s = self._loop.now_s + LATENCY_S * (0.5 + self._draw.random())
        if message and self.faults[back]:
            fault = self.faults[back].popleft()
            self.hurt_s = at_s + fault.late_s
            if fault.kind == "drop":
                return
            if back:
                # Replies come in any order, and nobody says that one comes but once.
                self._loop.call_at(at_s + fault.late_s, self._arrive, deliver, back)
                if fault.kind == "late":
                    return
            else:
                # What follows waits behind it.
                at_s += fault.late_s
        at_s = max(at_s, self._last_s[back])
        self._last_s[back] = at_s
        self._loop.call_at(at_s, self._arrive, deliver, back)

    def _arrive(self, deliver: Deliver, back: bool) -> None:
        receiver = self.client if back else self._network.processes.get(self.address)
        if receiver is None:
            deliver()
        elif receiver.is_stopped:
            receiver.inbox.append(deliver)
        elif not receiver.is_dead:
            deliver()


class Server:
    """What a gRPC server is to those who add services to it."""

    def __init__(self) -> None:
        self._generic: list[Any] = []
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._handlers |= {f"/{service}/{name}": one for name, one in handlers.items()}

    def handler(self, method: str) -> Any:
        """Return what serves a method, ``/package.Service/Method``."""
        if method not in self._handlers:
            details = _Details(method, ())
            found = [found for one in self._generic if (found := one.service(details))]
            self._handlers[method] = found[0]
        return self._handlers[method]


class _Details(NamedTuple):
    method: str
    invocation_metadata: tuple[Any, ...]


class Aborted(Exception):
    """A call that its server ended with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code.name, details)
        self.code = code
        self.details = details


class Context:
    """One call as its server sees it."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s

    async def abort(self, code: grpc.StatusCode, details: str = "", _: Any = ()) -> None:
        raise Aborted(code, details)


class _Inbox:
    """Messages that came in on one side of a stream."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.end: BaseException | None = None

    def put(self, message: Any) -> None:
        if self.end is None:
            self._messages.append(message)
            self._wake()

    def close(self, error: BaseException) -> None:
        if self.end is None:
            self.end = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        while not self._messages:
            if self.end is not None:
                raise self.end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._messages.popleft()


class _Stream(Context):
    """A call of two streams as its server sees it."""

    def __init__(self, call: "Call") -> None:
        super().__init__()
        self.call = call
        self.inbox = _Inbox()
        self.task: asyncio.Task[None] | None = None

    async def send_initial_metadata(self, metadata: Any) -> None:
        self.call.path.send(lambda: self.call.connected(metadata), back=True)

    async def read(self) -> Any:
        return await self.inbox.get()

    async def write(self, message: Any) -> None:
        call = self.call
        call.path.send(lambda: call.receive(message), back=True, message=True)


class Call:
    """A call of two streams as its client sees it."""

    def __init__(self, path: Path, method: str, beats: AsyncIterator[Any] | None) -> None:
        self.path = path
        self.network = path._network
        self.method = method
        self.stream: _Stream | None = None
        """The other side, once it is there."""
        self.process: Any = None
        self._inbox = _Inbox()
        self._metadata: asyncio.Future[Any] = self.network.loop.create_future()
        self._beating: asyncio.Task[None] | None = None
        path.calls[self] = None
        path.send(self._knock, back=False)
        self.network.loop.call_later(CONNECT_S, self._check_connected)
        if beats is not None:
            self._beating = asyncio.create_task(self._beat(beats))

    def done(self) -> bool:
        return self._inbox.end is not None

    async def initial_metadata(self) -> Any:
        return await asyncio.shield(self._metadata)

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:
        return await self._inbox.get()

    async def write(self, message: Any) -> None:
        if self.done():
            raise asyncio.InvalidStateError("the stream has ended")
        self.network.on_call(self, message)
        self.path.send(lambda: self._feed(message), back=False, message=True)

    def cancel(self) -> None:
        """End it on this side; the other side is told."""
        if not self.done():
            self._end(asyncio.CancelledError())
            self.path.send(self._hang_up, back=False)

    def connected(self, metadata: Any = ()) -> None:
        if not self._metadata.done():
            self._metadata.set_result(metadata)

    def receive(self, message: Any) -> None:
        if not self.done():
            self.network.on_reply(self, message)
            self._inbox.put(message)

    def lose(self, details: str) -> None:
        """End it because the connection is lost; each side notices by itself."""
        self._fail(details)
        self._hang_up()

    def reset(self) -> None:
        """Tell the client that the other side has gone."""
        self.path.send(lambda: self._fail("connection reset"), back=True)

    def _fail(self, details: str) -> None:
        if not self.done():
            none = grpc.aio.Metadata()
            code = grpc.StatusCode.UNAVAILABLE
            self._end(grpc.aio.AioRpcError(code, none, none, details=details))

    def _end(self, error: BaseException) -> None:
        self._inbox.close(error)
        self.connected()
        self.path.calls.pop(self, None)
        self.network.on_end(self)
        if self._beating is not None:
            self._beating.cancel()

    def _knock(self) -> None:
        process = self.network.processes.get(self.path.address)
        if process is None or process.is_dead:
            self.path.send(lambda: self._fail("connection refused"), back=True)
        elif not self.done():
            self.process = process
            self.stream = _Stream(self)
            handler = process.server.handler(self.method)
            work = handler.stream_stream(None, self.stream)
            self.stream.task = process.start(work)
            process.streams[self] = None
            self.stream.task.add_done_callback(lambda _: process.streams.pop(self, None))

    def _feed(self, message: Any) -> None:
        if self.stream is not None:
            self.stream.inbox.put(message)

    def _hang_up(self) -> None:
        if self.stream is not None and self.stream.task is not None:
            self.stream.task.cancel()

    def _check_connected(self) -> None:
        if self.stream is None:
            self._fail("connection timed out")
            self._hang_up()

    async def _beat(self, beats: AsyncIterator[Any]) -> None:
        async for beat in beats:
            if self.done():
                break
            await self.write(beat)


class Answer:
    """The answer to a call of one message, which may still come."""

    def __init__(self) -> None:
        self._code: grpc.StatusCode | None = None
        self._value: Any = None

    def done(self) -> bool:
        return self._code is not None

    def end(self, code: grpc.StatusCode, value: Any = None) -> None:
        if self._code is None:
            self._code, self._value = code, value

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def result(self) -> Any:
        return self._value

    def exception(self) -> Exception | None:
        return None if self._code is grpc.StatusCode.OK else RuntimeError(str(self._code))


class _Unary:
    def __init__(self, path: Path, method: str) -> None:
        self._path, self._method = path, method

    def future(self, request: Any, timeout: float) -> Answer:
        path, network, answer = self._path, self._path._network, Answer()
        network.loop.call_later(timeout, answer.end, grpc.StatusCode.DEADLINE_EXCEEDED)

        async def serve(process: Any) -> None:
            try:
                value = await process.server.handler(self._method).unary_unary(request, Context())
                code = grpc.StatusCode.OK
            except Aborted as error:
                value, code = None, error.code
            path.send(lambda: answer.end(code, value), back=True)

        def arrive() -> None:
            process = network.processes.get(path.address)
            if process is None or process.is_dead:
                path.send(lambda: answer.end(grpc.StatusCode.UNAVAILABLE), back=True)
            else:
                process.start(serve(process))

        path.send(arrive, back=False)
        return answer


class Channel:
    """What a channel of gRPC is to the stubs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls: list[Call] = []

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., Call]:
        def begin(beats: AsyncIterator[Any] | None = None) -> Call:
            self._calls = [one for one in self._calls if not one.done()]
            self._calls.append(Call(self._path, method, beats))
            return self._calls[-1]

        return begin

    def unary_unary(self, method: str, *_: Any, **__: Any) -> _Unary:
        return _Unary(self._path, method)

    def unary_stream(self, *_: Any, **__: Any) -> None:
        return None

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for one in self._calls:
            one.cancel()


def host_of(address: str) -> str:
    return address.partition(":")[0]


class Network:
    """All processes by address, and the paths to them."""

    def __init__(self, loop: SimulatedLoop, seed: int) -> None:
        self.loop = loop
        self.processes: dict[str, Any] = {}
        self.paths: dict[tuple[str, str], Path] = {}
        self.cut_hosts: Counter[str] = Counter()
        self.on_call: Callable[[Call, Any], None] = lambda *_: None
        """Is told what a client sends on a stream."""
        self.on_reply: Callable[[Call, Any], None] = lambda *_: None
        """Is told what a client receives on a stream."""
        self.on_end: Callable[[Call], None] = lambda _: None
        """Is told of a stream that has ended at its client."""
        self._seed = seed

    def path(self, client: Receiver, address: str) -> Path:
        key = client.name, address
        if key not in self.paths:
            # Each path has chance of its own, so that it does not depend on the others.
            seed = random.Random(f"{self._seed}/{client.name}/{address}").getrandbits(48)
            self.paths[key] = path = Path(self, client, address, seed)
            for _ in range(self.cut_hosts[host_of(address)]):
                path.cut()
        return self.paths[key]

    def cut_host(self, host: str) -> None:
        """Cut a host off from everybody; cuts add up."""
        self.cut_hosts[host] += 1
        for path in self._paths_to(host):
            path.cut()

    def heal_host(self, host: str) -> None:
        self.cut_hosts[host] -= 1
        for path in self._paths_to(host):
            path.heal()

    def _paths_to(self, host: str) -> list[Path]:
        return [path for path in self.paths.values() if host_of(path.address) == host]

    def dialer(self, client: Receiver) -> "NetworkDialer":
        """Return what opens channels of a client."""
        return NetworkDialer(self, client)

    def stood_still(self, process: Any) -> None:
        """Let the clients of a process that stands still give up their connections in time."""
        calls = list(process.streams)

        def give_up() -> None:
            if process.is_stopped and not process.is_dead:
                for call in calls:
                    call.lose("keepalive watchdog timeout")

        self.loop.call_later(KEEPALIVE_S, give_up)


class NetworkDialer:
    """Opens channels of one client; see ``cluster.dialer.Dials``."""

    def __init__(self, network: Network, client: Receiver) -> None:
        self._network = network
        self._client = client

    def channel(self, address: str, options: object = ()) -> Channel:
        return Channel(self._network.path(self._client, address))

    aio_channel = channel
