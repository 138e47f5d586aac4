import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.shard.errors import SnapshotError
from silvershard.shard.outline import partition_path, read_outline
from silvershard.shard.snapshot import open_snapshot


def test_an_outline_says_what_the_manifest_says(generation: Any) -> None:
    outline, manifest = read_outline(generation.path), open_snapshot(generation.path).manifest
    assert outline.path == generation.path
    assert (outline.generation, outline.model) == (manifest.spec.generation, "films")
    assert outline.content_hash == manifest.content_hash
    assert outline.partition_documents == manifest.spec.partition_documents
    assert outline.num_partitions == manifest.spec.num_partitions
    assert outline.sizes == {name: entry.size for name, entry in manifest.files.items()}
    assert (outline.log_id, outline.cut) == (manifest.log_id, manifest.cut)
    assert partition_path(3) in outline.sizes


@pytest.mark.parametrize("content", ["{", "[]", '{"spec": {}}', json.dumps({"spec": 3})])
def test_a_manifest_that_says_something_else_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        read_outline(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SnapshotError, match=r"manifest\.json cannot be read"):
        read_outline(tmp_path)
