import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from silvershard.model import training_batches
from silvershard.model.catalogue import Ragged
from silvershard.model.clustering import assign_clusters
from silvershard.model.encoder_config import HSTUEncoderConfig, SequenceEncoderConfig
from silvershard.model.joint_config import JointConfig
from silvershard.model.quality import hit_rate_at_k, ndcg_at_k, popularity_ranking
from silvershard.model.ranker_training import RankerTraining
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.tower_training import TowerTraining
from silvershard.model.training import Checkpoint, LogRow, Progress, Trained, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions

NUM_FILMS, NUM_USERS, LENGTH, GROUPS = 120, 90, 14, 6

SCHEMA = Schema(
    user_features=(UserFeature(name="history", max_length=10),),
    item_features=(
        UserFeature(name="film", max_length=1),
        UserFeature(name="genres", dtype="string"),
    ),
    signals=("popularity",),
    heads=("rated", "liked"),
    tasks=("rated", "liked"),
)
FEATURES = {
    "film": Ragged.from_rows([[film] for film in range(NUM_FILMS)]),
    "genres": Ragged.from_rows([[f"genre {film % GROUPS}"] for film in range(NUM_FILMS)]),
}
SIGNALS = np.linspace(0, 1, NUM_FILMS, dtype=np.float32)[:, None]
CONFIG = TrainingConfig(
    item="film",
    dim=16,
    steps=60,
    batch=128,
    negatives=256,
    clusters=8,
    learning_rate=0.01,
    ranker_steps=20,
    ranker_batch=32,
    ranker_hard=8,
    ranker_depth=30,
)


class Parts(NamedTuple):
    train: Interactions
    valid: Interactions
    test_items: np.ndarray[Any, Any]
    histories: list[list[int]]


def interactions() -> Parts:
    """Users who watch the films of one group, in any order; the last two are held out."""
    rng = np.random.default_rng(0)
    per_group = NUM_FILMS // GROUPS
    watched = np.stack(
        [rng.permutation(per_group)[:LENGTH] * GROUPS + user % GROUPS for user in range(NUM_USERS)]
    )
    ratings = rng.integers(2, 6, watched.shape).astype(np.float32)
    users = np.arange(NUM_USERS)
    return Parts(
        Interactions(
            np.repeat(users, LENGTH - 2), watched[:, :-2].ravel(), ratings[:, :-2].ravel()
        ),
        Interactions(users, watched[:, -2], ratings[:, -2]),
        watched[:, -1],
        watched[:, :-1].tolist(),
    )


PARTS = interactions()


QUIET = Watch(progress=False)


def run(
    seed: int = 0, watch: Watch = QUIET, resume: Checkpoint | None = None, **changes: Any
) -> Trained:
    return train(
        SCHEMA,
        FEATURES,
        SIGNALS,
        PARTS.train,
        CONFIG.model_copy(update=changes),
        validation=PARTS.valid,
        seed=seed,
        watch=watch,
        resume=resume,
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return run()


def test_the_retriever_finds_planted_tastes_that_popularity_misses(trained: Trained) -> None:
    items = trained.model.embed_items(FEATURES)
    encoded = trained.model.encode([{"history": history} for history in PARTS.histories])
    scores = encoded.embedding[:, 0] @ items.T
    counts = np.bincount(PARTS.train.item_ids, minlength=NUM_FILMS)
    popular = popularity_ranking(counts, np.arange(NUM_FILMS))
    by_popularity = []
    for user, history in enumerate(PARTS.histories):
        scores[user, history] = -2.0
        by_popularity.append(popular[~np.isin(popular, history)][:10])
    found = scores.topk(10, 1).indices
    mine = hit_rate_at_k(found, PARTS.test_items, 10).mean()
    theirs = hit_rate_at_k(np.stack(by_popularity), PARTS.test_items, 10).mean()
    assert mine > 0.9
    assert mine > 2 * theirs


@pytest.mark.parametrize("kind", ["mean", "attention", "hstu"])
def test_towers_learn_with_a_sequence_encoder(kind: str) -> None:
    encoder = TypeAdapter(SequenceEncoderConfig).validate_python({"kind": kind, "max_length": 10})
    before = run(encoder=encoder, steps=1, ranker_steps=0, learning_rate=1e-9)
    after = run(encoder=encoder, ranker_steps=0)
    assert after.tower_losses[-1] < after.tower_losses[0]
    assert after.tower_ndcg > 0.2
    for name, weight in after.model.encoder.named_parameters():
        assert not torch.equal(weight, before.model.encoder.get_parameter(name)), name
    assert after.model.config.encoder == encoder


def test_losses_fall_and_validation_is_reported(trained: Trained) -> None:
    assert len(trained.tower_losses) == len(trained.ranker_losses) == 10
    assert trained.tower_losses[-1] < trained.tower_losses[0]
    assert 0.2 < trained.tower_ndcg <= 1
    assert trained.ranker_ndcg >= 0.9 * trained.tower_ndcg
    assert trained.seconds > 0


def test_the_kept_reranker_is_the_best_on_validation(trained: Trained) -> None:
    untrained = run(ranker_steps=0)
    assert untrained.ranker_step == 0
    assert untrained.tower_ndcg == trained.tower_ndcg
    assert trained.ranker_ndcg >= untrained.ranker_ndcg


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(trained: Trained) -> None:
    torch.manual_seed(99)
    again, other = run(), run(seed=1)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    weight = trained.model.item_tables.weight("film")
    assert not torch.equal(other.model.item_tables.weight("film"), weight)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(steps=2, ranker_steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_thread_count_of_the_caller_changes_nothing_and_stays(trained: Trained) -> None:
    torch.set_num_threads(2)
    again = run()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_pull_brings_items_closer_to_their_centres() -> None:
    spread = []
    for pull in (0.0, 30.0):
        items = run(cluster_pull=pull, ranker_steps=0).model.embed_items(FEATURES)
        similarity = (items @ items.T).fill_diagonal_(-1.0)
        spread.append(similarity.topk(5, 1).values.mean().item())
    assert spread[1] > spread[0] + 0.02


def test_training_through_the_index_gives_centroids_that_find_most_with_few_probes() -> None:
    assert run(steps=2, ranker_steps=0).centroids is None
    options: dict[str, Any] = {"ranker_steps": 0, "clusters": 24, "joint": JointConfig()}
    first, trained = run(steps=1, **options), run(**options)
    items = trained.model.embed_items(FEATURES)
    query = trained.model.encode([{"history": one} for one in PARTS.histories]).embedding[:, 0]
    best = (query @ items.T).topk(10, 1).indices
    reached = []
    for centroids in (first.centroids, trained.centroids):
        assert centroids.shape == (24, 16)
        assert not centroids.requires_grad
        found = assign_clusters(items, centroids)
        probed = (query @ found.centroids.T).topk(3, 1).indices
        own = found.assignment[best]
        reached.append((own[:, :, None] == probed[:, None]).any(2).float().mean().item())
    assert reached[1] > max(reached[0] + 0.02, 0.85), reached
    assert trained.tower_losses[-1] < trained.tower_losses[0]
    assert trained.tower_ndcg > 0.2


def test_the_centroids_that_are_kept_are_those_of_the_best_towers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states: list[torch.Tensor] = []
    values = iter((0.3, 0.6, 0.5, 0.4))

    def evaluate(self: TowerTraining) -> float:
        states.append(self.centroids.clone())
        return next(values)

    monkeypatch.setattr(TowerTraining, "evaluate", evaluate)
    trained = run(steps=8, evaluate_every=2, ranker_steps=0, joint=JointConfig())
    assert torch.equal(trained.centroids, states[1])
    assert not torch.equal(states[3], states[1])


def test_training_goes_without_validation() -> None:
    trained = train(SCHEMA, FEATURES, SIGNALS, PARTS.train, CONFIG, watch=QUIET)
    assert math.isnan(trained.tower_ndcg)
    assert math.isnan(trained.ranker_ndcg)
    assert trained.ranker_step == CONFIG.ranker_steps


def test_a_validation_of_nobody_is_none_and_stops_nothing() -> None:
    nobody = Interactions(
        user_ids=PARTS.train.user_ids[:0],
        item_ids=PARTS.train.item_ids[:0],
        ratings=PARTS.train.ratings[:0],
    )
    config = CONFIG.model_copy(update={"patience": 1, "evaluate_every": 2})
    trained = train(SCHEMA, FEATURES, SIGNALS, PARTS.train, config, validation=nobody, watch=QUIET)
    assert (trained.tower_step, trained.ranker_step) == (config.steps, config.ranker_steps)


def test_a_model_without_tasks_trains_no_reranker() -> None:
    schema = SCHEMA.model_copy(update={"tasks": ()})
    trained = train(schema, FEATURES, SIGNALS, PARTS.train, CONFIG, watch=QUIET)
    assert trained.ranker_losses == ()
    assert trained.model.config.tasks == ()


def test_a_trained_model_has_no_gradients_and_serves(trained: Trained) -> None:
    assert not trained.model.training
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert torch.isfinite(trained.model.encode([{}]).embedding).all()


@pytest.mark.parametrize(("reached", "kept"), [((0.5, 0.4, 0.7, 0.6), 10), ((0.9, 0.1), 0)])
def test_the_reranker_is_restored_to_the_step_that_validates_best(
    monkeypatch: pytest.MonkeyPatch, reached: tuple[float, ...], kept: int
) -> None:
    states: list[torch.Tensor] = []
    # One value for the untrained reranker, then one for each evaluation.
    values = iter((*reached, *(0.0 for _ in range(9))))

    def evaluate(self: RankerTraining) -> float:
        states.append(self._model.ranker.out.weight.clone())
        return next(values)

    monkeypatch.setattr(RankerTraining, "evaluate", evaluate)
    trained = run(steps=2, ranker_steps=25)
    assert trained.ranker_step == kept
    assert trained.ranker_ndcg == max(reached)
    assert torch.equal(trained.model.ranker.out.weight, states[reached.index(max(reached))])
    assert not torch.equal(states[0], states[1])


def test_evaluated_towers_are_restored_to_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[torch.Tensor] = []
    values = iter((0.3, 0.6, 0.5, 0.4))

    def evaluate(self: TowerTraining) -> float:
        states.append(self._model.user_head.weight.clone())
        return next(values)

    monkeypatch.setattr(TowerTraining, "evaluate", evaluate)
    trained = run(steps=8, evaluate_every=2, ranker_steps=0)
    assert trained.tower_step == 4
    assert trained.tower_ndcg == 0.6
    assert torch.equal(trained.model.user_head.weight, states[1])
    assert not torch.equal(states[3], states[1])


def test_training_stops_early_where_validation_no_longer_improves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter((0.3, 0.6, 0.6, 0.5, 0.9))
    monkeypatch.setattr(TowerTraining, "evaluate", lambda self: next(values))
    trained = run(steps=50, evaluate_every=5, patience=2, ranker_steps=0)
    assert trained.tower_step == 10
    assert len(trained.tower_losses) == 10
    assert next(values) == 0.9


@pytest.mark.parametrize("joint", [None, JointConfig()])
def test_an_interrupted_training_ends_in_the_same_bits(joint: JointConfig | None) -> None:
    checkpoints: list[Checkpoint] = []
    watch = Watch(on_checkpoint=checkpoints.append, checkpoint_every=7, progress=False)
    changes = {"steps": 24, "ranker_steps": 16, "evaluate_every": 10, "joint": joint}
    whole = run(watch=watch, **changes)
    stops = [(one.progress.phase, one.progress.done) for one in checkpoints]
    assert stops == [
        *(("towers", done) for done in (7, 14, 21, 24)),
        *(("reranker", done) for done in (7, 14, 16)),
    ]
    for checkpoint in checkpoints:
        written = Checkpoint(
            Progress.model_validate_json(checkpoint.progress.model_dump_json()), checkpoint.tensors
        )
        torch.manual_seed(5)
        again = run(resume=written, **changes)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), (name, checkpoint.progress)
        if joint is not None:
            assert torch.equal(again.centroids, whole.centroids)
        assert again.tower_losses == whole.tower_losses
        assert again.ranker_losses == whole.ranker_losses
        assert again.tower_ndcg == whole.tower_ndcg
        assert (again.tower_step, again.ranker_step) == (whole.tower_step, whole.ranker_step)
        assert again.seconds > checkpoint.progress.seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": ("foo",)}, "pooled must name item features, which are film, genres, got 'foo'"),
        ({"item": "foo"}, "item must be one of film, genres, got 'foo'"),
        ({"min_rating": {"nope": 3.0}}, "min_rating must name heads and tasks, .*got 'nope'"),
        ({"encoder": HSTUEncoderConfig(max_length=11)}, "encoder.max_length must be at most 10"),
        ({"learning_rate": 1e38}, "the loss of towers must be finite, got nan at step"),
    ],
)
def test_a_training_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    checkpoints: list[Checkpoint] = []
    watch = Watch(on_checkpoint=checkpoints.append, progress=False)
    run(watch=watch, steps=1, ranker_steps=0)
    with pytest.raises(ValueError, match="checkpoint must be of a model of this schema"):
        run(resume=checkpoints[0], dim=8)


def test_the_log_tells_phase_step_loss_rate_and_validation() -> None:
    rows: list[LogRow] = []
    trained = run(
        watch=Watch(on_log=rows.append, progress=False), steps=25, evaluate_every=20, ranker_steps=5
    )
    towers = [row for row in rows if row.phase == "towers"]
    assert [row.step for row in towers] == [10, 20, 25]
    assert [math.isnan(row.ndcg) for row in towers] == [True, False, False]
    assert [row.step for row in rows if row.phase == "reranker"] == [1, 2, 3, 4, 5]
    assert towers[0].learning_rate > towers[1].learning_rate > towers[2].learning_rate > 0
    assert towers[0].loss == pytest.approx(np.mean(trained.tower_losses[:4]), rel=0.5)
    assert sorted(row.seconds for row in rows) == [row.seconds for row in rows]


def test_held_out_ranks_are_as_good_as_ndcg_says(trained: Trained) -> None:
    items = trained.model.embed_items(FEATURES)
    histories = [history[:-1] for history in PARTS.histories]
    query = trained.model.encode([{"history": history} for history in histories]).embedding
    reached = []
    for head in range(2):
        scores = query[:, head] @ items.T
        for user, history in enumerate(histories):
            scores[user, history] = -2.0
        found = scores.topk(10, 1).indices
        reached.append(ndcg_at_k(found, PARTS.valid.item_ids, 10).mean())
    assert trained.tower_ndcg == pytest.approx(max(reached), abs=1e-3)


@pytest.mark.parametrize("depth", [20, NUM_FILMS])
def test_the_reranked_ndcg_is_that_of_the_summed_probabilities(
    monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr(training_batches, "_SELECTION_DEPTH", depth)
    trained = run(steps=20)
    model, items = trained.model, trained.model.embed_items(FEATURES)
    histories = [history[:-1] for history in PARTS.histories]
    encoded = model.encode([{"history": history} for history in histories])
    found = []
    for user, history in enumerate(histories):
        refined = items @ encoded.embedding[user].T  # (N, H)
        refined[history] = -2.0
        union = refined.topk(depth, 0).indices.flatten().unique()
        union = union[~torch.isin(union, torch.tensor(history))]
        logits = model.rank(
            encoded.embedding[user : user + 1],
            encoded.user_state[user : user + 1],
            items[union][None],
            refined[union][None],
            torch.from_numpy(SIGNALS)[union][None],
        )[0]
        found.append(union[torch.sigmoid(logits).sum(1).topk(10).indices].tolist())
    reached = ndcg_at_k(found, PARTS.valid.item_ids, 10).mean()
    assert trained.ranker_ndcg == pytest.approx(reached, abs=1e-3)
