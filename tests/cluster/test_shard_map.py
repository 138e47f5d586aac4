import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.shard.errors import StateError


def entry(shard: int, replica: int = 0, **more: Any) -> ShardEntry:
    fields = {"address": "127.0.0.1:1", "epoch": 3, "documents": 10, "pid": 99}
    return ShardEntry(shard=shard, replica=replica, **{**fields, **more})


def make_map(*entries: ShardEntry, **more: Any) -> ShardMap:
    fields = {"version": 4, "generation": 2, "snapshot": "/s/gen-2", "num_shards": 2}
    return ShardMap(**{**fields, **more}, entries=entries)


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = make_map(entry(1), entry(0, 1), entry(0))
    written.write_atomic(tmp_path / "map.json")
    assert ShardMap.read(tmp_path / "map.json") == written
    assert os.listdir(tmp_path) == ["map.json"]


def test_replicas_come_in_order() -> None:
    shard_map = make_map(entry(2), entry(0, 1), entry(0), num_shards=4)
    assert [one.replica for one in shard_map.replicas(0)] == [0, 1]
    assert shard_map.replicas(1) == []


def test_a_failed_write_leaves_the_old_map(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "map.json"
    make_map().write_atomic(path)

    def fail(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StateError, match=r"map\.json: no space left"):
        make_map(version=5).write_atomic(path)
    assert ShardMap.read(path).version == 4
    assert os.listdir(tmp_path) == ["map.json"]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        make_map().write_atomic(tmp_path / "nowhere" / "map.json")
    with pytest.raises(StateError, match=r"map\.json: No such file"):
        ShardMap.read(tmp_path / "map.json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "file: Invalid JSON"),
        ('{"version": 1', "file: Invalid JSON"),
        ("[]", "file: Input should be an object"),
        ('{"version": 0}', "version: Input should be greater"),
    ],
)
def test_a_damaged_map_is_refused_naming_the_place(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(StateError) as raised:
        ShardMap.read(path)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"entries": [entry(2).model_dump()]}, "shard must be below 2, got 2"),
        (
            {"entries": [entry(1).model_dump(), entry(1, epoch=4).model_dump()]},
            "shard 1 replica 0 is listed twice",
        ),
        ({"num_shards": 0}, "greater than or equal to 1"),
        ({"snapshot": ""}, "at least 1 character"),
        ({"aliases": {"canary": 9}}, r"alias canary must name a generation of \[\d+\], got 9"),
        (
            {"snapshots": {"9": "/s/9"}, "aliases": {"live": 9}},
            r"alias live must be generation \d+, got 9",
        ),
        ({"log_partitions": 0}, "greater than or equal to 1"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(change: dict[str, Any], complaint: str) -> None:
    fields = json.loads(make_map(entry(0)).model_dump_json())
    with pytest.raises(ValidationError, match=complaint):
        ShardMap.model_validate({**fields, **change})


def test_a_map_of_the_first_version_is_read(tmp_path: Path) -> None:
    fields = {"version": 4, "generation": 2, "snapshot": "/s/2", "num_shards": 1, "entries": []}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(fields))
    read = ShardMap.read(path)
    assert read.hosted == {2: "/s/2"}
    assert (read.sequencer, read.log_url, read.aliases) == ("", "", {})


def test_a_map_names_every_generation_that_can_be_asked_for(tmp_path: Path) -> None:
    written = make_map(
        entry(0),
        generation=2,
        snapshot="/s/2",
        snapshots={1: "/s/1", 2: "/elsewhere"},
        aliases={"canary": 1, "live": 2},
        sequencer="127.0.0.1:5",
        log_url="sqlite:///log.db",
        log_partitions=4,
    )
    # What is live is where the map says that it is.
    assert written.hosted == {1: "/s/1", 2: "/s/2"}
    path = tmp_path / "map.json"
    written.write_atomic(path)
    assert ShardMap.read(path) == written
