import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.live_generation import LiveGeneration, load_live_generation
from silvershard.shard.errors import SnapshotError


@pytest.fixture(scope="module")
def live(generation: Any) -> LiveGeneration:
    return load_live_generation(generation.path)


def test_the_items_of_a_snapshot_are_known(live: LiveGeneration, generation: Any) -> None:
    assert live.item_ids.tolist() == sorted(generation.catalogue.item_ids.tolist())
    assert live.spec.documents == 600
    assert live.tables


def test_only_items_of_the_snapshot_are_held(live: LiveGeneration) -> None:
    known = live.item_ids
    asked = [int(known[0]), int(known[-1]), int(known[-1]) + 1, 0, int(known[5]), 2**63 - 1]
    assert live.held(asked) == {int(known[0]), int(known[-1]), int(known[5])}
    assert live.held([]) == set()
    empty = live._replace(item_ids=np.empty(0, np.int64))
    assert empty.held([1, 2]) == set()


def test_a_damaged_snapshot_is_refused(generation: Any, tmp_path: Path) -> None:
    path = tmp_path / generation.path.name
    shutil.copytree(generation.path, path)
    part = min((path / "partitions").iterdir())
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(SnapshotError, match="checksum differs"):
        load_live_generation(path)
