"""The text recipe: from an encoder's folder to a text tower, and films as texts.

The folder is what ``save_pretrained`` of transformers writes: ``config.json``, ``tokenizer.json``
and ``model.safetensors``, whole or in parts with an index. Nothing is downloaded, and nothing in
the folder can run code: pickled weights and models that bring code of their own are refused.

Shapes: N items, E width of the encoder's states, D embedding dimension.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
import torch
from torch import Tensor

from silvershard.deploy.errors import CommandError
from silvershard.deploy.movielens import MovieLens
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.dense import PaddedLinear
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.text_config import TextTowerConfig, TextTrainingConfig
from silvershard.model.text_encoder import encoder_class, states_only, text_library
from silvershard.model.text_tower import TextTower
from silvershard.model.training_texts import TrainingTexts, embed_training_texts

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
POOLING = "1_Pooling/config.json"
MODULES = "modules.json"

FILM_TEXT = ("{title}", "Genres: {genres}", "Tags: {tags}")
"""How a film reads: ``Heat (1995). Genres: Action, Crime, Thriller. Tags: heist``."""

# Where a configuration came from and what code it wants is no part of a generation.
_LEFT_OUT = ("_name_or_path", "auto_map", "transformers_version")


def load_text_tower(
    directory: Path, *, projection: Tensor | None = None, **settings: Any
) -> TextTower:
    """Return a text tower with the weights and the tokenizer of a folder.

    Args:
        directory: of the encoder.
        projection: ``(D, E)`` float32, applied to the pooled states; without it D is E.
        settings: fields of ``TextTowerConfig``. Where ``pooling`` is not among them, it is what the
            folder's ``1_Pooling/config.json`` says, and ``mean`` if there is none.

    Raises:
        CommandError: if a file is missing, damaged or pickled, if the weights are not those of the
            model, or if the model is no encoder of text.
        ValueError: if a setting is out of range, or a package is missing.
    """
    for name in (CONFIG, TOKENIZER):
        if not (directory / name).is_file():
            raise CommandError(f"{directory} must have a {name}, there is none")
    if not any((directory / name).is_file() for name in WEIGHTS):
        found = ", ".join(sorted(path.name for path in directory.glob("*.bin"))) or "none"
        raise CommandError(
            f"{directory} must have safetensors weights as {' or '.join(WEIGHTS)}, got {found}; "
            "pickled weights are never read, convert them"
        )
    if projection is None and _has_dense(directory):
        raise CommandError(
            f"{directory / MODULES} lists a dense layer behind the encoder: give it as projection"
        )
    encoder = _load_encoder(directory)
    tokenizer = np.frombuffer((directory / TOKENIZER).read_bytes(), dtype=np.uint8)
    described = json.loads(encoder.config.to_json_string(use_diff=False))
    if "pooling" not in settings:
        settings["pooling"] = _pooling(directory)
    tower = TextTower(
        TextTowerConfig(
            **settings,
            encoder={name: value for name, value in described.items() if name not in _LEFT_OUT},
            tokenizer_bytes=len(tokenizer),
            dim=None if projection is None else projection.shape[0],
        )
    )
    tower.encoder.load_state_dict(encoder.state_dict())
    tower.tokenizer_json.copy_(torch.from_numpy(tokenizer.copy()))
    if tower.projection is not None and projection is not None:
        _load_projection(tower.projection, projection)
    _check_vocabulary(directory, tower)
    return tower


def training_texts(config: TextTrainingConfig, features: Mapping[str, Ragged]) -> TrainingTexts:
    """Return what the encoder of a training makes of its items and of what asks for them.

    Args:
        config: the section of the recipe; it names the folder.
        features: the values of each item feature.

    Raises:
        CommandError: if the folder is no encoder, or a feature or setting is wrong, naming it.
    """
    try:
        encoder = load_text_tower(
            Path(config.encoder).expanduser(),
            item_text=config.item_text,
            query_prefix=config.query_prefix,
            item_prefix=config.item_prefix,
            max_tokens=config.max_tokens,
        )
        return embed_training_texts(encoder, features, config)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CommandError(f"training.text: {problem}") from None
    except ValueError as error:
        raise CommandError(f"training.text: {error}") from None
    except CommandError as error:
        raise CommandError(f"training.text.encoder: {error}") from None


def _load_encoder(directory: Path) -> Any:
    transformers = text_library("transformers")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **options)
        encoder, report = encoder_class(config).from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CommandError(f"{directory} cannot be used as an encoder: {error}") from None
    # What a class has behind the states is often not among the weights, and is not used.
    wrong = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    wrong += [str(found) for found in report["mismatched_keys"]]
    if wrong:
        raise CommandError(
            f"{directory} must have all weights of a {config.model_type}, "
            f"{len(wrong)} are missing or of another shape: {', '.join(sorted(wrong)[:3])}"
        )
    return states_only(encoder)


def _load_projection(layer: PaddedLinear, projection: Tensor) -> None:
    dim, width = layer.out_features, layer.in_features
    if projection.shape != (dim, width) or not bool(projection.isfinite().all()):
        raise ValueError(
            f"projection must be (D, {width}) and finite, got {tuple(projection.shape)}"
        )
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:width, :dim] = projection.T
        layer.bias.zero_()


def _check_vocabulary(directory: Path, tower: TextTower) -> None:
    try:
        largest = max(tower.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    except ValueError as error:
        raise CommandError(f"{directory / TOKENIZER} cannot be used: {error}") from None
    rows = tower.config.encoder.get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise CommandError(
            f"{directory / TOKENIZER} must have the encoder's vocabulary of {rows} tokens, "
            f"got token {largest}"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CommandError(f"{path} must be JSON: {error}") from None


def _pooling(directory: Path) -> str:
    """How the folder says that states are pooled; ``mean`` if it says nothing."""
    path = directory / POOLING
    if not path.is_file():
        return "mean"
    read = _read_json(path)
    if not isinstance(read, dict):
        raise CommandError(f"{path} must be a JSON object, got {type(read).__name__}")
    prefix = "pooling_mode_"
    chosen = [name for name, value in read.items() if name.startswith(prefix) and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    named = [str(read["pooling_mode"])] if "pooling_mode" in read else []
    pooling = [known.get(name, name) for name in chosen] or named
    if pooling not in (["mean"], ["cls"]):
        raise CommandError(
            f"{path} must pool by mean or cls, got {', '.join(pooling) or 'neither'}"
        )
    return pooling[0]


def _has_dense(directory: Path) -> bool:
    path = directory / MODULES
    if not path.is_file():
        return False
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise CommandError(f"{path} must be a JSON list of objects")
    return any(str(module.get("type", "")).endswith(".Dense") for module in modules)


def principal_axes(embeddings: Tensor, dim: int) -> Tensor:
    """Return the ``dim`` directions that keep most of the inner products among embeddings.

    As the ``projection`` of a tower they make an index smaller: the best linear map to ``dim``
    numbers for items like these, by squared error.

    Args:
        embeddings: ``(N, E)`` float32, as an unprojected tower gives them.
        dim: D, from 1 to E.

    Returns:
        ``(D, E)`` float32 with orthonormal rows, strongest first.

    Raises:
        ValueError: if ``dim`` is out of range.

    Source:
        Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    if not 1 <= dim <= embeddings.shape[1]:
        raise ValueError(f"dim must be in 1..{embeddings.shape[1]}, got {dim}")
    wide = embeddings.double()
    axes: Tensor = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)  # (E, E)
    return axes[:, :dim].T.float().contiguous()


def film_schema(base: Schema) -> Schema:
    """The schema of films that are found by a sentence: same filters, signals and fields.

    Args:
        base: as of ``movielens.schema``; its towers' features, heads and tasks are replaced.
    """
    return Schema.model_validate(
        {
            **dict(base),
            "user_features": (
                UserFeature(name="query", kind="text", dtype="string", max_length=8),
            ),
            "item_features": tuple(
                UserFeature(name=name, kind="text", dtype="string")
                for name in ("title", "genres", "tags")
            ),
            "heads": ("user",),
            "tasks": (),
            "value": "score",
            "weights": {},
        }
    )


def film_catalogue(data: MovieLens, base: Catalogue) -> Catalogue:
    """The films of a catalogue with what ``film_schema`` reads of them.

    The tags are those of all people at all times: an index of them must not be judged by how well
    it foretells ratings.

    Args:
        data: the data set.
        base: all of its films, as ``movielens.catalogue`` makes them.
    """
    titles = Ragged(data.titles, np.arange(len(data.titles) + 1, dtype=np.int64))
    return dataclasses.replace(
        base, features={"title": titles, "genres": data.genres, "tags": data.tags}
    )
