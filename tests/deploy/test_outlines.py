from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.outlines import Outlines
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir


def test_documents_of_a_shard_are_those_of_its_partitions(tmp_path: Path, generation: Any) -> None:
    generation_dir(tmp_path, 1).symlink_to(generation.path)
    outlines = Outlines(tmp_path)
    assert outlines.path(1) == generation_dir(tmp_path, 1)
    for num_shards in (1, 2, 3, 7):
        documents = [outlines.documents(1, shard, num_shards) for shard in range(num_shards)]
        assert sum(documents) == len(generation.catalogue)
        assert min(documents) > 0
    generation_dir(tmp_path, 1).unlink()
    assert outlines.outline(1) is outlines.outline(1)
    with pytest.raises(SnapshotError):
        outlines.outline(2)
