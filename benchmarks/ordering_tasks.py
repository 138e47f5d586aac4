"""The data sets of the ordering experiment, and rerankers trained on top of the same towers.

Shapes: U users with a held-out item, N items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.planted import PlantedWorld
from silvershard.deploy.config import Config
from silvershard.deploy.evaluate import tested_users
from silvershard.deploy.publishing import num_clusters
from silvershard.deploy.recipe import interactions, prepare
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.clustering import default_clusters
from silvershard.model.quality import Relevant
from silvershard.model.ranker_config import RankerConfig
from silvershard.model.request import FeatureValues
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training import Checkpoint, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions
from silvershard.model.training_data import prepare as prepare_training
from silvershard.model.two_tower import TwoTower

CANDIDATES = 1000
"""Per head, that pass the scan and are ranked again."""
PROBE_SHARES = {"few": 1 / 8, "all": 1.0}
"""Of the clusters, per head; few is what the demo publishes as its default."""
PLANTED_DIM = 8

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Task:
    """A data set with the item that each user took next, and the recipe for it.

    Attributes:
        features: what a request says of each user.
        histories: everything before the held-out item, oldest first.
        held_out: the item id of each user.
    """

    name: str
    schema: Schema
    catalogue: Catalogue
    training: Interactions
    validation: Interactions
    features: Sequence[Mapping[str, FeatureValues]]
    histories: Sequence[Sequence[int]]
    held_out: Relevant
    recipe: TrainingConfig

    @property
    def clusters(self) -> int:
        """Clusters of the index."""
        return self.recipe.clusters

    @property
    def probes(self) -> dict[str, int]:
        """Clusters per head by the names of their shares."""
        return {name: max(round(share * self.clusters), 1) for name, share in PROBE_SHARES.items()}


def planted_task(world: PlantedWorld, *, steps: int = 450, ranker_steps: int = 300) -> Task:
    """Return the generated users with recipe, the last item of each held out."""
    num_items = len(world.kinds)
    history = UserFeature(name="history", dtype="int", max_length=50)
    schema = Schema(
        user_features=(history,),
        item_features=tuple(
            UserFeature(name=name, dtype="int", max_length=1) for name in ("item", "kind", "topic")
        ),
        heads=("taken",),
        tasks=("taken",),
        value="taken",
    )
    histories = world.taken[:, :-1].tolist()
    every = np.arange(num_items)
    features = {"item": every, "kind": world.kinds, "topic": world.topics}
    catalogue = Catalogue(
        item_ids=every,
        categories={},
        numbers={},
        signals=np.zeros((num_items, 0), np.float32),
        fields={},
        features={
            name: Ragged(values, np.arange(num_items + 1)) for name, values in features.items()
        },
    )
    return Task(
        name="planted",
        schema=schema,
        catalogue=catalogue,
        training=_interactions(world.taken[:, :-2]),
        validation=_interactions(world.taken[:, -2:-1]),
        features=[{"history": row[-history.max_length :]} for row in histories],
        histories=histories,
        held_out=world.taken[:, -1],
        recipe=TrainingConfig(
            item="item",
            pooled=("kind", "topic"),
            min_rating={},
            dim=PLANTED_DIM,
            steps=steps,
            clusters=default_clusters(num_items),
            ranker_share=0.3,
            ranker_steps=ranker_steps,
            ranker_batch=256,
            ranker_depth=CANDIDATES,
        ),
    )


def _interactions(items: Ids) -> Interactions:
    users = np.repeat(np.arange(len(items)), items.shape[1])
    return Interactions(users, items.flatten(), np.ones(items.size, np.float32))


def movielens_task() -> Task | None:
    """Return MovieLens with the demo's recipe and split; None where it is not to be had."""
    config = Config()
    prepared = prepare(config)
    if prepared.source.generated:
        return None
    tested = tested_users(prepared)
    parts = prepared.split
    clusters = num_clusters(config, len(prepared.catalogue))
    return Task(
        name="movielens",
        schema=prepared.schema,
        catalogue=prepared.catalogue,
        training=interactions(prepared, parts.train_rows),
        validation=interactions(prepared, parts.valid_rows[parts.valid_rows >= 0]),
        features=tested.features,
        histories=tested.histories,
        held_out=tested.held_out,
        recipe=config.training.model_copy(update={"clusters": clusters}),
    )


def train_rankers(
    task: Task, rankers: Mapping[str, RankerConfig], seed: int
) -> dict[str, TwoTower]:
    """Return a model with each reranker, all of them with the same towers.

    Args:
        task: what to train on.
        rankers: the settings by name.
        seed: of towers and rerankers.
    """
    towers: list[Checkpoint] = []
    models: dict[str, TwoTower] = {}
    data = (task.schema, task.catalogue.features, task.catalogue.signals, task.training)
    for name, ranker in rankers.items():
        recipe = task.recipe.model_copy(update={"ranker": ranker})
        resume = None
        if towers:
            torch.manual_seed(seed)
            resume = _with_ranker(towers[-1], prepare_training(*data, recipe)[0])
        trained = train(
            *data,
            recipe,
            validation=task.validation,
            seed=seed,
            watch=Watch(
                on_checkpoint=lambda one: _keep_towers(one, towers),
                checkpoint_every=recipe.steps,
                progress=False,
            ),
            resume=resume,
        )
        models[name] = trained.model
    return models


def _keep_towers(checkpoint: Checkpoint, kept: list[Checkpoint]) -> None:
    if checkpoint.progress.phase == "towers" and not kept:
        kept.append(checkpoint)


def _with_ranker(checkpoint: Checkpoint, model: TwoTower) -> Checkpoint:
    """Return the checkpoint of trained towers with the untrained reranker of another model."""
    prefix = "model.ranker."
    tensors = {name: one for name, one in checkpoint.tensors.items() if not name.startswith(prefix)}
    fresh = {prefix + name: one.clone() for name, one in model.ranker.state_dict().items()}
    return checkpoint._replace(tensors=tensors | fresh)
