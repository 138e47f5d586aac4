"""What keeps strangers out of a cluster, as a person decides it."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TlsSection(BaseModel):
    """Certificates of the connections of a cluster; without a certificate nothing is encrypted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: str = Field(
        default="", description="PEM file of the certificate, with those that lead to its CA"
    )
    key: str = Field(default="", description="PEM file of its key, readable by its owner alone")
    ca: str = Field(
        default="",
        description="PEM file of the CA of the certificate, by which the processes of the cluster "
        "know each other; empty: the certificate itself",
    )
    name: str = Field(
        default="", description="a DNS name in the certificate, which they look for in each other's"
    )
    client_ca: str = Field(
        default="",
        description="PEM file of the CA of clients: router and admin plane ask for a certificate "
        "of it; empty: for none",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {key: getattr(self, key) for key in ("certificate", "key", "name")}
        lacking = [key for key, value in given.items() if not value]
        if len(lacking) not in (0, len(given)):
            present = ", ".join(key for key, value in given.items() if value)
            raise ValueError(
                f"certificate, key and name belong together: {', '.join(lacking)} must be set, "
                f"got {present} alone"
            )
        if lacking and (self.ca or self.client_ca):
            raise ValueError("ca and client_ca need a certificate, got none")
        return self

    @property
    def enabled(self) -> bool:
        """Return whether connections are encrypted."""
        return bool(self.certificate)


class SecuritySection(BaseModel):
    """Who may reach the ports of a cluster, and what is noted about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    insecure: bool = Field(
        default=False,
        description="allow addresses other than loopback without TLS and tokens; who can reach "
        "them may ask",
    )
    tls: TlsSection = Field(
        default=TlsSection(),
        description="PEM files: certificate, key, ca, client_ca; and a DNS name in the "
        "certificate. Changed files are read anew",
    )
    tokens: str = Field(
        default="",
        description="file of bearer tokens, which `token create` makes; empty: nobody is asked for "
        "one",
    )
    secret: str = Field(
        default="",
        description="file of the secret that the processes of the cluster show each other; empty: "
        "one that `up` makes in the state directory",
    )
    audit: str = Field(
        default="",
        description="file to which changes by the admin plane and refused calls are appended; "
        "empty: log/audit.jsonl in the state directory",
    )

    @property
    def peers(self) -> "PeerSection":
        """Return the part that every process of the cluster needs."""
        return PeerSection(secret=self.secret, tls=self.tls, insecure=self.insecure)


class PeerSection(BaseModel):
    """How the processes of a cluster know each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    secret: str = Field(default="", description="file of their secret; empty: none is asked for")
    tls: TlsSection = Field(default=TlsSection(), description="of their connections")
    insecure: bool = Field(
        default=False, description="allow addresses other than loopback without encryption"
    )
