"""A cluster on three hosts that are namespaces of this machine.

The modules share it, and run in the order of their names as long as their limits are the same:
``test_several_hosts_operated`` ends it, and later ones start their own.
"""

import json
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# The folders of tests are on no path.
if "multihost" not in sys.modules:
    _package = types.ModuleType("multihost")
    _package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["multihost"] = _package

from history.checker import check
from history.events import QueryEvent
from history.recorder import Recorder
from multihost.hosts import NETWORK, Box, Network, reason_to_skip, until

from silvershard.model.spec import SearchDefaults
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation

SHARDS, REPLICAS = 2, 2
HOSTS = [
    {"name": f"h{number}", "address": f"{NETWORK}.{10 + number}", "cpus": 2, "memory": "4GiB"}
    for number in range(3)
]
LOAD = Path(__file__).with_name("load_process.py")


class HostedCluster:
    """A cluster on a network, and what is done to it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.hosts = network.hosts
        self.settings = {
            "SILVERSHARD__CONTROL__STORE": network.redis_url(),
            "SILVERSHARD__UPDATES__LOG": network.redis_url("log"),
            "SILVERSHARD__RUNTIME__START_TIMEOUT_S": "240",
            "SILVERSHARD__RUNTIME__HANG_S": "3",
            "SILVERSHARD__SWAP__DRAIN_MS": "1000",
        }
        self._loads = 0

    def cli(self, *words: str, host: int = 0) -> Any:
        return self.network.cli(self.hosts[host], *words, environment=self.settings)

    def up(
        self, *words: str, hosts: Sequence[dict[str, Any]] = HOSTS, insecure: bool = True
    ) -> Any:
        return self.cli(
            *("up", "--hosts", json.dumps(hosts), "--output", "json", "--generation", "1"),
            *(("--insecure",) if insecure else ()),
            *("--shards", str(SHARDS), "--replicas", str(REPLICAS), *words),
        )

    def status(self, host: int = 0) -> dict[str, Any]:
        done = self.cli("status", "--output", "json", host=host)
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return found

    def record(self, host: int = 0) -> dict[str, Any]:
        """Return what the supervisor wrote last, as a host has it."""
        path = self.hosts[host].folder / "state" / "cluster.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def is_whole(self, host: int = 0) -> bool:
        """Return whether everything serves, as a host has it, and its router answers in full."""
        record = self.record(host)
        if not record:
            return False
        states = [one["state"] for one in (*record["shards"], *record["routers"])]
        states.append(record["sequencer"]["state"])
        named = record["size"]["shards"] * record["size"]["replicas"]
        return set(states) == {"serving"} and len(self.map(host)["entries"]) == named

    def map(self, host: int = 0) -> dict[str, Any]:
        """Return the shard map that the router of a host follows."""
        path = self.hosts[host].folder / "state" / "shard_map.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def wait_whole(self, host: int = 0, timeout_s: float = 120.0) -> None:
        until(lambda: self.is_whole(host), f"not whole: {self.record(host)}", timeout_s)

    def actor(self, name: str) -> tuple[Box, int]:
        """Return where the process of a kind of actor is, and its number outside."""
        found = [(box, pid) for box in self.network.boxes.values() for pid in box.named(name)]
        assert len(found) == 1, found
        return found[0]

    @contextmanager
    def under_load(self, *routers: int) -> Iterator[Path]:
        """Ask the routers of these hosts all the time; no request may fail."""
        self._loads += 1
        history = self.network.root / f"history-{self._loads}.jsonl"
        stop = self.network.root / f"stop-{self._loads}"
        process = self.network.switch.spawn(
            *(sys.executable, "-P", str(LOAD), "--history", str(history), "--until", str(stop)),
            *("--number", str(self._loads)),
            *("--routers", ",".join(f"{NETWORK}.{10 + one}:8001" for one in routers)),
        )
        try:
            until(lambda: min(answered(history)) >= 5, "the load is not answered")
            yield history
            queries, audits = answered(history)
            until(lambda: answered(history)[0] >= queries + 20, "the load is not answered any more")
            until(lambda: answered(history)[1] >= audits + 10, "nothing that is written is read")
        finally:
            stop.touch()
            process.wait(60)
        with Recorder(history) as recorder:
            report = check(recorder.events())
        assert report.violations == []
        assert report.looked["no_failed_request"] > 30
        assert report.looked["read_your_writes"] > 5


def answered(history: Path) -> tuple[int, int]:
    """Return how many queries were answered so far, and how many of them read what was written."""
    if not history.exists():
        return 0, 0
    with Recorder(history) as recorder:
        queries = [one for one in recorder.events() if isinstance(one, QueryEvent)]
    return len(queries), sum(bool(one.after) for one in queries if one.code == "OK")


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
    """Hosts of which the first one has two generations, clustered otherwise."""
    repository = network.hosts[0].folder / "state" / "generations"
    repository.mkdir(mode=0o700)
    shutil.copytree(generation.path, generation_dir(repository, 1))
    publish_generation(
        repository,
        name="films",
        model=generation.model,
        builder="two_tower",
        config=generation.model.config.model_dump(mode="json"),
        catalogue=generation.catalogue,
        schema=generation.schema,
        defaults=SearchDefaults(probes=4, ann_k=40),
        num_clusters=16,
        false_positive_rate=0.1,
        max_exact_planes=6,
        seed=18,
        generation=2,
    )
    return HostedCluster(network)


@pytest.fixture(scope="session")
def cluster(unstarted: HostedCluster) -> Iterator[HostedCluster]:
    """The cluster, started once; it is whole again after every test."""
    done = unstarted.up()
    assert done.returncode == 0, done.stderr[-2000:]
    return unstarted


@pytest.fixture
def whole(cluster: HostedCluster) -> HostedCluster:
    cluster.wait_whole()
    return cluster
