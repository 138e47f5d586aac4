"""The shard map that follows from what the processes hold, and when it is another one than before.

Free of I/O: whoever asks writes it.
"""

import secrets

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.deploy.generation_watch import GenerationWatch


def next_map(
    before: ShardMap | None,
    generations: GenerationWatch,
    *,
    num_shards: int,
    num_named: int,
    sequencer: str = "",
    log_url: str = "",
    log_partitions: int = 1,
) -> ShardMap | None:
    """Return the map that shall take the place of another one; None: that one is true.

    Args:
        before: the newest map; None: there never was one. The first map is whole, so that no router
            believes in a smaller catalogue; it is none until then.
        generations: what is in service.
        num_shards: S.
        num_named: shard processes that a whole map names.
        sequencer: ``host:port`` that takes updates; empty: none.
        log_url: update log that the processes follow; empty: none.
        log_partitions: L.
    """
    entries = generations.in_service
    if before is None and len(entries) < num_named:
        return None
    made = drawn_map(
        before,
        generations,
        entries,
        num_shards,
        sequencer=sequencer,
        log_url=log_url,
        log_partitions=log_partitions,
    )
    if made == before:
        return None
    return made.model_copy(update={"version": before.version + 1}) if before else made


def drawn_map(
    before: ShardMap | None,
    generations: GenerationWatch,
    entries: tuple[ShardEntry, ...],
    num_shards: int,
    *,
    sequencer: str = "",
    log_url: str = "",
    log_partitions: int = 1,
) -> ShardMap:
    """Return a map of some processes, of the version of the one before; see ``next_map``.

    One that follows on none has an origin of its own, so that a router which outlived the cluster
    before takes it, whatever version it knows.
    """
    return ShardMap(
        version=before.version if before else 1,
        origin=before.origin if before else secrets.token_hex(8),
        generation=generations.live,
        snapshot=str(generations.path(generations.live)),
        num_shards=num_shards,
        entries=entries,
        snapshots=generations.snapshots,
        aliases=generations.aliases,
        sequencer=sequencer,
        log_url=log_url,
        log_partitions=log_partitions,
    )
