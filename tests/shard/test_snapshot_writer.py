import os
from pathlib import Path
from typing import Any

import pydantic
import pytest

from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import Manifest, open_snapshot
from silvershard.shard.snapshot_writer import without_log


def published(repository: Path, source: Any, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "name": "films",
        "model": source.model,
        "builder": "two_tower",
        "config": source.model.config.model_dump(mode="json"),
        "catalogue": source.catalogue,
        "schema": source.schema,
        "defaults": SearchDefaults(probes=4, ann_k=40),
        "num_clusters": 16,
        "false_positive_rate": 0.1,
        "max_exact_planes": 6,
        **changes,
    }
    return publish_generation(repository, **options).path


def test_what_two_generations_share_is_stored_once(tmp_path: Path, generation: Any) -> None:
    first, second = published(tmp_path, generation), published(tmp_path, generation)
    names = open_snapshot(first).manifest.files
    assert [(first / name).samefile(second / name) for name in names] == [True] * len(names)
    assert not (first / "manifest.json").samefile(second / "manifest.json")
    open_snapshot(second).verify()
    assert open_snapshot(first).manifest.content_hash == open_snapshot(second).manifest.content_hash


def test_a_damaged_file_is_shared_with_nobody(tmp_path: Path, generation: Any) -> None:
    first = published(tmp_path, generation)
    os.truncate(first / "dense.safetensors", 99)
    (generation_dir(tmp_path, 9)).mkdir()
    (generation_dir(tmp_path, 9) / "manifest.json").write_text("{")
    second = published(tmp_path, generation, generation=2)
    open_snapshot(second).verify()
    assert not (first / "dense.safetensors").samefile(second / "dense.safetensors")


def test_without_hard_links_a_generation_stays_a_copy(
    tmp_path: Path, generation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError("no links here")

    first = published(tmp_path, generation)
    monkeypatch.setattr(os, "link", refused)
    second = published(tmp_path, generation)
    open_snapshot(second).verify()
    assert not (first / "dense.safetensors").samefile(second / "dense.safetensors")


def test_a_generation_names_the_log_and_the_cut_that_it_was_made_at(
    tmp_path: Path, generation: Any
) -> None:
    made = published(tmp_path, generation, log_id=(1 << 64) - 1, cut=(7, 0))
    manifest = open_snapshot(made).manifest
    assert (manifest.log_id, manifest.cut) == ((1 << 64) - 1, (7, 0))
    # The cut says where to go on, not what the content is.
    assert manifest.content_hash == open_snapshot(generation.path).manifest.content_hash
    assert (open_snapshot(generation.path).manifest.cut, manifest.format) == ((), manifest.format)


@pytest.mark.parametrize("change", [{"cut": (1,)}, {"log_id": 3}, {"log_id": 3, "cut": (-1,)}])
def test_a_cut_without_its_log_is_refused(generation: Any, change: dict[str, Any]) -> None:
    document = open_snapshot(generation.path).manifest.model_dump()
    with pytest.raises(pydantic.ValidationError, match="cut and log_id must both be given"):
        Manifest.model_validate({**document, **change})


def test_a_generation_that_leaves_its_log_keeps_its_content(
    tmp_path: Path, generation: Any
) -> None:
    made = published(tmp_path, generation, log_id=7, cut=(3, 4))
    before = open_snapshot(made).manifest
    without_log(made)
    left = open_snapshot(made)
    left.verify()
    assert left.manifest == before.model_copy(update={"log_id": 0, "cut": ()})
    assert [one.name for one in tmp_path.iterdir()] == [made.name]
    (made / "manifest.json").write_text("{")
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        without_log(made)
