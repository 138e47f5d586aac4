import pytest

from silvershard.cluster import wire


def test_a_shard_of_this_release_may_be_asked() -> None:
    assert wire.refusal(wire.METADATA) == ""
    assert wire.refusal([("other", b"bytes"), *wire.METADATA]) == ""


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (None, "1 or none"),
        ((), "1 or none"),
        ((("silvershard-wire", str(wire.VERSION + 1)),), str(wire.VERSION + 1)),
        ((("silvershard-wire", "x" * 900),), "x" * 20 + ","),
    ],
)
def test_another_version_is_refused_by_name(
    metadata: tuple[tuple[str, str], ...] | None, named: str
) -> None:
    said = wire.refusal(metadata)
    assert f"wire version {named}" in said
    assert f"this router {wire.VERSION}:" in said
    assert len(said) < 200
