"""What the generations of a state directory keep of its update log.

A generation is brought up to date from its cut, so the log is kept from the oldest cut of all
generations: each of them pins its own. Several state directories may use one log; the pins of each
bear its name, and none touches those of another.
"""

from pathlib import Path

from silvershard.cluster.update_log import UpdateLog
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import adopt_log
from silvershard.shard.errors import LogTrimmed, SnapshotError
from silvershard.shard.generations import generation_dir, list_generations, number_of
from silvershard.shard.outline import Outline, read_outline


def pin_generation(
    log: UpdateLog, state: StateDir, generation: int, cut: tuple[int, ...] = ()
) -> None:
    """Let a log keep what lies beyond a cut, for a generation; the log becomes that of the state.

    Args:
        log: what keeps it.
        state: of the generation.
        generation: its number; it need not be published yet.
        cut: ``(L,)`` positions; empty for the very start.

    Raises:
        Refused: if the state directory has another log.
        LogTrimmed: if some of it was trimmed already.
    """
    log.pin(_pin_name(adopt_log(state, log), generation), cut)


def pin_generations(log: UpdateLog, state: StateDir) -> None:
    """Let the log keep what any generation needs to be brought up to date.

    One that needs more than is kept has no pin: it can be served no more, and says so when asked.
    One that is damaged keeps the pin that it has.

    Raises:
        Refused: if the state directory has another log.
    """
    state_id = adopt_log(state, log)
    for generation in list_generations(state.generations):
        try:
            outline = read_outline(generation_dir(state.generations, generation))
            check_log(log, outline)
            log.pin(_pin_name(state_id, generation), outline.cut)
        except (SnapshotError, CommandError, LogTrimmed):
            continue


def drop_pins(log: UpdateLog, state: StateDir) -> None:
    """Remove the pins of generations that are not there any more, or never came to be.

    Nobody may be publishing into the state directory: what is on its way is pinned already.

    Raises:
        Refused: if the state directory has another log.
    """
    state_id = adopt_log(state, log)
    needed = {_pin_name(state_id, one) for one in list_generations(state.generations)}
    for name in log.pins():
        if name.startswith(f"{state_id}/") and name not in needed:
            log.unpin(name)


def other_pins(log: UpdateLog, state: StateDir) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return what other state directories keep of the log: cuts by name and generation."""
    state_id = adopt_log(state, log)
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for pin, cut in log.pins().items():
        name, _, generation = pin.partition("/")
        if name != state_id:
            found.setdefault(name, {})[number_of(generation) or 0] = cut
    return found


def release_pins(log: UpdateLog, state: StateDir, name: str, *, dry_run: bool = False) -> int:
    """Let the log forget what a state directory kept that is no more; return how many pins it had.

    Args:
        log: what keeps it.
        state: another directory with the same log.
        name: of the one that is no more.
        dry_run: count them only.

    Raises:
        Refused: if it is the name of this one, or this one has another log.
    """
    own_name = state.control.read().state_id
    if name == (own_name if dry_run else adopt_log(state, log)):
        raise Refused(f"{name} is {state.root} itself: its generations need what they keep")
    own = [one for one in log.pins() if one.startswith(f"{name}/")]
    if not dry_run:
        for one in own:
            log.unpin(one)
    return len(own)


def _pin_name(state_id: str, generation: int) -> str:
    return f"{state_id}/{generation_dir(Path(), generation).name}"


def check_log(log: UpdateLog, outline: Outline) -> None:
    """Return if a generation can be brought up to date from a log.

    Raises:
        Refused: as ``check_cut``.
        CommandError: as ``check_cut``.
    """
    check_cut(log, outline.generation, outline.log_id, outline.cut)


def check_cut(log: UpdateLog, generation: int, log_id: int, cut: tuple[int, ...]) -> None:
    """Return if a generation can be brought up to date from a log.

    Args:
        log: the log.
        generation: what messages call it.
        log_id: of the log whose updates its items hold; 0: of none.
        cut: ``(L,)`` up to where they hold them; empty for nothing.

    Raises:
        Refused: if its items hold updates of another log, or the log was trimmed beyond its cut, or
            ends before it.
        CommandError: if the log has another number of partitions than the cut.
    """
    if log_id not in (0, log.log_id):
        raise Refused(
            f"generation {generation} holds updates of log {log_id}, {log.url} is log "
            f"{log.log_id}: name its log with updates.log, publish it from data again, or leave "
            "its log behind with --new-log, which says what is lost"
        )
    if cut and len(cut) != log.num_partitions:
        raise CommandError(
            f"generation {generation} has a cut of {len(cut)} partitions, {log.url} has "
            f"{log.num_partitions}"
        )
    for partition in range(log.num_partitions):
        position = cut[partition] if cut else 0
        start, end = log.start(partition), log.end(partition)
        if position < start:
            raise Refused(
                f"generation {generation} needs what {log.url} kept beyond position {position} of "
                f"partition {partition}, which is trimmed up to {start}: it can be brought up to "
                "date no more; publish with --recluster from a newer one"
            )
        if position > end:
            raise Refused(
                f"generation {generation} holds what {log.url} had up to position {position} of "
                f"partition {partition}, which ends at {end} now: the log has lost updates, and "
                "was put back from an old copy perhaps"
            )


def trim_log(log: UpdateLog) -> list[int]:
    """Forget what no generation needs; return the last trimmed position of each partition."""
    return [log.trim(partition, log.end(partition)) for partition in range(log.num_partitions)]
