"""Generations on their way to a host: copied from another host that has them, file by file.

What arrives is compared with the manifest and appears under its name when it is whole.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from silvershard.deploy.cluster_store import HostReport
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.outline import read_outline

CHUNK_BYTES = 8 << 20
MANIFEST = "manifest.json"

ReadChunk = Callable[[int, str, int], bytes]
"""Returns up to ``CHUNK_BYTES`` of a file of a generation from an offset; empty at its end."""


Reach = Callable[[str], ReadChunk]
"""Returns the way to read from the host of a name."""


class Stager:
    """Fetches what a host lacks, one generation after the other, on a thread of its own."""

    def __init__(self, repository: Path, host: str, reach: Reach) -> None:
        """Fetch nothing yet.

        Args:
            repository: directory of generations of this host.
            host: its name.
            reach: ways to other hosts.
        """
        self.said = ""
        """What is being fetched, or why it cannot be; empty if nothing is lacking."""
        self._repository = repository
        self._host = host
        self._reach = reach
        self._thread: threading.Thread | None = None

    def holds(self, generation: int) -> bool:
        """Return whether a generation is here."""
        return generation_dir(self._repository, generation).is_dir()

    def poll(self, wanted: Iterable[int], reports: Mapping[str, HostReport]) -> None:
        """Begin to fetch one of the generations that shall be here and are not.

        Args:
            wanted: what shall be here.
            reports: what every host says of itself, by name.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        lacking = [one for one in sorted(wanted) if not self.holds(one)]
        if not lacking:
            self.said = ""
            return
        sources = [
            name
            for name, report in sorted(reports.items())
            if lacking[0] in report.generations and name != self._host
        ]
        if not sources:
            self.said = f"generation {lacking[0]} is on no host"
            return
        self._thread = threading.Thread(
            target=self._fetch, args=(lacking[0], sources), daemon=True, name="stager"
        )
        self._thread.start()

    def _fetch(self, generation: int, sources: list[str]) -> None:
        """Fetch a generation from the first host that it can be read from."""
        for source in sources:
            self.said = f"generation {generation} is fetched from {source}"
            try:
                bring(self._repository, generation, self._host, self._reach(source))
                return
            except Exception as error:  # noqa: BLE001  # the border of a thread; it is shown
                self.said = f"generation {generation} cannot be fetched from {source}: {error}"


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
        try:
            partial.rename(target)
        except OSError:
            # Somebody else was quicker.
            if generation not in list_generations(repository):
                raise
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
