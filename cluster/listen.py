"""Where servers bind, and the channel settings that both ends of a connection agree on."""

import ipaddress
from typing import Any, NamedTuple

import grpc
import grpc.aio

from silvershard.shard.errors import ConfigError, StateError

INTERNAL_MESSAGE_BYTES = 256 << 20
"""Largest message between a router and a shard."""

Options = list[tuple[str, int]]

_SERVER: Options = [
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
]

# A cut link is noticed 1.5 s after the last byte and tried again twice a second.
LINK_OPTIONS: Options = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Channels to the same address would otherwise share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
]


def server_options(max_receive_bytes: int, *, shared: bool = False) -> Options:
    """Return the options of a server that accepts messages up to ``max_receive_bytes``.

    A second server on a port fails, unless both share it: then the system deals out connections.
    """
    return [
        *_SERVER,
        ("grpc.so_reuseport", int(shared)),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    ]


def is_loopback(host: str) -> bool:
    """Return True when only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door(NamedTuple):
    """What keeps strangers out of a port."""

    credentials: Any = None
    """Of gRPC, by which connections are encrypted; None: they are not."""
    guarded: bool = False
    """Whoever calls is asked who they are."""
    insecure: bool = False
    """Somebody decided that strangers may come in."""


OPEN = Door()
"""Of a port that only this machine can reach."""


def check_host(host: str, door: Door, key: str = "listen.host") -> None:
    """Check that other machines cannot reach an address, or only those that may.

    Raises:
        ConfigError: naming ``key`` and what is missing.
    """
    if is_loopback(host) or door.insecure:
        return
    missing = [] if door.credentials is not None else ["security.tls"]
    missing += [] if door.guarded else ["security.tokens"]
    if missing:
        raise ConfigError(
            f"{key} must be a loopback address without {' and '.join(missing)}, got {host!r}; set "
            f"{'both' if len(missing) == 2 else 'it'}, or security.insecure (--insecure) if every "
            "machine that can reach it may ask"
        )


def bind(server: grpc.aio.Server, host: str, port: int, door: Door = OPEN) -> str:
    """Bind a server and return its address ``host:port``.

    Args:
        server: not started yet.
        host: address to bind.
        port: 0 lets the system choose a free one.
        door: what keeps strangers out of it.

    Raises:
        ConfigError: if other machines can reach ``host`` and nothing keeps them out.
        StateError: if the port is in use or the address is not of this machine.
    """
    check_host(host, door)
    name = f"[{host}]" if ":" in host else host
    try:
        if door.credentials is None:
            bound = server.add_insecure_port(f"{name}:{port}")
        else:
            bound = server.add_secure_port(f"{name}:{port}", door.credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise StateError(
            f"cannot listen on {name}:{port}: "
            "the port is in use or the address is not of this machine"
        )
    return f"{name}:{bound}"
