import asyncio
from typing import Any

import grpc.aio
import pytest

from silvershard.cluster import table_pb2, table_pb2_grpc
from silvershard.cluster.config import PingSection
from silvershard.cluster.listen import server_options
from silvershard.cluster.stream_link import Connection, StreamLink

PING = PingSection(every_ms=5, suspect_after=2, eject_after=4)


class Link(StreamLink[table_pb2.TableCall, table_pb2.TableReply, str]):
    """A link whose callers are names."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "echo", PING)
        self.got: list[tuple[str, int]] = []
        self.failed: list[tuple[str, str]] = []
        self.break_on: int | None = None

    def _open(self, channel: grpc.aio.Channel) -> Any:
        return table_pb2_grpc.TableStub(channel).Execute()

    def _receive(self, connection: Connection[Any, str], reply: Any) -> None:
        self._heard = True
        if reply.call_id == self.break_on:
            raise ValueError("garbled")
        self.got.append((connection.pending.pop(reply.call_id), reply.call_id))

    def _fail(self, waiting: str, message: str) -> None:
        self.failed.append((waiting, message))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            self._count_look()

    def ask(self, call_id: int, waiting: str) -> None:
        assert self._connection is not None
        self._post(self._connection, table_pb2.TableCall(call_id=call_id), waiting)


class Echo:
    """Answers every call by its number, and number 0 by ending the stream."""

    def __init__(self) -> None:
        self.streams = 0
        self.silent = False

    async def Execute(self, _requests: object, context: Any) -> None:
        self.streams += 1
        await context.send_initial_metadata(())
        while (call := await context.read()) is not grpc.aio.EOF:
            if not call.call_id:
                return
            if not self.silent:
                await context.write(table_pb2.TableReply(call_id=call.call_id))

    async def Inspect(self, _request: object, _context: object) -> table_pb2.TableState:
        return table_pb2.TableState()

    async def start(self) -> str:
        self.server = grpc.aio.server(options=server_options(1 << 20))
        table_pb2_grpc.add_TableServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"


async def until(condition: Any) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
def scene(run: Any) -> Any:
    """``scene(body)`` runs ``body(echo, link)`` with a server and a link to it."""

    def play(body: Any) -> None:
        async def whole() -> None:
            echo = Echo()
            link = Link(await echo.start())
            assert link._connected is None
            assert not link.reached
            link.start()
            try:
                await until(lambda: link._connected is True)
                await body(echo, link)
            finally:
                await link.aclose()
                await echo.server.stop(0)
            assert all(task.done() for task in link._tasks)

        run(whole())

    return play


def test_every_reply_is_handed_to_whoever_waits(scene: Any) -> None:
    async def body(echo: Echo, link: Link) -> None:
        for call_id in (5, 9, 7):
            link.ask(call_id, f"caller {call_id}")
        await until(lambda: len(link.got) == 3)
        assert link.got == [("caller 5", 5), ("caller 9", 9), ("caller 7", 7)]

    scene(body)


def test_a_stream_that_ends_fails_its_calls_and_is_opened_again(scene: Any) -> None:
    async def body(echo: Echo, link: Link) -> None:
        echo.silent = True
        link.ask(3, "waiting")
        link.ask(0, "last")
        await until(lambda: len(link.failed) == 2)
        assert link._connected is False
        assert link.failed == [
            ("waiting", "the shard ended the connection"),
            ("last", "the shard ended the connection"),
        ]
        echo.silent = False
        await until(lambda: echo.streams == 2 and link._connected)
        link.ask(4, "again")
        await until(lambda: link.got == [("again", 4)])

    scene(body)


def test_a_reply_that_cannot_be_read_ends_the_stream_and_is_logged(
    scene: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(echo: Echo, link: Link) -> None:
        link.break_on = 6
        link.ask(6, "broken")
        await until(lambda: link.failed)
        assert link.failed == [("broken", "malformed answer: garbled")]
        assert f"echo at {link._address}: malformed answer: garbled" in caplog.text
        await until(lambda: echo.streams == 2)

    scene(body)


def test_looks_in_vain_are_counted_until_there_is_a_sign_of_life(scene: Any) -> None:
    async def body(echo: Echo, link: Link) -> None:
        await until(lambda: link.hung)
        assert not link.reached
        link.ask(1, "sign")
        await until(lambda: link.reached)

    scene(body)


def test_a_closed_link_fails_what_is_on_its_way(scene: Any) -> None:
    async def body(echo: Echo, link: Link) -> None:
        echo.silent = True
        link.ask(3, "waiting")
        await link.aclose()
        assert link.failed == [("waiting", "the link was closed")]

    scene(body)


def test_a_call_sent_before_the_connection_is_there_is_answered(run: Any) -> None:
    async def whole() -> None:
        echo = Echo()
        link = Link(await echo.start())
        link.start()
        link.ask(2, "early")
        try:
            await until(lambda: link.got == [("early", 2)])
        finally:
            await link.aclose()
            await echo.server.stop(0)

    run(whole())
