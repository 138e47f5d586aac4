"""The one place where channels are opened: encrypted or not, and with the token that calls show."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import grpc
import grpc.aio

from silvershard.cluster.http_address import split_address
from silvershard.cluster.listen import is_loopback
from silvershard.cluster.secret_file import read_secret
from silvershard.cluster.security_config import PeerSection
from silvershard.cluster.tls import ClientTls, client_tls
from silvershard.shard.errors import ConfigError

Option = tuple[str, Any]


class Dials(Protocol):
    """What opens channels; ``Dialer`` does over the network."""

    def channel(self, address: str, options: Sequence[Option] = ()) -> Any:
        """Return a channel for threads."""

    def aio_channel(self, address: str, options: Sequence[Option] = ()) -> Any:
        """Return a channel for the running event loop."""


class Dialer(NamedTuple):
    """How servers are reached; it may be handed to other processes."""

    token: str = ""
    """Shown with every call, by a stream once; empty: none."""
    tls: ClientTls | None = None
    """None: in plain text."""
    insecure: bool = False
    """Show the token in plain text to other machines, too."""

    def __repr__(self) -> str:
        # The token must not get into a log.
        return f"Dialer(token={'set' if self.token else 'none'}, tls={self.tls is not None})"

    def channel(self, address: str, options: Sequence[Option] = ()) -> Any:
        """Return a channel for threads.

        Args:
            address: ``host:port``.
            options: of gRPC.

        Raises:
            ConfigError: if the token would be shown to another machine in plain text, or a
                certificate cannot be read.
        """
        if self.tls is None:
            self._check(address)
            return self._authorized(grpc.insecure_channel(address, options=options))
        credentials = self.tls.credentials()
        named = self._named(options)
        return self._authorized(grpc.secure_channel(address, credentials, options=named))

    def aio_channel(self, address: str, options: Sequence[Option] = ()) -> Any:
        """Return a channel for the running event loop; arguments and errors as above."""
        if self.tls is None:
            self._check(address)
            return self._authorized(grpc.aio.insecure_channel(address, options=options))
        credentials = self.tls.credentials()
        named = self._named(options)
        return self._authorized(grpc.aio.secure_channel(address, credentials, options=named))

    def _check(self, address: str) -> None:
        if not self.token or self.insecure:
            return
        try:
            host, _ = split_address(address)
        except ValueError:
            host = address
        if not is_loopback(host):
            raise ConfigError(
                f"a token is shown in plain text to loopback addresses alone, got {address!r}: "
                "give the CA of its certificate (root_certificates, --ca)"
            )

    def _named(self, options: Sequence[Option]) -> list[Option]:
        name = self.tls.name if self.tls is not None else ""
        return [*options, *([("grpc.ssl_target_name_override", name)] if name else [])]

    def _authorized(self, channel: Any) -> Any:
        if not self.token:
            return channel
        return _AuthorizedChannel(channel, (("authorization", f"Bearer {self.token}"),))


PLAIN = Dialer()
"""Reaches servers on this machine that ask for nothing."""


def client_dialer(token: str = "", root_certificates: bytes | None = None) -> Dialer:
    """Return how a program outside the cluster reaches it.

    Args:
        token: empty: none.
        root_certificates: PEM of the CAs by which servers are known; None: plain text.
    """
    return Dialer(token, None if root_certificates is None else ClientTls(root_certificates))


def peer_dialer(section: PeerSection) -> Dialer:
    """Return how a process reaches the others of its cluster.

    Raises:
        ConfigError: if the secret cannot be read.
    """
    token = read_secret(Path(section.secret)) if section.secret else ""
    return Dialer(token, client_tls(section.tls), section.insecure)


class _AuthorizedChannel:
    """A channel whose calls show a token; interceptors of gRPC would cost something per message."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *arguments: Any, **named: Any) -> "_AuthorizedMethod":
        return _AuthorizedMethod(self._channel.unary_unary(*arguments, **named), self._metadata)

    def unary_stream(self, *arguments: Any, **named: Any) -> "_AuthorizedMethod":
        return _AuthorizedMethod(self._channel.unary_stream(*arguments, **named), self._metadata)

    def stream_unary(self, *arguments: Any, **named: Any) -> "_AuthorizedMethod":
        return _AuthorizedMethod(self._channel.stream_unary(*arguments, **named), self._metadata)

    def stream_stream(self, *arguments: Any, **named: Any) -> "_AuthorizedMethod":
        return _AuthorizedMethod(self._channel.stream_stream(*arguments, **named), self._metadata)

    def close(self) -> Any:
        return self._channel.close()

    def channel_ready(self) -> Any:
        return self._channel.channel_ready()

    def __enter__(self) -> Self:
        self._channel.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.__exit__(kind, error, trace)

    async def __aenter__(self) -> Self:
        await self._channel.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.__aexit__(kind, error, trace)


class _AuthorizedMethod:
    """A method of such a channel."""

    def __init__(self, method: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._method = method
        self._metadata = metadata

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._method(*arguments, metadata=self._metadata, **named)

    def future(self, *arguments: Any, **named: Any) -> Any:
        return self._method.future(*arguments, metadata=self._metadata, **named)
