"""The MovieLens recipe with user features: from the files to what the generation answers."""

import csv
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from silvershard.deploy import evaluate, recipe
from silvershard.deploy.config import Config
from silvershard.deploy.movielens_users import after_all, before
from silvershard.deploy.state import StateDir
from silvershard.deploy.synthetic import generate
from silvershard.deploy.users import read_user
from silvershard.model.request import Request, WeightedIds
from silvershard.model.training_data import held_out, prepare
from silvershard.model.two_tower import TwoTower
from silvershard.shard.errors import ConfigError
from silvershard.shard.load import load_retriever


class Trained(NamedTuple):
    config: Config
    prepared: recipe.Prepared
    model: TwoTower
    state: StateDir
    generation: Path


@pytest.fixture(scope="module")
def tagged_folder(films_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films with the tags that their users gave them."""
    folder = tmp_path_factory.mktemp("tagged") / "ml"
    shutil.copytree(films_folder, folder)
    with (folder / "tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("userId", "movieId", "tag", "timestamp"))
        given = generate(400, 80, 40, seed=3).tagging
        writer.writerows(zip(*(column.tolist() for column in given), strict=True))
    return folder


@pytest.fixture(scope="module")
def trained(tagged_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = Config.model_validate(
        {
            "training": {
                "user_features": ["activity", "tags"],
                "steps": 6,
                "ranker_steps": 3,
                "dim": 16,
            },
            "index": {"clusters": 16},
        }
    )
    prepared = recipe.prepare(config, data=tagged_folder, environ={}, report=lambda _: None)
    state = StateDir(tmp_path_factory.mktemp("state"))
    state.create()
    recipe.train_model(state, config, prepared, progress=False)
    loaded = recipe.load_model(state.model_dir)
    published = recipe.publish(state, config, prepared, loaded)
    assert isinstance(loaded.model, TwoTower)
    return Trained(config, prepared, loaded.model, state, published.path)


def test_the_model_reads_the_features_of_the_setting(trained: Trained) -> None:
    made = trained.model.config
    assert [one.name for one in made.user_ids] == ["tags"]
    assert [(one.name, one.width) for one in made.user_numbers] == [("activity", 2)]
    names = [one.name for one in trained.prepared.schema.user_features]
    assert names == ["history", "activity", "tags"]


def test_what_training_reads_of_a_user_is_what_a_request_says(trained: Trained) -> None:
    prepared, model = trained.prepared, trained.model
    rows = prepared.split.valid_rows[prepared.split.valid_rows >= 0]
    seen = recipe.interactions(prepared, prepared.split.train_rows)
    following = recipe.interactions(prepared, rows)
    _, data = prepare(
        prepared.schema,
        prepared.catalogue.features,
        prepared.catalogue.signals,
        seen,
        trained.config.training,
    )
    held = held_out(model, data, seen, following)
    further = recipe.user_features(prepared, before(prepared.data, rows))
    users = np.flatnonzero(prepared.split.valid_rows >= 0)
    features = [
        prepared.schema.check_features({"history": prepared.split.histories.row(int(at)), **others})
        for at, others in zip(users, further, strict=True)
    ]
    served = model.encode(features)
    with torch.inference_mode():
        state = model.user_state(model.history(held.rows, held.lengths, held.users))
    assert torch.equal(served.user_state, state)
    assert any(isinstance(one["tags"], WeightedIds) for one in further)


def test_users_of_the_data_set_are_asked_with_their_features(trained: Trained) -> None:
    data = trained.prepared.data
    everything = recipe.user_features(trained.prepared, after_all(data))
    retriever, _ = load_retriever(trained.generation)
    users = np.unique(data.user_ids)
    for at in (0, 30, len(users) - 1):
        stored = read_user(trained.state.users_file, int(users[at]))
        assert stored is not None
        asked = {"history": stored.history, **stored.features}
        same = {"history": stored.history, **everything[at]}
        one, other = retriever([Request(features=asked, k=5), Request(features=same, k=5)])
        assert torch.equal(one.scores, other.scores)
        assert one.warnings == ()
        (plain,) = retriever([Request(features={"history": stored.history}, k=5)])
        assert not torch.equal(one.scores, plain.scores)


def test_users_that_are_tested_come_with_the_features_before_their_test(trained: Trained) -> None:
    users = evaluate.tested_users(trained.prepared)
    split, data = trained.prepared.split, trained.prepared.data
    rows = split.test_rows[split.test_rows >= 0]
    for features, history, row in zip(users.features, users.histories, rows, strict=True):
        mean, count = features["activity"]
        assert count == pytest.approx(np.log1p(len(history)))
        assert mean == pytest.approx(data.ratings[row - len(history) : row].mean())


def test_an_unknown_feature_is_named(tagged_folder: Path) -> None:
    config = Config.model_validate({"training": {"user_features": ["age"]}})
    with pytest.raises(ConfigError, match="user_features: must be among tags, activity, got 'age'"):
        recipe.prepare(config, data=tagged_folder, environ={}, report=lambda _: None)
