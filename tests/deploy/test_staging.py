import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy import staging
from silvershard.deploy.cluster_store import HostReport
from silvershard.deploy.staging import Stager, bring, read_chunk
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir, list_generations


def published(repository: Path, generation: int, **files: bytes) -> Path:
    directory = generation_dir(repository, generation)
    (directory / "parts").mkdir(parents=True)
    entries = {}
    for name, content in files.items():
        (directory / "parts" / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries[f"parts/{name}"] = {"size": len(content), "sha256": digest}
    spec = {"generation": generation, "model": "films", "partition_documents": [1]}
    document = {"spec": spec, "content_hash": "a" * 64, "files": entries}
    (directory / "manifest.json").write_text(json.dumps(document))
    return directory


def reader(repository: Path) -> Any:
    return lambda generation, name, offset: read_chunk(repository, generation, name, offset)


def test_a_generation_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    source = published(tmp_path / "there", 3, one=b"x" * 2500, two=b"", three=b"y" * 1000)
    here = tmp_path / "here"
    bring(here, 3, "h1", reader(tmp_path / "there"))
    assert list_generations(here) == [3]
    assert [one.name for one in here.iterdir()] == ["gen-000003"]
    for path in source.rglob("*"):
        if path.is_file():
            copied = generation_dir(here, 3) / path.relative_to(source)
            assert copied.read_bytes() == path.read_bytes()
    # It is not read again.
    bring(here, 3, "h1", lambda *_: pytest.fail("it was read again"))


def test_what_is_damaged_on_its_way_does_not_appear(tmp_path: Path) -> None:
    published(tmp_path / "there", 3, one=b"x" * 10)

    def read(generation: int, name: str, offset: int) -> bytes:
        found = read_chunk(tmp_path / "there", generation, name, offset)
        return found.replace(b"xx", b"xy") if name == "parts/one" else found

    with pytest.raises(SnapshotError, match="parts/one is damaged"):
        bring(tmp_path / "here", 3, "h1", read)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("name", ["../gen-000004/manifest.json", "/etc/passwd", "parts/none"])
def test_only_files_of_the_generation_are_read(tmp_path: Path, name: str) -> None:
    published(tmp_path, 3, one=b"x")
    published(tmp_path, 4, one=b"x")
    with pytest.raises(SnapshotError):
        read_chunk(tmp_path, 3, name, 0)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    directory = published(tmp_path / "there", 3, one=b"x")
    document = json.loads((directory / "manifest.json").read_text())
    document["files"] = {"../../evil": {"size": 1, "sha256": "0" * 64}}
    (directory / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(SnapshotError, match="no file of it"):
        bring(tmp_path / "here", 3, "h1", reader(tmp_path / "there"))


def test_the_stager_takes_the_first_host_that_can_be_read(tmp_path: Path) -> None:
    published(tmp_path / "there", 3, one=b"x")
    asked: list[str] = []

    def reach(host: str) -> Any:
        asked.append(host)
        if host == "a":
            raise OSError("the agent of a does not run")
        return reader(tmp_path / "there")

    stager = Stager(tmp_path / "here", "c", reach)
    assert not stager.holds(3)
    stager.poll([3], {})
    assert stager.said == "generation 3 is on no host"
    reports = {name: HostReport(host=name, beat=1, generations=(3,)) for name in "abc"}
    while not stager.holds(3):
        stager.poll([3], reports)
    # What is here itself is no source.
    assert set(asked) == {"a", "b"}
    while stager.said:
        stager.poll([3], reports)


def test_the_stager_says_why_it_cannot(tmp_path: Path) -> None:
    def reach(host: str) -> Any:
        raise OSError("the agent of a does not run")

    stager = Stager(tmp_path / "here", "c", reach)
    reports = {"a": HostReport(host="a", beat=1, generations=(3,))}
    while "cannot be fetched from a: the agent of a does not run" not in stager.said:
        stager.poll([3], reports)
