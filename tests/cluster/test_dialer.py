import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from silvershard.cluster.dialer import PLAIN, Dialer, client_dialer, peer_dialer
from silvershard.cluster.listen import Door, bind, server_options
from silvershard.cluster.secret_file import make_secret, read_secret
from silvershard.cluster.security_config import PeerSection, TlsSection
from silvershard.cluster.tls import ClientTls, server_credentials
from silvershard.shard.errors import ConfigError


class Noting:
    """A server that notes the metadata of every call, and echoes."""

    def __init__(self) -> None:
        self.address = ""
        self.shown: list[str] = []

    def _note(self, context: Any) -> None:
        found = dict(context.invocation_metadata())
        self.shown.append(found.get("authorization", ""))

    async def _one(self, message: bytes, context: Any) -> bytes:
        self._note(context)
        return message

    async def _many(self, messages: Any, context: Any) -> AsyncIterator[bytes]:
        self._note(context)
        async for message in messages:
            yield message

    @asynccontextmanager
    async def serving(self, credentials: Any = None) -> AsyncIterator["Noting"]:
        server = grpc.aio.server(options=server_options(1 << 20))
        handlers = {
            "One": grpc.unary_unary_rpc_method_handler(self._one),
            "Many": grpc.stream_stream_rpc_method_handler(self._many),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("n", handlers),))
        self.address = bind(server, "127.0.0.1", 0, Door(credentials))
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)


async def once(channel: Any) -> bytes:
    answer: bytes = await channel.unary_unary("/n/One")(b"a", timeout=5)
    return answer


def test_a_call_shows_the_token_and_a_stream_shows_it_once(run: Any) -> None:
    async def scene() -> None:
        async with Noting().serving() as server:
            async with Dialer("secret").aio_channel(server.address) as channel:
                assert await once(channel) == b"a"
                stream = channel.stream_stream("/n/Many")(timeout=5)
                for number in range(3):
                    await stream.write(b"%d" % number)
                    assert await stream.read() == b"%d" % number
                await stream.done_writing()
                await channel.channel_ready()
            assert server.shown == ["Bearer secret"] * 2
            async with PLAIN.aio_channel(server.address) as channel:
                await once(channel)
            assert server.shown[-1] == ""

    run(scene())


def test_threads_show_it_too(run: Any) -> None:
    async def scene() -> None:
        async with Noting().serving() as server:

            def call() -> None:
                with Dialer("secret").channel(server.address) as channel:
                    assert channel.unary_unary("/n/One")(b"a", timeout=5) == b"a"
                    assert channel.unary_unary("/n/One").future(b"b", timeout=5).result() == b"b"
                    assert channel.unary_stream("/n/Many")(b"c", timeout=5).code() is not None
                    assert list(channel.stream_stream("/n/Many")(iter([b"d"]))) == [b"d"]

            await asyncio.to_thread(call)
            assert set(server.shown) == {"Bearer secret"}

    run(scene())


def test_a_server_is_believed_by_its_ca_and_its_name(
    run: Any, authority: Any, stranger: Any
) -> None:
    made = authority.section()
    credentials = server_credentials(TlsSection(**made))

    async def scene() -> None:
        async with Noting().serving(credentials) as server:
            good = ClientTls(authority.ca, name="feed.test")
            for tls in (good, ClientTls(authority.ca), ClientTls(authority.ca.read_bytes())):
                async with Dialer("secret", tls).aio_channel(server.address) as channel:
                    assert await once(channel) == b"a"
            assert server.shown == ["Bearer secret"] * 3
            bad = (ClientTls(stranger.ca), good._replace(name="other.test"), None)
            for tls in bad:
                async with Dialer("secret", tls).aio_channel(server.address) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await once(channel)
                    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert len(server.shown) == 3

    run(scene())


def test_a_server_may_ask_for_a_certificate(run: Any, authority: Any, stranger: Any) -> None:
    section = TlsSection(**authority.section(), client_ca=str(authority.ca))
    own = authority.issue("client", "client.test")
    strange = stranger.issue("client", "client.test")

    def shown(one: dict[str, str]) -> ClientTls:
        return ClientTls(authority.ca, Path(one["certificate"]), Path(one["key"]))

    async def scene() -> None:
        async with Noting().serving(server_credentials(section)) as server:
            async with Dialer("", shown(own)).aio_channel(server.address) as channel:
                assert await once(channel) == b"a"
            async with peer_dialer(PeerSection(tls=section)).aio_channel(server.address) as channel:
                assert await once(channel) == b"a"
            for tls in (ClientTls(authority.ca), shown(strange)):
                async with Dialer("", tls).aio_channel(server.address) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await once(channel)
                    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scene())


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.org:1", "0.0.0.0:1", "localhost.x:1"])
def test_no_token_is_shown_to_others_in_plain_text(address: str) -> None:
    for opened in (Dialer("secret").channel, Dialer("secret").aio_channel):
        with pytest.raises(ConfigError, match="plain text to loopback addresses alone") as raised:
            opened(address)
        assert "secret" not in str(raised.value)
    for dialer in (PLAIN, Dialer("secret", insecure=True), Dialer("secret", ClientTls(b""))):
        dialer.channel(address).close()
    for own in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        Dialer("secret").channel(own).close()


def test_a_program_outside_gives_a_token_and_roots() -> None:
    assert client_dialer() == PLAIN
    assert client_dialer("a", b"PEM") == Dialer("a", ClientTls(b"PEM"))


def test_processes_of_a_cluster_show_their_secret(tmp_path: Path, authority: Any) -> None:
    path = tmp_path / "secret"
    make_secret(path)
    tls = TlsSection(**authority.section())
    found = peer_dialer(PeerSection(secret=str(path), tls=tls))
    assert found == Dialer(read_secret(path), ClientTls(authority.ca, name="feed.test"))
    assert peer_dialer(PeerSection()) == PLAIN
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_dialer_does_not_show_its_token_in_a_log() -> None:
    for dialer in (Dialer("secret"), Dialer("secret", ClientTls(b"PEM", key=b"PRIVATE"))):
        for text in (repr(dialer), str(dialer), f"{dialer}"):
            assert "secret" not in text
            assert "PRIVATE" not in text
