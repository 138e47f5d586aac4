import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from silvershard.shard.errors import SnapshotError
from silvershard.shard.load import load_retriever, load_semantic
from silvershard.shard.partition import partition_of
from silvershard.shard.snapshot import (
    MANIFEST,
    SEMANTIC,
    Builder,
    content_hash,
    open_snapshot,
)
from silvershard.shard.snapshot_writer import write_snapshot


@pytest.fixture
def copy(generation, tmp_path: Path) -> Path:
    """A private copy of a published generation, to be damaged."""
    return Path(shutil.copytree(generation.path, tmp_path / generation.path.name))


def files_of(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file())


def load_everything(path: Path) -> None:
    snapshot = open_snapshot(path)
    snapshot.verify()
    load_retriever(path)


def test_a_sound_snapshot_verifies_and_loads(copy: Path) -> None:
    load_everything(copy)


def test_a_flipped_byte_anywhere_is_noticed_and_the_file_named(copy: Path, generation) -> None:
    generator = np.random.default_rng(0)
    files = files_of(copy)
    # The manifest is small and decisive: every region of it is tried, of other files a few places.
    tries = [(copy / MANIFEST, at) for at in range(0, (copy / MANIFEST).stat().st_size, 997)]
    tries += [
        (path, int(at))
        for path in files
        for at in {0, 9, path.stat().st_size - 1, *generator.integers(0, path.stat().st_size, 2)}
    ]
    for path, at in tries:
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match="damaged") as caught:
            open_snapshot(copy).verify()
        assert path.name in str(caught.value)
        shutil.copyfile(generation.path / path.relative_to(copy), path)


@pytest.mark.parametrize("change", ["missing", "truncated", "grown"])
def test_a_file_that_is_missing_or_of_another_size_is_named(copy: Path, change: str) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if change == "truncated" else content + b"\0")
        with pytest.raises(SnapshotError, match=path.name):
            open_snapshot(copy).verify()
        path.write_bytes(content)


def test_loading_checks_what_it_reads_without_a_full_verification(copy: Path) -> None:
    partition = next((copy / "partitions").iterdir())
    content = bytearray(partition.read_bytes())
    content[-1] ^= 1
    partition.write_bytes(content)
    with pytest.raises(SnapshotError, match=partition.name):
        load_retriever(copy)


def test_a_manifest_of_another_format_is_refused(copy: Path, generation) -> None:
    snapshot = open_snapshot(copy)
    document = snapshot.manifest.model_dump(mode="json")
    document["format"] = 99
    _rewrite(copy, document)
    with pytest.raises(SnapshotError, match="format 99 is not supported"):
        open_snapshot(copy)


def test_an_unknown_manifest_field_is_refused(copy: Path) -> None:
    document = open_snapshot(copy).manifest.model_dump(mode="json")
    document["surprise"] = 1
    _rewrite(copy, document)
    with pytest.raises(SnapshotError, match="surprise"):
        open_snapshot(copy)


def test_a_changed_specification_breaks_the_content_hash(copy: Path) -> None:
    document = open_snapshot(copy).manifest.model_dump(mode="json")
    document["spec"]["model"] = "other"
    _rewrite(copy, document)
    with pytest.raises(SnapshotError, match="content hash"):
        open_snapshot(copy)


def _rewrite(path: Path, document: dict[str, object]) -> None:
    """Write a manifest whose checksum fits, so that only its content can be at fault."""

    def canonical(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"

    document["checksum"] = hashlib.sha256(canonical(document)).hexdigest()
    (path / MANIFEST).write_bytes(canonical(document))


@pytest.mark.parametrize("name", ["tables/../../../secret.safetensors", "/etc/passwd", "tables/x"])
def test_a_manifest_cannot_name_files_outside_the_snapshot(copy: Path, name: str) -> None:
    snapshot = open_snapshot(copy)
    document = snapshot.manifest.model_dump(mode="json")
    document["files"][name] = {"sha256": "0" * 64, "size": 0}
    _rewrite(copy, document)
    with pytest.raises(SnapshotError, match="is no file of a snapshot"):
        open_snapshot(copy)


def test_a_builder_that_is_not_registered_is_never_constructed(copy: Path) -> None:
    snapshot = open_snapshot(copy)
    builder = Builder(name="os.system", config={})
    document = snapshot.manifest.model_dump(mode="json")
    document["builder"] = builder.model_dump(mode="json")
    document["content_hash"] = content_hash(snapshot.spec, builder, snapshot.manifest.files)
    _rewrite(copy, document)
    with pytest.raises(SnapshotError, match=r"os\.system"):
        load_retriever(copy)


def test_no_file_of_a_snapshot_is_a_pickle_or_executable(generation) -> None:
    for path in files_of(generation.path):
        assert path.suffix in (".safetensors", ".json")
        assert not os.access(path, os.X_OK)


def test_partitions_hold_each_item_once_where_its_hash_says(generation) -> None:
    snapshot = open_snapshot(generation.path)
    spec = snapshot.spec
    seen: list[int] = []
    for number in range(spec.num_partitions):
        data = snapshot.load_partition(number)
        if data is None:
            assert spec.partition_documents[number] == 0
            continue
        ids = torch.from_numpy(data.catalogue.item_ids)
        assert set(partition_of(ids, spec.num_partitions).tolist()) == {number}
        assert bool((data.clusters[1:] >= data.clusters[:-1]).all()), "not cluster-sorted"
        seen += ids.tolist()
    assert sorted(seen) == sorted(generation.catalogue.item_ids.tolist())


def test_raw_features_and_attributes_survive_so_that_items_can_be_embedded_again(
    generation,
) -> None:
    snapshot = open_snapshot(generation.path)
    row_of = {item: row for row, item in enumerate(generation.catalogue.item_ids.tolist())}
    for number in range(snapshot.spec.num_partitions):
        data = snapshot.load_partition(number)
        if data is None:
            continue
        rows = np.array([row_of[item] for item in data.catalogue.item_ids.tolist()])
        wanted = generation.catalogue.take(rows)
        for name, ragged in wanted.features.items():
            assert list(ragged.values) == list(data.catalogue.features[name].values)
        with torch.inference_mode():
            again = generation.model.embed_items(dict(data.catalogue.features))
        assert torch.equal(again.half(), data.cache)


def test_a_generation_is_written_once(copy: Path) -> None:
    snapshot = open_snapshot(copy)
    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(SnapshotError, match="exists already"):
        write_snapshot(
            copy.parent,
            snapshot.spec,
            snapshot.manifest.builder,
            {},
            torch.zeros(1, 1),
            {},
            code_version="0",
            created_unix_s=0,
        )
    assert (copy / MANIFEST).read_bytes() == before


def test_a_write_that_fails_leaves_nothing_behind(copy: Path, tmp_path: Path) -> None:
    snapshot = open_snapshot(copy)
    target = tmp_path / "other"
    with pytest.raises(AttributeError):
        write_snapshot(
            target,
            snapshot.spec,
            snapshot.manifest.builder,
            {"bad": None},  # type: ignore[dict-item]
            torch.zeros(1, 1),
            {},
            code_version="0",
            created_unix_s=0,
        )
    assert list(target.iterdir()) == []


def test_a_directory_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"manifest\.json is missing"):
        open_snapshot(tmp_path)


def test_a_manifest_that_cannot_be_read_is_a_damaged_snapshot(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(SnapshotError, match=r"manifest\.json cannot be read: Input/output error"):
        open_snapshot(copy)


def test_the_specification_is_read_without_the_tensors(copy: Path, tmp_path: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    assert open_snapshot(copy).spec.documents == 600


def test_a_snapshot_from_before_a_setting_was_added_loads_as_it_was(
    copy: Path, generation, request_maker
) -> None:
    """Its content hash is over what was written then, which has no place for new settings."""
    document = json.loads((copy / MANIFEST).read_bytes())
    del document["checksum"]
    del document["spec"]["semantic"]
    del document["spec"]["defaults"]["semantic_k"]
    content = {
        "spec": {name: one for name, one in document["spec"].items() if name != "generation"},
        "builder": document["builder"],
        "files": {name: entry["sha256"] for name, entry in document["files"].items()},
    }
    text = json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
    document["content_hash"] = hashlib.sha256(text).hexdigest()
    _rewrite(copy, document)
    old, new = load_retriever(copy)[0], load_retriever(generation.path)[0]
    assert old.spec.semantic is None
    requests = request_maker(generation, 10, seed=3)
    for one, other in zip(old(requests), new(requests), strict=True):
        assert torch.equal(one.item_ids, other.item_ids)
        assert torch.equal(one.scores, other.scores)


def test_every_item_has_its_semantic_codes(semantic_generation, generation) -> None:
    snapshot = open_snapshot(semantic_generation.path)
    snapshot.verify()
    held = 0
    for number in range(snapshot.spec.num_partitions):
        data = snapshot.load_partition(number)
        if data is None:
            continue
        with torch.inference_mode():
            embedded = semantic_generation.model.embed_items(dict(data.catalogue.features))
        source = load_semantic(snapshot)
        assert source is not None
        assert torch.equal(data.semantic_codes, source.item_codes(embedded))
        held += len(data.semantic_codes)
    assert held == 600
    plain = open_snapshot(generation.path)
    assert SEMANTIC not in plain.manifest.files
    loaded = [plain.load_partition(number) for number in range(plain.spec.num_partitions)]
    assert all(data.semantic_codes is None for data in loaded if data is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:, :2], r"semantic_codes must be \(\d+, 3\) torch.int16, got"),
        (lambda codes: codes[1:], r"semantic_codes must be \(\d+, 3\) torch.int16, got"),
        (lambda codes: codes.int(), "semantic_codes must be .* got .* torch.int32"),
        (lambda codes: codes + 7, r"semantic_codes must be in \[0, 7\)"),
        (lambda codes: codes - 7, r"semantic_codes must be in \[0, 7\)"),
        (None, "'semantic_codes'"),
    ],
)
def test_semantic_codes_that_do_not_fit_are_refused(
    semantic_generation, monkeypatch: pytest.MonkeyPatch, change, message: str
) -> None:
    snapshot = open_snapshot(semantic_generation.path)
    load = snapshot._load

    def changed(name: str) -> dict[str, torch.Tensor]:
        tensors = load(name)
        codes = tensors.pop("semantic_codes")
        return tensors if change is None else tensors | {"semantic_codes": change(codes)}

    monkeypatch.setattr(snapshot, "_load", changed)
    number = int(np.argmax(snapshot.spec.partition_documents))
    with pytest.raises(SnapshotError, match=message):
        snapshot.load_partition(number)


def test_a_source_with_other_tensors_than_its_sizes_is_refused(
    semantic_generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = open_snapshot(semantic_generation.path)
    state = snapshot.load_semantic()
    monkeypatch.setattr(snapshot, "load_semantic", lambda: state)
    state["codebooks"] = state["codebooks"][:, :3]
    with pytest.raises(SnapshotError, match="semantic ids: tensor codebooks must be"):
        load_semantic(snapshot)
    del state["codebooks"]
    with pytest.raises(SnapshotError, match="semantic ids: tensor codebooks is missing"):
        load_semantic(snapshot)
