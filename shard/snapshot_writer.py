"""Writing a snapshot: under a temporary name, synced and renamed, so that its name means complete.

Shapes: C clusters, D embedding dimension, W bytes of a record.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from silvershard.model.recall_calibration import RecallCalibration
from silvershard.model.spec import ServingSpec
from silvershard.shard.columns import pack_catalogue
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, stored_files
from silvershard.shard.outline import partition_path
from silvershard.shard.snapshot import (
    DENSE,
    FORMAT,
    GOLDEN,
    MANIFEST,
    SEMANTIC,
    Builder,
    FileEntry,
    Manifest,
    PartitionData,
    canonical,
    content_hash,
    open_snapshot,
    sha256_of,
)
from silvershard.shard.table_files import RECORDS, row_path

# Where TorchRec keeps pooled tables, and tables of sequences.
_COLLECTIONS = frozenset({"embedding_bags", "embeddings"})


def without_log(path: Path) -> None:
    """Let a generation go on from the very start of any update log; its content stays as it is.

    Raises:
        SnapshotError: if its manifest is missing or damaged.
    """
    open_snapshot(path)
    document = json.loads((path / MANIFEST).read_bytes())
    del document["checksum"]
    partial = path.parent / f".{path.name}.{os.getpid()}.manifest.tmp"
    partial.write_bytes(_sealed({**document, "log_id": 0, "cut": []}))
    sync(partial)
    partial.replace(path / MANIFEST)
    sync(path)


def _sealed(document: dict[str, Any]) -> bytes:
    """Return the content of a manifest, with its checksum."""
    checksum = hashlib.sha256(canonical(document)).hexdigest()
    return canonical({**document, "checksum": checksum})


def _table_name(key: str) -> str | None:
    """Return the table that a parameter holds, if it is the weight of an embedding table."""
    parts = key.split(".")
    if _COLLECTIONS.isdisjoint(parts) or parts[-1] != "weight":
        return None
    return ".".join(part for part in parts[:-1] if part not in _COLLECTIONS and part != "tables")


def write_snapshot(
    repository: Path,
    spec: ServingSpec,
    builder: Builder,
    state: Mapping[str, Tensor],
    centroids: Tensor,
    partitions: Mapping[int, PartitionData],
    *,
    code_version: str,
    created_unix_s: int,
    rows: Mapping[str, Tensor] | None = None,
    semantic: Mapping[str, Tensor] | None = None,
    golden: bytes | None = None,
    log_id: int = 0,
    cut: tuple[int, ...] = (),
    calibration: RecallCalibration | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Write one generation atomically and return its directory.

    A file that another generation of the repository holds byte for byte is stored once.

    Args:
        repository: directory of generations; made when missing.
        spec: the generation; its number gives the name.
        builder: how the model is constructed.
        state: the model's parameters and buffers by name.
        centroids: ``(C, D)`` float32.
        partitions: the data of every partition that holds items.
        code_version: silvershard version.
        created_unix_s: wall-clock time.
        rows: records ``(rows, W)`` uint8 of each remote table of the model.
        semantic: the semantic source's parameters and buffers by name, where there is one.
        golden: content of the file of golden requests; none without.
        log_id: the update log that ``cut`` is of; 0 without.
        cut: position in each partition of the log up to which its updates are in the items.
        calibration: what plans find of exact answers; None: it was not measured.
        check: is given what was written before it gets its name, and raises if it is not sound.

    Raises:
        SnapshotError: if the generation exists already.
    """
    target = generation_dir(repository, spec.generation)
    if target.exists():
        raise SnapshotError(str(target), "exists already; generations are written once")
    staging = repository / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "partitions").mkdir(parents=True)
    (staging / "tables").mkdir()
    if rows:
        (staging / "rows").mkdir()
    try:
        files = _write_files(staging, state, centroids, partitions, rows or {}, semantic or {})
        if golden is not None:
            (staging / GOLDEN).write_bytes(golden)
            files[GOLDEN] = FileEntry(sha256=sha256_of(staging / GOLDEN), size=len(golden))
        _share_files(repository, staging, files)
        manifest = Manifest(
            format=FORMAT,
            code_version=code_version,
            created_unix_s=created_unix_s,
            content_hash=content_hash(spec, builder, files),
            spec=spec,
            builder=builder,
            files=files,
            log_id=log_id,
            cut=cut,
            calibration=calibration,
        )
        (staging / MANIFEST).write_bytes(_sealed(manifest.model_dump(mode="json")))
        check(staging)
        commit_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def _write_files(
    staging: Path,
    state: Mapping[str, Tensor],
    centroids: Tensor,
    partitions: Mapping[int, PartitionData],
    rows: Mapping[str, Tensor],
    semantic: Mapping[str, Tensor],
) -> dict[str, FileEntry]:
    contents: dict[str, dict[str, Tensor]] = {DENSE: {"centroids": centroids}}
    for key, tensor in state.items():
        table = _table_name(key)
        file = f"tables/{table}.safetensors" if table else DENSE
        contents.setdefault(file, {})[f"model/{key}"] = tensor
    for partition, data in partitions.items():
        contents[partition_path(partition)] = {
            **pack_catalogue(data.catalogue),
            "clusters": data.clusters,
            "codes": data.codes,
            "scales": data.scales,
            "cache": data.cache,
            "exact": torch.nonzero(data.bits.exact)[:, 1],
            "exact_counts": data.bits.exact.sum(1),
            "terms": data.bits.terms,
            "columns": data.bits.columns,
        }
        if data.semantic_codes is not None:
            contents[partition_path(partition)]["semantic_codes"] = data.semantic_codes
    if semantic:
        contents[SEMANTIC] = dict(semantic)
    for table, records in rows.items():
        contents[row_path(table)] = {RECORDS: records}
    files = {}
    for name, tensors in contents.items():
        path = staging / name
        safetensors.torch.save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path
        )
        files[name] = FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
    return files


def commit_directory(staging: Path, target: Path) -> None:
    """Give a finished directory its name, after all of it is on storage."""
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    staging.rename(target)
    sync(target.parent)


def _share_files(repository: Path, staging: Path, files: Mapping[str, FileEntry]) -> None:
    """Link what other generations of the repository hold already instead of storing it twice."""
    stored = stored_files(repository)
    for name, entry in files.items():
        source = stored.get(entry.sha256)
        # The other file may have been damaged since.
        if source is not None and source.is_file() and sha256_of(source) == entry.sha256:
            linked = staging / f"{name}.link"
            try:
                os.link(source, linked)
            except OSError:
                # The file system has no hard links: the file stays a copy.
                return
            linked.replace(staging / name)


def sync(path: Path) -> None:
    """Have a file or directory on its disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
