"""The moment that data are of, as a place in the update log.

A generation that is published from data replays the updates that the data do not hold yet. Which
ones that are is known to whoever exported the data: all that were acked before the export began are
in them, so the end of the log at that moment is the cut.
"""

from typing import Final, NamedTuple

from silvershard.cluster.update_log import UpdateLog
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.log_pins import check_cut, pin_generation
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import existing_log
from silvershard.shard.generations import list_generations

START: Final = "start"
NOW: Final = "now"


class LogCut(NamedTuple):
    """A place in an update log, as the manifest of a generation names it."""

    log_id: int = 0
    """0: the very start of any log."""
    cut: tuple[int, ...] = ()
    """``(L,)`` positions; empty for the very start."""


FROM_START: Final = LogCut()


def cut_of_data(state: StateDir, config: Config, as_of: str) -> LogCut:
    """Return the cut of the next generation from data; the log keeps what lies beyond it.

    Args:
        state: where the generation goes.
        config: its settings.
        as_of: ``start`` for data that hold no updates, ``now`` for data that hold all, or what
            ``silvershard freshness`` said when the export began: positions of all log partitions,
            with the id of the log before them, as in ``4711:120,88``.

    Raises:
        Refused: if the log was trimmed beyond it, so that updates would be lost, or is another one.
        CommandError: if it is no place in the log, or there is no log.
        LogUnavailable: if the log cannot be read.
    """
    log = existing_log(state, config)
    if log is None:
        if as_of in (START, NOW):
            return FROM_START
        raise CommandError(f"--data-as-of {as_of}: there is no update log in {state.root}")
    number = max(list_generations(state.generations), default=0) + 1
    try:
        found = _parsed(log, as_of)
        _check_start(log, found)
        check_cut(log, number, found.log_id, found.cut)
        pin_generation(log, state, number, found.cut)
    finally:
        log.close()
    return found


def _parsed(log: UpdateLog, as_of: str) -> LogCut:
    if as_of == START:
        return FROM_START
    ends = tuple(log.end(one) for one in range(log.num_partitions))
    if as_of == NOW:
        return LogCut(log.log_id, ends)
    log_id, colon, positions = as_of.rpartition(":")
    parts = positions.split(",")
    if not all(one.isdecimal() for one in [*parts, *([log_id] if colon else [])]):
        raise CommandError(
            f"--data-as-of must be {START}, {NOW} or what `silvershard freshness` says, as in "
            f"{log.log_id}:{','.join(map(str, ends))}, got {as_of}",
            ExitCode.USAGE,
        )
    cut = tuple(map(int, parts))
    if len(cut) == len(ends) and any(one > end for one, end in zip(cut, ends, strict=True)):
        raise CommandError(
            f"--data-as-of must be at most the end of the update log, {','.join(map(str, ends))}, "
            f"got {positions}",
            ExitCode.USAGE,
        )
    return LogCut(int(log_id) if colon else log.log_id, cut)


def _check_start(log: UpdateLog, found: LogCut) -> None:
    """Refuse the very start of a log that was trimmed."""
    for partition in range(log.num_partitions):
        start = log.start(partition)
        if start and not found.cut:
            raise Refused(
                f"data that hold no updates need the whole update log, {log.url} is trimmed up to "
                f"position {start} of partition {partition}: say what the data hold with "
                "--data-as-of, or publish with --recluster from the live generation"
            )
