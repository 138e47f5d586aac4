import json
from pathlib import Path
from typing import Any

import pytest
from multihost.conftest import HOSTS, HostedCluster
from multihost.hosts import NETWORK

from silvershard.cluster.secret_file import make_secret
from silvershard.cluster.tokens import TokenFile, make_token

# It starts a cluster of its own, after the others.
pytestmark = pytest.mark.timeout(600)


def test_hosts_with_certificates_tokens_and_a_secret(
    unstarted: HostedCluster, tmp_path: Path, make_authority: Any
) -> None:
    if unstarted.status()["state"] != "down":
        assert unstarted.cli("down").returncode == 0
    addresses = [f"{NETWORK}.{10 + host}" for host in range(len(HOSTS))]
    authority = make_authority("hosts")
    tls = authority.section("server", "feed.test", *addresses)
    made = make_token("reader", ["query"], now_unix_s=1)
    TokenFile(tokens=(made.row,)).write(tmp_path / "tokens.json")
    make_secret(tmp_path / "secret")
    unstarted.settings |= {
        **{f"SILVERSHARD__SECURITY__TLS__{key.upper()}": one for key, one in tls.items()},
        "SILVERSHARD__SECURITY__TOKENS": str(tmp_path / "tokens.json"),
        "SILVERSHARD__SECURITY__SECRET": str(tmp_path / "secret"),
    }
    done = unstarted.up(insecure=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Who owns the state directory may ask, and the processes of the cluster each other.
    found = unstarted.status(2)
    assert (found["state"], found["coverage"]) == ("up", 1.0)
    assert unstarted.cli("query", "--history", "1,2,3", "--fields", "title", host=1).returncode == 0

    def ask(address: str, *words: str, token: str = "") -> Any:
        return unstarted.network.cli(
            unstarted.network.switch,
            *("query", "--history", "1,2,3", "--fields", "title", "--output", "json", *words),
            *("--address", f"{address}:8001"),
            environment={"SILVERSHARD_TOKEN": token},
        )

    known = ("--ca", str(authority.ca))
    for address in addresses:
        done = ask(address, *known, token=made.text)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["coverage"] == 1.0
    for words, token, said in (
        (known, "", "UNAUTHENTICATED: a token is needed"),
        (known, "svt_00000000_wrong", "UNAUTHENTICATED: "),
        ((), made.text, "a token is shown in plain text to loopback addresses alone"),
    ):
        done = ask(addresses[2], *words, token=token)
        assert (done.returncode, done.stdout) != (0, "")
        assert said in done.stderr
    assert unstarted.cli("down", host=2).returncode == 0
