"""Structure that only a user feature, or only a number of an item, tells is learnt from it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.request import FeatureValues, WeightedIds
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training import Checkpoint, Trained, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions

NUM_FILMS, GROUPS, NUM_USERS, TESTED = 120, 6, 600, 200
PER_GROUP = NUM_FILMS // GROUPS
CHANCE = PER_GROUP / (NUM_FILMS - 1)

SCHEMA = Schema(
    user_features=(
        UserFeature(name="history", max_length=10),
        UserFeature(name="place", kind="numbers", dtype="float", width=2),
        UserFeature(name="topics", dtype="string"),
    ),
    item_features=(UserFeature(name="film", max_length=1),),
    heads=("rated",),
)
FEATURES = {"film": Ragged.from_rows([[film] for film in range(NUM_FILMS)])}
SIGNALS = np.zeros((NUM_FILMS, 0), dtype=np.float32)
CONFIG = TrainingConfig(
    item="film",
    pooled=(),
    min_rating={},
    dim=16,
    steps=120,
    batch=128,
    negatives=256,
    clusters=8,
    learning_rate=0.03,
    history_dropout=0.8,
    cluster_pull=0.0,
)

RNG = np.random.default_rng(0)
GROUP = RNG.integers(0, GROUPS, NUM_USERS + TESTED)
# The first film is any; the second one is of the user's group.
FIRST = RNG.integers(0, NUM_FILMS, NUM_USERS + TESTED)
SECOND = RNG.integers(0, PER_GROUP, NUM_USERS + TESTED) * GROUPS + GROUP
ANGLE = GROUP * 2 * np.pi / GROUPS
PLACE = 100 + 7 * np.stack([np.cos(ANGLE), np.sin(ANGLE)], 1) + RNG.normal(size=(len(GROUP), 2))
# All users have the same topics; the weights tell them apart.
WEIGHTS = np.where(np.arange(GROUPS) == GROUP[:, None], 3.0, 0.2).astype(np.float32)
TOPICS = [f"topic {group}" for group in range(GROUPS)]


def columns(users: NDArray[np.int64]) -> dict[str, UserColumn]:
    return {
        "place": UserColumn(Ragged.from_rows(PLACE[users].tolist(), dtype="float")),
        "topics": UserColumn(Ragged.from_rows([TOPICS] * len(users)), WEIGHTS[users].ravel()),
    }


def interactions(users: NDArray[np.int64]) -> Interactions:
    films = np.stack([FIRST[users], SECOND[users]], 1)
    return Interactions(
        np.repeat(users, 2), films.ravel(), np.ones(2 * len(users), np.float32), columns(users)
    )


TRAINED_USERS, TESTED_USERS = np.arange(NUM_USERS), np.arange(NUM_USERS, NUM_USERS + TESTED)
QUIET = Watch(progress=False)


def run(
    *names: str, watch: Watch = QUIET, resume: Checkpoint | None = None, **changes: Any
) -> Trained:
    config = CONFIG.model_copy(update={"user_features": names, **changes})
    return train(
        SCHEMA, FEATURES, SIGNALS, interactions(TRAINED_USERS), config, watch=watch, resume=resume
    )


def request(user: int) -> dict[str, FeatureValues]:
    return {
        "history": [int(FIRST[user])],
        "place": PLACE[user].tolist(),
        "topics": WeightedIds(TOPICS, WEIGHTS[user].tolist()),
    }


def recall(trained: Trained, *withheld: str) -> float:
    """Share of tested users whose next film is among as many as their group has."""
    asked: list[Mapping[str, FeatureValues]] = [
        {name: one for name, one in request(user).items() if name not in withheld}
        for user in TESTED_USERS
    ]
    query = trained.model.encode(asked).embedding[:, 0]
    found = (query @ trained.model.embed_items(FEATURES).T).topk(PER_GROUP, 1).indices.numpy()
    return float((found == SECOND[TESTED_USERS][:, None]).any(1).mean())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_without_further_features_there_is_nothing_to_learn() -> None:
    assert recall(run()) < CHANCE + 0.1


@pytest.mark.parametrize("name", ["place", "topics"])
def test_what_only_one_feature_tells_is_learnt_from_it(name: str) -> None:
    trained = run(name)
    assert recall(trained) > 3 * CHANCE
    assert recall(trained, name) < CHANCE + 0.1


def test_topics_without_their_weights_say_nothing() -> None:
    trained = run("topics")
    plain = [{"history": request(user)["history"], "topics": TOPICS} for user in (600, 601)]
    weighted = [request(user) for user in (600, 601)]
    one, other = trained.model.encode(plain).user_state[:, 2 * 16 :]
    assert torch.equal(one, other)
    one, other = trained.model.encode(weighted).user_state[:, 2 * 16 :]
    assert GROUP[600] != GROUP[601]
    assert not torch.allclose(one, other, atol=0.1)


def test_a_feature_is_dropped_in_training_so_that_its_absence_is_known() -> None:
    changed = [
        run("place", "topics", steps=10, user_feature_dropout=dropout).model
        for dropout in (0.0, 0.5)
    ]
    starts = run("place", "topics", steps=1, learning_rate=1e-12).model
    moved = [
        not torch.allclose(
            model.user_tables.weight("user_topics")[0],
            starts.user_tables.weight("user_topics")[0],
            atol=1e-4,
        )
        for model in changed
    ]
    assert moved == [False, True]


def test_users_that_validate_bring_their_features() -> None:
    # Films that training does not know of users, of whom the feature alone tells the group.
    following = Interactions(
        TESTED_USERS, SECOND[TESTED_USERS], np.ones(TESTED, np.float32), columns(TESTED_USERS)
    )
    reached = [
        train(
            SCHEMA,
            FEATURES,
            SIGNALS,
            interactions(TRAINED_USERS),
            CONFIG.model_copy(update={"user_features": names}),
            validation=following,
            watch=QUIET,
        ).tower_ndcg
        for names in ((), ("place",))
    ]
    assert reached[1] > 0.15 > 2 * reached[0]


def test_an_interrupted_training_with_features_ends_in_the_same_bits() -> None:
    checkpoints: list[Checkpoint] = []
    watch = Watch(on_checkpoint=checkpoints.append, checkpoint_every=5, progress=False)
    whole = run("place", "topics", watch=watch, steps=12)
    again = run("place", "topics", resume=checkpoints[0], steps=12)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_numbers_of_an_item_place_one_whose_id_nobody_knows() -> None:
    angle = np.arange(NUM_FILMS) % GROUPS * 2 * np.pi / GROUPS
    colours = np.stack([np.cos(angle), np.sin(angle)], 1)
    features = {**FEATURES, "colour": Ragged.from_rows(colours.tolist(), dtype="float")}
    item_features = (
        *SCHEMA.item_features,
        UserFeature(name="colour", kind="numbers", dtype="float", width=2),
    )
    model = train(
        SCHEMA.model_copy(update={"item_features": item_features}),
        features,
        SIGNALS,
        interactions(TRAINED_USERS),
        CONFIG.model_copy(update={"user_features": ("place",), "item_dropout": 0.5}),
        watch=QUIET,
    ).model
    new = {
        "film": Ragged.from_rows([[10_000 + group] for group in range(GROUPS)]),
        "colour": Ragged.from_rows(colours[:GROUPS].tolist(), dtype="float"),
    }
    query = model.encode([request(int(user)) for user in TESTED_USERS]).embedding[:, 0]
    best = (query @ model.embed_items(new).T).argmax(1).numpy()
    assert (best == GROUP[TESTED_USERS]).mean() > 0.8
    absent = model.embed_items({"film": new["film"]})
    assert torch.equal(absent, absent[:1].expand_as(absent))
