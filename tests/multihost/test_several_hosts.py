import json
import os
import signal
import time
from typing import Any

import pytest
from multihost.conftest import HOSTS, REPLICAS, SHARDS, HostedCluster
from multihost.hosts import HEAD, NETWORK, until

# The first of them also starts the cluster.
pytestmark = pytest.mark.timeout(600)


def shard_copies(cluster: HostedCluster, host: int = 0) -> dict[tuple[int, int], dict[str, Any]]:
    return {(one["shard"], one["replica"]): one for one in cluster.record(host)["shards"]}


def test_an_impossible_plan_is_refused_with_numbers(unstarted: HostedCluster) -> None:
    done = unstarted.up(hosts=[{**one, "memory": "300MiB"} for one in HOSTS])
    assert done.returncode == 4
    assert "this plan is impossible" in done.stderr
    assert "MiB" in done.stderr
    assert unstarted.status()["state"] == "down"


def test_hosts_that_are_no_nodes_of_the_ray_are_named(unstarted: HostedCluster) -> None:
    done = unstarted.up(hosts=[*HOSTS, {**HOSTS[0], "name": "h9", "address": f"{NETWORK}.99"}])
    assert done.returncode == 4
    assert f"1 of 4 hosts are no nodes of the Ray at {HEAD}:6399: h9 ({NETWORK}.99)" in done.stderr
    assert unstarted.status()["state"] == "down"


def test_copies_of_a_shard_are_on_different_hosts_and_every_router_answers(
    cluster: HostedCluster,
) -> None:
    found = cluster.status()
    assert (found["state"], found["coverage"]) == ("up", 1.0)
    places: dict[int, set[str]] = {}
    for one in found["shards"]:
        address = next(host["address"] for host in HOSTS if host["name"] == one["host"])
        assert one["address"].startswith(f"{address}:")
        places.setdefault(one["shard"], set()).add(one["host"])
    assert [len(places[shard]) for shard in range(SHARDS)] == [REPLICAS] * SHARDS
    assert [one["host"] for one in found["routers"]] == ["h0", "h1", "h2"]
    # The generation was on the first host only.
    for box in cluster.hosts:
        assert (box.folder / "state" / "generations" / "gen-000001" / "manifest.json").is_file()
    for host in range(len(HOSTS)):
        done = cluster.cli(
            *("query", "--history", "1,2,3", "-k", "3", "--fields", "title", "--output", "json"),
            *("--address", f"{NETWORK}.{10 + host}:8001"),
            host=host,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["coverage"], len(answer["items"])) == (1.0, 3)


def test_a_generation_is_brought_to_every_host_and_activated(whole: HostedCluster) -> None:
    remote = whole.hosts[2].folder / "state" / "generations" / "gen-000002"
    assert not remote.exists()
    with whole.under_load(0, 1):
        done = whole.cli("activate", "2", "--checks", "files")
        assert done.returncode == 0, done.stderr
        until(lambda: {whole.map(one)["generation"] for one in range(3)} == {2}, "not everywhere")
    assert (remote / "manifest.json").is_file()
    assert whole.status(2)["generation"] == 2


def test_a_second_cluster_on_the_same_store_is_refused(whole: HostedCluster) -> None:
    done = whole.up()
    assert done.returncode == 4
    assert "a cluster runs already" in done.stderr
    assert whole.is_whole()


def test_no_request_fails_while_a_host_is_cut_off_and_healed(whole: HostedCluster) -> None:
    box = whole.hosts[2]
    epochs = {key: one["epoch"] for key, one in shard_copies(whole).items()}
    mine = [key for key, one in shard_copies(whole).items() if one["host"] == "h2"]
    assert mine
    with whole.under_load(0, 1):
        whole.network.cut(box)
        until(
            lambda: len(whole.map()["entries"]) < SHARDS * REPLICAS,
            "the map still names the copies of the host that is cut off",
        )
        # Who is cut off lives on, and knows nothing of it.
        assert box.named("ShardActor")
        whole.network.heal(box)
        whole.wait_whole()
    for key, one in shard_copies(whole).items():
        assert (one["epoch"] > epochs[key]) == (key in mine)


def test_no_request_fails_while_a_host_is_killed_and_comes_back(whole: HostedCluster) -> None:
    box = whole.hosts[1]
    with whole.under_load(0, 2):
        box.kill()
        until(
            lambda: len(whole.map()["entries"]) < SHARDS * REPLICAS,
            "the map still names the copies of the host that was killed",
        )
        whole.network.restart(box, str(HOSTS[1]["address"]))
        whole.wait_whole()


def test_no_request_fails_while_the_supervisor_is_killed_and_the_next_one_adopts(
    whole: HostedCluster,
) -> None:
    before = whole.record()
    _, pid = whole.actor("ray::SupervisorActor")
    with whole.under_load(0, 1, 2):
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: whole.record()["since_unix_s"] > before["since_unix_s"],
            "no other supervisor took over",
        )
        whole.wait_whole()
    after = whole.record()
    places = ("shard", "replica", "pid", "epoch", "address", "host")
    assert [[one[name] for name in places] for one in after["shards"]] == [
        [one[name] for name in places] for one in before["shards"]
    ]
    assert after["sequencer"]["pid"] == before["sequencer"]["pid"]
    assert after["map_version"] >= before["map_version"]


def test_a_router_is_started_again_on_its_host_and_outlives_its_agent(
    whole: HostedCluster,
) -> None:
    box = whole.hosts[2]
    with whole.under_load(0, 1):
        (doomed,) = box.named("router_process")
        os.kill(doomed, signal.SIGKILL)
        until(lambda: whole.record()["routers"][2]["restarts"] == 1, "the router did not return")
        whole.wait_whole()
    (router,) = box.named("router_process")
    (agent,) = box.named("ray::HostActor")
    with whole.under_load(2):
        os.kill(agent, signal.SIGKILL)
        until(lambda: box.named("ray::HostActor") not in ([], [agent]), "no agent came back")
        whole.wait_whole()
    assert box.named("router_process") == [router]


def test_a_shard_that_hangs_is_killed_by_its_host(whole: HostedCluster) -> None:
    box = whole.hosts[2]
    (pid,) = box.named("ray::ShardActor")
    with whole.under_load(0, 1):
        os.kill(pid, signal.SIGSTOP)
        until(lambda: pid not in box.named("ray::ShardActor"), "nobody killed it")
        until(lambda: box.named("ray::ShardActor") != [], "it did not come back")
        whole.wait_whole()


def test_no_request_fails_while_the_head_of_ray_is_away(whole: HostedCluster) -> None:
    head = whole.network.head
    with whole.under_load(0, 1, 2):
        head.kill()
        until_s = time.monotonic() + 20.0
        until(lambda: time.monotonic() > until_s, "time does not pass")
        whole.network.restart(head, HEAD)
    # What dies from now on is started again, so the supervisor has found the new head.
    (pid,) = whole.hosts[1].named("ray::ShardActor")
    os.kill(pid, signal.SIGKILL)
    until(lambda: whole.hosts[1].named("ray::ShardActor") not in ([], [pid]), "not restarted")
    whole.wait_whole()
