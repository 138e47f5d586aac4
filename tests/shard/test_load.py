import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from silvershard.model.request import Request
from silvershard.shard.errors import SnapshotError
from silvershard.shard.load import load_executor, load_live, load_model, load_retriever
from silvershard.shard.snapshot import Snapshot, open_snapshot


def test_the_loaded_model_has_the_published_weights(generation) -> None:
    model, centroids = load_model(open_snapshot(generation.path))
    state = generation.model.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert centroids.vectors.shape == (16, 16)


def test_tables_of_both_towers_are_files_of_their_own(generation) -> None:
    names = {path.name for path in (generation.path / "tables").iterdir()}
    assert "item_tables.movie.safetensors" in names
    assert "user_tables.history.safetensors" in names


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_the_builder_are_refused(
    generation, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    snapshot = open_snapshot(generation.path)
    centroids, state = snapshot.load_dense()
    key = sorted(state)[0]
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["stranger"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(3, 3, 3)
    monkeypatch.setattr(snapshot, "load_dense", lambda: (centroids, state))
    with pytest.raises(SnapshotError, match="tensor"):
        load_model(snapshot)


def test_the_shards_of_any_count_hold_every_document_once(generation) -> None:
    for num_shards in (1, 2, 5, 64):
        held: list[int] = []
        for shard in range(num_shards):
            retriever, _ = load_retriever(generation.path, shard=shard, num_shards=num_shards)
            for part in retriever.indexes:
                held += [item for item in part.item_ids.flatten().tolist() if item >= 0]
        assert sorted(held) == sorted(generation.catalogue.item_ids.tolist())


def test_devices_split_the_documents_of_a_shard(generation) -> None:
    retriever, _ = load_retriever(generation.path, devices=("cpu", "cpu"))
    sizes = [part.documents for part in retriever.indexes]
    assert sum(sizes) == 600
    assert min(sizes) > 200


def test_a_shard_or_device_that_does_not_exist_is_refused(generation) -> None:
    with pytest.raises(ValueError, match=r"shard must be in 0\.\.1"):
        load_retriever(generation.path, shard=2, num_shards=2)
    with pytest.raises(ValueError, match=r"num_shards must be in 1\.\.64"):
        load_retriever(generation.path, num_shards=65)
    with pytest.raises(ValueError, match="at least one device"):
        load_retriever(generation.path, devices=())
    with pytest.raises(ValueError, match="devices must be cpu, got 'cuda'"):
        load_retriever(generation.path, devices=("cuda",))


def test_a_snapshot_without_its_tensors_is_refused(generation, tmp_path: Path) -> None:
    bare = tmp_path / "gen-000001"
    bare.mkdir()
    shutil.copy(generation.path / "manifest.json", bare)
    with pytest.raises(SnapshotError, match=r"dense\.safetensors is missing"):
        load_executor(bare, 0, 1)


def test_an_executor_answers_at_once(generation) -> None:
    executor = load_executor(generation.path, 0, 2)
    assert executor.documents == sum(executor.spec.partition_documents[:32])
    assert executor.num_open == 0


def test_loading_twice_gives_the_same_answers(generation) -> None:
    answers = [
        load_retriever(generation.path)[0]([Request(k=20, filter="genre:Drama")])[0]
        for _ in range(2)
    ]
    assert torch.equal(answers[0].item_ids, answers[1].item_ids)
    assert torch.equal(answers[0].scores, answers[1].scores)


def test_snapshot_files_are_plain_safetensors(generation) -> None:
    for path in generation.path.rglob("*.safetensors"):
        assert safetensors.torch.load_file(path)


def test_a_live_shard_answers_as_one_that_stays(generation, request_maker) -> None:
    requests = request_maker(generation, 30, seed=4)
    whole = load_retriever(generation.path)[0]
    retriever, live = load_live(generation.path, devices=("cpu", "cpu"), headroom=0.2)
    assert [part.documents for part in live.parts] == [part.documents for part in retriever.parts]
    assert live.cut == ()
    for one, other in zip(whole(requests), retriever(requests), strict=True):
        assert torch.equal(one.item_ids, other.item_ids)
        assert torch.equal(one.scores, other.scores)


def test_the_parts_of_a_live_shard_are_those_that_answer(generation) -> None:
    executor = load_executor(generation.path, 0, 1, headroom=0.2)
    assert executor.usage().live_slots == 600
    assert executor.usage().free_pages > 16
    held = generation.catalogue.item_ids[:2].tolist()
    assert executor.fields(held, ["title"]) == {"title": ["Film 0", "Film 1"]}


def test_a_live_shard_without_room_is_refused(generation) -> None:
    for headroom in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="headroom must be more than 0"):
            load_live(generation.path, headroom=headroom)


def test_a_live_shard_begins_at_the_cut_of_its_snapshot(generation, monkeypatch) -> None:
    snapshot = open_snapshot(generation.path)
    manifest = snapshot.manifest.model_copy(update={"log_id": 7, "cut": (3, 9)})
    monkeypatch.setattr(
        "silvershard.shard.load.open_snapshot", lambda path: Snapshot(path, manifest)
    )
    assert load_executor(generation.path, 0, 1, headroom=0.2).cut == (3, 9)
