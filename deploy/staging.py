"""Generations on their way to a host: copied from another host that has them, file by file.

What arrives is compared with the manifest and appears under its name when it is whole.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import read_outline

CHUNK_BYTES = 8 << 20
MANIFEST = "manifest.json"

ReadChunk = Callable[[int, str, int], bytes]
"""Returns up to ``CHUNK_BYTES`` of a file of a generation from an offset; empty at its end."""


def read_chunk(repository: Path, generation: int, name: str, offset: int) -> bytes:
    """Return a part of a file of a generation; see ``ReadChunk``.

    Raises:
        SnapshotError: if there is no such file.
    """
    directory = generation_dir(repository, generation)
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise SnapshotError(str(directory), f"{name} is no file of it")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)
    except OSError as error:
        raise SnapshotError(str(directory), f"{name}: {error.strerror or error}") from None


def bring(repository: Path, generation: int, host: str, read: ReadChunk) -> None:
    """Copy a generation into a directory of generations, unless it is there.

    Args:
        repository: directory of generations; made when missing.
        generation: its number.
        host: name of this host, for the directory in which it is collected.
        read: reads from where it is.

    Raises:
        SnapshotError: if a file is damaged or missing there.
    """
    target = generation_dir(repository, generation)
    if generation in list_generations(repository):
        return
    # Two hosts may share the directory.
    partial = repository / f".{target.name}.{host}.stage"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    try:
        _copy(partial, generation, MANIFEST, read)
        outline = read_outline(partial)
        for name in sorted(outline.sizes):
            found = _copy(partial, generation, name, read)
            if found != outline.checksums[name]:
                raise SnapshotError(f"generation {generation}", f"{name} is damaged")
        if generation not in list_generations(repository):
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(directory: Path, generation: int, name: str, read: ReadChunk) -> str:
    """Copy one file and return its SHA-256."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise SnapshotError(f"generation {generation}", f"{name} is no file of it")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    offset = 0
    with path.open("wb") as file:
        while content := read(generation, name, offset):
            file.write(content)
            digest.update(content)
            offset += len(content)
    return digest.hexdigest()
