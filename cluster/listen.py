"""Where servers bind, and the channel settings that both ends of a connection agree on."""

import ipaddress

import grpc
import grpc.aio

from silvershard.shard.errors import ConfigError, StateError

INTERNAL_MESSAGE_BYTES = 256 << 20
"""Largest message between a router and a shard."""

Options = list[tuple[str, int]]

# Without SO_REUSEPORT a second server on a port fails instead of sharing its requests.
_SERVER: Options = [
    ("grpc.so_reuseport", 0),
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


def server_options(max_receive_bytes: int) -> Options:
    """Return the options of a server that accepts messages up to ``max_receive_bytes``."""
    return [
        *_SERVER,
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


def bind(server: grpc.aio.Server, host: str, port: int, *, insecure: bool = False) -> str:
    """Bind a server and return its address ``host:port``.

    Args:
        server: not started yet.
        host: address to bind.
        port: 0 lets the system choose a free one.
        insecure: allow an address that other machines can reach.

    Raises:
        ConfigError: if other machines can reach ``host`` and ``insecure`` is False.
        StateError: if the port is in use or the address is not of this machine.
    """
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"listen.host must be a loopback address while nothing is encrypted, got {host!r}; "
            "set listen.insecure to bind it all the same"
        )
    name = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{name}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise StateError(
            f"cannot listen on {name}:{port}: "
            "the port is in use or the address is not of this machine"
        )
    return f"{name}:{bound}"
