"""Snapshots: one published generation as a directory of safetensors files and a manifest.

Layout::

    gen-000001/
      manifest.json                      spec, builder, checksums of every other file and of itself
      dense.safetensors                  centroids, towers, reranker, vocabularies
      tables/<name>.safetensors          one embedding table each
      semantic.safetensors               codebooks and decoder of semantic ids, where there are any
      rows/<name>.safetensors            rows of one remote table, which table processes serve
      partitions/p-00000.safetensors     the items of one partition, cluster-sorted
      golden.json                        requests with the answers of the eager model

A snapshot does not depend on the number of shards: a shard reads the partitions it serves. It is
written under a temporary name, synced and renamed, so that a directory with its final name is
complete. Nothing in it can run code.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import pydantic
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from silvershard.kernels import MAX_CODE
from silvershard.model.catalogue import Catalogue
from silvershard.model.planes import ItemBits
from silvershard.model.recall_calibration import RecallCalibration
from silvershard.model.schema import check_model
from silvershard.model.spec import ServingSpec
from silvershard.shard.columns import unpack_catalogue
from silvershard.shard.errors import SnapshotError
from silvershard.shard.outline import partition_path
from silvershard.shard.table_files import RECORDS, row_path

FORMAT = 2
MANIFEST = "manifest.json"
DENSE = "dense.safetensors"
SEMANTIC = "semantic.safetensors"
GOLDEN = "golden.json"
_FILE_NAME = re.compile(
    r"(dense|semantic)\.safetensors|(tables|rows)/[A-Za-z0-9_.]+\.safetensors"
    r"|partitions/p-\d{5,9}\.safetensors|golden\.json"
)
_MAX_MANIFEST_BYTES = 256 << 20


class FileEntry(BaseModel):
    """Checksum and size of one file of a snapshot."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, hexadecimal")
    size: int = Field(ge=0, description="bytes")


class Builder(BaseModel):
    """The registered model builder that makes the module, and what it is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name in the model registry")
    config: dict[str, Any] = Field(description="its configuration")


class Manifest(BaseModel):
    """What a snapshot holds; the only file of it that is read before its checksum is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(description="version of this layout")
    code_version: str = Field(description="silvershard version that wrote it")
    created_unix_s: int = Field(description="when it was written; never part of an answer")
    content_hash: str = Field(description="SHA-256 over the specification, builder and files")
    spec: ServingSpec = Field(description="the generation as its clients see it")
    builder: Builder = Field(description="how the model is constructed")
    files: dict[str, FileEntry] = Field(description="every other file by relative path")
    log_id: int = Field(
        default=0, ge=0, lt=1 << 64, description="update log that the cut is of; 0: none"
    )
    cut: tuple[int, ...] = Field(
        default=(),
        description="position in each partition of the update log up to which its updates are in "
        "the items; empty: none are",
    )
    calibration: RecallCalibration | None = Field(
        default=None, description="what plans find of exact answers; none: it was not measured"
    )

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            # A manifest is data: it must not make a reader leave the snapshot.
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no file of a snapshot")
        return files

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.cut) != bool(self.log_id) or min(self.cut, default=0) < 0:
            raise ValueError(
                "cut and log_id must both be given or neither, and positions not be negative, "
                f"got {self.cut} and {self.log_id}"
            )
        check_model(self.spec.item_schema, self.builder.config)
        return self


class PartitionData(NamedTuple):
    """The items of one partition, cluster-sorted."""

    catalogue: Catalogue
    clusters: Tensor
    """``(n,)`` int32 cluster of every item, ascending."""
    codes: Tensor
    """``(n, D)`` int8."""
    scales: Tensor
    """``(n,)`` float32."""
    cache: Tensor
    """``(n, D)`` float16."""
    bits: ItemBits
    semantic_codes: Tensor | None = None
    """``(n, L)`` int16; None where the generation has no semantic ids."""


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return a document as the one JSON text that is hashed and written."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode() + b"\n"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(spec: ServingSpec, builder: Builder, files: Mapping[str, FileEntry]) -> str:
    """Return the SHA-256 that names the content: equal content has equal hashes.

    The generation number is not part of it, so that a republished generation can be recognised.
    """
    return _content_hash(
        {
            "spec": spec.model_dump(mode="json"),
            "builder": builder.model_dump(mode="json"),
            "files": {name: entry.model_dump(mode="json") for name, entry in files.items()},
        }
    )


def _content_hash(manifest: Mapping[str, Any]) -> str:
    """Return the content hash of a manifest as it is written.

    What was written counts, not what this version makes of it: a setting that is new since then has
    no place in the hash of an old snapshot.
    """
    spec = {name: one for name, one in manifest["spec"].items() if name != "generation"}
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    document = {"spec": spec, "builder": manifest["builder"], "files": files}
    return hashlib.sha256(canonical(document)).hexdigest()


class Snapshot:
    """A published generation on disk; every file is verified before its content is used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def spec(self) -> ServingSpec:
        """Return the generation as its clients see it."""
        return self.manifest.spec

    def verify(self) -> None:
        """Check the size and checksum of every file.

        Raises:
            SnapshotError: naming the first file that is missing or damaged.
        """
        for name in self.manifest.files:
            self._verified(name)

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            SnapshotError: if the file is missing, damaged or not in the manifest.
        """
        return self._verified(name).read_bytes()

    def _verified(self, name: str) -> Path:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise SnapshotError(str(self.path), f"{name} is not in the manifest")
        path = self.path / name
        if not path.is_file():
            raise SnapshotError(str(self.path), f"{name} is missing")
        size = path.stat().st_size
        if size != entry.size:
            raise SnapshotError(
                str(self.path), f"{name} is damaged: {entry.size} bytes expected, got {size}"
            )
        if sha256_of(path) != entry.sha256:
            raise SnapshotError(str(self.path), f"{name} is damaged: its checksum differs")
        return path

    def _load(self, name: str) -> dict[str, Tensor]:
        path = self._verified(name)
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, struct.error, OSError) as error:
            raise SnapshotError(str(self.path), f"{name} cannot be read: {error}") from None

    def load_dense(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the centroids ``(C, D)`` float32 and the model's state, tables included."""
        tensors = self._load(DENSE)
        centroids = tensors.pop("centroids", None)
        if centroids is None:
            raise SnapshotError(str(self.path), f"{DENSE} has no centroids")
        for name in self.manifest.files:
            if name.startswith("tables/"):
                tensors |= self._load(name)
        return centroids, {key.removeprefix("model/"): one for key, one in tensors.items()}

    def load_rows(self, table: str) -> Tensor:
        """Return the records ``(rows, W)`` uint8 of a remote table, for a model in one process.

        Raises:
            SnapshotError: if the file is missing, damaged, or holds something else.
        """
        name = row_path(table)
        records = self._load(name).get(RECORDS)
        if records is None or records.ndim != 2 or records.dtype != torch.uint8:
            raise SnapshotError(str(self.path), f"{name} has no records")
        return records

    def load_semantic(self) -> dict[str, Tensor]:
        """Return the state of the semantic source.

        Raises:
            SnapshotError: if the file is missing or damaged.
        """
        return self._load(SEMANTIC)

    def _semantic_codes(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if self.spec.semantic is None:
            return None
        sizes, codes = self.spec.semantic.decoder, tensors["semantic_codes"]
        shape = (len(tensors["codes"]), sizes.levels)
        if tuple(codes.shape) != shape or codes.dtype != torch.int16:
            raise ValueError(
                f"semantic_codes must be {shape} torch.int16, got {tuple(codes.shape)} "
                f"{codes.dtype}"
            )
        if int(codes.min()) < 0 or int(codes.max()) >= sizes.width:
            raise ValueError(f"semantic_codes must be in [0, {sizes.width})")
        return codes

    def load_item_ids(self, partition: int) -> Tensor:
        """Return the ids of the items of a partition, ``(n,)`` int64.

        Raises:
            SnapshotError: if the file is missing, damaged, or has no ids.
        """
        if not self.spec.partition_documents[partition]:
            return torch.empty(0, dtype=torch.int64)
        name = partition_path(partition)
        path = self._verified(name)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                item_ids: Tensor = file.get_tensor("item_ids")
        except (safetensors.SafetensorError, struct.error, OSError) as error:
            raise SnapshotError(str(self.path), f"{name} cannot be read: {error}") from None
        if item_ids.dtype != torch.int64 or item_ids.ndim != 1:
            raise SnapshotError(str(self.path), f"{name} has no item ids")
        return item_ids

    def load_partition(self, partition: int) -> PartitionData | None:
        """Return the items of a partition, or None where it is empty.

        Raises:
            SnapshotError: if the file is missing, damaged, or holds other columns than the schema.
        """
        if not self.spec.partition_documents[partition]:
            return None
        name = partition_path(partition)
        tensors = self._load(name)
        try:
            if tensors["codes"].numel() and int(tensors["codes"].min()) < -MAX_CODE:
                raise ValueError(f"codes must be in [{-MAX_CODE}, {MAX_CODE}]")
            catalogue = unpack_catalogue(tensors, self.spec.item_schema)
            counts = tensors["exact_counts"]
            exact = torch.zeros(len(counts), self.spec.planes.num_exact_planes, dtype=torch.bool)
            exact[torch.arange(len(counts)).repeat_interleave(counts), tensors["exact"]] = True
            return PartitionData(
                catalogue=catalogue,
                clusters=tensors["clusters"],
                codes=tensors["codes"],
                scales=tensors["scales"],
                cache=tensors["cache"],
                bits=ItemBits(exact, tensors["terms"], tensors["columns"]),
                semantic_codes=self._semantic_codes(tensors),
            )
        except (KeyError, ValueError, IndexError) as error:
            raise SnapshotError(
                str(self.path), f"{name} has an unexpected column: {error}"
            ) from None


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest of a snapshot from the content of its file, every byte of it verified.

    Args:
        content: of ``manifest.json``.
        where: what an error names.

    Raises:
        SnapshotError: if it is damaged or of another format.
    """
    try:
        document = json.loads(content)
        checksum = document.pop("checksum")
        intact = hashlib.sha256(canonical(document)).hexdigest() == checksum
        # The canonical form of the whole must give the same bytes, so no byte goes unchecked.
        intact = intact and canonical({**document, "checksum": checksum}) == content
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
        intact = False
    if not intact:
        raise SnapshotError(where, f"{MANIFEST} is damaged: its checksum differs")
    if document.get("format") != FORMAT:
        raise SnapshotError(
            where, f"format {document.get('format')} is not supported, expected {FORMAT}"
        )
    try:
        manifest = Manifest.model_validate(document)
    except pydantic.ValidationError as error:
        raise SnapshotError(where, f"{MANIFEST} does not fit this version: {error}") from None
    if _content_hash(document) != manifest.content_hash:
        raise SnapshotError(where, f"{MANIFEST} is damaged: its content hash differs")
    return manifest


def open_snapshot(path: Path) -> Snapshot:
    """Open a published generation and verify its manifest, byte by byte.

    Raises:
        SnapshotError: if the manifest is missing, unreadable, damaged or of another format.
    """
    file = path / MANIFEST
    try:
        if not file.is_file():
            raise SnapshotError(str(path), f"{MANIFEST} is missing")
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise SnapshotError(str(path), f"{MANIFEST} is over {_MAX_MANIFEST_BYTES} bytes")
        content = file.read_bytes()
    except OSError as error:
        raise SnapshotError(str(path), f"{MANIFEST} cannot be read: {error.strerror}") from None
    return Snapshot(path, parse_manifest(content, str(path)))
