"""Addresses as settings write them."""


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[host]:port``.

    Raises:
        ValueError: if it is no such address.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"must be host:port with a port from 0 to 65535, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
