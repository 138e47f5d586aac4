import json
import os
import signal
import sys
from collections import Counter
from typing import Any

import pytest
from multihost.conftest import REPLICAS, SHARDS, HostedCluster
from multihost.hosts import NETWORK, until

from silvershard.model.request import Request
from silvershard.shard.load import load_retriever

# The first of them also starts the cluster, if it is run alone.
pytestmark = pytest.mark.timeout(900)

ACTORS = ("ray::HostActor", "ray::ShardActor", "ray::SequencerActor", "ray::SupervisorActor")
# What the load writes is left out.
FILTERS = ("NOT genre:own", "NOT genre:own AND year >= 1990", "genre:drama AND NOT genre:own")
ASK = """
import json, sys
from silvershard.cluster import Client, Query
with Client(sys.argv[1], timeout_s=10.0) as client:
    for text in json.loads(sys.argv[2]):
        found = client.retrieve(
            Query(features={"history": [1, 2, 3]}, k=100, filter=text, exact=True, min_coverage=1.0)
        )
        scores = [float(one).hex() for one in found.scores]
        print(json.dumps([found.item_ids.tolist(), scores]))
"""


def answers(cluster: HostedCluster, host: int) -> list[Any]:
    """Return what the router of a host answers in exact mode."""
    address = f"{NETWORK}.{10 + host}:8001"
    done = cluster.network.switch.run(sys.executable, "-P", "-c", ASK, address, json.dumps(FILTERS))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected(generation: Any) -> list[Any]:
    """What the model answers in one process."""
    whole = load_retriever(generation.path)[0]
    requests = [
        Request(features={"history": [1, 2, 3]}, k=100, filter=text, exact=True) for text in FILTERS
    ]
    found = [whole([one])[0] for one in requests]
    return [
        [one.item_ids.tolist(), [float(score).hex() for score in one.scores.tolist()]]
        for one in found
    ]


def copies_of(cluster: HostedCluster) -> dict[int, Counter[str]]:
    """Return on which hosts the copies of each shard are."""
    found: dict[int, Counter[str]] = {}
    for one in cluster.record()["shards"]:
        found.setdefault(one["shard"], Counter())[one["host"]] += 1
    return found


def num_processes(cluster: HostedCluster) -> int:
    return sum(len(box.named("ray::ShardActor")) for box in cluster.hosts)


def scaled(cluster: HostedCluster, shards: int) -> None:
    done = cluster.cli("scale", "--shards", str(shards), "--output", "json", "--timeout", "240")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answers are compared" in done.stderr
    assert json.loads(done.stdout)["after"]["shards"] == shards


def test_it_is_scaled_up_and_down_and_no_request_fails(
    whole: HostedCluster, expected: list[Any]
) -> None:
    assert answers(whole, 0) == expected
    with whole.under_load(0, 1, 2):
        scaled(whole, SHARDS + 1)
        until(lambda: {whole.map(one)["num_shards"] for one in range(3)} == {SHARDS + 1}, "no map")
        whole.wait_whole()
        assert [answers(whole, one) for one in range(3)] == [expected] * 3
    # Copies of a shard are on different hosts, and the old set ends when it is not asked any more.
    assert {max(one.values()) for one in copies_of(whole).values()} == {1}
    until(lambda: num_processes(whole) == (SHARDS + 1) * REPLICAS, "the old set is left")
    # Whoever takes over finds the new set.
    before = whole.record()
    _, pid = whole.actor("ray::SupervisorActor")
    with whole.under_load(0, 1, 2):
        os.kill(pid, signal.SIGKILL)
        until(lambda: whole.record()["since_unix_s"] > before["since_unix_s"], "no supervisor")
        whole.wait_whole()
        scaled(whole, SHARDS)
        whole.wait_whole()
        assert [answers(whole, one) for one in range(3)] == [expected] * 3
    until(lambda: num_processes(whole) == SHARDS * REPLICAS, "the larger set is left")


def test_down_ends_everything_of_ours_and_nothing_else(whole: HostedCluster) -> None:
    done = whole.cli("down", host=1)
    assert done.returncode == 0, done.stderr
    for box in whole.hosts:
        # Ray keeps idle workers.
        until(lambda box=box: not any(map(box.named, ACTORS)), "actors are left")
        assert box.named("router_process") == []
        assert not (box.folder / "state" / "shard_map.json").exists()
        # Ray itself goes on.
        assert len(box.named("raylet/raylet")) == 1
    assert whole.status()["state"] == "down"
    assert whole.cli("down").stdout.startswith("nothing is running")
