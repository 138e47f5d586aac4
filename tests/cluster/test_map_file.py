import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from silvershard.cluster.map_file import MapFile, read_map, stamp_of, write_map
from silvershard.shard.errors import StateError


class Map(BaseModel, frozen=True, extra="forbid"):
    version: int


def test_a_map_is_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(Map(version=3), path, "map")
    assert read_map(Map, path, "map") == Map(version=3)
    assert os.listdir(tmp_path) == ["map.json"]


def test_every_replacement_has_another_stamp_and_no_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    assert stamp_of(path) is None
    write_map(Map(version=3), path, "map")
    before = stamp_of(path)
    assert before == stamp_of(path)
    write_map(Map(version=4), path, "map")
    assert stamp_of(path) != before


def test_a_map_that_cannot_be_written_leaves_the_old_one_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.json"
    write_map(Map(version=3), path, "map")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StateError, match=r"map .*map\.json: No space left on device"):
        write_map(Map(version=4), path, "map")
    assert os.listdir(tmp_path) == ["map.json"]
    assert read_map(Map, path, "map") == Map(version=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        ('{"version": "x"}', "version: Input should be a valid integer"),
        ('{"version": 1, "more": 2}', "more: Extra inputs"),
    ],
)
def test_a_map_that_is_none_is_refused_with_its_file_and_field(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StateError, match=rf"^users .*map\.json: .*{message}"):
        read_map(Map, path, "users")


def test_a_source_reads_what_is_in_its_file_by_then(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    source = MapFile(Map, path, "users")
    assert source.stamp() is None
    with pytest.raises(StateError, match=r"^users .*map\.json: No such file"):
        source.read()
    for version in (3, 4):
        before = source.stamp()
        write_map(Map(version=version), path, "map")
        assert source.stamp() == stamp_of(path) != before
        assert source.read() == Map(version=version)
