import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest

from silvershard.shard.errors import RepositoryError, SnapshotError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.load import load_retriever
from silvershard.shard.publish import publish_generation
from silvershard.shard.repository import Repository
from silvershard.shard.snapshot import MANIFEST, canonical, open_snapshot


@pytest.fixture(params=["directory", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for copies on the local disk, and one on a file system without rename."""
    if request.param == "directory":
        yield str(tmp_path / "copies")
        return
    yield "memory://copies"
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "generations"


def names_of(path: Path) -> dict[str, bytes]:
    return {
        str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()
    }


def republished(generation: Any, repository: Path, number: int, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "name": "films",
        "model": generation.model,
        "builder": "two_tower",
        "config": generation.model.config.model_dump(mode="json"),
        "catalogue": generation.catalogue,
        "schema": generation.schema,
        "defaults": open_snapshot(generation.path).spec.defaults,
        "num_clusters": generation.num_clusters,
        "false_positive_rate": 0.1,
        "max_exact_planes": 6,
        **changes,
    }
    return publish_generation(repository, generation=number, **options).path


def test_a_generation_comes_back_byte_for_byte(url: str, local: Path, generation: Any) -> None:
    there = Repository(url)
    assert there.generations() == []
    snapshot = open_snapshot(generation.path)
    pushed = there.push(snapshot)
    assert pushed.copied == pushed.files == len(snapshot.manifest.files)
    assert pushed.copied_bytes == sum(one.size for one in snapshot.manifest.files.values())
    assert there.generations() == [1]
    assert there.manifest(1) == snapshot.manifest
    fetched = there.fetch(1, local)
    assert fetched == pushed
    assert names_of(generation_dir(local, 1)) == names_of(generation.path)
    load_retriever(generation_dir(local, 1))


def test_what_is_there_is_not_copied_again(
    url: str, local: Path, tmp_path: Path, generation: Any
) -> None:
    there = Repository(url)
    there.push(open_snapshot(generation.path))
    again = there.push(open_snapshot(generation.path))
    assert (again.copied, again.copied_bytes) == (0, 0)
    other = open_snapshot(republished(generation, tmp_path / "other", 2, seed=18))
    shared = {one.sha256 for one in open_snapshot(generation.path).manifest.files.values()}
    new = [one for one in other.manifest.files.values() if one.sha256 not in shared]
    assert 0 < len(new) < len(other.manifest.files)
    assert there.push(other).copied == len(new)
    assert there.fetch(1, local).copied == len(shared)
    assert there.fetch(2, local).copied == len(new)
    assert there.fetch(2, local).copied == 0
    open_snapshot(generation_dir(local, 2)).verify()


def test_a_number_with_other_content_is_refused_there_and_here(
    url: str, local: Path, tmp_path: Path, generation: Any
) -> None:
    there = Repository(url)
    there.push(open_snapshot(generation.path))
    other = republished(generation, tmp_path / "other", 1, seed=18)
    with pytest.raises(RepositoryError, match="generation 1 is there with other content"):
        there.push(open_snapshot(other))
    with pytest.raises(SnapshotError, match="must have the content"):
        there.fetch(1, other.parent)
    assert there.manifest(1) == open_snapshot(generation.path).manifest


def cut_at(path: Path, log_id: int, cut: list[int]) -> Path:
    """Let a generation go on from a position of an update log; its content stays as it is."""
    document = json.loads((path / MANIFEST).read_bytes()) | {"log_id": log_id, "cut": cut}
    del document["checksum"]
    document["checksum"] = hashlib.sha256(canonical(document)).hexdigest()
    (path / MANIFEST).write_bytes(canonical(document))
    return path


@pytest.mark.parametrize(("log_id", "cut"), [(0, []), (77, [900]), (78, [1000])])
def test_the_same_content_from_elsewhere_in_the_log_is_refused_there_and_here(
    url: str, tmp_path: Path, generation: Any, log_id: int, cut: list[int]
) -> None:
    there, here = Repository(url), tmp_path / "here"
    path = Path(shutil.copytree(generation.path, generation_dir(here, 1)))
    there.push(open_snapshot(cut_at(path, 77, [1000])))
    there.push(open_snapshot(path))
    kept = there.manifest(1)
    cut_at(path, log_id, cut)
    with pytest.raises(RepositoryError, match="is there and goes on in log 77 from 1000"):
        there.push(open_snapshot(path))
    assert there.manifest(1) == kept
    with pytest.raises(SnapshotError, match="must go on in log 77 from 1000"):
        there.fetch(1, here)
    assert there.fetch(1, here, any_log=True).copied == 0
    assert open_snapshot(path).manifest.log_id == log_id


def test_a_generation_that_is_not_there_is_named_with_those_that_are(
    url: str, local: Path, generation: Any
) -> None:
    there = Repository(url)
    with pytest.raises(RepositoryError, match="must hold generation 3, it holds none"):
        there.fetch(3, local)
    there.push(open_snapshot(generation.path))
    with pytest.raises(RepositoryError, match="must hold generation 3, it holds 1"):
        there.fetch(3, local)


def test_a_damaged_copy_is_named_and_never_gets_its_name_here(
    tmp_path: Path, local: Path, generation: Any
) -> None:
    there = Repository(str(tmp_path / "copies"))
    there.push(open_snapshot(generation.path))
    entry = open_snapshot(generation.path).manifest.files["dense.safetensors"]
    damaged = tmp_path / "copies" / "files" / entry.sha256
    content = bytearray(damaged.read_bytes())
    content[99] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"dense\.safetensors is damaged"):
        there.fetch(1, local)
    assert list_generations(local) == []
    content[99] ^= 1
    damaged.write_bytes(content)
    heard: list[str] = []
    assert there.fetch(1, local, heard.append).copied == len(heard) >= 1
    assert "dense.safetensors" in heard
    damaged_manifest = tmp_path / "copies" / "generations" / "gen-000001.json"
    damaged_manifest.write_bytes(damaged_manifest.read_bytes().replace(b"films", b"pilms"))
    with pytest.raises(SnapshotError, match="is damaged: its checksum differs"):
        there.fetch(1, tmp_path / "elsewhere")


def test_a_truncated_copy_is_replaced_by_the_next_push(
    tmp_path: Path, local: Path, generation: Any
) -> None:
    there = Repository(str(tmp_path / "copies"))
    there.push(open_snapshot(generation.path))
    entry = open_snapshot(generation.path).manifest.files["dense.safetensors"]
    os.truncate(tmp_path / "copies" / "files" / entry.sha256, 7)
    assert there.push(open_snapshot(generation.path)).copied == 1
    assert there.fetch(1, local).files > 1


def test_an_interrupted_fetch_goes_on_and_leaves_nothing_behind(
    tmp_path: Path, local: Path, generation: Any
) -> None:
    there = Repository(str(tmp_path / "copies"))
    there.push(open_snapshot(generation.path))
    heard: list[str] = []

    def interrupted(name: str) -> None:
        heard.append(name)
        if len(heard) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.fetch(1, local, interrupted)
    assert list_generations(local) == []
    staging = local / ".gen-000001.fetch"
    (staging / "partitions" / "p-99999.safetensors").write_bytes(b"of another generation")
    fetched = there.fetch(1, local)
    assert fetched.copied == fetched.files - 4
    assert names_of(generation_dir(local, 1)) == names_of(generation.path)
    assert [one.name for one in local.iterdir()] == ["gen-000001"]


def test_what_an_interrupted_fetch_linked_to_another_generation_is_never_written_to(
    tmp_path: Path, local: Path, generation: Any
) -> None:
    there = Repository(str(tmp_path / "copies"))
    there.push(open_snapshot(generation.path))
    other = republished(generation, local, 2, seed=18)
    staged = local / ".gen-000001.fetch" / "dense.safetensors"
    staged.parent.mkdir()
    os.link(other / "dense.safetensors", staged)
    there.fetch(1, local)
    open_snapshot(other).verify()
    open_snapshot(generation_dir(local, 1)).verify()


def test_a_damaged_generation_is_not_pushed(tmp_path: Path, generation: Any) -> None:
    copy = Path(shutil.copytree(generation.path, tmp_path / "gen-000001"))
    os.truncate(copy / "dense.safetensors", 100)
    there = Repository(str(tmp_path / "copies"))
    with pytest.raises(SnapshotError, match=r"dense\.safetensors is damaged"):
        there.push(open_snapshot(copy))
    assert there.generations() == []


def test_a_file_system_that_is_unknown_or_fails_is_named(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(RepositoryError, match=r"repository nonsense://a: .*nonsense"):
        Repository("nonsense://a")
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match=f"repository {tmp_path}/file/x: "):
        Repository(f"{tmp_path}/file/x").push(open_snapshot(generation.path))


class Broken(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(503)

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def broken_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/copies"
        server.shutdown()
        serving.join()


def test_a_place_that_cannot_be_asked_does_not_pass_for_an_empty_one(
    broken_url: str, local: Path, generation: Any
) -> None:
    for url, words in ((broken_url, "503"), ("http://127.0.0.1:9/copies", "connect")):
        there = Repository(url)
        for ask in (
            there.generations,
            lambda there=there: there.fetch(1, local),
            lambda there=there: there.push(open_snapshot(generation.path)),
        ):
            with pytest.raises(RepositoryError, match=f"(?i)repository {url}: .*{words}"):
                ask()


def test_a_copy_is_complete_before_its_manifest_is_there(tmp_path: Path, generation: Any) -> None:
    there = Repository(str(tmp_path / "copies"))

    def interrupted(name: str) -> None:
        assert there.generations() == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        there.push(open_snapshot(generation.path), interrupted)
    assert there.generations() == []
    there.push(open_snapshot(generation.path))
    found = {one.name for one in (tmp_path / "copies" / "files").iterdir()}
    assert found == {one.sha256 for one in open_snapshot(generation.path).manifest.files.values()}
    assert (tmp_path / "copies" / "generations" / "gen-000001.json").read_bytes() == (
        generation.path / MANIFEST
    ).read_bytes()
