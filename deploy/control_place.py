"""Where the control store of a state directory is: a file in it, or the server that it names."""

import os
from pathlib import Path

from silvershard.deploy.control_store import Conflict, ControlStore, FileControlStore
from silvershard.deploy.errors import Refused
from silvershard.shard.errors import ConfigError

FILE = "control.sqlite"
"""The control store in a state directory that names no other one."""
URL_FILE = "control.url"
"""Names the server of the control store; there is none where the store is a file."""


def control_store(root: Path) -> ControlStore:
    """Return the control store of the state directory ``root``.

    Raises:
        ConfigError: if it names a server that cannot be used here.
    """
    try:
        url = (root / URL_FILE).read_text().strip()
    except FileNotFoundError:
        return FileControlStore(root / FILE)
    return _opened(url)


def _opened(url: str) -> ControlStore:
    try:
        from silvershard.deploy.redis_control import RedisControlStore
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ConfigError(
            "a control store in Redis needs redis-py: pip install 'silvershard[redis]'"
        ) from None
    return RedisControlStore(url)


def move_control(root: Path, url: str) -> None:
    """Make ``url`` the control store of the state directory ``root``, with all that is in the old.

    Nothing happens if it is that already. A server that holds a document of its own is joined by a
    directory that has none.

    Args:
        root: an existing state directory, on which nothing else is at work.
        url: of a Redis server; empty: the store stays where it is.

    Raises:
        Refused: if the directory and the server have both been used, each by itself.
        ConfigError: if the url or the server cannot be used.
        StateError: if one of the stores cannot be used.
    """
    old = control_store(root)
    if not url:
        return
    new = _opened(url)
    if new.place == old.place:
        _write(root, url)
        return
    mine, theirs = old.read(), new.read()
    # A move that was interrupted has been done but for the last step.
    is_copy = mine.model_copy(update={"version": theirs.version}) == theirs
    is_same = is_copy or mine.state_id == theirs.state_id != ""
    if not theirs.version and mine.version:
        # The number of its first change is 1, whatever it was before.
        try:
            new.write(mine.model_copy(update={"version": 0}))
        except Conflict:
            theirs = new.read()
    if mine.version and theirs.version and not is_same:
        raise Refused(
            f"{root} has a control store of its own, {old.place}, and {new.place} is that of "
            "another cluster: name another prefix in control.store"
        )
    _write(root, url)


def _write(root: Path, url: str) -> None:
    path = root / URL_FILE
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)
    # It may hold a password.
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{url}\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
