"""Copies of generations at a URL: pushed there, listed, and brought back.

Layout, on any file system that fsspec knows::

    URL/
      generations/gen-000001.json    the manifest of a generation; it is there when all of it is
      files/<sha256>                 the content of one file, stored once for all generations

What has the right name and size is not copied again, and nothing is used before its checksum is
known.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from silvershard.shard.errors import RepositoryError, SnapshotError
from silvershard.shard.generations import (
    generation_dir,
    list_generations,
    number_of,
    stored_files,
)
from silvershard.shard.snapshot import (
    MANIFEST,
    FileEntry,
    Manifest,
    Snapshot,
    open_snapshot,
    parse_manifest,
    sha256_of,
)
from silvershard.shard.snapshot_writer import commit_directory, sync

_GENERATIONS, _FILES = "generations", "files"


class Copied(NamedTuple):
    """What a push or a fetch did."""

    generation: int
    files: int
    """Files of the generation."""
    copied: int
    """Files among them that had to be transferred."""
    copied_bytes: int


class Repository:
    """Generations at a URL."""

    def __init__(self, url: str) -> None:
        """Find the file system of a URL; nothing is read or made yet.

        Raises:
            RepositoryError: if no installed file system serves it.
        """
        self.url = url
        with self._said():
            self._files, self._root = fsspec.core.url_to_fs(url)

    def generations(self) -> list[int]:
        """Return the numbers of the generations that are there, ascending.

        Raises:
            RepositoryError: if the file system fails, which is not the same as to hold none.
        """
        folder = self._path(_GENERATIONS)
        with self._said():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        names = [path.rsplit("/", 1)[-1] for path in found]
        numbers = [
            number_of(name.removesuffix(".json")) for name in names if name.endswith(".json")
        ]
        return sorted(number for number in numbers if number)

    def manifest(self, generation: int) -> Manifest:
        """Return the manifest of a generation.

        Raises:
            RepositoryError: if the generation is not there, or the file system fails.
            SnapshotError: if the manifest is damaged.
        """
        return parse_manifest(self._read_manifest(generation), self._manifest_path(generation))

    def push(self, snapshot: Snapshot, report: Callable[[str], None] = lambda _: None) -> Copied:
        """Copy a generation there; what is there already is not copied again.

        Args:
            snapshot: the generation; all of it is verified.
            report: hears the name of each file that is transferred.

        Raises:
            RepositoryError: if its number is taken by other content, or by the same that goes on
                from elsewhere in the update log, or the file system fails.
            SnapshotError: if a file of the generation is missing or damaged.
        """
        generation = snapshot.spec.generation
        snapshot.verify()
        if generation in self.generations():
            there = self.manifest(generation)
            if there.content_hash != snapshot.manifest.content_hash:
                raise RepositoryError(
                    self.url,
                    f"generation {generation} is there with other content, "
                    f"{there.content_hash[:12]}, that of {snapshot.path} is "
                    f"{snapshot.manifest.content_hash[:12]}",
                )
            if _origin(there) != _origin(snapshot.manifest):
                raise RepositoryError(
                    self.url,
                    f"generation {generation} is there and goes on {_place(there)}, that of "
                    f"{snapshot.path} {_place(snapshot.manifest)}: push it elsewhere",
                )
        copied = copied_bytes = 0
        for name, entry in snapshot.manifest.files.items():
            if self._holds(entry):
                continue
            report(name)
            self._put(snapshot.path / name, f"{_FILES}/{entry.sha256}")
            copied, copied_bytes = copied + 1, copied_bytes + entry.size
        self._put(snapshot.path / MANIFEST, f"{_GENERATIONS}/{_json_name(generation)}")
        return Copied(generation, len(snapshot.manifest.files), copied, copied_bytes)

    def fetch(
        self,
        generation: int,
        repository: Path,
        report: Callable[[str], None] = lambda _: None,
        *,
        any_log: bool = False,
    ) -> Copied:
        """Bring a generation into a directory of generations, where it appears when it is whole.

        A file that any generation there holds is linked to it. A fetch that was interrupted goes on
        with what it had. Two of one generation must not run at once.

        Args:
            generation: its number.
            repository: directory of generations; made when missing.
            report: hears the name of each file that is transferred.
            any_log: let a generation that is held stay also if it goes on from elsewhere in the
                update log than the copy, or in another one.

        Raises:
            RepositoryError: if the generation is not there, or the file system fails.
            SnapshotError: if a file is damaged, there or here, or other content has its number, or
                the same that goes on from elsewhere in the update log.
        """
        content = self._read_manifest(generation)
        manifest = parse_manifest(content, self._manifest_path(generation))
        if manifest.spec.generation != generation:
            raise SnapshotError(
                self._manifest_path(generation), f"it is of generation {manifest.spec.generation}"
            )
        target = generation_dir(repository, generation)
        if generation in list_generations(repository):
            held = open_snapshot(target)
            if held.manifest.content_hash != manifest.content_hash:
                raise SnapshotError(
                    str(target),
                    f"must have the content {manifest.content_hash[:12]} of {self.url}, "
                    f"got {held.manifest.content_hash[:12]}: remove it, or restore elsewhere",
                )
            if not any_log and _origin(held.manifest) != _origin(manifest):
                raise SnapshotError(
                    str(target),
                    f"must go on {_place(manifest)} like that of {self.url}, it does "
                    f"{_place(held.manifest)}: remove it, or restore elsewhere",
                )
            held.verify()
            return Copied(generation, len(manifest.files), 0, 0)
        staging = repository / f".{target.name}.fetch"
        copied = copied_bytes = 0
        stored = stored_files(repository)
        for name, entry in manifest.files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if _is_content(path, entry) or _link(stored.get(entry.sha256), path, entry):
                continue
            report(name)
            # What is left there may be linked to a file of another generation.
            path.unlink(missing_ok=True)
            with self._said():
                self._files.get_file(self._path(f"{_FILES}/{entry.sha256}"), str(path))
            if not _is_content(path, entry):
                path.unlink()
                raise SnapshotError(f"{self.url} generation {generation}", f"{name} is damaged")
            copied, copied_bytes = copied + 1, copied_bytes + entry.size
        (staging / MANIFEST).write_bytes(content)
        for path in staging.rglob("*"):
            # An interrupted fetch of other content may have left more.
            if path.is_file() and str(path.relative_to(staging)) not in {*manifest.files, MANIFEST}:
                path.unlink()
        commit_directory(staging, target)
        return Copied(generation, len(manifest.files), copied, copied_bytes)

    def _holds(self, entry: FileEntry) -> bool:
        path = self._path(f"{_FILES}/{entry.sha256}")
        with self._said():
            try:
                return bool(self._files.size(path) == entry.size)
            except FileNotFoundError:
                return False

    def _put(self, source: Path, name: str) -> None:
        """Copy a file there so that its name never stands for a part of it."""
        target = self._path(name)
        partial = f"{target}.{uuid.uuid4().hex}.part"
        with self._said():
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            try:
                self._files.put_file(str(source), partial)
                self._sync(partial)
                self._files.mv(partial, target)
                self._sync(target.rsplit("/", 1)[0])
            except BaseException:
                if self._files.exists(partial):
                    self._files.rm_file(partial)
                raise

    def _sync(self, path: str) -> None:
        """Have what is on a local disk there before anything that comes after."""
        if isinstance(self._files, LocalFileSystem):
            sync(Path(path))

    def _read_manifest(self, generation: int) -> bytes:
        present = self.generations()
        if generation not in present:
            known = ", ".join(map(str, present)) or "none"
            raise RepositoryError(self.url, f"must hold generation {generation}, it holds {known}")
        with self._said():
            content: bytes = self._files.cat_file(self._manifest_path(generation))
        return content

    def _manifest_path(self, generation: int) -> str:
        return self._path(f"{_GENERATIONS}/{_json_name(generation)}")

    def _path(self, name: str) -> str:
        return f"{str(self._root).rstrip('/')}/{name}"

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Give what a file system raises the form of this program."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each file system raises errors of its own
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RepositoryError(self.url, str(words)) from None


def _json_name(generation: int) -> str:
    return f"{generation_dir(Path(), generation).name}.json"


def _origin(manifest: Manifest) -> tuple[int, tuple[int, ...]]:
    """Return where in which update log a generation goes on; its content hash leaves that out."""
    return manifest.log_id, manifest.cut


def _place(manifest: Manifest) -> str:
    if not manifest.log_id:
        return "in any log from its start"
    return f"in log {manifest.log_id} from {', '.join(map(str, manifest.cut))}"


def _is_content(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def _link(source: Path | None, path: Path, entry: FileEntry) -> bool:
    """Make a file from one that a generation here holds; return whether that was possible."""
    if source is None or not _is_content(source, entry):
        return False
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
    return True
