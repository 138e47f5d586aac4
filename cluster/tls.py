"""Certificates: what a server shows, what a client believes, and whether both fit together."""

import contextlib
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from silvershard.cluster.reloaded import Reloaded
from silvershard.cluster.secret_file import check_private
from silvershard.cluster.security_config import TlsSection
from silvershard.shard.errors import ConfigError


class ClientTls(NamedTuple):
    """What a client believes and shows; files are read whenever a channel is opened."""

    roots: bytes | Path
    """PEM of the CAs that it believes."""
    certificate: bytes | Path = b""
    """PEM of its own certificate, for servers that ask for one; empty: none."""
    key: bytes | Path = b""
    name: str = ""
    """Name that the server must have; empty: that of its address."""

    def credentials(self) -> Any:
        """Return the credentials of a channel.

        Raises:
            ConfigError: if a file cannot be read.
        """
        key, certificate = _content(self.key), _content(self.certificate)
        return grpc.ssl_channel_credentials(_content(self.roots), key or None, certificate or None)


def client_tls(section: TlsSection) -> ClientTls | None:
    """Return how the processes of a cluster meet each other; None: in plain text."""
    if not section.enabled:
        return None
    shown: tuple[bytes | Path, bytes | Path] = b"", b""
    if section.client_ca:
        shown = Path(section.certificate), Path(section.key)
    return ClientTls(Path(section.ca or section.certificate), *shown, section.name)


def server_credentials(section: TlsSection, *, every_s: float = 0.5) -> Any:
    """Return the credentials of a server, which follow the files; None: it encrypts nothing.

    A connection that is open goes on with the certificate that it began with.

    Args:
        section: names the files.
        every_s: least time between two looks at them.

    Raises:
        ConfigError: if the files cannot be used together.
    """
    if not section.enabled:
        return None
    names = (section.certificate, section.key, section.client_ca)
    files = Reloaded(
        [Path(name) for name in names if name],
        lambda: _server_configuration(section),
        every_s=every_s,
    )
    return grpc.dynamic_ssl_server_credentials(
        files.value, lambda: files.value, require_client_authentication=bool(section.client_ca)
    )


def _server_configuration(section: TlsSection) -> Any:
    _server_context(section)
    roots = _content(Path(section.client_ca)) if section.client_ca else None
    pair = _content(Path(section.key)), _content(Path(section.certificate))
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _content(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None


def _server_context(section: TlsSection) -> ssl.SSLContext:
    """Return what a server would show.

    Raises:
        ConfigError: if certificate and key cannot be read, or are not of each other.
    """
    check_private(Path(section.key), "security.tls.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(section.certificate, section.key, password=_no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"security.tls.certificate {section.certificate} and security.tls.key {section.key} "
            f"must be a certificate and its key in PEM: {error.reason or error}"
        ) from None
    except OSError as error:
        raise ConfigError(f"security.tls.certificate {section.certificate}: {error}") from None
    if section.client_ca:
        _load_roots(context, section.client_ca, "security.tls.client_ca")
    return context


def _no_password() -> bytes:
    # Without it OpenSSL would ask at the terminal.
    return b""


def _load_roots(context: ssl.SSLContext, path: str, key: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{key} {path} must be PEM: {error.reason or error}") from None
    except OSError as error:
        raise ConfigError(f"{key} {path}: {error.strerror}") from None


def check_tls(section: TlsSection) -> None:
    """Check that processes with these files would believe each other, by a handshake in memory.

    Raises:
        ConfigError: if a file cannot be used; if the key is of another certificate; if that is out
            of date, not of the CA, or not of the name.
    """
    if not section.enabled:
        return
    server = _server_context(section)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_roots(client, section.ca or section.certificate, "security.tls.ca")
    if section.client_ca:
        client.load_cert_chain(section.certificate, section.key)
        server.verify_mode = ssl.CERT_REQUIRED
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=section.name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(4):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        # With TLS 1.3 a client is told only afterwards that its certificate was refused.
        ends[1].write(b"1")
        ends[0].read(1)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"security.tls.certificate {section.certificate}: {error.verify_message.rstrip('.')}; "
            "the processes of the cluster would not believe each other"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"security.tls.certificate {section.certificate}: {error.reason or error}"
        ) from None
