"""What a shard process takes of its host, component by component, from the manifest alone.

The number of pages is not in a manifest: it is counted from the clusters of the items, which stand
in the files of the partitions.

Shapes: P partitions, S shards, n items of a shard, C clusters, N pages of G slots, D embedding
dimension, J planes, V columns, F term slots, E exact planes, L semantic codes, H heads, R
candidates per head.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray

from silvershard.deploy.config import Config
from silvershard.deploy.memory_plan import swap_bytes
from silvershard.deploy.placement import Need
from silvershard.model.spec import ServingSpec
from silvershard.shard.assignment import shard_partitions
from silvershard.shard.build import spare_pages, table_width
from silvershard.shard.errors import SnapshotError
from silvershard.shard.outline import Outline, partition_path, read_outline
from silvershard.shard.partition import part_of
from silvershard.shard.snapshot import open_snapshot

Tier = Literal["host", "device"]
Swap = Literal["beside", "wave"]

PROCESS_BYTES = 330 << 20
"""A shard process before it has loaded anything: an idle Ray actor with torch and TorchRec was
measured to take 299 MiB that it does not share, and gRPC comes to that."""

_TEXT_BYTES = 56
"""A Python string beside its characters: 49 bytes, rounded up by the allocator."""
_CELL_BYTES = 20
"""Of the map from ids to slots."""
_PAGE_STATE_BYTES = 33
"""Of the pool: owner, free list, live and used slots, and whether it is drained."""
_CANDIDATE_BYTES = 20
"""Score, id and slot."""
_ON_HOST = frozenset({"process", "id map", "stored fields", "page state", "remote rows cache"})
"""Components that stay in host memory where the others lie on a device."""
_ONCE = frozenset({"process", "open queries"})
"""Components that a second generation does not take again."""


class PartitionShape(NamedTuple):
    """What the file of a partition says of its size."""

    per_cluster: NDArray[np.int64]
    """``(C,)`` items."""
    text_bytes: int
    """Characters of its stored fields."""
    file_bytes: int


class ShardFootprint(NamedTuple):
    """What one copy of a shard takes."""

    shard: int
    documents: int
    pages: int
    """N, those in use."""
    components: dict[str, int]
    """Bytes by name while it serves one generation."""
    loading: int
    """Bytes of host memory more while it loads one."""
    asked_by_swap: int
    """Bytes more that ``activate`` wants to be free for it."""

    @property
    def serving(self) -> int:
        """Return what it takes while it serves one generation."""
        return sum(self.components.values())

    def double_buffer(self, tier: Tier, *, num_devices: int = 0) -> int:
        """Return what a second generation takes in a tier while it is loaded beside the first."""
        again = sum(
            size
            for name, size in self.components.items()
            if name not in _ONCE and tier_of(name, num_devices) == tier
        )
        if tier == "device":
            return again
        return max(again + self.loading, 0 if num_devices else self.asked_by_swap)

    def need(self, swap: Swap, *, num_devices: int = 0) -> Need:
        """Return what a host must have for a copy.

        Args:
            swap: whether a second generation is held beside the first, or exchanged for it.
            num_devices: GPUs that each copy takes; 0: everything is in host memory.
        """
        held: dict[Tier, int] = {"host": 0, "device": 0}
        for name, size in self.components.items():
            held[tier_of(name, num_devices)] += size
        if swap == "beside":
            held["host"] += self.double_buffer("host", num_devices=num_devices)
            held["device"] += self.double_buffer("device", num_devices=num_devices)
        else:
            held["host"] += self.loading
        # A standby changes generations as the others do, and keeps everything in host memory.
        standby = self.serving - self.components["open queries"]
        standby += self.double_buffer("host") if swap == "beside" else self.loading
        return Need(
            self.documents,
            memory_bytes=held["host"],
            num_devices=num_devices,
            device_bytes=-(-held["device"] // max(num_devices, 1)),
            standby_bytes=standby,
        )


def tier_of(component: str, num_devices: int) -> Tier:
    """Return where a component of a copy with so many GPUs lies."""
    return "device" if num_devices and component not in _ON_HOST else "host"


class Footprint(NamedTuple):
    """What the copies of every shard of a generation take."""

    outline: Outline
    spec: ServingSpec
    shards: tuple[ShardFootprint, ...]


def read_footprint(path: Path, config: Config, *, process_bytes: int = PROCESS_BYTES) -> Footprint:
    """Return what the copies of every shard of a published generation take.

    Args:
        path: directory of the generation.
        config: shards, devices, headroom, batches and caches.
        process_bytes: what a shard process takes before it loads anything.

    Raises:
        SnapshotError: if a file is missing or cannot be read.
        ValueError: if there are more shards than partitions.
    """
    snapshot = open_snapshot(path)
    spec, outline = snapshot.spec, read_outline(path)
    num_shards = config.sharding.shards
    owned = [shard_partitions(at, num_shards, spec.num_partitions) for at in range(num_shards)]
    shapes = {
        number: _partition_shape(path, number, spec, outline.sizes)
        for number, documents in enumerate(spec.partition_documents)
        if documents
    }
    return Footprint(
        outline,
        spec,
        tuple(
            _shard_footprint(
                at,
                numbers,
                {number: shapes[number] for number in numbers if number in shapes},
                spec,
                outline,
                config,
                process_bytes,
            )
            for at, numbers in enumerate(owned)
        ),
    )


def _partition_shape(
    path: Path, partition: int, spec: ServingSpec, sizes: Mapping[str, int]
) -> PartitionShape:
    name = partition_path(partition)
    try:
        with safetensors.safe_open(str(path / name), framework="numpy") as file:
            clusters = file.get_tensor("clusters")
            texts = [
                file.get_slice(f"field/{one.name}/bytes").get_shape()[0]
                for one in spec.item_schema.fields
                if one.dtype == "string"
            ]
    except (OSError, ValueError, struct.error, safetensors.SafetensorError) as error:
        raise SnapshotError(str(path), f"{name} cannot be read: {error}") from None
    counts = np.bincount(clusters.astype(np.int64), minlength=spec.num_clusters)
    return PartitionShape(counts.astype(np.int64), sum(texts), sizes.get(name, 0))


def _shard_footprint(
    shard: int,
    partitions: Sequence[int],
    shapes: Mapping[int, PartitionShape],
    spec: ServingSpec,
    outline: Outline,
    config: Config,
    process_bytes: int,
) -> ShardFootprint:
    headroom = config.updates.headroom if config.updates.enabled else 0.0
    num_parts = len(config.sharding.devices)
    components: dict[str, int] = {"process": process_bytes}
    documents = pages = 0
    for part in range(num_parts):
        held = [one for number, one in shapes.items() if part_of(number, num_parts) == part]
        per_cluster = sum((one.per_cluster for one in held), np.zeros(spec.num_clusters, np.int64))
        used, added = _index_bytes(per_cluster, sum(one.text_bytes for one in held), spec, headroom)
        for name, size in added.items():
            components[name] = components.get(name, 0) + size
        documents += int(per_cluster.sum())
        pages += used
    components |= _model_bytes(spec, outline)
    components["remote rows cache"] = (config.tables.cache_mib << 20) * sum(
        name.startswith("rows/") for name in outline.sizes
    )
    components["open queries"] = _query_bytes(spec, config)
    return ShardFootprint(
        shard=shard,
        documents=documents,
        pages=pages,
        components=components,
        loading=_loading_bytes(documents, shapes, spec, components),
        asked_by_swap=swap_bytes(outline, partitions, headroom),
    )


def _index_bytes(
    per_cluster: NDArray[np.int64], text_bytes: int, spec: ServingSpec, headroom: float
) -> tuple[int, dict[str, int]]:
    """Return the pages in use of a part and its bytes by component.

    Args:
        per_cluster: ``(C,)`` items.
        text_bytes: characters of their stored fields.
        spec: of the generation.
        headroom: free pages as a share of those in use.
    """
    planes, schema = spec.planes, spec.item_schema
    page_slots = spec.page_slots
    in_pages = -(-per_cluster // page_slots)
    used, documents = int(in_pages.sum()), int(per_cluster.sum())
    spare = spare_pages(used, spec.num_clusters, headroom)
    levels = spec.semantic.decoder.levels if spec.semantic else 0
    per_slot: dict[str, float] = {
        "codes": spec.dim,
        "scales and ids": 12,
        "planes": planes.num_planes / 8,
        "columns": 8 * planes.num_columns,
        "term keys": 8 * planes.terms_width,
        "fp16 cache": 2 * spec.dim,
        "signals": 4 * len(schema.signals),
        "semantic ids": (2 * levels + 5.125) if levels else 0,
    }
    found = {name: round(used * page_slots * size) for name, size in per_slot.items()}
    if levels and spec.semantic:
        prefixes = sum(min(documents, spec.semantic.decoder.width**at) for at in range(levels))
        found["semantic ids"] += documents * (12 + 2 * levels) + 24 * prefixes
    found["page headroom"] = round(spare * page_slots * sum(per_slot.values()))
    width = table_width(int(in_pages.max(initial=0)), grows=spare > 0)
    found["page table"] = 4 * spec.num_clusters * width
    found["id map"] = _CELL_BYTES * _cells(documents)
    strings = sum(one.dtype == "string" for one in schema.fields)
    rows = (used + spare) * page_slots if headroom else documents
    found["stored fields"] = (
        8 * rows * len(schema.fields) + strings * documents * _TEXT_BYTES + text_bytes
    )
    if headroom:
        found["page state"] = (used + spare) * (_PAGE_STATE_BYTES + page_slots // 8)
    return used, found


def _cells(documents: int) -> int:
    """Return the cells of a map of so many ids: a power of two, at most half full."""
    return max(1 << 10, 1 << max(2 * documents - 1, 1).bit_length())


def _model_bytes(spec: ServingSpec, outline: Outline) -> dict[str, int]:
    """Return what every shard holds, whatever its documents."""
    sizes = outline.sizes
    centroids = 4 * spec.num_clusters * spec.dim
    towers = max(sizes.get("dense.safetensors", 0) - centroids, 0)
    return {
        "centroids": centroids + spec.num_clusters * (spec.dim + 4),
        "towers": towers + sizes.get("semantic.safetensors", 0),
        "tables": sum(size for name, size in sizes.items() if name.startswith("tables/")),
    }


def _query_bytes(spec: ServingSpec, config: Config) -> int:
    """Return what the candidates of open queries and the batch that runs take at most.

    With as many batches open as a router runs, each of the largest size, at the default depth.
    """
    heads, defaults, query = len(spec.item_schema.heads), spec.defaults, config.query
    per_request = heads * defaults.ann_k + defaults.semantic_k
    batches = config.admission.concurrency.max
    open_bytes = batches * query.max_batch * per_request * _CANDIDATE_BYTES
    tasks = len(spec.item_schema.tasks)
    # A batch that is reranked has the candidates of all its requests with their embeddings.
    running = query.max_batch * per_request * (4 * spec.dim + 4 * heads + 8 * tasks + 32)
    return open_bytes + running


def _loading_bytes(
    documents: int,
    shapes: Mapping[int, PartitionShape],
    spec: ServingSpec,
    components: Mapping[str, int],
) -> int:
    """Return what lies beside the index while it is laid out: all as it was read."""
    read = sum(one.file_bytes for one in shapes.values())
    joined = max(2 * spec.dim, 8 * spec.planes.terms_width, 8 * spec.planes.num_columns)
    return (
        read
        + documents * (spec.planes.num_exact_planes + joined)
        + components["towers"]
        + components["tables"]
    )


def component_table(
    footprint: Footprint, *, replicas: int, standbys: int, swap: Swap, num_devices: int = 0
) -> list[dict[str, Any]]:
    """Return the bytes of each component over all copies, and of the copy with the most.

    Args:
        footprint: of the generation.
        replicas: copies of each shard that answer.
        standbys: copies of each shard that wait.
        swap: whether a second generation is held beside the first.
        num_devices: GPUs of each copy that answers.
    """
    shards = footprint.shards
    rows = []
    for name in shards[0].components:
        each = [one.components[name] for one in shards]
        if any(each):
            copies = replicas + (0 if name == "open queries" else standbys)
            rows.append(_row(name, tier_of(name, num_devices), each, copies))
    loading = [one.loading for one in shards]
    if swap == "wave":
        return [*rows, _row("loading", "host", loading, replicas + standbys)]
    tiers: tuple[Tier, ...] = ("device", "host") if num_devices else ("host",)
    for tier in tiers:
        each = [one.double_buffer(tier, num_devices=num_devices) for one in shards]
        rows.append(_row("double buffer for a swap", tier, each, replicas))
    if standbys:
        each = [one.double_buffer("host") for one in shards]
        rows.append(_row("double buffer of standbys", "host", each, standbys))
    return rows


def _row(component: str, tier: Tier, each: Sequence[int], copies: int) -> dict[str, Any]:
    return {
        "component": component,
        "tier": tier,
        "bytes": sum(each) * copies,
        "largest_copy": max(each),
    }
