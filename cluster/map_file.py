"""Maps of who serves what, as small JSON files: replaced whole, read back checked, watched."""

import os
import tempfile
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from silvershard.shard.errors import StateError

M = TypeVar("M", bound=BaseModel)
M_co = TypeVar("M_co", bound=BaseModel, covariant=True)

Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes with every replacement of the file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_map(kind: type[M], path: Path, what: str) -> M:
    """Return the map in the file ``path``.

    Args:
        kind: class of the map.
        path: its file.
        what: what an error calls it.

    Raises:
        StateError: if there is none, or it is damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StateError(f"{what} {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise StateError(f"{what} {path}: {where}: {first['msg']}") from None


class MapSource(Protocol[M_co]):
    """Where the newest map is found."""

    def stamp(self) -> Stamp | None:
        """Return what changes with every replacement of the map; None where there is none."""
        ...

    def read(self) -> M_co:
        """Return the map; raise ``StateError`` if there is none, or it is damaged."""
        ...


class MapFile(Generic[M]):
    """A map in a file."""

    def __init__(self, kind: type[M], path: Path, what: str) -> None:
        """Name the class of the map, its file, and what an error calls it."""
        self._kind, self._path, self._what = kind, path, what

    def stamp(self) -> Stamp | None:
        """See ``MapSource.stamp``."""
        return stamp_of(self._path)

    def read(self) -> M:
        """See ``MapSource.read``."""
        return read_map(self._kind, self._path, self._what)


def write_map(served: BaseModel, path: Path, what: str) -> None:
    """Replace the file ``path``; a reader sees the old map or the new one, never a part.

    Raises:
        StateError: if it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(served.model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StateError(f"{what} {path}: {error.strerror or error}") from None
