"""Publishing: from a trained model and a catalogue to a generation on storage.

Shapes: n items, C clusters, D embedding dimension.
"""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from silvershard.kernels import quantize_rows
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.clustering import spherical_kmeans
from silvershard.model.planes import ItemBits, PlaneReport, choose_planes, encode_items
from silvershard.model.schema import Schema, SchemaError
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.generations import list_generations
from silvershard.shard.partition import choose_num_partitions, partition_of
from silvershard.shard.snapshot import (
    Builder,
    PartitionData,
    write_snapshot,
)

PHASES = ("embedding the items", "clustering", "encoding filters", "writing")


class ItemTower(Protocol):
    """What publishing needs of a model."""

    def embed_items(self, features: dict[str, Ragged]) -> Tensor:
        """Return unit embeddings ``(n, D)`` float32 of items given their raw features."""
        ...


class Published(NamedTuple):
    """A generation that was written, and what an operator wants to know of it."""

    path: Path
    generation: int
    documents: int
    longest_list: int
    """Items in the largest cluster."""
    mean_list: float
    planes: PlaneReport


def publish_generation(
    repository: Path,
    *,
    name: str,
    model: nn.Module,
    builder: str,
    config: dict[str, Any],
    catalogue: Catalogue,
    schema: Schema,
    defaults: SearchDefaults,
    num_clusters: int,
    planned_shards: int = 8,
    page_slots: int = 64,
    false_positive_rate: float = 0.001,
    max_exact_planes: int = 256,
    seed: int = 17,
    generation: int | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Published:
    """Embed, cluster, encode and write a catalogue as the next generation.

    Args:
        repository: directory of generations.
        name: logical model name.
        model: the trained module; its item tower embeds the catalogue.
        builder: name of the registered builder that makes such a module.
        config: what the builder makes it from.
        catalogue: the items.
        schema: what the catalogue's columns and the model's inputs and outputs are.
        defaults: search settings.
        num_clusters: C.
        planned_shards: the most shards this generation should be cut into without republishing.
        page_slots: G, 64 or 128.
        false_positive_rate: target of one Bloom term.
        max_exact_planes: most values with a plane of their own.
        seed: of clustering and hashing.
        generation: its number; by default one more than the newest.
        on_phase: hears the name of each of the ``PHASES`` when it begins.

    Raises:
        SchemaError: if the catalogue or the model does not fit the schema.
        SnapshotError: if the generation exists already.
        ValueError: if a setting is out of range or the filter target cannot be reached.
    """
    catalogue.validate(schema)
    for part in ("heads", "tasks", "signals"):
        wanted, made = tuple(getattr(schema, part)), tuple(config.get(part, getattr(schema, part)))
        if wanted != made:
            raise SchemaError(part, f"the schema has {wanted}, the model was made for {made}")
    if generation is None:
        generation = max(list_generations(repository), default=0) + 1
    on_phase(PHASES[0])
    with torch.inference_mode():
        embeddings = cast(ItemTower, model.eval()).embed_items(dict(catalogue.features)).clone()
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("the item tower gave an embedding that is not finite")
    on_phase(PHASES[1])
    clustering = spherical_kmeans(embeddings, num_clusters, seed=seed)
    codes, scales = (one.cpu() for one in quantize_rows(embeddings))
    cache = embeddings.half().cpu()
    if not bool(torch.isfinite(cache).all()):
        raise ValueError(
            "the item tower gave an embedding beyond float16, whose largest magnitude is 65504, "
            f"got {float(embeddings.abs().max()):.6g}"
        )
    assignment = clustering.assignment.cpu()
    on_phase(PHASES[2])
    planes = choose_planes(
        schema,
        catalogue,
        target_false_positive_rate=false_positive_rate,
        max_exact_planes=max_exact_planes,
        seed=seed,
    )
    num_partitions = choose_num_partitions(planned_shards)
    owner = partition_of(torch.from_numpy(catalogue.item_ids), num_partitions)
    spec = ServingSpec(
        model=name,
        generation=generation,
        documents=len(catalogue),
        dim=embeddings.shape[1],
        num_clusters=num_clusters,
        num_partitions=num_partitions,
        partition_documents=tuple(torch.bincount(owner, minlength=num_partitions).tolist()),
        page_slots=page_slots,
        item_schema=schema,
        planes=planes,
        defaults=defaults,
    )
    bits = encode_items(planes, schema, catalogue)
    partitions = {}
    by_cluster = torch.argsort(assignment, stable=True)
    by_partition = by_cluster[torch.argsort(owner[by_cluster], stable=True)]
    for partition, rows in enumerate(by_partition.split(spec.partition_documents)):
        if not len(rows):
            continue
        partitions[partition] = PartitionData(
            catalogue=catalogue.take(rows.numpy()),
            clusters=assignment[rows].to(torch.int32),
            codes=codes[rows],
            scales=scales[rows],
            cache=cache[rows],
            bits=ItemBits(bits.exact[rows], bits.terms[rows], bits.columns[rows]),
        )
    on_phase(PHASES[3])
    path = write_snapshot(
        repository,
        spec,
        Builder(name=builder, config=config),
        model.state_dict(),
        clustering.centroids,
        partitions,
        code_version=importlib.metadata.version("silvershard"),
        created_unix_s=int(time.time()),
    )
    sizes = torch.bincount(assignment, minlength=num_clusters)
    return Published(
        path=path,
        generation=generation,
        documents=len(catalogue),
        longest_list=int(sizes.max()),
        mean_list=len(catalogue) / num_clusters,
        planes=planes.report(),
    )
