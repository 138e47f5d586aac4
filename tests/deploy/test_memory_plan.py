import os
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.config import Config, load
from silvershard.deploy.memory_plan import (
    MemoryPlan,
    free_memory,
    held_by,
    loaded_bytes,
    plan_memory,
    render,
    row_bytes,
)
from silvershard.shard.outline import Outline, read_outline

MIB = 1 << 20


@pytest.fixture
def outline(generation: Any) -> Outline:
    return read_outline(generation.path)


def config(**options: Any) -> Config:
    return load(
        None, environ={}, options={name.replace("__", "."): one for name, one in options.items()}
    )


def test_every_process_takes_its_partitions_twice_and_the_model_once(outline: Outline) -> None:
    sizes = outline.sizes
    items = sum(size for name, size in sizes.items() if name.startswith("partitions/"))
    model = sum(sizes.values()) - items - sizes["golden.json"]
    still = {"updates__enabled": False}
    assert loaded_bytes(config(sharding__shards=1, **still), outline) == 2 * items + model
    assert loaded_bytes(config(sharding__shards=3, **still), outline) == 2 * items + 3 * model
    twice = config(sharding__shards=3, sharding__replicas=2, **still)
    assert loaded_bytes(twice, outline) == 2 * (2 * items + 3 * model)
    roomy = config(sharding__shards=1, updates__headroom=0.5)
    assert loaded_bytes(roomy, outline) == pytest.approx(3 * items + model, abs=2)
    off = config(sharding__shards=1, updates__headroom=0.5, updates__enabled=False)
    assert loaded_bytes(off, outline) == 2 * items + model


def plan(outline: Outline, free_bytes: int, **options: Any) -> MemoryPlan:
    return plan_memory(
        config(**options), outline, outline, held_bytes=500 * MIB, free_bytes=free_bytes
    )


def test_rows_of_remote_tables_take_room_unless_they_are_those_of_the_live_one(
    publish_model: Any,
) -> None:
    plain, remote = (
        read_outline(publish_model("int8", remote=names).path) for names in ((), ("history",))
    )
    rows = remote.sizes["rows/history.safetensors"]
    assert row_bytes(plain, remote) == rows > 0
    assert row_bytes(remote, remote) == row_bytes(remote, plain) == 0
    options = {"held_bytes": 500 * MIB, "free_bytes": 900 * MIB}
    found = plan_memory(config(), plain, remote, **options)
    assert found.new_bytes == loaded_bytes(config(), remote) + rows


def test_what_fits_is_held_beside(outline: Outline) -> None:
    found = plan(outline, 100 * MIB)
    assert (found.mode, found.reason) == ("beside", "")
    assert found.new_bytes == found.old_bytes == loaded_bytes(config(), outline)
    assert found.checks_fit
    assert plan(outline, found.new_bytes).mode == "beside"


def test_one_replica_without_room_for_both_is_refused_with_numbers(outline: Outline) -> None:
    needed = plan(outline, 100 * MIB).new_bytes
    found = plan(outline, needed - 1)
    assert found.mode == "refused"
    numbers = f"takes {needed / MIB:.1f} MiB beside the 500.0 MiB that are held, and "
    assert f"{numbers}{(needed - 1) / MIB:.1f} MiB are free: free memory" in found.reason
    assert any("memory plan: refused: generation 1 takes" in line for line in render(found))


def test_several_replicas_without_room_for_both_change_one_part_after_the_other(
    outline: Outline,
) -> None:
    two = {"sharding__replicas": 2}
    needed = plan(outline, 100 * MIB, **two).new_bytes
    assert plan(outline, needed, **two).mode == "beside"
    found = plan(outline, needed - 1, **two)
    assert found.mode == "wave"
    assert "one part after the other" in found.reason
    assert plan(outline, 0, **two).mode == "wave"
    assert not plan(outline, 0, **two).checks_fit


def test_waves_are_refused_where_even_the_old_ones_memory_is_too_little(
    outline: Outline,
) -> None:
    found = plan_memory(
        config(sharding__replicas=2), outline, outline, held_bytes=1000, free_bytes=0
    )
    assert found.mode == "refused"
    assert "giving up the live one would free 0.0 MiB only" in found.reason


def test_the_limit_of_the_settings_counts_what_is_held(outline: Outline) -> None:
    assert plan(outline, 100 * MIB, swap__memory_mib=500).mode == "refused"
    assert plan(outline, 100 * MIB, swap__memory_mib=500).free_bytes == 0
    assert plan(outline, 100 * MIB, swap__memory_mib=550).free_bytes == 50 * MIB
    assert plan(outline, 100 * MIB, swap__memory_mib=900).free_bytes == 100 * MIB


def test_a_generation_that_is_held_already_takes_nothing(outline: Outline) -> None:
    found = plan_memory(config(), None, outline, held_bytes=MIB, free_bytes=0)
    assert (found.mode, found.new_bytes) == ("beside", 0)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 3000 << 10),
        ({"memory.max": "max\n", "memory.current": "7\n"}, 3000 << 10),
        ({"memory.max": "2000\n", "memory.current": "700\n"}, 1300),
        ({"memory.max": "2000\n", "memory.current": "2700\n"}, 0),
        ({"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"}, 800),
    ],
)
def test_free_is_what_machine_and_control_group_leave(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:  9000 kB\nMemAvailable:   3000 kB\nHugePages_Total:   0\n"
    )
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == free


def test_the_memory_of_this_process_is_some_and_of_none_is_nothing() -> None:
    assert held_by([os.getpid()]) > MIB
    assert held_by([os.getpid(), os.getpid()]) > held_by([os.getpid()])
    assert held_by([1 << 30]) == 0
    assert free_memory() > 0
