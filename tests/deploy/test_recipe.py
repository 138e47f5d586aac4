from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from silvershard.deploy import recipe
from silvershard.deploy.config import Config, load
from silvershard.deploy.csv_files import DataError
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir
from silvershard.deploy.training_files import TrainingFiles
from silvershard.deploy.users import user_history
from silvershard.model.joint_config import JointConfig
from silvershard.model.request import Request
from silvershard.model.semantic_config import SemanticConfig, SemanticTrainingConfig
from silvershard.model.training import Checkpoint
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.golden import read_golden
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import open_snapshot


@pytest.fixture(scope="module")
def config() -> Config:
    options = {
        "training.steps": 8,
        "training.ranker_steps": 4,
        "training.dim": 16,
        "index.clusters": 16,
    }
    return load(None, environ={}, options=options)


@pytest.fixture(scope="module")
def prepared(config: Config, films_folder: Path) -> recipe.Prepared:
    return recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)


@pytest.fixture(scope="module")
def state(
    config: Config, prepared: recipe.Prepared, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StateDir]:
    """A state directory with a trained model and one generation."""
    directory = StateDir(tmp_path_factory.mktemp("state"))
    directory.create()
    recipe.train_model(directory, config, prepared, progress=False)
    recipe.publish(directory, config, prepared, recipe.load_model(directory.model_dir))
    return directory


def test_the_data_that_were_named_come_before_all_others(
    films_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    named = load(None, environ={}, options={"paths.data": str(films_folder)})
    by_setting = recipe.prepare(
        named, environ={"SILVERSHARD_DATA": str(tmp_path)}, report=said.append
    )
    assert by_setting.source.path == str(films_folder)
    by_variable = recipe.prepare(
        load(None, environ={}),
        environ={"SILVERSHARD_DATA": str(films_folder)},
        report=said.append,
    )
    assert by_variable.source == by_setting.source
    assert said[0].startswith(f"data: {films_folder}: 400 movies")
    with pytest.raises(DataError, match="does not exist"):
        recipe.prepare(named, data=tmp_path / "none", environ={}, report=said.append)


def test_the_trained_model_is_loaded_as_it_was_saved(
    state: StateDir, config: Config, prepared: recipe.Prepared
) -> None:
    loaded = recipe.load_model(state.model_dir)
    assert loaded.description.builder == "two_tower"
    assert loaded.description.training.steps == 8
    assert loaded.description.data == prepared.source
    assert not loaded.model.training
    again = recipe.load_model(state.model_dir)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_stopped_training_goes_on_to_the_same_model(
    state: StateDir,
    config: Config,
    prepared: recipe.Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    often = config.model_copy(
        update={"model": config.model.model_copy(update={"checkpoint_every": 3})}
    )
    stopped = StateDir(tmp_path)

    class Stopped(Exception):
        pass

    def write_then_stop(self: TrainingFiles, checkpoint: Checkpoint) -> None:
        write(self, checkpoint)
        if checkpoint.progress.done == 6:
            raise Stopped

    write = TrainingFiles.write_checkpoint
    monkeypatch.setattr(TrainingFiles, "write_checkpoint", write_then_stop)
    with pytest.raises(Stopped):
        recipe.train_model(stopped, often, prepared, progress=False)
    monkeypatch.undo()
    assert not stopped.model_dir.exists()
    recipe.train_model(stopped, often, prepared, progress=False, resume=True)
    whole, again = recipe.load_model(state.model_dir), recipe.load_model(stopped.model_dir)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    lines = (stopped.training_dir / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["phase", "towers", *["reranker"] * 4]
    other = often.model_copy(update={"training": often.training.model_copy(update={"steps": 9})})
    with pytest.raises(CommandError, match="other settings"):
        recipe.train_model(stopped, other, prepared, progress=False, resume=True)


def test_a_model_that_is_missing_or_damaged_is_named(state: StateDir, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="run `silvershard train`"):
        recipe.load_model(tmp_path)
    for name in (recipe.DESCRIPTION, recipe.WEIGHTS):
        (tmp_path / name).write_bytes((state.model_dir / name).read_bytes())
    (tmp_path / recipe.WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(CommandError, match=r"model\.safetensors cannot be used"):
        recipe.load_model(tmp_path)
    (tmp_path / recipe.DESCRIPTION).write_text("{}")
    with pytest.raises(CommandError, match=r"model\.json: builder: field required; train again"):
        recipe.load_model(tmp_path)


def test_training_again_replaces_the_model(state: StateDir, tmp_path: Path) -> None:
    loaded = recipe.load_model(state.model_dir)
    target = tmp_path / "model"
    for seed in (1, 2):
        description = loaded.description.model_copy(update={"seed": seed})
        recipe.save_model(target, loaded.model, description)
    assert recipe.load_model(target).description.seed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_generation_answers(state: StateDir, prepared: recipe.Prepared) -> None:
    retriever, _ = load_retriever(generation_dir(state.generations, 1))
    assert retriever.documents == len(prepared.catalogue)
    assert retriever.spec.model == "movielens"
    assert (retriever.spec.num_clusters, retriever.spec.defaults.probes) == (16, 2)
    history = user_history(state.users_file, 1)
    assert history
    (answer,) = retriever([Request(features={"history": history}, exclude_ids=history, k=5)])
    assert len(answer.item_ids) == 5


def test_a_generation_with_quantised_tables_answers_alike_on_any_shards(
    state: StateDir, config: Config, prepared: recipe.Prepared, tmp_path: Path
) -> None:
    index = config.index.model_copy(update={"table_precision": "int8"})
    small = config.model_copy(update={"index": index})
    other = StateDir(tmp_path)
    published = recipe.publish(other, small, prepared, recipe.load_model(state.model_dir))
    floats, _ = load_retriever(generation_dir(state.generations, 1))
    retriever, _ = load_retriever(published.path)
    assert retriever.model.config.table_precision == "int8"
    history = user_history(other.users_file, 1)
    request = Request(features={"history": history}, exclude_ids=history, k=20, exact=True)
    (answer,), (expected,) = retriever([request]), floats([request])
    assert len(set(answer.item_ids.tolist()) & set(expected.item_ids.tolist())) >= 16
    alone = retriever([request, Request(k=3)])[0]
    assert torch.equal(alone.scores, answer.scores)
    names = sorted(path.name for path in (published.path / "tables").iterdir())
    assert any(name.startswith("user_tables.history") for name in names)
    with pytest.raises(CommandError, match=r"index\.table_precision: table .* is int8"):
        recipe.publish(
            other,
            small,
            prepared,
            recipe.LoadedModel(retriever.model, recipe.load_model(state.model_dir).description),
        )


def test_a_generation_with_remote_tables_answers_like_the_quantised_one(
    state: StateDir, config: Config, prepared: recipe.Prepared, tmp_path: Path
) -> None:
    index = config.index.model_copy(update={"table_precision": "int8"})
    local = config.model_copy(update={"index": index})
    names = ("history", "recent", "history_genres")

    def remote(*tables: str) -> Config:
        section = config.tables.model_copy(update={"remote": tables})
        return local.model_copy(update={"tables": section})

    trained = recipe.load_model(state.model_dir)
    paths = [
        recipe.publish(StateDir(tmp_path / name), one, prepared, trained).path
        for name, one in (("local", local), ("remote", remote(*names)))
    ]
    assert sorted(path.stem for path in (paths[1] / "rows").iterdir()) == sorted(names)
    history = user_history(tmp_path / "remote" / "users.safetensors", 1)
    request = Request(features={"history": history}, exclude_ids=history, k=20)
    expected, found = (load_retriever(path)[0]([request])[0] for path in paths)
    assert torch.equal(found.item_ids, expected.item_ids)
    assert torch.equal(found.scores, expected.scores)
    with pytest.raises(CommandError, match=r"^tables\.remote: remote must name .* got 'films'$"):
        recipe.publish(StateDir(tmp_path / "bad"), remote("films"), prepared, trained)


def test_golden_requests_are_of_users_before_their_test(
    state: StateDir, prepared: recipe.Prepared
) -> None:
    golden = read_golden(open_snapshot(generation_dir(state.generations, 1)))
    asked = [case.to_request() for case in golden.cases]
    assert len(asked) == 24
    known = {
        tuple(prepared.split.test_histories.row(row).tolist())
        for row in range(len(prepared.split.user_ids))
    }
    users = [tuple(one.features["history"]) for one in asked if one.features]
    assert len(set(users)) > 10
    assert set(users) <= known


def test_the_split_is_that_of_the_training_given(config: Config, films_folder: Path) -> None:
    said: list[str] = []
    training = config.training.model_copy(update={"split": "temporal"})
    cut = recipe.prepare(
        config, data=films_folder, environ={}, report=said.append, training=training
    )
    assert cut.split.test_from is not None
    assert said[1] == f"split: {cut.split.summary}"
    assert len(cut.split.train_rows) < 0.9 * len(cut.data.ratings)


def test_publishing_again_makes_the_next_generation(
    state: StateDir, config: Config, prepared: recipe.Prepared
) -> None:
    before = list_generations(state.generations)
    published = recipe.publish(state, config, prepared, recipe.load_model(state.model_dir))
    assert list_generations(state.generations) == [*before, before[-1] + 1]
    described = recipe.describe_published(published)
    assert described["documents"] == 400
    assert described["longest_list"] >= described["mean_list"]


def test_an_index_that_was_trained_with_the_towers_is_kept_and_published(
    config: Config, prepared: recipe.Prepared, tmp_path: Path
) -> None:
    training = config.training.model_copy(update={"joint": JointConfig()})
    joint = config.model_copy(update={"training": training})
    state = StateDir(tmp_path)
    trained = recipe.train_model(state, joint, prepared, progress=False)
    loaded = recipe.load_model(state.model_dir)
    assert torch.equal(loaded.centroids, trained.centroids)
    published = recipe.publish(state, joint, prepared, loaded)
    stored, _ = open_snapshot(published.path).load_dense()
    assert stored.shape == (16, 16)
    assert torch.allclose(stored, torch.nn.functional.normalize(trained.centroids, dim=1))
    automatic = joint.model_copy(update={"index": joint.index.model_copy(update={"clusters": 0})})
    again = recipe.publish(state, automatic, prepared, loaded)
    assert open_snapshot(again.path).spec.num_clusters == 16
    other = joint.model_copy(update={"index": joint.index.model_copy(update={"clusters": 8})})
    with pytest.raises(CommandError, match=r"index\.clusters must be 0 or 16, .* got 8"):
        recipe.publish(state, other, prepared, loaded)
    (state.model_dir / recipe.INDEX).unlink()
    with pytest.raises(CommandError, match=r"index\.safetensors cannot be used.*train again"):
        recipe.load_model(state.model_dir)


def test_semantic_ids_are_trained_kept_published_and_served(
    config: Config, prepared: recipe.Prepared, state: StateDir, tmp_path: Path
) -> None:
    semantic = SemanticTrainingConfig(decoder=SemanticConfig(levels=2, width=8), steps=6)
    training = config.training.model_copy(update={"semantic": semantic})
    index = config.index.model_copy(update={"semantic_k": 25})
    wanted = config.model_copy(update={"training": training, "index": index})
    folder = StateDir(tmp_path)
    trained = recipe.train_model(folder, wanted, prepared, progress=False)
    log = (folder.training_dir / "log.csv").read_text().splitlines()
    assert log[-1].startswith("semantic,6,")
    loaded = recipe.load_model(folder.model_dir)
    assert loaded.description.semantic == trained.semantic.spec
    assert loaded.description.semantic_ndcg == trained.semantic_ndcg
    for name, tensor in trained.semantic.state_dict().items():
        assert torch.equal(loaded.semantic.state_dict()[name], tensor)
    published = recipe.publish(folder, wanted, prepared, loaded)
    retriever, _ = load_retriever(published.path)
    history = user_history(folder.users_file, 1)
    request = Request(features={"history": history}, exclude_ids=history, k=20)
    (answer,) = retriever([request])
    assert answer.plan.semantic_k == answer.counts.semantic_kept == 25
    assert recipe.load_model(state.model_dir).semantic is None
    (folder.model_dir / recipe.SEMANTIC_WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(CommandError, match=r"semantic\.safetensors cannot be used: .*train again"):
        recipe.load_model(folder.model_dir)
