import json
import os
import signal
import sys
from collections import Counter
from typing import Any

import pytest
from multihost.conftest import HOSTS, REPLICAS, SHARDS, HostedCluster, answered
from multihost.hosts import NETWORK, until

from silvershard.model.request import Request
from silvershard.shard.load import load_retriever

# The first of them also starts the cluster, if it is run alone; the last one ends it.
pytestmark = pytest.mark.timeout(600)

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


def releases(cluster: HostedCluster) -> set[str]:
    """Return the releases that processes say they run."""
    record = cluster.record()
    processes = [*record["shards"], *record["routers"], record["sequencer"], record]
    return {one["release"] for one in processes}


def test_a_restart_brings_a_new_release_in_and_no_request_fails(whole: HostedCluster) -> None:
    before = {(one["shard"], one["replica"]): one for one in whole.record()["shards"]}
    agents = [pid for box in whole.hosts for pid in box.named("ray::HostActor")]
    assert releases(whole) == {"1.0"}
    with whole.under_load(0, 1, 2):
        whole.network.installed.install("2.0", is_next=True)
        done = whole.cli("restart", "--output", "json", "--timeout", "240")
        assert done.returncode == 0, done.stderr[-2000:]
        until(lambda: releases(whole) == {"2.0"}, f"other releases run: {releases(whole)}")
        whole.wait_whole()
    after = {(one["shard"], one["replica"]): one for one in whole.record()["shards"]}
    assert json.loads(done.stdout)["processes"] == len(after) == SHARDS * REPLICAS
    for key, one in after.items():
        assert one["host"] == before[key]["host"]
        assert one["epoch"] > before[key]["epoch"]
    assert whole.record()["added"] == "by the next release"
    assert num_processes(whole) == SHARDS * REPLICAS
    now = [pid for box in whole.hosts for pid in box.named("ray::HostActor")]
    assert len(now) == len(agents)
    assert not {*now} & {*agents}
    assert json.loads(whole.cli("status", "--output", "json").stdout)["release"] == "2.0"


def test_a_host_hands_over_what_it_holds_and_gets_its_share_back(whole: HostedCluster) -> None:
    before = copies_of(whole)
    assert any(one["h1"] for one in before.values())
    listed = json.loads(whole.cli("node", "list", "--output", "json").stdout)["hosts"]
    assert [one["host"] for one in listed] == [one["name"] for one in HOSTS]
    assert sum(one["copies"] for one in listed) == SHARDS * REPLICAS
    with whole.under_load(0, 1, 2):
        done = whole.cli("drain", "h1", "--output", "json", "--timeout", "240")
        assert done.returncode == 0, done.stderr[-2000:]
        assert whole.hosts[1].named("ray::ShardActor") == []
        whole.wait_whole()
    assert not any(one["h1"] for one in copies_of(whole).values())
    assert {max(one.values()) for one in copies_of(whole).values()} == {1}
    assert {one["address"].split(":")[0] for one in whole.map(1)["entries"]} == {
        one["address"] for one in HOSTS if one["name"] != "h1"
    }
    # What a further one would cost is said before it is done.
    done = whole.cli("drain", "h0", "--dry-run")
    assert "2 copies of shard 0 share host h2" in done.stdout
    with whole.under_load(0, 1, 2):
        assert whole.cli("undrain", "h1").returncode == 0
        until(lambda: any(one["h1"] for one in copies_of(whole).values()), "nothing came back")
        until(lambda: num_processes(whole) == SHARDS * REPLICAS, "first processes are left")
        whole.wait_whole()
    assert {max(one.values()) for one in copies_of(whole).values()} == {1}


def test_no_request_fails_while_a_link_is_slow(whole: HostedCluster) -> None:
    box = whole.hosts[2]
    assert box.named("ray::ShardActor")
    with whole.under_load(0, 1) as history:
        whole.network.slow(box, "1mbit")
        try:
            before = answered(history)[0]
            until(lambda: answered(history)[0] >= before + 100, "the load is not answered")
        finally:
            whole.network.fast(box)
        whole.wait_whole()


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
