import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.codec import Refusal
from silvershard.cluster.roles import Caller
from silvershard.cluster.tokens import Made, TokenFile, Tokens, make_token
from silvershard.shard.errors import ConfigError


def made(name: str = "alice", **more: Any) -> Made:
    return make_token(name, more.pop("roles", ["query"]), now_unix_s=1000, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def refused(tokens: Tokens, text: str) -> str:
    with pytest.raises(Refusal) as raised:
        tokens.caller(text)
    assert raised.value.code == "UNAUTHENTICATED"
    # What was shown must not get into an answer or a log.
    assert not text or text not in str(raised.value)
    return raised.value.reason


def test_a_token_is_whose_it_was_made_for(path: Path) -> None:
    one, other = made(roles=["query", "update", "query"], tenant="acme"), made("bob")
    TokenFile(tokens=(one.row, other.row)).write(path)
    tokens = Tokens(path)
    assert tokens.caller(one.text) == Caller("alice", frozenset({"query", "update"}), "acme")
    assert tokens.caller(other.text) == Caller("bob", frozenset({"query"}))


def test_any_other_text_is_nobodys(path: Path) -> None:
    one, other = made(), made("bob")
    TokenFile(tokens=(one.row,)).write(path)
    tokens = Tokens(path)
    prefix, token_id, secret = one.text.split("_", 2)
    last = "A" if secret[-1] != "A" else "B"
    wrong = [
        *("", "_", "__", "svt__", other.text, one.row.sha256, token_id),
        *(f"{prefix}_{token_id}", f"{prefix}_{token_id}_", f"{prefix}_{token_id}_{secret}x"),
        *(f"{prefix}_{token_id}_{secret[:-1]}{last}", f"x{one.text}", f"{prefix}_{token_id}_ü"),
        f"svx_{token_id}_{secret}",
    ]
    for text in wrong:
        assert refused(tokens, text) == "TOKEN_UNKNOWN"
    assert tokens.caller(one.text).name == "alice"


def test_a_token_ends_with_its_time(path: Path) -> None:
    one = made(expires_unix_s=2000)
    TokenFile(tokens=(one.row,)).write(path)
    now_s = 1999.9
    tokens = Tokens(path, wall=lambda: now_s)
    assert tokens.caller(one.text).name == "alice"
    now_s = 2000.0
    assert refused(tokens, one.text) == "TOKEN_EXPIRED"
    assert one.row.described(1999.0)["expired"] is False
    assert one.row.described(2000.0) == {
        "token_id": one.row.token_id,
        "name": "alice",
        "roles": ["query"],
        "tenant": "",
        "created": "1970-01-01T00:16:40Z",
        "expires": "1970-01-01T00:33:20Z",
        "expired": True,
    }


def test_tokens_follow_their_file(path: Path) -> None:
    one, other = made(), made("bob")
    TokenFile(tokens=(one.row,)).write(path)
    tokens = Tokens(path, every_s=0.0)
    TokenFile(tokens=(other.row,)).write(path)
    assert refused(tokens, one.text) == "TOKEN_UNKNOWN"
    assert tokens.caller(other.text).name == "bob"
    path.write_text("{")
    assert tokens.caller(other.text).name == "bob"
    TokenFile().write(path)
    assert refused(tokens, other.text) == "TOKEN_UNKNOWN"


def test_the_file_holds_no_token_and_is_its_owners_alone(path: Path) -> None:
    one = made()
    TokenFile(tokens=(one.row,)).write(path)
    content = path.read_text()
    assert one.text not in content
    assert one.text.split("_", 2)[2] not in content
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["tokens.json"]
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"security\.tokens .* owner alone, got mode 0644"):
        TokenFile.read(path)


def test_two_tokens_of_one_name_are_different() -> None:
    first, second = made(), made()
    assert first.text != second.text
    assert first.row.token_id != second.row.token_id


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"roles": ["root"]}, r"tokens\.0\.roles\.0: Input should be 'view'"),
        ({"roles": []}, r"tokens\.0\.roles"),
        ({"sha256": "svt_00000000_secret"}, r"tokens\.0\.sha256"),
        ({"name": ""}, r"tokens\.0\.name"),
        ({"more": 1}, r"tokens\.0\.more"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_not_repeated(
    path: Path, change: dict[str, Any], named: str
) -> None:
    row = made().row.model_dump(mode="json") | change
    path.write_text(json.dumps({"tokens": [row]}))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"security.tokens .*tokens.json: {named}") as raised:
        Tokens(path)
    assert "svt_" not in str(raised.value)


def test_an_id_is_given_once(path: Path) -> None:
    row = made().row.model_dump(mode="json")
    path.write_text(json.dumps({"tokens": [row, row]}))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="token_id must be given once"):
        TokenFile.read(path)


@pytest.mark.parametrize("more", [{"name": ""}, {"tenant": "x" * 65}, {"roles": []}])
def test_a_token_that_could_not_be_read_again_is_not_made(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"token: {next(iter(more))}"):
        made(**more)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"security\.tokens .*No such file"):
        TokenFile().write(tmp_path / "no" / "tokens.json")
