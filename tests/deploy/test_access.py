import argparse
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.secret_file import make_secret, read_secret
from silvershard.cluster.security_config import SecuritySection, TlsSection
from silvershard.cluster.tls import ClientTls
from silvershard.deploy.access import access_options, dialer_of, dialer_within, secured
from silvershard.deploy.config import load
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SILVERSHARD_TOKEN", raising=False)


@pytest.fixture
def own(idle_state: StateDir, authority: Any) -> StateDir:
    """A state directory whose cluster has a secret and certificates."""
    make_secret(idle_state.secret_file)
    record = idle_state.read_record()
    assert record is not None
    tls = TlsSection(**authority.section())
    security = SecuritySection(secret=str(idle_state.secret_file), tls=tls)
    idle_state.write_record(record.model_copy(update={"security": security}))
    return idle_state


def options(*arguments: str, address: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    access_options(parser)
    return parser.parse_args(arguments, argparse.Namespace(address=address))


def test_the_owner_of_a_state_directory_needs_nothing_else(own: StateDir, authority: Any) -> None:
    secret = read_secret(own.secret_file)
    expected = Dialer(secret, ClientTls(authority.ca, name="feed.test"))
    assert dialer_within(own.read_record()) == expected
    assert dialer_of(options(), own) == expected


def test_another_address_is_shown_nothing_that_was_not_given(
    own: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dialer_of(options(address="10.0.0.1:8001"), own) == PLAIN
    assert dialer_of(options(), StateDir(tmp_path / "none")) == PLAIN
    assert dialer_within(None) == PLAIN
    monkeypatch.setenv("SILVERSHARD_TOKEN", "svt_1_2")
    found = dialer_of(options("--ca", "ca.pem", address="10.0.0.1:8001"), own)
    assert found == Dialer("svt_1_2", ClientTls(Path("ca.pem")))


def test_a_token_is_shown_instead_of_the_secret(
    own: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Any
) -> None:
    monkeypatch.setenv("SILVERSHARD_TOKEN", " from-environment\n")
    tls = ClientTls(authority.ca, name="feed.test")
    assert dialer_of(options(), own) == Dialer("from-environment", tls)
    path = tmp_path / "token"
    path.write_text("from-file\n")
    path.chmod(0o600)
    assert dialer_of(options("--token-file", str(path)), own) == Dialer("from-file", tls)
    given = dialer_of(options("--ca", "other.pem"), own)
    assert given.tls == ClientTls(Path("other.pem"), name="feed.test")


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"token", 0o644, "--token-file .* owner alone, got mode 0644"),
        (b"", 0o600, "must hold one token"),
        (b"two words", 0o600, "must hold one token"),
        (b"\xff", 0o600, "must hold ASCII"),
    ],
)
def test_a_file_that_holds_no_token_is_named(
    tmp_path: Path, content: bytes, mode: int, message: str
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        dialer_of(options("--token-file", str(path)), StateDir(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"--token-file .*: No such file"):
        dialer_of(options("--token-file", "nowhere"), StateDir(tmp_path / "none"))


def test_files_are_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = StateDir(tmp_path / "s")
    found = secured(load(None, environ={}), state).security
    assert found == SecuritySection(
        secret=str(state.root / "cluster.secret"), audit=str(state.root / "log" / "audit.jsonl")
    )
    # Other hosts would lack a secret of the directory.
    assert secured(load(None, environ={}), state, own_secret=False).security.secret == ""
    tls = {"certificate": "c.pem", "key": "/k.pem", "ca": "ca.pem", "name": "feed.test"}
    given = {f"security.tls.{key}": value for key, value in tls.items()}
    given |= {f"security.{key}": f"{key}.x" for key in ("tokens", "secret", "audit")}
    found = secured(load(None, environ={}, options=given), state).security
    assert found == SecuritySection(
        tls=TlsSection(
            certificate=str(tmp_path / "c.pem"),
            key="/k.pem",
            ca=str(tmp_path / "ca.pem"),
            name="feed.test",
        ),
        **{key: str(tmp_path / f"{key}.x") for key in ("tokens", "secret", "audit")},
    )
