"""The update log of a state directory: where it is, and that it stays the same one.

The first command that keeps something in a log makes it the log of the directory. What was acked is
there and nowhere else, so from then on another log, or none, is refused until a person leaves it.
"""

import secrets

from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control
from silvershard.deploy.errors import Refused
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import LogMissing, SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import Outline, read_outline

_ADVICE = "give it back, or leave it behind with --new-log, which says what is lost"


def log_url(state: StateDir, config: Config) -> str:
    """Return where the update log of a state directory is; empty where there are no updates."""
    if not config.updates.enabled:
        return ""
    return config.updates.log or f"sqlite:///{state.updates_file}"


def existing_log(state: StateDir, config: Config) -> UpdateLog | None:
    """Return the update log if there is one: the first ``up`` makes it.

    Raises:
        Refused: if it is not the log of the state directory, or that one is gone.
        LogUnavailable: if the one that the settings name cannot be reached.
        LogDamaged: if what is there is not an update log.
    """
    url = log_url(state, config)
    own = state.control.read().log_id
    if not url:
        if own:
            raise Refused(
                f"updates.enabled is false, and {state.root} has update log {own}: what was acked "
                f"there would be lost; switch updates on, or leave it behind with --new-log"
            )
        return None
    log = _opened(state, config, url)
    if log is None:
        if own:
            raise Refused(f"update log {own} of {state.root} is gone, {url} holds none: {_ADVICE}")
        return None
    if own not in (0, log.log_id):
        found, where = log.log_id, log.url
        log.close()
        raise Refused(
            f"{state.root} has update log {own}, {where} is log {found}: name its log with "
            f"updates.log, {_ADVICE}"
        )
    return log


def made_log(state: StateDir, config: Config, outline: Outline) -> UpdateLog:
    """Return the update log, made where the state directory never had one.

    Args:
        state: the directory; its settings must not switch updates off.
        config: its settings.
        outline: the generation that is served.

    Raises:
        Refused: if it is not the log of the directory, or that one or the generation's is gone.
        ConfigError: if it has another number of partitions, or would not keep what it acknowledges.
        LogUnavailable: if it cannot be reached or made.
    """
    log = existing_log(state, config)
    if log is None:
        check_missing(state, config, outline)
    else:
        log.close()
    return open_log(log_url(state, config), config.updates.partitions, create=log is None)


def check_missing(state: StateDir, config: Config, outline: Outline) -> None:
    """Return if a generation can be served although there is no update log.

    Raises:
        Refused: if its items hold updates of one.
    """
    if outline.log_id:
        where = log_url(state, config) or "updates.enabled is false"
        raise Refused(
            f"generation {outline.generation} holds updates of log {outline.log_id}, which is not "
            f"there: {where}; {_ADVICE}"
        )


def adopt_log(state: StateDir, log: UpdateLog) -> str:
    """Make a log that of the state directory, which it stays; return the name of its pins.

    Raises:
        Refused: if the directory has another one.
    """

    def make(now: Control) -> Control:
        if now.log_id not in (0, log.log_id):
            raise Refused(
                f"{state.root} has update log {now.log_id}, {log.url} is log {log.log_id}: "
                f"{_ADVICE}"
            )
        state_id = now.state_id or secrets.token_hex(8)
        return now.model_copy(update={"log_id": log.log_id, "state_id": state_id})

    return state.control.change(make).state_id


def leave_log(state: StateDir, config: Config) -> list[str]:
    """Forget which update log the state directory has; return in words what is lost with it.

    Its generations stay as they are published: from now on the log that the settings name belongs
    to all of them, from its very start.

    Raises:
        Refused: if a cluster runs, which follows the log.
        LogUnavailable: if the log that the settings name cannot be reached.
    """
    from silvershard.shard.snapshot_writer import without_log

    check_stopped(state)
    store = state.control
    own = store.read().log_id
    log = _opened(state, config, log_url(state, config))
    found = 0
    if log is not None:
        found = log.log_id
        log.close()
    outlines = [one for one in _outlines(state) if one.log_id not in (0, found)]
    if own in (0, found) and not outlines:
        return []
    said = []
    for outline in outlines:
        said.append(
            f"generation {outline.generation} goes on without what update log {outline.log_id} "
            f"holds beyond {', '.join(map(str, outline.cut))}: later updates are lost, and items "
            "that were deleted later come back"
        )
    if own not in (0, found):
        said += [
            f"generation {outline.generation} goes on without what update log {own} holds: all "
            "updates are lost, and all items that were deleted come back"
            for outline in _outlines(state)
            if not outline.log_id
        ]
    for outline in outlines:
        without_log(outline.path)
    store.change(lambda now: now.model_copy(update={"log_id": found}))
    return said


def check_stopped(state: StateDir) -> None:
    """Return if no cluster runs that follows the update log.

    Raises:
        Refused: if one does.
    """
    if state.is_locked():
        raise Refused(f"a cluster runs on {state.root} and follows its update log: stop it first")


def _opened(state: StateDir, config: Config, url: str) -> UpdateLog | None:
    if not url or (not config.updates.log and not state.updates_file.is_file()):
        return None
    try:
        return open_log(url, None, create=False)
    except LogMissing:
        return None


def _outlines(state: StateDir) -> list[Outline]:
    """Return the generations that can be read; the others say so when they are used."""
    found = []
    for number in list_generations(state.generations):
        try:
            found.append(read_outline(generation_dir(state.generations, number)))
        except SnapshotError:
            continue
    return found
