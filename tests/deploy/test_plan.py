import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import plan as planning
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode, NotPublished, Refused
from silvershard.deploy.footprint import Footprint, read_footprint
from silvershard.deploy.placement import Copy, Host
from silvershard.deploy.plan import HEAD_BYTES, NODE_BYTES, plan, plan_cluster, render
from silvershard.deploy.plan_speed import BatchTimes, Speed, SpeedTask
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import ConfigError
from silvershard.shard.generations import generation_dir

GIB = 1 << 30


def config(**options: Any) -> Config:
    return load(
        None, environ={}, options={name.replace("__", "."): one for name, one in options.items()}
    )


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(generation.path, generation_dir(made.generations, 1))
    return made


@pytest.fixture
def footprint(generation: Any) -> Callable[..., Footprint]:
    return lambda settings: read_footprint(generation.path, settings)


def machines(count: int, memory_bytes: int = 16 * GIB, zones: int = 0) -> list[Host]:
    return [
        Host(f"h{at}", 4.0, memory_bytes, zone=f"z{at % zones}" if zones else "")
        for at in range(count)
    ]


def listed(count: int, memory: str = "16GiB", **fields: Any) -> str:
    return json.dumps(
        [{"name": f"h{at}", "cpus": 4, "memory": memory, **fields} for at in range(count)]
    )


def test_copies_are_spread_and_the_control_plane_keeps_its_memory(
    footprint: Callable[..., Footprint],
) -> None:
    settings = config(sharding__shards=3, sharding__replicas=2, sharding__standby=1)
    made = plan_cluster(settings, footprint(settings), machines(3))
    assert made.swap == "beside"
    assert [host.memory_bytes for host in made.hosts] == [
        16 * GIB - HEAD_BYTES,
        16 * GIB - NODE_BYTES,
        16 * GIB - NODE_BYTES,
    ]
    assert made.placement.shared == ()
    assert len(made.placement.at) == 9
    again = plan_cluster(settings, made.footprint, machines(4), made.placement.at)
    assert {move.target for move in again.placement.moves} == {"h3"}
    zoned = config(sharding__replicas=2, replicas__placement={"spread": "zone"})
    spread = plan_cluster(zoned, footprint(zoned), machines(4, zones=2))
    for shard in range(2):
        names = [spread.placement.at[Copy(shard, replica)] for replica in range(2)]
        assert {int(name[1:]) % 2 for name in names} == {0, 1}


def test_several_replicas_without_room_for_two_generations_swap_in_waves(
    footprint: Callable[..., Footprint],
) -> None:
    settings = config(sharding__shards=1, sharding__replicas=2)
    made = footprint(settings)
    beside = made.shards[0].need("beside").memory_bytes
    wave = made.shards[0].need("wave").memory_bytes
    assert wave < beside

    def swap(memory_bytes: int) -> str:
        hosts = machines(2, memory_bytes)
        return plan_cluster(settings, made, hosts, reserved=False).swap

    assert swap(beside) == "beside"
    assert swap(beside - 1) == swap(wave) == "wave"
    with pytest.raises(Refused, match="no host that is up has so much"):
        swap(wave - 1)


def test_one_replica_without_room_for_a_swap_is_refused_and_told_so(
    footprint: Callable[..., Footprint],
) -> None:
    settings = config(sharding__shards=1)
    made = footprint(settings)
    hosts = machines(1, made.shards[0].need("beside").memory_bytes - 1)
    with pytest.raises(Refused) as refusal:
        plan_cluster(settings, made, hosts, reserved=False)
    assert str(refusal.value).startswith("there is no room to swap generations: shard 0 replica 0 ")
    assert str(refusal.value).endswith("which takes two copies of each shard to swap")


def test_a_plan_is_a_document_with_bytes_shards_and_hosts(state: StateDir) -> None:
    settings = config(sharding__shards=4, sharding__replicas=2)
    document = plan(state, settings, None, hosts=listed(3, zone="east"), seconds=0)
    assert json.loads(json.dumps(document)) == document
    assert (document["generation"], document["documents"], document["possible"]) == (1, 600, True)
    assert sum(one["bytes"] for one in document["components"]) == document["total_bytes"]["host"]
    names = {one["component"] for one in document["components"]}
    assert names >= {"codes", "planes", "term keys", "fp16 cache", "towers", "tables", "process"}
    assert names >= {"page headroom", "open queries", "double buffer for a swap"}
    assert sum(one["documents"] for one in document["per_shard"]) == 600
    assert all(len(set(one["hosts"])) == 2 for one in document["per_shard"])
    taken = sum(one["taken_bytes"] for one in document["hosts"])
    assert taken == document["total_bytes"]["host"]
    assert sum(one["documents"] for one in document["hosts"]) == 1200
    assert [one["control_bytes"] for one in document["hosts"]] == [
        HEAD_BYTES,
        NODE_BYTES,
        NODE_BYTES,
    ]
    assert document["speed"] is None
    text = render(document)
    assert "generation 1, 600 documents: 4 shards x 2 replicas\n" in text
    for one in document["components"]:
        assert one["component"] in text
    assert "expected QPS" not in text


def test_an_impossible_plan_still_says_what_is_needed(state: StateDir) -> None:
    settings = config(sharding__shards=4, sharding__replicas=2)
    document = plan(state, settings, 1, hosts=listed(2, "1700MiB"))
    assert not document["possible"]
    assert "are missing" in document["refused"]
    assert document["swap"] == "refused"
    assert document["speed"] is None
    assert document["total_bytes"]["host"] > 0
    assert f"impossible: {document['refused']}" in render(document)


def test_without_hosts_it_is_this_machine(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda: 64 * GIB)
    document = plan(state, config(sharding__replicas=2), 1, seconds=0)
    (host,) = document["hosts"]
    assert host["memory_bytes"] == 64 * GIB
    assert host["cpus"] == len(os.sched_getaffinity(0))
    assert "2 copies of shard 0 share host" in document["notes"][0]
    assert "memory is what this machine has left now" in document["notes"]
    limited = plan(state, config(swap__memory_mib=1), 1, seconds=0)
    assert not limited["possible"]
    assert limited["hosts"][0]["memory_bytes"] == (1 << 20) + HEAD_BYTES


def test_what_a_running_cluster_holds_is_free_for_the_next_one(
    idle_state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda: 8 * GIB)
    document = plan(idle_state, config(), 1, seconds=0)
    assert document["hosts"][0]["memory_bytes"] > 8 * GIB


def test_the_hosts_of_the_settings_count(state: StateDir, tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(listed(2))
    document = plan(state, config(hosts__file=str(path)), 1, seconds=0)
    assert [host["host"] for host in document["hosts"]] == ["h0", "h1"]
    path.write_text("[{name: a}]")
    with pytest.raises(ConfigError, match=r"host 1 \(a\): cpus: required field is missing"):
        plan(state, config(hosts__file=str(path)), 1, seconds=0)


def test_hosts_that_are_not_up_get_nothing(state: StateDir) -> None:
    given = json.loads(listed(3))
    given[1]["state"] = "maintenance"
    document = plan(state, config(sharding__shards=4), 1, hosts=json.dumps(given), seconds=0)
    assert [len(one["replicas"]) for one in document["hosts"]] == [2, 0, 2]


def test_too_many_shards_and_no_generation_are_said(state: StateDir, tmp_path: Path) -> None:
    with pytest.raises(
        CommandError, match="shards: must be at most 64, the partitions of gen-"
    ) as e:
        plan(state, config(sharding__shards=65), 1, seconds=0)
    assert e.value.exit_code == ExitCode.USAGE
    with pytest.raises(NotPublished):
        plan(StateDir(tmp_path / "none"), config(), None, seconds=0)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SpeedTask, int, int]]:
    """What would have been measured; it finds 10 ms for both rounds of any batch."""
    asked: list[tuple[SpeedTask, int, int]] = []

    def measured(task: SpeedTask, *, processes: int, threads: int) -> Speed:
        asked.append((task, processes, threads))
        times = [
            BatchTimes(batch=batch, runs=5, encode_s=0.0, rounds_s=0.01) for batch in task.batches
        ]
        return Speed(processes, threads, 600 // task.num_shards, 300 << 20, 340 << 20, tuple(times))

    monkeypatch.setattr(planning, "measure", measured)
    monkeypatch.setattr(planning, "free_memory", lambda: 64 * GIB)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    return asked


def test_the_speed_of_this_machine_gives_the_expected_queries(
    state: StateDir, tasks: list[tuple[SpeedTask, int, int]]
) -> None:
    said: list[str] = []
    settings = config(sharding__shards=2, query__max_batch=16)
    document = plan(state, settings, 1, hosts=listed(2), seconds=0.5, report=said.append)
    ((task, processes, threads),) = tasks
    # One process of the four cores of a host, with all of them.
    assert (processes, threads, task.num_shards, task.share) == (1, 4, 2, 2)
    assert (task.batches, task.seconds) == ((1, 8, 16), 0.5)
    assert said == ["measuring 1 process of 4 threads for 0.5 s"]
    batches = document["speed"]["batches"]
    assert [one["batch"] for one in batches] == [1, 8, 16]
    assert 80 < batches[0]["expected_qps"] < 120
    assert batches[2]["expected_qps"] == pytest.approx(16 * batches[0]["expected_qps"], rel=1e-2)
    text = render(document)
    assert "an estimate: 1 processes of 4 threads ran batches here at once" in text
    assert "expected QPS" in text


def test_as_many_processes_measure_as_a_host_would_run(
    state: StateDir, tasks: list[tuple[SpeedTask, int, int]]
) -> None:
    plan(state, config(sharding__shards=8), 1, hosts=listed(2), seconds=0.5)
    plan(state, config(sharding__shards=3, sharding__threads=2), 1, hosts=listed(1), seconds=0.5)
    assert [(processes, threads) for _, processes, threads in tasks] == [(4, 1), (2, 2)]


def test_a_shard_too_large_for_this_machine_is_measured_in_part_or_not_at_all(
    state: StateDir,
    tasks: list[tuple[SpeedTask, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(sharding__shards=2)
    each = read_footprint(generation_dir(state.generations, 1), settings).shards[0]
    whole = each.serving + each.loading
    monkeypatch.setattr(planning, "free_memory", lambda: whole // 3)
    plan(state, settings, 1, hosts=listed(2), seconds=0.5)
    assert [(task.num_shards, task.share) for task, _, _ in tasks] == [(8, 2)]
    monkeypatch.setattr(planning, "free_memory", lambda: 1000)
    document = plan(state, settings, 1, hosts=listed(2), seconds=0.5)
    assert "are needed to measure, and 1000 bytes are free here" in document["speed"]["skipped"]
    assert "speed was not measured: " in render(document)


def test_runs_of_shards_are_written_short() -> None:
    assert planning._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert planning._ranges([0, 0, 1]) == "0, 0-1"
    assert planning._ranges([]) == "-"
