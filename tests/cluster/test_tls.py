from pathlib import Path
from typing import Any

import grpc
import pytest

from silvershard.cluster.security_config import TlsSection
from silvershard.cluster.tls import ClientTls, check_tls, client_tls, server_credentials
from silvershard.shard.errors import ConfigError


def section(**fields: str) -> TlsSection:
    return TlsSection(**fields)


def test_files_that_fit_together_are_accepted(authority: Any) -> None:
    check_tls(TlsSection())
    check_tls(section(**authority.section()))
    check_tls(section(**authority.section(), client_ca=str(authority.ca)))


def test_a_certificate_may_be_its_own_ca(authority: Any) -> None:
    issued = authority.issue("alone", "feed.test")
    check_tls(section(**issued))


def test_a_key_of_another_certificate_is_refused(authority: Any) -> None:
    one, other = authority.section("one"), authority.section("other")
    with pytest.raises(ConfigError, match=r"must be a certificate and its key.*MISMATCH"):
        check_tls(section(**{**one, "key": other["key"]}))


@pytest.mark.parametrize(
    ("days", "reason"), [(-1.0, "certificate has expired"), (0.01, "certificate has expired")]
)
def test_a_certificate_out_of_date_is_refused(authority: Any, days: float, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_tls(section(**authority.section(days=days)))


def test_a_certificate_of_another_name_is_refused(authority: Any) -> None:
    made = authority.section("server", "other.test")
    with pytest.raises(ConfigError, match="not valid for 'feed\\.test'"):
        check_tls(section(**{**made, "name": "feed.test"}))


def test_a_certificate_of_another_ca_is_refused(authority: Any, stranger: Any) -> None:
    made = authority.issue("server", "feed.test", authority=stranger)
    with pytest.raises(ConfigError, match="would not believe each other"):
        check_tls(section(**made, ca=str(authority.ca)))


def test_a_certificate_that_the_ca_of_clients_does_not_know_is_refused(
    authority: Any, stranger: Any
) -> None:
    made = authority.section()
    with pytest.raises(ConfigError, match="would not believe each other"):
        check_tls(section(**made, client_ca=str(stranger.ca)))


@pytest.mark.parametrize("key", ["certificate", "key", "ca", "client_ca"])
def test_a_file_that_is_not_there_or_no_pem_is_named(
    authority: Any, tmp_path: Path, key: str
) -> None:
    whole = {**authority.section(), "client_ca": str(authority.ca)}
    nowhere = tmp_path / "nowhere.pem"
    with pytest.raises(ConfigError, match="No such file"):
        check_tls(section(**{**whole, key: str(nowhere)}))
    nowhere.write_text("-----BEGIN NOTHING-----")
    nowhere.chmod(0o600)
    with pytest.raises(ConfigError, match="PEM"):
        check_tls(section(**{**whole, key: str(nowhere)}))


def test_a_key_that_others_can_read_is_refused(authority: Any) -> None:
    made = authority.section()
    Path(made["key"]).chmod(0o644)
    with pytest.raises(ConfigError, match=r"security\.tls\.key .* owner alone, got mode 0644"):
        server_credentials(section(**made))


def test_nothing_is_encrypted_without_a_certificate() -> None:
    assert server_credentials(TlsSection()) is None
    assert client_tls(TlsSection()) is None


def test_processes_show_their_certificate_only_where_one_is_asked_for(authority: Any) -> None:
    made = authority.section()
    assert client_tls(section(**made)) == ClientTls(authority.ca, name="feed.test")
    mutual = client_tls(section(**made, client_ca=str(authority.ca)))
    assert mutual == ClientTls(
        authority.ca, Path(made["certificate"]), Path(made["key"]), "feed.test"
    )
    alone = {key: made[key] for key in ("certificate", "key", "name")}
    assert client_tls(section(**alone)) == ClientTls(Path(made["certificate"]), name="feed.test")


def test_a_root_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        ClientTls(tmp_path / "nowhere").credentials()
    assert isinstance(ClientTls(b"").credentials(), grpc.ChannelCredentials)
