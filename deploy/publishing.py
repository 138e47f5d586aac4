"""What a generation is made of beside its items, and the form in which a model is served.

Shapes: C clusters, D embedding dimension, W bytes of a record.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.model.clustering import default_clusters
from silvershard.model.remote_split import split_remote
from silvershard.model.remote_tables import StoredRows
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import SearchDefaults
from silvershard.model.two_tower import TwoTower
from silvershard.shard.table_placement import connect_tables


class ServedModel(NamedTuple):
    """A model as a generation holds it."""

    model: nn.Module
    config: dict[str, Any]
    """What its builder makes it from."""
    remote_rows: Mapping[str, Tensor]
    """Records ``(rows, W)`` uint8 of each remote table."""


def served_model(config: Config, model: nn.Module, settings: dict[str, Any]) -> ServedModel:
    """Return a trained model as the settings want it served.

    Args:
        config: its ``tables.remote`` are taken out, the others get ``index.table_precision``.
        model: as it was trained.
        settings: what its builder makes it from.

    Raises:
        CommandError: if a setting does not fit the model.
    """
    rows: Mapping[str, Tensor] = {}
    if config.tables.remote:
        try:
            split = split_remote(cast(TwoTower, model), config.tables.remote)
        except ValueError as error:
            raise CommandError(f"tables.remote: {error}") from None
        model, rows = split.model, split.records
        settings = split.model.config.model_dump(mode="json")
    if config.index.table_precision != "float32":
        try:
            quantized = cast(TwoTower, model).quantized(config.index.table_precision)
        except ValueError as error:
            raise CommandError(f"index.table_precision: {error}") from None
        model, settings = quantized, quantized.config.model_dump(mode="json")
    connect_tables(model, StoredRows(rows), rows.__getitem__)
    return ServedModel(model, settings, rows)


def num_clusters(config: Config, documents: int) -> int:
    """Return the clusters of an index: as configured, or a power of two near 2.6 root of items."""
    if config.index.clusters:
        return config.index.clusters
    return default_clusters(documents)


def index_options(
    config: Config, documents: int, semantic: SemanticSource | None, centroids: Tensor | None
) -> dict[str, Any]:
    """Return how ``publish_generation`` shall index the items of a newly trained model.

    Args:
        config: settings of the index.
        documents: number of items.
        semantic: gives the items their semantic ids; None: nothing does.
        centroids: ``(C, D)`` float32 that were trained with the model; None: k-means makes them.

    Raises:
        CommandError: if the settings want another number of clusters than was trained.
    """
    clusters = num_clusters(config, documents)
    if centroids is not None:
        clusters = len(centroids)
        if config.index.clusters not in (0, clusters):
            raise CommandError(
                f"index.clusters must be 0 or {clusters}, which were trained with the towers, "
                f"got {config.index.clusters}; set it so, or train again"
            )
    return {
        "defaults": SearchDefaults(
            probes=max(round(config.index.probe_share * clusters), 1),
            ann_k=config.index.ann_k,
            semantic_k=config.index.semantic_k if semantic else 0,
        ),
        "num_clusters": clusters,
        "planned_shards": max(config.index.planned_shards, config.sharding.shards),
        "page_slots": config.index.page_slots,
        "false_positive_rate": config.index.false_positive_rate,
        "seed": config.model.seed,
        "centroids": centroids,
        "semantic": semantic,
        "golden_requests": config.index.golden_requests,
        "recall_requests": config.index.recall_requests,
    }
