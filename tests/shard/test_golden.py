import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from silvershard.model.brute_force import BruteForce
from silvershard.model.request import FilterMode, Request, WeightedIds
from silvershard.model.spec import SearchDefaults
from silvershard.shard import publish as publishing
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import list_generations
from silvershard.shard.golden import (
    Embedded,
    Golden,
    check_exact,
    check_generation,
    difference,
    differences,
    read_golden,
)
from silvershard.shard.load import load_retriever
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import (
    GOLDEN,
    MANIFEST,
    FileEntry,
    canonical,
    content_hash,
    open_snapshot,
)

Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def whole(generation):
    return load_retriever(generation.path)[0]


@pytest.fixture
def copy(generation, tmp_path: Path) -> Path:
    """A private copy of a published generation, to be damaged."""
    return Path(shutil.copytree(generation.path, tmp_path / generation.path.name))


def sealed(path: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed, as a wrong packing would."""
    manifest = open_snapshot(path).manifest
    content = (path / name).read_bytes()
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    files = {**manifest.files, name: entry}
    changed = manifest.model_copy(
        update={
            "files": files,
            "content_hash": content_hash(manifest.spec, manifest.builder, files),
        }
    )
    document = changed.model_dump(mode="json")
    document["checksum"] = hashlib.sha256(canonical(document)).hexdigest()
    (path / MANIFEST).write_bytes(canonical(document))


def tamper(path: Path, name: str, change: Change) -> None:
    tensors = safetensors.torch.load_file(path / name)
    change(tensors)
    safetensors.torch.save_file(tensors, path / name)
    sealed(path, name)


def flip(key: str, at: int = 0) -> Change:
    """Flip the lowest bit of one byte of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key].contiguous()
        content = tensors[key].view(-1).view(torch.uint8)
        content[at] ^= 1

    return change


def partition_file(path: Path) -> str:
    return f"partitions/{sorted(one.name for one in (path / 'partitions').iterdir())[0]}"


def test_a_generation_carries_requests_that_it_answers_as_the_eager_model(generation) -> None:
    golden = read_golden(open_snapshot(generation.path))
    assert len(golden.cases) == 24
    assert check_generation(generation.path) == 24
    found = [case.answer for case in golden.cases]
    assert sum(len(one.item_ids) for one in found) > 200
    assert len({one.plan.split("(")[0] for one in found}) > 1


def test_every_bit_and_field_survives_the_file(generation, whole, request_maker) -> None:
    requests = [
        *request_maker(generation, 20, seed=4),
        Request(
            features={"history": WeightedIds([1, 2], [0.5, 2.0])},
            params={"y": 1990},
            filter="year > $y",
            filter_mode=FilterMode.EXACT,
            value="liked",
            plan="probe(probes=3,ann_k=20)",
            return_fields=["title"],
        ),
    ]
    golden = Golden.of(whole, requests)
    again = Golden.model_validate_json(golden.to_bytes())
    assert again == golden
    for request, case in zip(requests, again.cases, strict=True):
        got = case.to_request()
        assert set(got.exclude_ids) == set(request.exclude_ids)
        assert list(got.exclude_ids) == list(request.exclude_ids)
        for name in ("k", "filter", "params", "exact", "filter_mode", "task_weights", "value"):
            assert getattr(got, name) == getattr(request, name), name
        if isinstance(request.features.get("history"), WeightedIds):
            assert got.features["history"] == request.features["history"]
        (answer,) = whole([request])
        assert np.array(case.answer.scores, dtype=np.float32).tobytes() == (
            answer.scores.numpy().tobytes()
        )
    assert list(differences(again, lambda request: whole([request])[0])) == []


def test_the_first_difference_is_said(generation, whole) -> None:
    golden = Golden.of(whole, [Request(k=5), Request(k=3)])
    wanted = golden.cases[0].answer

    def changed(**changes: Any) -> str:
        found = difference(wanted.model_copy(update=changes), wanted)
        assert found is not None
        return found

    assert difference(whole([Request(k=5)])[0], wanted) is None
    assert changed(plan="x") == f"the plan is x and must be {wanted.plan}"
    assert "rank 1: item" in changed(item_ids=(wanted.item_ids[0], 7, *wanted.item_ids[2:]))
    nudged = (*wanted.scores[:4], float(np.nextafter(np.float32(wanted.scores[4]), np.float32(9))))
    assert f"rank 4: item {wanted.item_ids[4]} has scores" in changed(scores=nudged)
    assert "have shapes (4,) and (5,)" in changed(
        item_ids=wanted.item_ids[:4], scores=wanted.scores[:4]
    )
    tasks = {name: (0.5, *scores[1:]) for name, scores in wanted.task_scores.items()}
    assert changed(task_scores=tasks).startswith("task liked, got first, required second: rank 0")
    assert changed(task_scores={}) == "the tasks are none and must be liked, rated"
    assert changed(exhausted=True) == "exhausted is True and must be False"
    found = list(differences(golden, lambda request: whole([replace(request, k=3)])[0]))
    assert [str(one)[:18] for one in found] == ["golden request 0: "]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dense.safetensors", "model/user_head.weight"),
        ("dense.safetensors", "centroids"),
        (
            "tables/user_tables.history.safetensors",
            "model/user_tables.tables.embedding_bags.history.weight",
        ),
    ],
)
def test_a_flipped_weight_of_the_user_side_is_found_by_an_answer(
    copy: Path, name: str, key: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        # One bit of every float, as in a copy of the wrong precision: rarely a whole one is read.
        tensors[key] = (tensors[key].view(torch.int32) ^ (1 << 16)).view(torch.float32)

    tamper(copy, name, change)
    with pytest.raises(SnapshotError, match=r"golden request [0-9]+: "):
        check_generation(copy)


def test_a_flipped_bit_of_an_item_table_is_found_by_an_item(copy: Path, generation) -> None:
    snapshot = open_snapshot(copy)
    (name,) = [
        one for one in snapshot.manifest.files if one.startswith("tables/item_tables.genres")
    ]
    (key,) = safetensors.torch.load_file(copy / name)
    tamper(copy, name, flip(key, at=2 + 4 * 16))
    with pytest.raises(SnapshotError, match=r"of item [0-9]+ are not those of the embedding"):
        check_generation(copy)


@pytest.mark.parametrize("key", ["codes", "scales", "cache"])
def test_a_flipped_byte_of_a_packed_item_is_found_and_the_item_named(copy: Path, key: str) -> None:
    name = partition_file(copy)
    tamper(copy, name, flip(key))
    item = int(safetensors.torch.load_file(copy / name)["item_ids"][0])
    with pytest.raises(SnapshotError, match=f"the {key} of item {item} are not those"):
        check_generation(copy)


def test_items_are_compared_with_what_they_were_packed_from(copy: Path, generation) -> None:
    catalogue = generation.catalogue
    with torch.no_grad():
        embeddings = generation.model.embed_items(dict(catalogue.features)).clone()
    packed = Embedded(catalogue.item_ids, embeddings)
    assert check_generation(copy, packed=packed, num_embedded=0) == 24
    embeddings[17] = -embeddings[17]
    with pytest.raises(SnapshotError, match=f"codes of item {catalogue.item_ids[17]} are not"):
        check_generation(copy, packed=packed, num_embedded=0)
    embeddings[17] = -embeddings[17]
    more = Embedded(np.append(catalogue.item_ids, 1 << 50), embeddings[[*range(600), 0]])
    with pytest.raises(SnapshotError, match="must hold the 601 published items, got 600"):
        check_generation(copy, packed=more, num_embedded=0)


def test_a_flipped_byte_after_publishing_is_damage(copy: Path) -> None:
    path = copy / GOLDEN
    content = bytearray(path.read_bytes())
    content[content.index(b"scores") + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"golden\.json is damaged: its checksum differs"):
        check_generation(copy)


@pytest.mark.parametrize("document", [{}, {"cases": [{"request": {"x": 1}, "answer": None}]}, []])
def test_golden_requests_of_another_form_are_refused(copy: Path, document: object) -> None:
    (copy / GOLDEN).write_text(json.dumps(document))
    sealed(copy, GOLDEN)
    with pytest.raises(SnapshotError, match=r"golden\.json cannot be read: "):
        read_golden(open_snapshot(copy))


def test_an_unknown_field_of_a_golden_request_is_refused(copy: Path) -> None:
    document = json.loads((copy / GOLDEN).read_bytes())
    document["cases"][0]["request"]["surprise"] = 1
    (copy / GOLDEN).write_text(json.dumps(document))
    sealed(copy, GOLDEN)
    with pytest.raises(SnapshotError, match="unexpected keyword argument 'surprise'"):
        read_golden(open_snapshot(copy))


def test_an_exact_answer_that_the_module_does_not_give_is_an_error(generation, whole) -> None:
    with torch.no_grad():
        embeddings = generation.model.embed_items(dict(generation.catalogue.features)).clone()
    golden = Golden.of(whole, [Request(k=5), Request(k=5, exact=True)])
    check_exact(golden, BruteForce(generation.model, whole.spec, generation.catalogue, embeddings))
    best = generation.catalogue.item_ids.tolist().index(golden.cases[1].answer.item_ids[0])
    embeddings[best] = -embeddings[best]
    wrong = BruteForce(generation.model, whole.spec, generation.catalogue, embeddings)
    with pytest.raises(ValueError, match="as the model without it: golden request 1: got first"):
        check_exact(golden, wrong)


def publish_again(repository: Path, generation: Any, **changes: Any) -> Path:
    return publish_generation(
        repository,
        name="films",
        model=generation.model,
        builder="two_tower",
        config=generation.model.config.model_dump(mode="json"),
        catalogue=generation.catalogue,
        schema=generation.schema,
        defaults=SearchDefaults(probes=4, ann_k=40),
        num_clusters=16,
        **changes,
    ).path


@pytest.mark.parametrize("wrong", ["weight", "code", "filter bits"])
def test_a_wrong_packing_publishes_nothing_and_says_the_first_difference(
    tmp_path: Path, generation, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    write = publishing.write_snapshot

    def write_wrongly(
        repository: Path,
        spec: Any,
        builder: Any,
        state: Any,
        centroids: Any,
        partitions: Any,
        **options: Any,
    ) -> Path:
        if wrong == "weight":
            state = {name: one.clone() for name, one in state.items()}
            state["user_head.weight"][:, 0] += 1.0
        elif wrong == "code":
            number, data = next(iter(partitions.items()))
            codes = data.codes.clone()
            codes[0, 0] ^= 1
            partitions = {**partitions, number: data._replace(codes=codes)}
        else:
            partitions = {
                number: data._replace(bits=data.bits._replace(exact=data.bits.exact.flip(1)))
                for number, data in partitions.items()
            }
        return write(repository, spec, builder, state, centroids, partitions, **options)

    monkeypatch.setattr(publishing, "write_snapshot", write_wrongly)
    said = "of item" if wrong == "code" else "golden request"
    with pytest.raises(SnapshotError, match=said):
        publish_again(tmp_path, generation)
    assert list_generations(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_loses_items_publishes_nothing(
    tmp_path: Path, generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = publishing.build_index
    monkeypatch.setattr(publishing, "build_index", lambda held, spec: build(held[1::2], spec))
    with pytest.raises(ValueError, match="the index does not answer as the model without it"):
        publish_again(tmp_path, generation)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_can_be_published_without_golden_requests(tmp_path: Path, generation) -> None:
    path = publish_again(tmp_path, generation, golden_requests=0)
    assert not (path / GOLDEN).exists()
    assert read_golden(open_snapshot(path)).cases == ()
    assert check_generation(path) == 0


def test_requests_of_real_users_are_asked(tmp_path: Path, generation) -> None:
    users = [
        Request(features={"history": [int(one)]}, exclude_ids=[int(one)])
        for one in generation.catalogue.item_ids[:3]
    ]
    path = publish_again(tmp_path, generation, golden_users=users, golden_requests=9)
    requests = [case.to_request() for case in read_golden(open_snapshot(path)).cases]
    assert len(requests) == 9
    asked = [one for one in requests if one.features]
    assert len(asked) == 8
    assert {tuple(one.features["history"]) for one in asked} <= {
        tuple(user.features["history"]) for user in users
    }
    assert all(set(one.features["history"]) <= set(one.exclude_ids) for one in asked)
