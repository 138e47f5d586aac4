"""The update log of a state directory, and what its generations keep of it.

A generation is brought up to date from its cut, so the log is kept from the oldest cut of all
generations: each of them pins its own.
"""

from pathlib import Path

from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import LogMissing, LogTrimmed, SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import Outline, read_outline


def log_url(state: StateDir, config: Config) -> str:
    """Return the update log of a state directory; empty where there are no updates."""
    if not config.updates.enabled:
        return ""
    return config.updates.log or f"sqlite:///{state.updates_file}"


def existing_log(state: StateDir, config: Config) -> UpdateLog | None:
    """Return the update log if there is one: the first ``up`` makes it.

    Raises:
        LogUnavailable: if the one that the settings name cannot be reached.
        LogDamaged: if what is there is not an update log.
    """
    url = log_url(state, config)
    if not url or (not config.updates.log and not state.updates_file.is_file()):
        return None
    try:
        return open_log(url, None, create=False)
    except LogMissing:
        return None


def pin_name(generation: int) -> str:
    """Return the name under which a generation pins its cut."""
    return generation_dir(Path(), generation).name


def pin_generations(log: UpdateLog, repository: Path) -> None:
    """Let the log keep what any generation needs to be brought up to date.

    One that needs more than is kept has no pin: it can be served no more, and says so when asked.
    One that is damaged keeps the pin that it has.
    """
    present = list_generations(repository)
    for generation in present:
        try:
            outline = read_outline(generation_dir(repository, generation))
            check_log(log, outline)
            log.pin(pin_name(generation), outline.cut)
        except (SnapshotError, CommandError, LogTrimmed):
            continue
    names = {pin_name(generation) for generation in present}
    for name in log.pins().keys() - names:
        log.unpin(name)


def check_log(log: UpdateLog, outline: Outline) -> None:
    """Return if a generation can be brought up to date from a log.

    Raises:
        Refused: if its items hold updates of another log, or the log was trimmed beyond its cut.
        CommandError: if the log has another number of partitions than the cut.
    """
    generation = outline.generation
    if outline.log_id not in (0, log.log_id):
        raise Refused(
            f"generation {generation} holds updates of log {outline.log_id}, {log.url} is log "
            f"{log.log_id}: name its log with updates.log, or publish it from data again"
        )
    if outline.cut and len(outline.cut) != log.num_partitions:
        raise CommandError(
            f"generation {generation} has a cut of {len(outline.cut)} partitions, {log.url} has "
            f"{log.num_partitions}"
        )
    for partition in range(log.num_partitions):
        position = outline.cut[partition] if outline.cut else 0
        start = log.start(partition)
        if position < start:
            raise Refused(
                f"generation {generation} needs what {log.url} kept beyond position {position} of "
                f"partition {partition}, which is trimmed up to {start}: it can be brought up to "
                "date no more; publish with --recluster from a newer one"
            )


def trim_log(log: UpdateLog) -> list[int]:
    """Forget what no generation needs; return the last trimmed position of each partition."""
    return [log.trim(partition, log.end(partition)) for partition in range(log.num_partitions)]
