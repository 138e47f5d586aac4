import pytest

from silvershard.cluster.http_address import split_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8002", ("127.0.0.1", 8002)),
        ("[::1]:0", ("::1", 0)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_an_address_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["", "8002", ":8002", "host:", "host:x", "host:65536", "host:٣"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port with a port from 0 to 65535, got"):
        split_address(text)
