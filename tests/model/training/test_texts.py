"""What only a text tells is learnt from it, with and without a history."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.text_config import TextTrainingConfig
from silvershard.model.text_encoder import TextEncoder
from silvershard.model.training import Checkpoint, Trained, Watch, train
from silvershard.model.training_batches import user_batch
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions, prepare
from silvershard.model.training_texts import TrainingTexts, embed_training_texts
from silvershard.model.two_tower import TwoTower

GENRES = ("Action", "Comedy", "Drama", "Horror")
NUM_FILMS, NUM_USERS = 80, 300
PER_GENRE = NUM_FILMS // len(GENRES)

RNG = np.random.default_rng(0)
GENRE = np.arange(NUM_FILMS) % len(GENRES)
FEATURES = {
    "film": Ragged.from_rows([[film] for film in range(NUM_FILMS)]),
    # What a film says of itself is the next genre: only training tells what asks for it.
    "title": Ragged.from_rows([[GENRES[(one + 1) % len(GENRES)]] for one in GENRE.tolist()]),
    "genres": Ragged.from_rows([[GENRES[one]] for one in GENRE.tolist()]),
}
SCHEMA = Schema(
    user_features=(
        UserFeature(name="history", max_length=10),
        UserFeature(name="query", kind="text", dtype="string"),
    ),
    item_features=(
        UserFeature(name="film", max_length=1),
        UserFeature(name="title", kind="text", dtype="string"),
        UserFeature(name="genres", kind="text", dtype="string"),
    ),
    heads=("rated",),
    tasks=("rated",),
    value="rated",
)
SIGNALS = np.zeros((NUM_FILMS, 0), dtype=np.float32)
TEXT = TextTrainingConfig(
    encoder="a folder", item_text=("{title}",), query_texts=("genres",), query_share=0.5
)
CONFIG = TrainingConfig(
    item="film",
    pooled=(),
    min_rating={},
    dim=16,
    steps=60,
    batch=128,
    negatives=128,
    clusters=8,
    learning_rate=0.02,
    ranker_steps=4,
    cluster_pull=0.0,
    text=TEXT,
)
# Pairs of films that go together, whatever their genres are.
FIRST = RNG.integers(0, NUM_FILMS, NUM_USERS)
PAIRS = np.stack([FIRST, (FIRST + 37) % NUM_FILMS], 1)
INTERACTIONS = Interactions(
    np.repeat(np.arange(NUM_USERS), 2), PAIRS.ravel(), np.ones(2 * NUM_USERS, np.float32)
)
QUIET = Watch(progress=False)


@pytest.fixture(scope="module")
def texts(make_text_encoder: Callable[..., TextEncoder]) -> TrainingTexts:
    encoder = make_text_encoder(item_text=TEXT.item_text)
    return embed_training_texts(encoder, FEATURES, TEXT)


def run(
    texts: TrainingTexts | None,
    schema: Schema = SCHEMA,
    watch: Watch = QUIET,
    resume: Checkpoint | None = None,
    **changes: Any,
) -> Trained:
    config = CONFIG.model_copy(update=changes)
    return train(
        schema, FEATURES, SIGNALS, INTERACTIONS, config, watch=watch, resume=resume, texts=texts
    )


def precision(model: TwoTower, **more: Any) -> float:
    """Share of films of the genre among as many as there are, over all genres."""
    query = model.encode([{"query": (one,), **more} for one in GENRES]).embedding[:, 0]
    found = (query @ model.embed_items(FEATURES).T).topk(PER_GENRE, 1).indices.numpy()
    return float((GENRE[found] == np.arange(len(GENRES))[:, None]).mean())


@pytest.fixture(scope="module")
def trained(texts: TrainingTexts) -> TwoTower:
    return run(texts).model


def test_films_are_found_by_the_texts_that_ask_for_them(
    texts: TrainingTexts, trained: TwoTower
) -> None:
    assert precision(run(texts, steps=1, learning_rate=1e-9).model) < 0.4
    assert precision(trained) > 0.9


def test_a_history_still_finds_what_goes_with_it_and_a_text_narrows_it(trained: TwoTower) -> None:
    films = list(range(NUM_FILMS))
    items = trained.embed_items(FEATURES)
    query = trained.encode([{"history": [film]} for film in films]).embedding[:, 0]
    best = (query @ items.T).topk(5, 1).indices
    following = (torch.tensor(films) + 37) % NUM_FILMS
    known = torch.from_numpy(np.isin(films, FIRST))
    found = (best == following[:, None]).any(1)
    assert float(found[known].float().mean()) > 0.8
    assert precision(trained, history=[3]) > 0.4 > 1.5 / len(GENRES)


def test_a_new_film_is_found_by_its_text(trained: TwoTower) -> None:
    titles = [[GENRES[(one + 1) % len(GENRES)]] for one in range(len(GENRES))]
    new = {
        "film": Ragged.from_rows([[10_000 + one] for one in range(len(GENRES))]),
        "title": Ragged.from_rows(titles),
    }
    query = trained.encode([{"query": (one,)} for one in GENRES]).embedding[:, 0]
    assert (query @ trained.embed_items(new).T).argmax(1).tolist() == [0, 1, 2, 3]


def test_the_encoder_keeps_its_weights(texts: TrainingTexts, trained: TwoTower) -> None:
    assert trained.text is not None
    own = texts.encoder.state_dict()
    for name, value in trained.text.encoder.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_the_reranker_learns_from_texts_too(
    texts: TrainingTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, emptied = [], []
    history = TwoTower.history

    def spied(
        self: TwoTower, rows: Any, lengths: Any, users: Any = None, weights: Any = None
    ) -> Any:
        given = users["text:query"].lengths > 0
        shares.append(float(given.float().mean()))
        emptied.append(float((lengths[given] == 0).float().mean()))
        return history(self, rows, lengths, users, weights)

    monkeypatch.setattr(TwoTower, "history", spied)
    run(texts, steps=1)
    assert len(shares) == 1 + CONFIG.ranker_steps
    assert 0.4 < float(np.mean(shares[1:])) < 0.6
    assert 0.4 < float(np.mean(emptied[1:])) < 0.6


def test_part_of_the_positions_with_a_text_have_no_history(texts: TrainingTexts) -> None:
    config = CONFIG.model_copy(update={"history_dropout": 0.0, "empty_history": 0.0})
    model, data = prepare(SCHEMA, FEATURES, SIGNALS, INTERACTIONS, config, texts)
    torch.manual_seed(0)
    bags = user_batch(model, data, config, data.tower_positions.repeat(4)).history.bags
    given = bags["text:query"].lengths > 0
    empty = bags["history"].rows == 0
    assert 0.45 < float(given.float().mean()) < 0.55
    assert not empty[~given].any()
    assert 0.45 < float(empty[given].float().mean()) < 0.55


@pytest.mark.parametrize("phase", ["towers", "reranker"])
def test_an_interrupted_training_with_texts_ends_in_the_same_bits(
    texts: TrainingTexts, phase: str
) -> None:
    checkpoints: list[Checkpoint] = []
    watch = Watch(on_checkpoint=checkpoints.append, checkpoint_every=2, progress=False)
    whole = run(texts, watch=watch, steps=5)
    at = next(one for one in checkpoints if one.progress.phase == phase and one.progress.done == 2)
    again = run(texts, resume=at, steps=5)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_training_without_texts_is_as_it_was(texts: TrainingTexts) -> None:
    model = run(None, text=None, steps=1).model
    assert model.text is None
    assert not [name for name in model.state_dict() if "text" in name]


@pytest.mark.parametrize("changes", [{"text": None}, {"texts": None}])
def test_texts_and_their_section_go_together(texts: TrainingTexts, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="where config has a section text, and only there"):
        run(**{"texts": texts, **changes})


def test_a_schema_without_the_text_of_requests_is_refused(texts: TrainingTexts) -> None:
    without = SCHEMA.model_copy(update={"user_features": SCHEMA.user_features[:1]})
    with pytest.raises(ValueError, match="must have the user feature query of kind text, it has n"):
        run(texts, schema=without)
