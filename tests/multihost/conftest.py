"""A cluster on three hosts that are namespaces of this machine."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from multihost.hosts import NETWORK, Network, reason_to_skip

from silvershard.shard.generations import generation_dir

SHARDS, REPLICAS = 2, 2
HOSTS = [
    {"name": f"h{number}", "address": f"{NETWORK}.{10 + number}", "cpus": 2, "memory": "4GiB"}
    for number in range(3)
]


class HostedCluster:
    """A cluster on a network, and how to do things to it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.hosts = network.hosts
        self.settings = {
            "SILVERSHARD__CONTROL__STORE": network.redis_url(),
            "SILVERSHARD__UPDATES__LOG": network.redis_url().replace("test", "log"),
            "SILVERSHARD__RUNTIME__START_TIMEOUT_S": "240",
            "SILVERSHARD__SWAP__DRAIN_MS": "1000",
        }

    def cli(self, *words: str, host: int = 0, timeout_s: float = 400.0) -> Any:
        return self.network.cli(
            self.hosts[host], *words, environment=self.settings, timeout_s=timeout_s
        )

    def up(self, *words: str) -> Any:
        return self.cli(
            *("up", "--hosts", json.dumps(HOSTS), "--insecure", "--output", "json"),
            *("--shards", str(SHARDS), "--replicas", str(REPLICAS), *words),
        )

    def status(self, host: int = 0) -> dict[str, Any]:
        done = self.cli("status", "--output", "json", host=host)
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return found


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    made = Network(3)
    yield made
    made.close()


@pytest.fixture(scope="session")
def unstarted(network: Network, generation: Any) -> HostedCluster:
    """Hosts of which the first one has a generation."""
    repository = network.boxes["h0"].folder / "state" / "generations"
    repository.mkdir(mode=0o700)
    shutil.copytree(generation.path, generation_dir(repository, 1))
    return HostedCluster(network)
