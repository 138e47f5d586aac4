"""A new generation from the live one and the update log: the items of today in new clusters.

They are embedded by the model of the live generation, or by one that was trained since.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from silvershard.cluster.mutation_codec import logged_from
from silvershard.cluster.update_log import UpdateLog
from silvershard.deploy import recipe
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.log_pins import check_log, pin_generation
from silvershard.deploy.publishing import index_options, served_model
from silvershard.deploy.recipe import LoadedModel
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import existing_log
from silvershard.model.clustering import default_clusters
from silvershard.model.request import Request
from silvershard.model.schema import Schema, SchemaError, check_model
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.errors import MutationError
from silvershard.shard.generations import list_generations
from silvershard.shard.golden import read_golden
from silvershard.shard.mutations import Mutation
from silvershard.shard.outline import read_outline
from silvershard.shard.publish import Published, publish_generation
from silvershard.shard.rebase import Rebased, rebase
from silvershard.shard.snapshot import Snapshot, open_snapshot

_READ = 1000
"""Records that are read at once."""

READING = "reading the update log"


def republish(
    state: StateDir,
    config: Config,
    report: Callable[[str], None] = lambda _: None,
    *,
    model: Path | None = None,
) -> Published:
    """Publish the items of the live generation as they are now, in clusters made for them.

    With another model its item tower embeds the raw features of all of them, and rows of tables
    that the log holds are left out: they are of the model before.

    Args:
        state: of the generation and its log.
        config: settings of the index, and of the model's form if there is another one.
        report: hears what is being done.
        model: directory in which ``train`` left it; None: the model of the live generation.

    Raises:
        CommandError: if there is no generation, or no update log, or the model does not fit the
            items.
        Refused: if the log does not hold what came since its cut.
        SnapshotError: if the generation is damaged.
        LogUnavailable: if the log cannot be read.
    """
    _, path = choose_generation(state, None)
    snapshot = open_snapshot(path)
    loaded = None if model is None else recipe.load_model(model)
    schema = snapshot.spec.item_schema
    if loaded is not None:
        schema = _schema_of(loaded, snapshot.spec, model)
    log = existing_log(state, config)
    if log is None:
        raise CommandError(
            f"there is no update log in {state.root}: without updates there is nothing to publish "
            "again"
        )
    try:
        check_log(log, read_outline(path))
        partitions = range(log.num_partitions)
        begin = snapshot.manifest.cut or (0,) * log.num_partitions
        cut = tuple(log.end(one) for one in partitions)
        number = max(list_generations(state.generations)) + 1
        # Nobody may trim what the new generation will be brought up to date from.
        pin_generation(log, state, number, cut)
        report(READING)
        rebased = rebase(snapshot, _mutations(log, begin, cut))
        if not len(rebased.catalogue):
            raise CommandError("every item is deleted: there is nothing to publish")
        if loaded is None:
            options = _as_before(config, snapshot, rebased)
        else:
            options = _of_model(config, loaded, len(rebased.catalogue))
        return publish_generation(
            state.generations,
            catalogue=rebased.catalogue,
            schema=schema,
            generation=number,
            golden_users=_golden_users(snapshot, schema),
            log_id=log.log_id,
            cut=cut,
            on_phase=report,
            **options,
        )
    finally:
        log.close()


def _as_before(config: Config, snapshot: Snapshot, rebased: Rebased) -> dict[str, Any]:
    """Return what makes the next generation of the model of this one."""
    spec, builder = snapshot.spec, snapshot.manifest.builder
    clusters = _num_clusters(config, spec, len(rebased.catalogue))
    return {
        "name": spec.model,
        "model": rebased.model,
        "builder": builder.name,
        "config": builder.config,
        "remote_rows": rebased.remote_rows,
        "semantic": rebased.semantic,
        "defaults": _defaults(spec, clusters),
        "num_clusters": clusters,
        "planned_shards": max(config.index.planned_shards, config.sharding.shards),
        "page_slots": spec.page_slots,
        "false_positive_rate": config.index.false_positive_rate,
        "seed": config.model.seed,
        "golden_requests": config.index.golden_requests,
        "recall_requests": config.index.recall_requests,
    }


def _of_model(config: Config, loaded: LoadedModel, items: int) -> dict[str, Any]:
    """Return what makes the next generation of a newly trained model."""
    description = loaded.description
    served = served_model(config, loaded.model, description.config)
    return {
        "name": description.name,
        "model": served.model,
        "builder": description.builder,
        "config": served.config,
        "remote_rows": served.remote_rows,
        **index_options(config, items, loaded.semantic, loaded.centroids),
    }


def _schema_of(loaded: LoadedModel, spec: ServingSpec, model: Path | None) -> Schema:
    """Return what users are for a newly trained model, and items as they are.

    Raises:
        CommandError: if the model reads what the items do not have.
    """
    items, trained = spec.item_schema, recipe.schema_of(loaded.description.training)
    schema = trained.model_copy(
        update={
            "item_features": items.item_features,
            "attributes": items.attributes,
            "fields": items.fields,
            "signals": items.signals,
        }
    )
    try:
        check_model(schema, loaded.description.config)
    except SchemaError as error:
        raise CommandError(
            f"the model in {model} does not fit the items of generation {spec.generation}: "
            f"{error}; publish it from data"
        ) from None
    return schema


def _golden_users(snapshot: Snapshot, schema: Schema) -> list[Request]:
    """Return the users of the golden requests of a generation, as requests of a schema name them.

    One of whom nothing is left is no user.
    """
    known = set(schema.user_features)
    kept = {one.name for one in snapshot.spec.item_schema.user_features if one in known}
    users = []
    for request in (case.to_request() for case in read_golden(snapshot).cases):
        features = {name: one for name, one in request.features.items() if name in kept}
        if features or not request.features:
            users.append(Request(features=features, exclude_ids=request.exclude_ids))
    return users


def _mutations(log: UpdateLog, begin: tuple[int, ...], cut: tuple[int, ...]) -> Iterator[Mutation]:
    """Yield what a log holds between two cuts; an item is in one partition, in its order there."""
    for partition, (position, end) in enumerate(zip(begin, cut, strict=True)):
        while position < end:
            records = log.read(partition, position, min(_READ, end - position))
            for record in records:
                try:
                    yield logged_from(record.payload)
                except MutationError:
                    # The shards refused it too, and said so.
                    continue
            position = records[-1].position


def _num_clusters(config: Config, spec: ServingSpec, items: int) -> int:
    """Return how many clusters the items get.

    They are as many as the settings say, else as many as before while the size of the catalogue
    asks for no other number.
    """
    if config.index.clusters:
        return min(config.index.clusters, items)
    wanted = default_clusters(items)
    is_as_before = wanted == default_clusters(spec.documents)
    return min(spec.num_clusters if is_as_before else wanted, items)


def _defaults(spec: ServingSpec, clusters: int) -> SearchDefaults:
    """Return the search settings of a generation, for another number of clusters."""
    share = spec.defaults.probes / spec.num_clusters
    probes = min(max(round(share * clusters), 1), clusters)
    return spec.defaults.model_copy(update={"probes": probes})
