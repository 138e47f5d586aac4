import pydantic
import pytest

from silvershard.cluster.security_config import PeerSection, SecuritySection, TlsSection

WHOLE = {"certificate": "c.pem", "key": "k.pem", "name": "feed.test"}


def test_nothing_is_encrypted_by_default() -> None:
    assert not SecuritySection().tls.enabled
    assert TlsSection(**WHOLE).enabled


@pytest.mark.parametrize("lacking", ["certificate", "key", "name"])
def test_certificate_key_and_name_belong_together(lacking: str) -> None:
    given = {key: value for key, value in WHOLE.items() if key != lacking}
    with pytest.raises(pydantic.ValidationError, match=f"{lacking} must be set, got"):
        TlsSection(**given)


@pytest.mark.parametrize("key", ["ca", "client_ca"])
def test_a_ca_needs_a_certificate(key: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="need a certificate, got none"):
        TlsSection(**{key: "ca.pem"})


def test_processes_know_all_that_concerns_them_and_nothing_else() -> None:
    tls = TlsSection(**WHOLE)
    section = SecuritySection(insecure=True, tls=tls, tokens="t", secret="s", audit="a")
    assert section.peers == PeerSection(secret="s", tls=tls, insecure=True)
    assert PeerSection.model_validate(section.peers.model_dump()) == section.peers
