"""What the manifests of the generations of a state directory say, each read once."""

from pathlib import Path

from silvershard.shard.assignment import shard_partitions
from silvershard.shard.generations import generation_dir
from silvershard.shard.outline import Outline, read_outline


class Outlines:
    """The outlines of published generations."""

    def __init__(self, generations: Path) -> None:
        """Know none yet; ``generations`` is the directory that they are published in."""
        self._generations = generations
        self._known: dict[int, Outline] = {}

    def path(self, generation: int) -> Path:
        """Return the directory of a generation."""
        return generation_dir(self._generations, generation)

    def outline(self, generation: int) -> Outline:
        """Return the outline of a generation.

        Raises:
            SnapshotError: if it cannot be read.
        """
        if generation not in self._known:
            self._known[generation] = read_outline(self.path(generation))
        return self._known[generation]

    def documents(self, generation: int, shard: int, num_shards: int) -> int:
        """Return the documents of one of so many shards in the snapshot of a generation.

        Raises:
            SnapshotError: if it cannot be read.
        """
        outline = self.outline(generation)
        owned = shard_partitions(shard, num_shards, outline.num_partitions)
        return sum(outline.partition_documents[one] for one in owned)
