"""What the manifest of a generation says of its size and place, read without torch.

It is taken at its word: whoever loads the generation verifies every byte of it.

Shapes: P partitions.
"""

import json
from pathlib import Path
from typing import NamedTuple

from silvershard.shard.errors import SnapshotError


class Outline(NamedTuple):
    """A generation from outside."""

    path: Path
    generation: int
    model: str
    content_hash: str
    partition_documents: tuple[int, ...]
    """``(P,)`` items of each partition."""
    sizes: dict[str, int]
    """Bytes of each file."""
    checksums: dict[str, str]
    """SHA-256 of each file."""
    log_id: int
    """Update log that the cut is of; 0: none."""
    cut: tuple[int, ...]
    """Position in each partition of the log; empty: the very start."""

    @property
    def num_partitions(self) -> int:
        """Return P."""
        return len(self.partition_documents)


def read_outline(path: Path) -> Outline:
    """Return the outline of a generation in a directory.

    Raises:
        SnapshotError: if its manifest is missing or cannot be read.
    """
    file = path / "manifest.json"
    try:
        document = json.loads(file.read_bytes())
        spec = document["spec"]
        return Outline(
            path=path,
            generation=int(spec["generation"]),
            model=str(spec["model"]),
            content_hash=str(document["content_hash"]),
            partition_documents=tuple(map(int, spec["partition_documents"])),
            sizes={str(name): int(one["size"]) for name, one in document["files"].items()},
            checksums={str(name): str(one["sha256"]) for name, one in document["files"].items()},
            log_id=int(document.get("log_id", 0)),
            cut=tuple(map(int, document.get("cut", ()))),
        )
    except FileNotFoundError:
        raise SnapshotError(str(path), f"{file.name} is missing") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise SnapshotError(str(path), f"{file.name} cannot be read: {error}") from None


def partition_path(partition: int) -> str:
    """Return the file of a partition, relative to its generation."""
    return f"partitions/p-{partition:05d}.safetensors"
