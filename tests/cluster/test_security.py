import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from silvershard.cluster.audit import AuditLog
from silvershard.cluster.codec import Refusal
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.listen import bind, server_options
from silvershard.cluster.metrics import Metrics
from silvershard.cluster.roles import CALLER, NOBODY, PEER, Caller
from silvershard.cluster.secret_file import make_secret, read_secret
from silvershard.cluster.security import (
    ALONE,
    Protection,
    front_protection,
    peers_of,
    tenant_of,
)
from silvershard.cluster.security_config import PeerSection, SecuritySection, TlsSection
from silvershard.cluster.service import refused_by
from silvershard.cluster.tls import ClientTls
from silvershard.cluster.tokens import TokenFile, make_token
from silvershard.shard.errors import ConfigError

RETRIEVE = "/silvershard.v1.Retrieval/Retrieve"
APPLY = "/silvershard.v1.Updates/Apply"
STREAM = "/silvershard.v1.Updates/StreamUpdates"
ACTIVATE = "/silvershard.v1.Admin/Activate"
SHARDS = "/silvershard.v1.Admin/ListShards"


class Front:
    """A server of methods by their real names; each answers who calls it."""

    def __init__(self) -> None:
        self.address = ""
        self.served: list[str] = []

    @asynccontextmanager
    async def serving(self, protection: Protection) -> AsyncIterator["Front"]:
        server = grpc.aio.server(
            interceptors=protection.interceptors, options=server_options(1 << 20)
        )
        for method in (RETRIEVE, APPLY, ACTIVATE, SHARDS):
            service, name = method[1:].split("/")
            handlers = {name: grpc.unary_unary_rpc_method_handler(self._who)}
            if method == APPLY:
                handlers["StreamUpdates"] = grpc.stream_stream_rpc_method_handler(self._echo)
            handler = grpc.method_handlers_generic_handler(service, handlers)
            server.add_generic_rpc_handlers((handler,))
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        self.address = bind(server, "127.0.0.1", 0, protection.door)
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)

    async def _who(self, _: bytes, context: Any) -> bytes:
        caller = CALLER.get()
        self.served.append(caller.name)
        return json.dumps([caller.name, sorted(caller.roles), caller.tenant]).encode()

    async def _echo(self, messages: Any, context: Any) -> AsyncIterator[bytes]:
        self.served.append("stream")
        async for message in messages:
            yield message

    async def ask(self, method: str, token: str = "", **more: Any) -> Any:
        """Return who was let in, or the name of the status and the reason."""
        async with Dialer(token, **more).aio_channel(self.address) as channel:
            return await asked(channel, method)


async def asked(channel: Any, method: str) -> Any:
    try:
        return json.loads(await channel.unary_unary(method)(b"", timeout=5))
    except grpc.aio.AioRpcError as error:
        found = refused_by(error)
        return found.code, found.reason


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Tokens by role; their file is ``tokens.json``."""
    made = {
        role: make_token(f"{role}er", [role], tenant="acme" * (role == "query"), now_unix_s=1)
        for role in ("view", "query", "update", "admin")
    }
    made["expired"] = make_token("late", ["admin"], now_unix_s=1, expires_unix_s=2)
    TokenFile(tokens=tuple(one.row for one in made.values())).write(tmp_path / "tokens.json")
    make_secret(tmp_path / "secret")
    return {role: one.text for role, one in made.items()}


@pytest.fixture
def section(tmp_path: Path, texts: dict[str, str]) -> SecuritySection:
    return SecuritySection(tokens=str(tmp_path / "tokens.json"), secret=str(tmp_path / "secret"))


def test_each_call_needs_its_role(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    allowed = {"view": {SHARDS}, "query": {RETRIEVE}, "update": {APPLY}}
    allowed["admin"] = {RETRIEVE, APPLY, ACTIVATE, SHARDS}

    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            for role, methods in allowed.items():
                for method in (RETRIEVE, APPLY, ACTIVATE, SHARDS):
                    found = await front.ask(method, texts[role])
                    if method in methods:
                        assert found == [f"{role}er", [role], "acme" * (role == "query")]
                    else:
                        assert found == ("PERMISSION_DENIED", "ROLE_MISSING"), (role, method)
            assert len(front.served) == 7

    run(scene())


def test_without_a_good_token_nobody_is_served(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            for method in (RETRIEVE, APPLY, ACTIVATE, SHARDS, "/unknown/Method"):
                assert await front.ask(method) == ("UNAUTHENTICATED", "TOKEN_MISSING")
                for wrong in ("x", "svt_00000000_x", texts["admin"][:-1], f"{texts['admin']}x"):
                    found = await front.ask(method, wrong)
                    assert found == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
                found = await front.ask(method, texts["expired"])
                assert found == ("UNAUTHENTICATED", "TOKEN_EXPIRED")
            assert front.served == []

    run(scene())


def test_a_refusal_says_what_is_needed_and_nothing_of_the_secrets(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    said = []

    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            for token in ("", "wrong-token", texts["query"], texts["expired"]):
                async with Dialer(token).aio_channel(front.address) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await channel.unary_unary(ACTIVATE)(b"", timeout=5)
                    said.append(f"{raised.value.details()} {raised.value.trailing_metadata()}")

    run(scene())
    assert "metadata `authorization: Bearer TOKEN`" in said[0]
    assert "the token is not known here" in said[1]
    assert "the token of 'queryer' is good for query; this call needs admin" in said[2]
    assert "has expired" in said[3]
    secret = read_secret(Path(section.secret))
    for text in said:
        assert secret not in text
        for token in (*texts.values(), "wrong-token"):
            assert token not in text


def test_a_stream_is_refused_before_it_has_sent_anything(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            for token, code in (("", "UNAUTHENTICATED"), (texts["query"], "PERMISSION_DENIED")):
                async with Dialer(token).aio_channel(front.address) as channel:
                    stream = channel.stream_stream(STREAM)(timeout=5)
                    assert (await stream.code()).name == code
            async with Dialer(texts["update"]).aio_channel(front.address) as channel:
                stream = channel.stream_stream(STREAM)(timeout=5)
                await stream.write(b"a")
                assert await stream.read() == b"a"
            assert front.served == ["stream"]

    run(scene())


def test_health_is_told_to_anybody(run: Any, section: SecuritySection) -> None:
    async def scene() -> None:
        peers = peers_of(section.peers)
        for protection in (front_protection(section), peers.protection):
            front = Front()
            async with front.serving(protection), PLAIN.aio_channel(front.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING

    run(scene())


def test_the_secret_of_the_cluster_opens_all_its_ports_and_a_token_only_the_front(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    secret = read_secret(Path(section.secret))

    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            assert await front.ask(ACTIVATE, secret) == [PEER.name, sorted(PEER.roles), ""]
        peers = peers_of(section.peers)
        async with Front().serving(peers.protection) as inner:
            async with peers.dialer.aio_channel(inner.address) as channel:
                assert (await asked(channel, RETRIEVE))[0] == PEER.name
            for token, reason in (
                ("", "TOKEN_MISSING"),
                (texts["admin"], "TOKEN_UNKNOWN"),
                (secret[:-1], "TOKEN_UNKNOWN"),
                (f"{secret}x", "TOKEN_UNKNOWN"),
            ):
                assert await inner.ask(RETRIEVE, token) == ("UNAUTHENTICATED", reason)
            assert inner.served == [PEER.name]

    run(scene())


def test_without_tokens_the_front_asks_nobody_and_knows_nobody(run: Any) -> None:
    async def scene() -> None:
        async with Front().serving(front_protection(SecuritySection())) as front:
            assert await front.ask(ACTIVATE) == [NOBODY.name, [], ""]

    run(scene())


def test_a_token_that_is_revoked_is_refused_over_an_open_channel(
    run: Any, section: SecuritySection, texts: dict[str, str]
) -> None:
    async def scene() -> None:
        path = Path(section.tokens)
        async with (
            Front().serving(front_protection(section)) as front,
            Dialer(texts["query"]).aio_channel(front.address) as channel,
        ):
            assert (await asked(channel, RETRIEVE))[0] == "queryer"
            left = [one for one in TokenFile.read(path).tokens if one.name != "queryer"]
            new = make_token("newer", ["query"], now_unix_s=1)
            TokenFile(tokens=(*left, new.row)).write(path)
            while (found := await asked(channel, RETRIEVE))[0] == "queryer":
                await asyncio.sleep(0.01)
            assert found == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
            assert (await front.ask(RETRIEVE, new.text))[0] == "newer"

    run(scene())


def test_a_rotated_certificate_is_shown_to_new_connections_and_breaks_no_old_one(
    run: Any, section: SecuritySection, texts: dict[str, str], authority: Any, stranger: Any
) -> None:
    made = authority.section()
    section = section.model_copy(update={"tls": TlsSection(**made)})
    old, new = ClientTls(authority.ca), ClientTls(stranger.ca)

    async def scene() -> None:
        async with (
            Front().serving(front_protection(section)) as front,
            Dialer(texts["query"], old).aio_channel(front.address) as channel,
        ):
            assert (await asked(channel, RETRIEVE))[0] == "queryer"
            assert (await front.ask(RETRIEVE, texts["query"], tls=new))[0] == "UNAVAILABLE"
            # Of the new pair only the certificate is there yet: the old pair stays.
            key = Path(made["key"])
            key_before = key.read_bytes()
            authority.issue("server", "127.0.0.1", authority=stranger)
            key_after = key.read_bytes()
            key.write_bytes(key_before)
            assert (await front.ask(RETRIEVE, texts["query"], tls=old))[0] == "queryer"
            key.write_bytes(key_after)
            while (await front.ask(RETRIEVE, texts["query"], tls=new))[0] == "UNAVAILABLE":
                await asyncio.sleep(0.01)
            assert (await front.ask(RETRIEVE, texts["query"], tls=old))[0] == "UNAVAILABLE"
            assert (await asked(channel, RETRIEVE))[0] == "queryer"

    run(scene())


def test_refused_calls_are_counted_and_noted_without_what_they_showed(
    run: Any, section: SecuritySection, texts: dict[str, str], tmp_path: Path
) -> None:
    metrics, path = Metrics(), tmp_path / "audit.jsonl"
    protection = front_protection(section, AuditLog(path), metrics)

    async def scene() -> None:
        async with Front().serving(protection) as front:
            await front.ask(RETRIEVE, texts["query"])
            await front.ask(ACTIVATE, texts["query"])
            await front.ask(ACTIVATE, "wrong-token")

    run(scene())
    text = metrics.text()
    assert 'silvershard_refused_calls_total{code="PERMISSION_DENIED"} 1' in text
    assert 'silvershard_refused_calls_total{code="UNAUTHENTICATED"} 1' in text
    denied, unknown = [json.loads(line) for line in path.read_text().splitlines()]
    assert (denied["who"], denied["method"], denied["reason"]) == (
        *("queryer", ACTIVATE),
        "ROLE_MISSING",
    )
    assert (unknown["who"], unknown["code"]) == (NOBODY.name, "UNAUTHENTICATED")
    assert "127.0.0.1" in unknown["peer"]
    for shown in (texts["query"], "wrong-token"):
        assert shown not in text
        assert shown not in path.read_text()


def test_a_token_of_a_tenant_acts_for_it_alone() -> None:
    assert (tenant_of(""), tenant_of("acme")) == ("", "acme")
    before = CALLER.set(Caller("a", frozenset({"query"}), "acme"))
    try:
        assert (tenant_of(""), tenant_of("acme")) == ("acme", "acme")
        with pytest.raises(Refusal, match="of tenant 'acme', the request of 'other'") as raised:
            tenant_of("other")
        assert (raised.value.code, raised.value.reason) == ("PERMISSION_DENIED", "TENANT_MISMATCH")
    finally:
        CALLER.reset(before)


def test_ports_that_others_can_reach_need_tls_and_who_calls_known(
    section: SecuritySection, authority: Any
) -> None:
    tls = TlsSection(**authority.section())
    for one, encrypted, guarded in (
        (SecuritySection(), False, False),
        (section, False, True),
        (SecuritySection(tls=tls), True, False),
        (section.model_copy(update={"tls": tls}), True, True),
    ):
        door = front_protection(one).door
        assert (door.credentials is not None, door.guarded) == (encrypted, guarded)
    peers = peers_of(PeerSection(secret=section.secret, tls=tls)).protection.door
    assert (peers.credentials is not None, peers.guarded, peers.insecure) == (True, True, False)
    assert peers_of(PeerSection(insecure=True)).protection.door.insecure
    assert peers_of(PeerSection()) == ALONE


def test_the_front_may_ask_for_certificates_and_the_cluster_itself_does_not(
    run: Any, section: SecuritySection, texts: dict[str, str], authority: Any
) -> None:
    tls = TlsSection(**authority.section(), client_ca=str(authority.ca))
    section = section.model_copy(update={"tls": tls})
    without = ClientTls(authority.ca)
    peers = peers_of(section.peers)

    async def scene() -> None:
        async with Front().serving(front_protection(section)) as front:
            found = await front.ask(RETRIEVE, texts["query"], tls=without)
            assert found[0] == "UNAVAILABLE"
            own = peers.dialer
            assert (await front.ask(RETRIEVE, own.token, tls=own.tls))[0] == PEER.name
        async with Front().serving(peers.protection) as inner:
            assert (await inner.ask(RETRIEVE, own.token, tls=without))[0] == PEER.name

    run(scene())


def test_a_file_that_cannot_be_used_stops_the_start(
    section: SecuritySection, tmp_path: Path
) -> None:
    for update, named in (
        ({"tokens": str(tmp_path / "no")}, "security.tokens"),
        ({"secret": str(tmp_path / "no")}, "security.secret"),
    ):
        with pytest.raises(ConfigError, match=named):
            front_protection(section.model_copy(update=update))
    with pytest.raises(ConfigError, match=r"security\.secret"):
        peers_of(PeerSection(secret=str(tmp_path / "no")))
