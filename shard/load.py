"""Loading: from a snapshot to a model that answers, in one process or as one shard of many."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silvershard.model.registry import build
from silvershard.model.retriever import Centroids, Retriever
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import ServingSpec
from silvershard.shard.build import build_index
from silvershard.shard.errors import SnapshotError
from silvershard.shard.executor import LiveParts, ShardExecutor
from silvershard.shard.fields import FieldStore
from silvershard.shard.live_index import LiveIndex
from silvershard.shard.mutations import updatable_tables
from silvershard.shard.partition import part_of, shard_partitions
from silvershard.shard.snapshot import PartitionData, Snapshot, open_snapshot
from silvershard.shard.table_placement import (
    RowSources,
    TableSettings,
    connect_tables,
    place_tables,
    remote_tables,
)
from silvershard.shard.updater import ShardUpdater

GiveWay = Callable[[], object]

_FIELD_TYPES = {"int": np.int64, "float": np.float64, "string": object}


def _to_nobody() -> None:
    """Nothing waits."""


def load_model(
    snapshot: Snapshot, sources: RowSources | None = None
) -> tuple[nn.Module, Centroids]:
    """Return the model with its weights, and the centroids.

    Args:
        snapshot: the generation.
        sources: where the rows of its remote tables are; None: they are loaded with the model.

    Raises:
        SnapshotError: if the builder is not registered here, or the tensors are not those it makes.
    """
    centroids, state = snapshot.load_dense()
    builder = snapshot.manifest.builder
    try:
        model = build(builder.name, builder.config)
        _load_state(model, state)
        remote = remote_tables(model)
        source = sources.open(snapshot.spec.generation, remote) if sources and remote else None
        connect_tables(model, source, snapshot.load_rows)
    except (ValueError, RuntimeError) as error:
        raise SnapshotError(str(snapshot.path), f"model {builder.name!r}: {error}") from None
    return model.eval(), Centroids.of(centroids)


def _load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into a model of the same shape; every tensor must fit."""
    own = model.state_dict()
    for key in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"tensor {key} is {'missing' if key in own else 'unexpected'}")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape or tensor.dtype != state[key].dtype:
            raise ValueError(
                f"tensor {key} must be {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(state[key].shape)} {state[key].dtype}"
            )
    model.load_state_dict(dict(state))


def load_semantic(snapshot: Snapshot) -> SemanticSource | None:
    """Return the source of semantic candidates, or None where the generation has none.

    Raises:
        SnapshotError: if its file is missing, damaged, or holds other tensors.
    """
    spec = snapshot.spec
    if spec.semantic is None:
        return None
    source, state = SemanticSource(spec.semantic, spec.dim), snapshot.load_semantic()
    try:
        _load_state(source, state)
    except ValueError as error:
        raise SnapshotError(str(snapshot.path), f"semantic ids: {error}") from None
    return source.eval().requires_grad_(requires_grad=False)


def load_retriever(
    path: Path,
    *,
    shard: int = 0,
    num_shards: int = 1,
    devices: Sequence[str] = ("cpu",),
    tables: TableSettings | None = None,
    give_way: GiveWay = _to_nobody,
) -> tuple[Retriever, FieldStore]:
    """Load the partitions of one shard of a snapshot; by default all of them.

    Args:
        path: directory of the generation.
        shard: index of the shard.
        num_shards: S; any number up to the partitions, whatever the snapshot was planned for.
        devices: the local devices that the shard's documents and tables are split over.
        tables: what is decided about embedding tables.
        give_way: as for ``load_executor``.

    Raises:
        SnapshotError: if a file is missing or damaged.
        ValueError: if the shard or a device is out of range, or a table does not fit.
    """
    snapshot, model, centroids, held = _load_shard(
        path, shard, num_shards, devices, tables, give_way
    )
    parts = [build_index(local, snapshot.spec) for local in held]
    retriever = Retriever(model, centroids, parts, snapshot.spec, load_semantic(snapshot)).eval()
    return retriever, _field_store([one for local in held for one in local], snapshot.spec)


def load_live(
    path: Path,
    *,
    shard: int = 0,
    num_shards: int = 1,
    devices: Sequence[str] = ("cpu",),
    tables: TableSettings | None = None,
    headroom: float,
    give_way: GiveWay = _to_nobody,
) -> tuple[Retriever, LiveParts]:
    """Load one shard of a snapshot so that it can follow updates; by default all of it.

    Args:
        path: directory of the generation.
        shard: index of the shard.
        num_shards: S, as for ``load_retriever``.
        devices: the local devices that the shard's documents and tables are split over.
        tables: what is decided about embedding tables.
        headroom: free pages for updates as a share of those in use, more than 0.
        give_way: as for ``load_executor``.

    Raises:
        SnapshotError: if a file is missing or damaged.
        ValueError: if a setting is out of range, or a table does not fit.
    """
    if not headroom > 0:
        raise ValueError(f"headroom must be more than 0, got {headroom}")
    snapshot, model, centroids, held = _load_shard(
        path, shard, num_shards, devices, tables, give_way
    )
    spec, builder = snapshot.spec, snapshot.manifest.builder
    live = []
    for local in held:
        index = build_index(local, spec, headroom=headroom)
        give_way()
        live.append(LiveIndex(index, _field_store(local, spec), spec, centroids.vectors))
    parts = [one.index for one in live]
    retriever = Retriever(model, centroids, parts, spec, load_semantic(snapshot)).eval()
    owned = shard_partitions(shard, num_shards, spec.num_partitions)
    updater = ShardUpdater(retriever, owned, updatable_tables(builder.name, builder.config))
    return retriever, LiveParts(live, updater, snapshot.manifest.cut)


def _load_shard(
    path: Path,
    shard: int,
    num_shards: int,
    devices: Sequence[str],
    tables: TableSettings | None,
    give_way: GiveWay,
) -> tuple[Snapshot, nn.Module, Centroids, list[list[PartitionData]]]:
    """Return a snapshot, its model, its centroids, and the partitions of every device."""
    if not devices:
        raise ValueError("devices must name at least one device, got none")
    for device in devices:
        if torch.device(device).type != "cpu":
            raise ValueError(f"devices must be cpu, got {device!r}")
    snapshot = open_snapshot(path)
    owned = shard_partitions(shard, num_shards, snapshot.spec.num_partitions)
    settings = tables or TableSettings()
    model, centroids = load_model(snapshot, settings.sources)
    place_tables(model, devices, settings)
    held: list[list[PartitionData]] = [[] for _ in devices]
    for number in owned:
        give_way()
        data = snapshot.load_partition(number)
        if data is not None:
            held[part_of(number, len(devices))].append(data)
    return snapshot, model, centroids, held


def _field_store(held: Sequence[PartitionData], spec: ServingSpec) -> FieldStore:
    def column(name: str, dtype: str) -> NDArray[np.generic]:
        parts = [data.catalogue.fields[name] for data in held]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=_FIELD_TYPES[dtype])

    ids = [data.catalogue.item_ids for data in held]
    return FieldStore(
        np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64),
        {field.name: column(field.name, field.dtype) for field in spec.item_schema.fields},
    )


def load_executor(
    path: Path,
    shard: int,
    num_shards: int,
    *,
    devices: Sequence[str] = ("cpu",),
    tables: TableSettings | None = None,
    headroom: float = 0.0,
    give_way: GiveWay = _to_nobody,
    clock: Callable[[], float] = monotonic,
) -> ShardExecutor:
    """Load one shard of a snapshot and run every stage once.

    Args:
        path: directory of the generation.
        shard: index of the shard.
        num_shards: S.
        devices: as for ``load_retriever``.
        tables: what is decided about embedding tables.
        headroom: free pages for updates as a share of those in use; 0: the shard follows none.
        give_way: is called between the parts of the work; lets the queries of what this process
            serves go first.
        clock: seconds.

    Raises:
        SnapshotError: if a file is missing or damaged.
        ValueError: if the shard, a device or the headroom is out of range.
    """
    retriever: Retriever
    held: FieldStore | LiveParts
    if headroom:
        retriever, held = load_live(
            path,
            shard=shard,
            num_shards=num_shards,
            devices=devices,
            tables=tables,
            headroom=headroom,
            give_way=give_way,
        )
    else:
        retriever, held = load_retriever(
            path,
            shard=shard,
            num_shards=num_shards,
            devices=devices,
            tables=tables,
            give_way=give_way,
        )
    executor = ShardExecutor(retriever, held, shard=shard, num_shards=num_shards, clock=clock)
    executor.warm(give_way)
    return executor
