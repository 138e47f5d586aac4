from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from silvershard.cluster.listen import Door, bind, check_host, is_loopback, server_options
from silvershard.shard.errors import ConfigError, StateError


@asynccontextmanager
async def server() -> AsyncIterator[Any]:
    one = grpc.aio.server(options=server_options(1024))
    try:
        yield one
    finally:
        await one.stop(None)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_only_addresses_of_this_machine_alone_are_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_an_address_that_others_can_reach_needs_the_flag(run: Callable[..., Any]) -> None:
    async def check() -> None:
        async with server() as one:
            with pytest.raises(ConfigError, match=r"without security\.tls and security\.tokens"):
                bind(one, "0.0.0.0", 0)
            assert bind(one, "0.0.0.0", 0, Door(insecure=True)).startswith("0.0.0.0:")

    run(check())


def test_the_system_chooses_a_free_port(run: Callable[..., Any]) -> None:
    async def check() -> None:
        async with server() as one:
            host, port = bind(one, "127.0.0.1", 0).split(":")
            assert host == "127.0.0.1"
            assert int(port) > 0

    run(check())


def test_a_port_in_use_is_an_error_and_is_not_shared(run: Callable[..., Any]) -> None:
    async def check() -> None:
        async with server() as first, server() as second:
            address = bind(first, "127.0.0.1", 0)
            await first.start()
            with pytest.raises(StateError, match=f"cannot listen on {address}"):
                bind(second, "127.0.0.1", int(address.split(":")[1]))

    run(check())


@pytest.mark.parametrize(
    ("door", "missing"),
    [
        (Door(), r"without security\.tls and security\.tokens, got '10\.0\.0\.1'; set both"),
        (Door(guarded=True), r"admin\.host must be .* without security\.tls, .* set it,"),
        (Door(credentials=object()), r"without security\.tokens, got '10\.0\.0\.1'; set it"),
    ],
)
def test_others_may_reach_only_what_is_encrypted_and_asks_who_they_are(
    door: Door, missing: str
) -> None:
    with pytest.raises(ConfigError, match=missing):
        check_host("10.0.0.1", door, "admin.host")
    check_host("127.0.0.1", door, "admin.host")
    check_host("10.0.0.1", Door(credentials=object(), guarded=True))
    check_host("10.0.0.1", Door(insecure=True))
