import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.config import Config, load
from silvershard.deploy.footprint import (
    PROCESS_BYTES,
    Footprint,
    component_table,
    read_footprint,
    tier_of,
)
from silvershard.deploy.memory_plan import swap_bytes
from silvershard.model.index import IndexTensors
from silvershard.shard.errors import SnapshotError
from silvershard.shard.load import load_live, load_retriever


def config(**options: Any) -> Config:
    return load(
        None, environ={}, options={name.replace("__", "."): one for name, one in options.items()}
    )


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_bytes_of_an_index_are_those_of_its_tensors(
    generation: Any, shards: int, devices: list[str]
) -> None:
    settings = config(sharding__shards=shards, sharding__devices=devices)
    found = read_footprint(generation.path, settings)
    for shard, one in enumerate(found.shards):
        retriever, live = load_live(
            generation.path,
            shard=shard,
            num_shards=shards,
            devices=devices,
            headroom=settings.updates.headroom,
        )
        assert one.documents == retriever.documents
        usage = [part.usage() for part in live.parts]
        assert one.pages == sum(each.pages - each.free_pages for each in usage)
        held = {
            name: sum(getattr(part, name).nbytes for part in retriever.indexes)
            for name in IndexTensors._fields
            if name != "semantic_codes"
        }
        of = one.components
        paged = {
            "codes": held["codes"],
            "scales and ids": held["scales"] + held["item_ids"],
            "planes": held["planes"],
            "columns": held["columns"],
            "term keys": held["terms"],
            "fp16 cache": held["cache"],
            "signals": held["signals"],
        }
        spare = sum(paged.values()) - sum(of[name] for name in paged)
        assert of["page headroom"] == pytest.approx(spare, abs=len(devices))
        free = sum(each.free_pages for each in usage) / sum(each.pages for each in usage)
        for name, size in paged.items():
            assert of[name] == pytest.approx(size * (1 - free))
        assert of["page table"] == held["page_table"]
        assert of["id map"] == 20 * sum(part.id_map.num_cells for part in retriever.indexes)


def test_without_updates_there_is_no_headroom(generation: Any) -> None:
    found = read_footprint(generation.path, config(updates__enabled=False, sharding__shards=1))
    (one,) = found.shards
    assert one.components["page headroom"] == 0
    assert "page state" not in one.components
    retriever, _ = load_retriever(generation.path)
    (part,) = retriever.indexes
    assert one.components["fp16 cache"] == part.cache.nbytes
    assert one.components["page table"] == part.page_table.nbytes


def test_every_shard_has_its_own_documents_and_the_whole_model(generation: Any) -> None:
    found = read_footprint(generation.path, config(sharding__shards=5))
    assert sum(one.documents for one in found.shards) == found.spec.documents == 600
    sizes = found.outline.sizes
    for one in found.shards:
        tables = sum(size for name, size in sizes.items() if name.startswith("tables/"))
        assert one.components["tables"] == tables > 0
        assert one.components["towers"] < sizes["dense.safetensors"]
        assert one.components["process"] == PROCESS_BYTES


def test_open_queries_grow_with_batches_and_remote_rows_with_the_cache(
    generation: Any, publish_model: Callable[..., Any]
) -> None:
    def queries(**options: Any) -> int:
        return (
            read_footprint(generation.path, config(**options)).shards[0].components["open queries"]
        )

    assert queries(admission__concurrency={"max": 128}) > queries() > queries(query__max_batch=8)
    remote = publish_model("int8", remote=("history",))
    found = read_footprint(remote.path, config(tables__remote=["history"], tables__cache_mib=7))
    assert found.shards[0].components["remote rows cache"] == 7 << 20


def test_semantic_ids_are_counted(semantic_generation: Any, generation: Any) -> None:
    with_ids, without = (
        read_footprint(one.path, config(sharding__shards=1)).shards[0]
        for one in (semantic_generation, generation)
    )
    retriever, _ = load_retriever(semantic_generation.path)
    tries = sum(one.nbytes for trie in retriever.tries for one in trie.buffers())
    assert without.components["semantic ids"] == 0
    assert with_ids.components["semantic ids"] > tries


def test_a_second_generation_takes_all_but_process_and_queries_again(generation: Any) -> None:
    found = read_footprint(generation.path, config(sharding__shards=2))
    one = found.shards[0]
    again = one.serving - one.components["process"] - one.components["open queries"]
    assert one.double_buffer("host") == again + one.loading
    beside, wave = one.need("beside"), one.need("wave")
    assert beside.memory_bytes == one.serving + again + one.loading
    assert wave.memory_bytes == one.serving + one.loading
    waiting = one.components["open queries"]
    assert beside.standby_bytes == beside.memory_bytes - waiting
    assert wave.standby_bytes == wave.memory_bytes - waiting
    assert (beside.num_devices, beside.device_bytes) == (0, 0)
    partitions = range(found.spec.num_partitions // 2)
    assert one.asked_by_swap == swap_bytes(found.outline, partitions, 0.1)


def test_what_activate_asks_for_is_kept_free_where_it_is_more(generation: Any) -> None:
    one = read_footprint(generation.path, config(sharding__shards=2)).shards[0]
    more = one._replace(asked_by_swap=1 << 40)
    assert more.double_buffer("host") == 1 << 40


def test_on_devices_lies_what_is_computed_with(generation: Any) -> None:
    one = read_footprint(generation.path, config(sharding__shards=2)).shards[0]
    on_host = sum(
        one.components[name] for name in ("process", "id map", "stored fields", "page state")
    )
    wave, beside = one.need("wave", num_devices=2), one.need("beside", num_devices=2)
    assert wave.memory_bytes == on_host + one.loading
    assert wave.device_bytes == -(-(one.serving - on_host) // 2)
    assert beside.device_bytes > wave.device_bytes
    assert beside.memory_bytes > wave.memory_bytes
    assert wave.standby_bytes == one.need("wave").standby_bytes
    assert (tier_of("codes", 2), tier_of("id map", 2), tier_of("codes", 0)) == (
        "device",
        "host",
        "host",
    )


@pytest.mark.parametrize("swap", ["beside", "wave"])
@pytest.mark.parametrize("num_devices", [0, 1])
def test_the_components_of_all_copies_add_up_to_what_they_need(
    generation: Any, swap: Any, num_devices: int
) -> None:
    found = read_footprint(generation.path, config(sharding__shards=3))
    rows = component_table(found, replicas=2, standbys=1, swap=swap, num_devices=num_devices)
    needs = [one.need(swap, num_devices=num_devices) for one in found.shards]
    needed = sum(2 * (one.memory_bytes + one.device_bytes) + one.standby_bytes for one in needs)
    assert sum(row["bytes"] for row in rows) == needed
    tiers = {row["tier"] for row in rows}
    assert tiers == ({"host", "device"} if num_devices else {"host"})
    assert all(row["bytes"] >= row["largest_copy"] > 0 for row in rows)


def test_a_damaged_partition_is_named(generation: Any, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / generation.path.name
    shutil.copytree(generation.path, path)
    file = next((path / "partitions").iterdir())
    file.write_bytes(b"x" * 20)
    with pytest.raises(SnapshotError, match=rf"{file.name} cannot be read"):
        read_footprint(path, config())
    assert json.loads((path / "manifest.json").read_bytes())["spec"]["generation"] == 1


def test_more_shards_than_partitions_are_refused(generation: Any) -> None:
    with pytest.raises(ValueError, match="num_shards must be in"):
        read_footprint(generation.path, config(sharding__shards=1000))


def test_a_footprint_is_of_one_generation(generation: Any) -> None:
    found = read_footprint(generation.path, config())
    assert isinstance(found, Footprint)
    assert found.outline.generation == found.spec.generation == 1
