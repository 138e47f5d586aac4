"""The MovieLens recipe: from a data set to a trained model, and from there to a generation.

``<state>/model`` holds ``model.safetensors`` and ``model.json``, ``semantic.safetensors`` where
semantic ids were trained, ``index.safetensors`` where the index was; nothing in it can run code.
``<state>/training`` holds the log and the last checkpoint of the training.

Shapes: N movies, U users, R ratings.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import safetensors
import safetensors.torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from silvershard.deploy import movielens, movielens_texts, movielens_users
from silvershard.deploy.config import Config
from silvershard.deploy.distributed import train_on_processes
from silvershard.deploy.errors import CommandError
from silvershard.deploy.log_cut import FROM_START, LogCut
from silvershard.deploy.movielens import MovieLens, Popularity, Split
from silvershard.deploy.movielens_users import Moments
from silvershard.deploy.publishing import index_options, num_clusters, served_model
from silvershard.deploy.state import StateDir
from silvershard.deploy.text_recipe import training_texts
from silvershard.deploy.training_files import TrainingFiles
from silvershard.deploy.users import write_users
from silvershard.model.catalogue import Catalogue
from silvershard.model.registry import build
from silvershard.model.request import FeatureValues, Request
from silvershard.model.schema import Schema
from silvershard.model.semantic_config import SemanticSpec
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.training import Trained, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions
from silvershard.model.training_texts import TrainingTexts
from silvershard.shard.publish import PHASES, Published, publish_generation

BUILDER = "two_tower"
WEIGHTS = "model.safetensors"
SEMANTIC_WEIGHTS = "semantic.safetensors"
INDEX = "index.safetensors"
DESCRIPTION = "model.json"
# A training may go on with others of these.
_ELSEWHERE = {"processes", "device", "process_timeout_s"}
_CENTROIDS = "centroids"
_GOLDEN_USERS = 64
"""Users that golden requests are drawn from, about."""


class DataSource(BaseModel):
    """Where the data of a model came from, so that ``publish`` can find them again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="folder or zip; empty: downloaded, or generated")
    summary: str = Field(description="what was found there")
    generated: bool = Field(description="whether the films are made up")


class ModelDescription(BaseModel):
    """What a trained model is made from and how it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    builder: str = Field(description="name in the model registry")
    config: dict[str, Any] = Field(description="what the builder makes the module from")
    name: str = Field(description="logical model name")
    training: TrainingConfig = Field(description="how it was trained")
    seed: int = Field(description="seed of the training")
    seconds: float = Field(description="time the training took")
    tower_ndcg: float | None = Field(description="NDCG@10 of the towers on the validation items")
    ranker_ndcg: float | None = Field(description="NDCG@10 after the reranker on the same")
    data: DataSource = Field(description="what it was trained on")
    semantic: SemanticSpec | None = Field(
        default=None, description="sizes of the semantic ids that were trained; none without"
    )
    semantic_ndcg: float | None = Field(
        default=None, description="NDCG@10 of the best items of their decoder on the same"
    )


class Prepared(NamedTuple):
    """A data set with everything that training, publishing and evaluation derive from it."""

    data: MovieLens
    source: DataSource
    split: Split
    popularity: Popularity
    schema: Schema
    catalogue: Catalogue


class LoadedModel(NamedTuple):
    """A trained model as ``train`` left it."""

    model: nn.Module
    description: ModelDescription
    semantic: SemanticSource | None = None
    centroids: Tensor | None = None
    """``(C, D)`` float32 of an index that was trained with the towers."""


def prepare(
    config: Config,
    *,
    data: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    report: Callable[[str], None] = print,
    training: TrainingConfig | None = None,
) -> Prepared:
    """Find a data set and derive split, popularity and catalogue from it.

    Args:
        config: ``paths`` says where to look when ``data`` is None.
        data: folder or zip.
        environ: environment variables.
        report: hears the lines of ``movielens.find``; the first says where the data come from.
        training: how the model was trained that these data are for, which decides the split; the
            section of ``config`` if None.

    Raises:
        DataError: if the data that were named cannot be used, or leave nothing to train on.
    """
    named = data or (Path(config.paths.data) if config.paths.data else None)
    if named is None and environ.get(movielens.DATA_VARIABLE):
        named = Path(environ[movielens.DATA_VARIABLE])
    found = movielens.find(
        named,
        environ=environ,
        cache_dir=Path(config.paths.cache).expanduser() if config.paths.cache else None,
        max_malformed=config.paths.max_malformed,
        report=report,
    )
    parts = movielens.split(found, training or config.training)
    if parts.test_from is not None:
        report(f"split: {parts.summary}")
    popular = movielens.popularity(found, parts)
    chosen = training or config.training
    schema = schema_of(chosen)
    texts = movielens_texts.columns(found, parts) if chosen.text else None
    items = movielens.catalogue(found, popular.counts, popular.means, texts)
    items.validate(schema)
    return Prepared(
        data=found,
        source=DataSource(
            path=str(named.expanduser().absolute()) if named else "",
            summary=found.summary,
            generated=found.generated,
        ),
        split=parts,
        popularity=popular,
        schema=schema,
        catalogue=items,
    )


def schema_of(training: TrainingConfig) -> Schema:
    """Return what the items and users of a model consist of that was trained so."""
    return movielens.schema(training.user_features, texts=training.text is not None)


def train_model(
    state: StateDir,
    config: Config,
    prepared: Prepared,
    *,
    progress: bool = True,
    resume: bool = False,
) -> Trained:
    """Train on the training split and write the model into the state directory.

    Args:
        state: gets the model, the log and the checkpoints.
        config: its ``training`` section is the recipe.
        prepared: the data.
        progress: show progress bars.
        resume: go on from the checkpoint in the state directory.

    Raises:
        CommandError: if ``resume`` is set and there is no checkpoint of this training.
    """
    clusters = config.training.clusters or num_clusters(config, len(prepared.catalogue))
    recipe = config.training.model_copy(update={"clusters": clusters})
    rows = prepared.split.train_rows
    texts = training_texts(recipe.text, prepared.catalogue.features) if recipe.text else None
    files = TrainingFiles(state.training_dir, _training(config, recipe, prepared, texts))
    watch = Watch(
        on_log=files.log,
        on_checkpoint=files.write_checkpoint,
        checkpoint_every=config.model.checkpoint_every,
        progress=progress,
    )
    several = recipe.processes > 1 or recipe.device != "cpu"
    trained = (train_on_processes if several else train)(
        prepared.schema,
        prepared.catalogue.features,
        prepared.catalogue.signals,
        interactions(prepared, rows),
        recipe,
        validation=_validation(prepared),
        seed=config.model.seed,
        watch=watch,
        resume=files.resume() if resume else None,
        texts=texts,
    )
    description = ModelDescription(
        builder=BUILDER,
        config=trained.model.config.model_dump(mode="json"),
        name=config.model.name,
        training=recipe,
        seed=config.model.seed,
        seconds=trained.seconds,
        tower_ndcg=finite(trained.tower_ndcg),
        ranker_ndcg=finite(trained.ranker_ndcg),
        data=prepared.source,
        semantic=trained.semantic.spec if trained.semantic else None,
        semantic_ndcg=finite(trained.semantic_ndcg),
    )
    save_model(state.model_dir, trained.model, description, trained.semantic, trained.centroids)
    return trained


def _training(
    config: Config, recipe: TrainingConfig, prepared: Prepared, texts: TrainingTexts | None
) -> str:
    """Return what tells one training from another."""
    parts = {
        "recipe": recipe.model_dump(mode="json", exclude=_ELSEWHERE),
        "seed": config.model.seed,
        "schema": prepared.schema.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    data, catalogue = prepared.data, prepared.catalogue
    columns: list[NDArray[Any]] = [data.user_ids, data.rated_movie_ids, data.ratings]
    if recipe.user_features:
        columns += [data.timestamps, *data.tagging]
    if texts is not None:
        columns += [texts.items.numpy(), texts.queries.numpy()]
    columns += [prepared.split.train_rows, prepared.split.valid_rows, catalogue.signals]
    for name in sorted(catalogue.features):
        columns += [catalogue.features[name].offsets, catalogue.features[name].values]
    for column in columns:
        is_text = column.dtype == object
        digest.update(json.dumps(column.tolist()).encode() if is_text else column.tobytes())
    return digest.hexdigest()


def interactions(prepared: Prepared, rows: NDArray[np.int64]) -> Interactions:
    """Return the ratings ``(M,)`` of these rows, with the user features just before each."""
    data, moments = prepared.data, movielens_users.before(prepared.data, rows)
    return Interactions(
        user_ids=data.user_ids[rows],
        item_ids=data.rated_movie_ids[rows],
        ratings=data.ratings[rows],
        features=movielens_users.columns(data, _further(prepared), moments),
        feature_rows=np.arange(len(rows), dtype=np.int64),
    )


def user_features(prepared: Prepared, moments: Moments) -> list[dict[str, FeatureValues]]:
    """Return what requests say of users at each moment beside the history."""
    columns = movielens_users.columns(prepared.data, _further(prepared), moments)
    return movielens_users.requests(columns, len(moments.ends))


def _further(prepared: Prepared) -> list[str]:
    """Return the names of what the data tell of users beside the history, which is the first."""
    return [one.name for one in prepared.schema.user_features[1:] if one.kind != "text"]


def _validation(prepared: Prepared) -> Interactions:
    rows = prepared.split.valid_rows
    return interactions(prepared, rows[rows >= 0])


def finite(value: float) -> float | None:
    """Return the number, or None where JSON has no form for it."""
    return value if math.isfinite(value) else None


def save_model(
    directory: Path,
    model: nn.Module,
    description: ModelDescription,
    semantic: SemanticSource | None = None,
    centroids: Tensor | None = None,
) -> None:
    """Write a model; the directory has the old model or the new one, never a mixture."""
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {name: one.detach().cpu().contiguous() for name, one in model.state_dict().items()}
    safetensors.torch.save_file(tensors, staging / WEIGHTS)
    if semantic is not None:
        safetensors.torch.save_file(semantic.state_dict(), staging / SEMANTIC_WEIGHTS)
    if centroids is not None:
        safetensors.torch.save_file({_CENTROIDS: centroids.contiguous()}, staging / INDEX)
    (staging / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)


def load_model(directory: Path) -> LoadedModel:
    """Return the model that ``train`` wrote.

    Raises:
        CommandError: if there is none, or it is damaged, naming the file.
    """
    file = directory / DESCRIPTION
    if not file.is_file():
        raise CommandError(f"no model is trained in {directory}: run `silvershard train`")
    try:
        description = ModelDescription.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise CommandError(f"{file}: {where}: {problem['msg'].lower()}; train again") from None
    weights = directory / WEIGHTS
    try:
        model = build(description.builder, description.config)
        model.load_state_dict(safetensors.torch.load_file(weights))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CommandError(f"{weights} cannot be used: {error}; train again") from None
    return LoadedModel(
        model.eval().requires_grad_(requires_grad=False),
        description,
        _load_semantic(directory, description),
        _load_centroids(directory, description),
    )


def _load_semantic(directory: Path, description: ModelDescription) -> SemanticSource | None:
    if description.semantic is None:
        return None
    weights = directory / SEMANTIC_WEIGHTS
    try:
        state = safetensors.torch.load_file(weights)
        semantic = SemanticSource(description.semantic, state["codebooks"].shape[2])
        semantic.load_state_dict(state)
    except (
        OSError,
        KeyError,
        IndexError,
        ValueError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        raise CommandError(f"{weights} cannot be used: {error}; train again") from None
    return semantic.eval().requires_grad_(requires_grad=False)


def _load_centroids(directory: Path, description: ModelDescription) -> Tensor | None:
    if description.training.joint is None:
        return None
    file = directory / INDEX
    try:
        return safetensors.torch.load_file(file)[_CENTROIDS]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise CommandError(f"{file} cannot be used: {error}; train again") from None


def publish(
    state: StateDir,
    config: Config,
    prepared: Prepared,
    loaded: LoadedModel,
    at: LogCut = FROM_START,
) -> Published:
    """Write the next generation, and the histories of the users beside it.

    Args:
        state: where they go.
        config: settings.
        prepared: the data.
        loaded: the model.
        at: place in the update log up to which its updates are in the data.
    """
    description = loaded.description
    options = index_options(config, len(prepared.catalogue), loaded.semantic, loaded.centroids)
    served = served_model(config, loaded.model, description.config)
    bar = tqdm(total=len(PHASES), desc="publishing", delay=2, leave=False)

    def on_phase(phase: str) -> None:
        bar.set_description(phase)
        bar.update()

    published = publish_generation(
        state.generations,
        name=description.name,
        model=served.model,
        builder=description.builder,
        config=served.config,
        catalogue=prepared.catalogue,
        schema=prepared.schema,
        remote_rows=served.remote_rows,
        golden_users=_golden_users(prepared),
        log_id=at.log_id,
        cut=at.cut,
        on_phase=on_phase,
        **options,
    )
    bar.close()
    data = prepared.data
    features = user_features(prepared, movielens_users.after_all(data))
    write_users(state.users_file, data.user_ids, data.rated_movie_ids, features)
    return published


def _golden_users(prepared: Prepared) -> list[Request]:
    """Return some users that are tested, evenly spread, as they are just before the test."""
    split = prepared.split
    tested = np.flatnonzero(split.test_rows >= 0)
    chosen = tested[:: max(len(tested) // _GOLDEN_USERS, 1)]
    histories = [split.test_histories.row(int(row)).tolist() for row in chosen]
    moments = movielens_users.before(prepared.data, split.test_rows[chosen])
    further = user_features(prepared, moments)
    requests = [
        Request(features={"history": history, **others}, exclude_ids=history)
        for history, others in zip(histories, further, strict=True)
    ]
    if movielens_texts.REQUEST_FEATURE not in prepared.schema.user_features:
        return requests
    # Of three users one has a text as well, and one a text alone.
    for at, title in enumerate(prepared.data.titles[: len(requests)].tolist()):
        known = {} if at % 3 == 2 else requests[at].features
        asked = {movielens_texts.REQUEST_FEATURE.name: [f"films like {title}"]} if at % 3 else {}
        requests[at] = dataclasses.replace(requests[at], features={**known, **asked})
    return requests


def describe_published(published: Published) -> dict[str, Any]:
    """Return what a publish made, for tables and JSON."""
    report = published.planes
    return {
        "path": str(published.path),
        "generation": published.generation,
        "documents": published.documents,
        "longest_list": published.longest_list,
        "mean_list": round(published.mean_list, 1),
        "exact_planes": report.num_exact_planes,
        "bloom_planes": report.num_bloom_planes,
        "false_positive_rate": report.false_positive_rate,
    }
