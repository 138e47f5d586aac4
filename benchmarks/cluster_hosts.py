"""What requests notice when a host of a cluster is cut off, and when the head of Ray is gone.

Hosts are namespaces of this machine, as in ``tests/multihost``; they take root. Copies of a shard
are on different hosts, and routers on the hosts that stay are asked from outside of all of them.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import live_catalogue as live
from silvershard.model.request import Request
from silvershard.shard.generations import generation_dir
from silvershard.shard.load import load_retriever

Read = Callable[[Path, Sequence[Sequence[int]]], list[dict[str, Any]]]

SHARDS, REPLICAS, HOSTS = 2, 2, 2
CUT_S = 3.0
"""For which the link of a host is down, from when the map no longer names it."""
HEAD_S = 120.0
"""For which the head of Ray is gone."""
K = 20
_ITEMS = 2000
_CLUSTERS = 16
_REQUESTS = 20
_RATE = 5.0
_DEADLINE_S = 2.0
_LEAD_S = 7.0
"""Of load before anything happens; the process that puts it starts within that time."""
_WHOLE_S = 27.0
"""Of load from the cut on, beside the time of the cut."""


def _namespaces() -> Any:
    """Return the module that makes hosts; tests are on no path."""
    package = types.ModuleType("multihost")
    folder = Path(__file__).resolve().parent.parent / "tests" / "multihost"
    package.__path__ = [str(folder)]
    sys.modules.setdefault("multihost", package)
    return importlib.import_module("multihost.hosts")


class Cluster:
    """A cluster over hosts, with requests whose answers are known."""

    def __init__(self, network: Any, namespaces: Any) -> None:
        self.network = network
        self.namespaces = namespaces
        self.answers: list[list[int]] = []
        self._requests = network.root / "requests.jsonl"
        self._loads = 0

    def start(self) -> None:
        """Publish a generation on the first host and start.

        Raises:
            RuntimeError: if it does not start.
        """
        repository = self.network.hosts[0].folder / "state" / "generations"
        repository.mkdir(mode=0o700)
        snapshot = live.publish(repository, _ITEMS, _CLUSTERS)
        draw = np.random.default_rng(0)
        visited = [draw.integers(0, live.CELLS, 8).tolist() for _ in range(_REQUESTS)]
        lines = [{"features": {"visited": one}, "k": K, "exact": True} for one in visited]
        self._requests.write_text("".join(json.dumps(one) + "\n" for one in lines))
        retriever, _ = load_retriever(snapshot)
        for one in visited:
            (answer,) = retriever([Request(features={"visited": one}, k=K, exact=True)])
            self.answers.append(answer.item_ids.tolist())
        assert generation_dir(repository, 1) == snapshot
        prefix = self.namespaces.NETWORK
        hosts = [
            {"name": f"h{at}", "address": f"{prefix}.{10 + at}", "cpus": 2, "memory": "4GiB"}
            for at in range(HOSTS)
        ]
        url = self.network.redis_url
        done = self.network.cli(
            self.network.hosts[0],
            *("up", "--hosts", json.dumps(hosts), "--insecure", "--generation", "1"),
            *("--shards", str(SHARDS), "--replicas", str(REPLICAS)),
            environment={
                "SILVERSHARD__CONTROL__STORE": url(),
                "SILVERSHARD__UPDATES__LOG": url("log"),
                "SILVERSHARD__RUNTIME__START_TIMEOUT_S": "240",
            },
        )
        if done.returncode:
            raise RuntimeError(f"the cluster did not start: {done.stderr.strip()[-1000:]}")

    def is_whole(self) -> bool:
        """Return whether the first host knows of all copies."""
        path = self.network.hosts[0].folder / "state" / "shard_map.json"
        return path.exists() and len(json.loads(path.read_text())["entries"]) == SHARDS * REPLICAS

    def wait_whole(self, timeout_s: float = 240.0) -> None:
        """Wait until it does."""
        self.namespaces.until(self.is_whole, "a copy is missing", timeout_s)

    @contextlib.contextmanager
    def asked(self, seconds: float, routers: int) -> Iterator[Callable[[], Path]]:
        """Ask the first routers for so long; yield what returns the record when it is over."""
        self._loads += 1
        record = self.network.root / f"record-{self._loads}.jsonl"
        prefix = self.namespaces.NETWORK
        addresses = ",".join(f"{prefix}.{10 + at}:8001" for at in range(routers))
        process = self.network.switch.spawn(
            *(sys.executable, "-P", "-m", "silvershard.deploy.cli", "bench"),
            *("--address", addresses, "--requests", str(self._requests), "--rate", str(_RATE)),
            *("--duration", str(seconds), "--arrivals", "constant", "--record", str(record)),
            *("--deadline", str(_DEADLINE_S), "--max-errors", "1"),
            *("--state", str(self.network.switch.folder / "state")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

        def ended() -> Path:
            said, _ = process.communicate(timeout=seconds + 60)
            # Answers of less than full coverage are exit code 3, and counted here.
            if process.returncode not in (0, 1, 3):
                raise RuntimeError(f"the load failed: {said.strip()[-1000:]}")
            return record

        try:
            yield ended
        finally:
            process.kill()
            process.wait()


def measure_hosts(
    read: Read, failed: Callable[[dict[str, Any]], bool], *, head: bool
) -> dict[str, Any]:
    """Return how many requests failed through a host that was cut off, and through a lost head.

    Args:
        read: reads a record, and raises RuntimeError if a full answer is not as expected.
        failed: tells whether a line of a record is of a request that failed.
        head: whether the head of Ray is killed, too, which takes two minutes and more.

    Raises:
        RuntimeError: if the cluster does not start, or an answer is wrong.
    """
    namespaces = _namespaces()
    reason = namespaces.reason_to_skip()
    if reason:
        return {"warnings": [reason]}
    network = namespaces.Network(HOSTS)
    try:
        cluster = Cluster(network, namespaces)
        cluster.start()
        cluster.wait_whole()
        found: dict[str, Any] = {"warnings": []}
        box = network.hosts[HOSTS - 1]
        with cluster.asked(_LEAD_S + CUT_S + _WHOLE_S, HOSTS - 1) as ended:
            time.sleep(_LEAD_S)
            network.cut(box)
            namespaces.until(lambda: not cluster.is_whole(), "the host is still in the map")
            time.sleep(CUT_S)
            network.heal(box)
            began_s = time.monotonic()
            cluster.wait_whole()
            found["cut_whole_s"] = time.monotonic() - began_s
            lines = read(ended(), cluster.answers)
        found["cut_failed"] = sum(map(failed, lines))
        found["cut_requests"] = len(lines)
        if head:
            with cluster.asked(_LEAD_S + HEAD_S + 2 * _LEAD_S, HOSTS) as ended:
                time.sleep(_LEAD_S)
                network.head.kill()
                time.sleep(HEAD_S)
                network.restart(network.head, namespaces.HEAD)
                lines = read(ended(), cluster.answers)
            found["head_failed"] = sum(map(failed, lines))
            found["head_requests"] = len(lines)
        return found
    finally:
        network.close()
