"""Publishing: from a trained model and a catalogue to a generation on storage.

Shapes: n items, C clusters, D embedding dimension.
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from silvershard.kernels import quantize_rows
from silvershard.model.brute_force import BruteForce
from silvershard.model.catalogue import Catalogue
from silvershard.model.clustering import assign_clusters, spherical_kmeans
from silvershard.model.planes import (
    ItemBits,
    PlaneDictionary,
    PlaneReport,
    choose_planes,
    encode_items,
)
from silvershard.model.recall_calibration import calibrate
from silvershard.model.request import Request
from silvershard.model.retriever import Centroids, RetrievalModel, Retriever
from silvershard.model.schema import Schema, check_model
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.build import build_index
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.golden import Embedded, Golden, ItemTower, check_exact, check_generation
from silvershard.shard.golden_requests import draw_requests
from silvershard.shard.partition import choose_num_partitions, partition_of
from silvershard.shard.snapshot import Builder, PartitionData, open_snapshot
from silvershard.shard.snapshot_writer import write_snapshot

PHASES = (
    "embedding the items",
    "clustering",
    "encoding filters",
    "answering golden requests",
    "writing",
    "checking",
)


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
    centroids: Tensor | None = None,
    remote_rows: Mapping[str, Tensor] | None = None,
    semantic: SemanticSource | None = None,
    golden_requests: int = 24,
    golden_users: Sequence[Request] = (),
    recall_requests: int = 0,
    log_id: int = 0,
    cut: tuple[int, ...] = (),
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Published:
    """Embed, cluster, encode and write a catalogue as the next generation.

    It holds every item that fits another generation of the repository with the same name, so that
    no update is refused which one of those took.

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
        centroids: ``(C, D)`` float32 that were trained with the model; None: k-means makes them. No
            list gets longer than four times the mean: it turns away the items that lose least.
        remote_rows: records ``(rows, W)`` uint8 of each remote table of the model.
        semantic: gives the items their semantic ids, and serves as a source of candidates.
        golden_requests: requests that are written with the answers of the model in memory and asked
            again of what was written; with 0 nothing is written or asked.
        golden_users: features and excluded ids of real users, to draw those requests from.
        recall_requests: requests, of these users first, on which it is measured what plans find of
            exact answers; with 0 answers have no expected recall.
        log_id: the update log that ``cut`` is of; 0 without.
        cut: position in each partition of the log up to which its updates are in the catalogue.
        on_phase: hears the name of each of the ``PHASES`` when it begins.

    Raises:
        SchemaError: if the catalogue or the model does not fit the schema.
        SnapshotError: if the generation exists already, or if what was written does not answer as
            the model in memory, naming the first difference.
        ValueError: if a setting is out of range or the filter target cannot be reached.
    """
    catalogue.validate(schema)
    check_model(schema, config)
    _check_finite("model", model)
    if semantic is not None:
        _check_finite("semantic", semantic)
    if generation is None:
        generation = max(list_generations(repository), default=0) + 1
    on_phase(PHASES[0])
    with torch.inference_mode():
        embeddings = cast(ItemTower, model.eval()).embed_items(dict(catalogue.features)).clone()
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("the item tower gave an embedding that is not finite")
    semantic_codes = None if semantic is None else _semantic_codes(semantic, model, embeddings)
    on_phase(PHASES[1])
    if centroids is None:
        clustering = spherical_kmeans(embeddings, num_clusters, seed=seed)
    elif len(centroids) == num_clusters:
        clustering = assign_clusters(embeddings, centroids)
    else:
        raise ValueError(
            f"centroids must be as many as num_clusters, {num_clusters}, got {len(centroids)}"
        )
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
        previous=_kept_planes(repository, name),
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
        semantic=None if semantic is None else semantic.spec,
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
            semantic_codes=None if semantic_codes is None else semantic_codes[rows],
        )
    on_phase(PHASES[3])
    golden = calibration = None
    if golden_requests or recall_requests:
        retriever = Retriever(
            model,
            Centroids.of(clustering.centroids),
            [build_index(list(partitions.values()), spec)],
            spec,
            semantic,
        ).eval()
        if golden_requests:
            drawn = draw_requests(spec, catalogue, golden_requests, users=golden_users, seed=seed)
            golden = Golden.of(retriever, drawn)
            check_exact(golden, BruteForce(model, spec, catalogue, embeddings))
        if recall_requests:
            drawn = draw_requests(spec, catalogue, recall_requests, seed=seed + 1)
            calibration = calibrate(retriever, (*golden_users, *drawn)[:recall_requests])
        # It must be gone when the written one is loaded.
        del retriever

    def check(written: Path) -> None:
        on_phase(PHASES[5])
        if golden is not None:
            check_generation(written, packed=Embedded(catalogue.item_ids, embeddings))

    on_phase(PHASES[4])
    path = write_snapshot(
        repository,
        spec,
        Builder(name=builder, config=config),
        model.state_dict(),
        clustering.centroids,
        partitions,
        code_version=importlib.metadata.version("silvershard"),
        created_unix_s=int(time.time()),
        rows=remote_rows,
        semantic=None if semantic is None else semantic.state_dict(),
        golden=None if golden is None else golden.to_bytes(),
        log_id=log_id,
        cut=cut,
        calibration=calibration,
        check=check,
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


def _kept_planes(repository: Path, name: str) -> list[PlaneDictionary]:
    """Return the planes of the generations of a model; one that nobody can load has none."""
    kept = []
    for generation in list_generations(repository):
        try:
            spec = open_snapshot(generation_dir(repository, generation)).spec
        except SnapshotError:
            continue
        if spec.model == name:
            kept.append(spec.planes)
    return kept


def _check_finite(what: str, module: nn.Module) -> None:
    """Return if every weight is finite.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{what}.{name} must be finite, got NaN or an infinite weight")


def _semantic_codes(source: SemanticSource, model: nn.Module, embeddings: Tensor) -> Tensor:
    """Return the semantic ids of all items, ``(n, L)`` int16.

    Raises:
        ValueError: if the source is of another model.
    """
    wanted, made = source.codebooks.shape[2], embeddings.shape[1]
    if wanted != made:
        raise ValueError(f"semantic ids must be of embeddings of {made} elements, got {wanted}")
    with torch.inference_mode():
        width = cast(RetrievalModel, model).encode([{}]).user_state.shape[1]
        if source.spec.state_dim > width:
            raise ValueError(
                f"the decoder of semantic ids must read at most the {width} elements of a user "
                f"state, got {source.spec.state_dim}"
            )
        return source.item_codes(embeddings).cpu()
