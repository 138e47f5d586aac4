"""A new generation from the live one and the update log: the same model over the items of today."""

from collections.abc import Callable, Iterator

from silvershard.cluster.mutation_codec import logged_from
from silvershard.cluster.update_log import UpdateLog
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.launch import choose_generation
from silvershard.deploy.log_pins import check_log, existing_log, pin_name
from silvershard.deploy.state import StateDir
from silvershard.model.clustering import default_clusters
from silvershard.model.request import Request
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.errors import MutationError
from silvershard.shard.generations import list_generations
from silvershard.shard.golden import read_golden
from silvershard.shard.mutations import Mutation
from silvershard.shard.outline import read_outline
from silvershard.shard.publish import Published, publish_generation
from silvershard.shard.rebase import rebase
from silvershard.shard.snapshot import open_snapshot

_READ = 1000
"""Records that are read at once."""

READING = "reading the update log"


def republish(
    state: StateDir, config: Config, report: Callable[[str], None] = lambda _: None
) -> Published:
    """Publish the items of the live generation as they are now, in clusters made for them.

    Args:
        state: of the generation and its log.
        config: settings of the index.
        report: hears what is being done.

    Raises:
        CommandError: if there is no generation, or no update log.
        Refused: if the log does not hold what came since its cut.
        SnapshotError: if the generation is damaged.
        LogUnavailable: if the log cannot be read.
    """
    _, path = choose_generation(state, None)
    snapshot = open_snapshot(path)
    log = existing_log(state, config)
    if log is None:
        raise CommandError(
            f"there is no update log in {state.root}: without updates there is nothing to publish "
            "again"
        )
    try:
        manifest = snapshot.manifest
        check_log(log, read_outline(path))
        partitions = range(log.num_partitions)
        begin = manifest.cut or (0,) * log.num_partitions
        cut = tuple(log.end(one) for one in partitions)
        number = max(list_generations(state.generations)) + 1
        # Nobody may trim what the new generation will be brought up to date from.
        log.pin(pin_name(number), cut)
        report(READING)
        rebased = rebase(snapshot, _mutations(log, begin, cut))
        if not len(rebased.catalogue):
            raise CommandError("every item is deleted: there is nothing to publish")
        spec = snapshot.spec
        clusters = _num_clusters(config, spec, len(rebased.catalogue))
        return publish_generation(
            state.generations,
            name=spec.model,
            model=rebased.model,
            builder=manifest.builder.name,
            config=manifest.builder.config,
            catalogue=rebased.catalogue,
            schema=spec.item_schema,
            defaults=_defaults(spec, clusters),
            num_clusters=clusters,
            planned_shards=max(config.index.planned_shards, config.sharding.shards),
            page_slots=spec.page_slots,
            false_positive_rate=config.index.false_positive_rate,
            seed=config.model.seed,
            generation=number,
            remote_rows=rebased.remote_rows,
            semantic=rebased.semantic,
            golden_requests=config.index.golden_requests,
            golden_users=[
                Request(features=request.features, exclude_ids=request.exclude_ids)
                for request in (case.to_request() for case in read_golden(snapshot).cases)
            ],
            log_id=log.log_id,
            cut=cut,
            on_phase=report,
        )
    finally:
        log.close()


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


def check_from_data(state: StateDir, config: Config) -> None:
    """Return if a generation that is published from data can be brought up to date.

    Its cut is the very start, so the whole log is replayed into it.

    Raises:
        Refused: if the log was trimmed, so that updates would be lost.
        LogUnavailable: if the log cannot be read.
    """
    log = existing_log(state, config)
    if log is None:
        return
    try:
        for partition in range(log.num_partitions):
            start = log.start(partition)
            if start:
                raise Refused(
                    f"a generation from data needs the whole update log, {log.url} is trimmed up "
                    f"to position {start} of partition {partition}: publish with --recluster from "
                    "the live one, or name a new log with updates.log"
                )
        log.pin(pin_name(max(list_generations(state.generations), default=0) + 1), ())
    finally:
        log.close()
