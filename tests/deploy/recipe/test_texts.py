"""The MovieLens recipe with texts: trained, published and served without the encoder's folder."""

import csv
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from silvershard.deploy import recipe
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir
from silvershard.model.request import Request, RequestError
from silvershard.model.training import Trained
from silvershard.model.two_tower import TwoTower
from silvershard.shard.golden import check_generation, read_golden
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import open_snapshot

pytestmark = pytest.mark.slow


class World(NamedTuple):
    config: Config
    prepared: recipe.Prepared
    state: StateDir
    trained: Trained
    generation: Path


def configured(encoder: Path, **text: object) -> Config:
    training = {
        "steps": 6,
        "ranker_steps": 3,
        "dim": 16,
        "text": {"encoder": str(encoder), "max_tokens": 32, **text},
    }
    return Config.model_validate(
        {"training": training, "index": {"clusters": 16}, "model": {"checkpoint_every": 2}}
    )


@pytest.fixture(scope="module")
def world(
    films_folder: Path, sentence_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    """A generation of a model with texts; the encoder's folder is gone before it is published."""
    folder = tmp_path_factory.mktemp("gone") / "encoder"
    shutil.copytree(sentence_encoder_folder, folder)
    config = configured(folder)
    prepared = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
    state = StateDir(tmp_path_factory.mktemp("state"))
    state.create()
    trained = recipe.train_model(state, config, prepared, progress=False)
    shutil.rmtree(folder)
    loaded = recipe.load_model(state.model_dir)
    published = recipe.publish(state, config, prepared, loaded)
    return World(config, prepared, state, trained, published.path)


ASKED = (
    Request(features={"query": ["a night of rain"]}, k=5, filter="year >= 1990"),
    Request(features={"query": ["a night of rain"], "history": [1, 7, 9]}, k=5),
    Request(features={"history": [1, 7, 9]}, k=5, filter='genre:"Drama"'),
    Request(features={"query": ["drama"]}, k=50, exact=True),
)


def test_a_generation_answers_a_sentence_a_history_and_both(world: World) -> None:
    served = load_retriever(world.generation)[0]
    answers = [served([request])[0] for request in ASKED]
    assert all(
        len(answer.item_ids) == request.k for answer, request in zip(answers, ASKED, strict=True)
    )
    first = [tuple(answer.item_ids.tolist()) for answer in answers]
    assert len(set(first)) == len(first)
    years = dict(zip(world.prepared.data.movie_ids, world.prepared.data.years, strict=True))
    assert all(years[item] >= 1990 for item in first[0])
    assert set(answers[0].task_scores) == {"rated", "liked"}
    with pytest.raises(RequestError, match="a text that is not blank"):
        served([Request(features={"query": [" "]})])


def test_golden_requests_have_texts_and_hold(world: World) -> None:
    golden = read_golden(open_snapshot(world.generation))
    asked = [case.to_request().features for case in golden.cases]
    assert any("query" in one and "history" in one for one in asked)
    assert any("query" in one and "history" not in one for one in asked)
    assert check_generation(world.generation) == len(golden.cases)


def test_the_serving_generation_embeds_a_new_film(world: World) -> None:
    served = load_retriever(world.generation)[0].model
    assert isinstance(served, TwoTower)
    features = world.prepared.catalogue.take([0, 1]).features
    unknown = features["movie_id"].values + 10_000_000
    new = {
        **features,
        "movie_id": type(features["movie_id"])(unknown, features["movie_id"].offsets),
    }
    assert torch.equal(served.embed_items(new), world.trained.model.embed_items(new))


def test_a_training_with_texts_goes_on_from_its_checkpoint(
    world: World, films_folder: Path, sentence_encoder_folder: Path, tmp_path: Path
) -> None:
    config = configured(sentence_encoder_folder)
    prepared = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
    state = StateDir(tmp_path)
    state.create()
    recipe.train_model(state, config, prepared, progress=False)
    again = recipe.train_model(state, config, prepared, progress=False, resume=True)
    for name, value in world.trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    other = configured(sentence_encoder_folder, query_share=0.2)
    with pytest.raises(CommandError, match="other settings, seed or data"):
        recipe.train_model(state, other, prepared, progress=False, resume=True)


def test_nothing_that_is_held_out_is_among_the_tags_of_items(
    films_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ml"
    shutil.copytree(films_folder, folder)
    plain = recipe.prepare(Config(), data=folder, environ={}, report=lambda _: None)
    parts, data = plain.split, plain.data
    user = int(parts.user_ids[0])
    tested, validated = int(parts.test_item_ids[0]), int(parts.valid_item_ids[0])
    trained = int(parts.histories.row(0)[0])
    other = int(parts.user_ids[1])
    with (folder / "tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("userId", "movieId", "tag", "timestamp"))
        writer.writerow((user, tested, "tested", 1))
        writer.writerow((user, validated, "validated", 1))
        writer.writerow((user, trained, "trained", 1))
        writer.writerow((other, trained, "of two", 1))
        writer.writerow((user, trained, "of two", 1))
        # Long after all ratings.
        writer.writerow((other, trained, "late", 4_000_000_000))
    for kind, wanted in (("leave_last_out", ["of two", "late", "trained"]), ("temporal", None)):
        config = Config.model_validate(
            {"training": {"split": kind, "text": {"encoder": "a folder"}}}
        )
        prepared = recipe.prepare(config, data=folder, environ={}, report=lambda _: None)
        tags = prepared.catalogue.features["tags"]
        held = set(tags.values.tolist()) - {"trained", "of two"}
        row = int(data.movie_rows(data.movie_ids[data.movie_ids == trained])[0])
        if wanted is None:
            assert "late" not in held
        else:
            assert held == {"late"}
            assert tags.row(row).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"encoder": "nowhere"}, r"training\.text\.encoder: nowhere must have a config\.json"),
        ({"max_tokens": 64}, r"training\.text: encoder of model_type 'bert' cannot encode max_tok"),
        ({"item_text": ["{plot}"]}, r"training\.text: text\.item_text must name item features, wh"),
        ({"item_text": ["plot"]}, r"training\.text: item_text must have one \{feature\} in each"),
        ({"query_texts": ["plot"]}, r"training\.text: text\.query_texts must name item features"),
    ],
)
def test_texts_that_cannot_be_trained_with_are_refused_before_anything_is_written(
    world: World,
    films_folder: Path,
    sentence_encoder_folder: Path,
    tmp_path: Path,
    text: dict[str, object],
    message: str,
) -> None:
    config = configured(**{"encoder": sentence_encoder_folder, **text})  # type: ignore[arg-type]
    prepared = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
    state = StateDir(tmp_path)
    state.create()
    with pytest.raises(CommandError, match=message):
        recipe.train_model(state, config, prepared, progress=False)
    assert not state.training_dir.exists()
