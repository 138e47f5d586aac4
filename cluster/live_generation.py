"""What the sequencer needs of the generation that serves: its schema, its tables and its items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from silvershard.model.spec import ServingSpec
from silvershard.shard.mutations import updatable_tables
from silvershard.shard.snapshot import open_snapshot


class LiveGeneration(NamedTuple):
    """What updates are checked against."""

    spec: ServingSpec
    tables: Mapping[str, tuple[int, int]]
    """Rows and D of the tables whose rows may change."""
    item_ids: NDArray[np.int64]
    """The items of its snapshot, ascending; updates since then are in the log."""

    def held(self, item_ids: Sequence[int]) -> set[int]:
        """Return those of the ids that are items of the snapshot."""
        wanted = np.asarray(item_ids, dtype=np.int64)
        at = np.searchsorted(self.item_ids, wanted)
        found = at < len(self.item_ids)
        found[found] = self.item_ids[at[found]] == wanted[found]
        return set(wanted[found].tolist())


def load_live_generation(path: Path) -> LiveGeneration:
    """Return what a snapshot says of its generation; of the items only their ids are kept.

    Raises:
        SnapshotError: if it is missing, damaged or of another format.
    """
    snapshot = open_snapshot(path)
    builder = snapshot.manifest.builder
    parts = [snapshot.load_item_ids(one) for one in range(snapshot.spec.num_partitions)]
    return LiveGeneration(
        snapshot.spec,
        updatable_tables(builder.name, builder.config),
        np.sort(torch.cat(parts).numpy()),
    )
