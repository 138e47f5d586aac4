"""Files that hold secrets: who may read them, and the one that the processes of a cluster share."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from silvershard.shard.errors import ConfigError

_PREFIX = "svs_"
_NUM_BYTES = 32
_LEAST_LENGTH = 32
_LONGEST = 4096


def check_private(path: Path, what: str) -> None:
    """Check that others than the owner cannot read a file.

    One of root's, as a mounted secret of Kubernetes, may be readable by its group.

    Raises:
        ConfigError: if they can, or the file is not there; names it by ``what``.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    mounted = status.st_uid == 0 and os.geteuid() != 0
    mode = stat.S_IMODE(status.st_mode)
    if mode & (0o037 if mounted else 0o077):
        raise ConfigError(
            f"{what} {path} must be readable by its owner alone, got mode {mode:04o}: chmod 600"
        )


def make_secret(path: Path) -> None:
    """Make the secret of a cluster, mode 0600, unless there is one.

    Raises:
        ConfigError: if it cannot be made, or the one that is there cannot be used.
    """
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(_PREFIX + secrets.token_urlsafe(_NUM_BYTES) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename it never replaces one that another process has made meanwhile.
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        except OSError as error:
            raise ConfigError(f"security.secret {path}: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
    read_secret(path)


def read_secret(path: Path) -> str:
    """Return the secret of a cluster.

    Raises:
        ConfigError: if it is not there, others can read it, or it is too short to be one.
    """
    check_private(path, "security.secret")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST).strip()
    except OSError as error:
        raise ConfigError(f"security.secret {path}: {error.strerror}") from None
    if len(content) < _LEAST_LENGTH or not content.isascii() or len(content.split()) != 1:
        # What it holds must not get into a message.
        raise ConfigError(
            f"security.secret {path} must hold at least {_LEAST_LENGTH} ASCII characters without "
            "blanks"
        )
    return content.decode()
