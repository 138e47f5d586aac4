import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import pack_bits
from silvershard.model import semantic_training
from silvershard.model.catalogue import Ragged
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.semantic_codebooks import fit_codebooks
from silvershard.model.semantic_config import (
    SemanticConfig,
    SemanticSpec,
    SemanticTrainingConfig,
)
from silvershard.model.semantic_ids import encode_items
from silvershard.model.semantic_search import generate
from silvershard.model.semantic_training import SemanticTraining, train_decoder
from silvershard.model.semantic_trie import CodeTrie
from silvershard.model.training import Checkpoint, LogRow, Progress, Trained, Watch, train
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import Interactions

TINY = SemanticTrainingConfig(steps=12, batch=16)


def make_items(count: int = 900, dim: int = 12) -> Tensor:
    """Unit vectors around the sums of a few directions, so that codes have something to find."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(6, dim, generator=generator)
    fine = 0.6 * torch.randn(7, dim, generator=generator)
    which = torch.randint(42, (count,), generator=generator)
    noise = 0.15 * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(coarse[which % 6] + fine[which // 6] + noise, dim=1)


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(5, (count, 3), generator=generator)
    states = torch.randn(count, 9, generator=generator)
    states[:, 0] += codes[:, 0]
    return states, codes


def test_a_trained_decoder_beats_popularity_on_users_who_keep_to_a_subtree() -> None:
    """Users of ten groups take four of five items below a first code of their own."""
    generator = torch.Generator().manual_seed(7)
    items = make_items(1500)
    config = SemanticConfig(levels=3, width=10, hidden=32)
    codes = encode_items(items, fit_codebooks(items, config, seed=0))
    by_first = [torch.nonzero(codes[:, 0] == first)[:, 0] for first in range(10)]
    tastes = torch.randn(10, 8, generator=generator)
    # The first items of each subtree are taken more often than the last.
    popularity = torch.arange(1, 1501).double() ** -0.5

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.randint(10, (count,), generator=generator)
        states = tastes[group] + 0.3 * torch.randn(count, 8, generator=generator)
        chosen = torch.multinomial(popularity, count, replacement=True, generator=generator)
        for first, members in enumerate(by_first):
            mine = torch.nonzero(group == first)[:, 0]
            mine = mine[torch.rand(len(mine), generator=generator) < 0.8]
            odds = torch.arange(1, len(members) + 1).double() ** -0.5
            at = torch.multinomial(odds, len(mine), replacement=True, generator=generator)
            chosen[mine] = members[at]
        return group, states, chosen

    _, states, chosen = draw(8000)
    training = SemanticTrainingConfig(steps=250, batch=256)
    trained = train_decoder(config, states, codes[chosen].long(), training, progress=False)
    assert trained.losses[-1] < 0.8 * trained.losses[0]

    _, states, wanted = draw(800)
    most_popular = torch.bincount(chosen, minlength=1500).argsort(descending=True)[:20]
    baseline = float((wanted[:, None] == most_popular).any(1).double().mean())
    slots = torch.full((24 * 64,), -1)
    slots[:1500] = torch.arange(1500)
    slot_codes = torch.zeros(24 * 64, 3, dtype=torch.int16)
    slot_codes[:1500] = codes
    trie = CodeTrie(slot_codes.view(24, 64, 3), slots.view(24, 64), config.width)
    everything = pack_bits(torch.ones(800, 24, 64, dtype=torch.bool))
    found = generate(trained.decoder, trained.decoder.context(states), trie, everything, 20)
    assert bool(found.exact.all())
    recall = float((found.item_ids == wanted[:, None]).any(1).double().mean())
    assert recall > 1.3 * baseline
    strangers = torch.roll(states, 1, 0)
    found = generate(trained.decoder, trained.decoder.context(strangers), trie, everything, 20)
    assert float((found.item_ids == wanted[:, None]).any(1).double().mean()) < 0.7 * recall


def test_training_depends_on_the_seed_only() -> None:
    states, codes = examples(200)
    config = SemanticConfig(levels=3, width=5, hidden=8)
    torch.manual_seed(11)
    first = train_decoder(config, states, codes, TINY, seed=3, progress=False)
    torch.manual_seed(12)
    drawn = torch.rand(1)
    torch.manual_seed(12)
    again = train_decoder(config, states, codes, TINY, seed=3, progress=False)
    assert torch.equal(torch.rand(1), drawn)
    other = train_decoder(config, states, codes, TINY, seed=4, progress=False)
    state, repeated = first.decoder.state_dict(), again.decoder.state_dict()
    assert all(torch.equal(value, repeated[name]) for name, value in state.items())
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert not torch.equal(state["codes"], other.decoder.state_dict()["codes"])


def test_a_trained_decoder_is_ready_to_serve() -> None:
    states, codes = examples(200)
    states[:, 4] = 7.0
    before = torch.get_num_threads()
    config = SemanticConfig(levels=3, width=5, hidden=8)
    trained = train_decoder(config, states, codes, TINY, progress=False)
    decoder = trained.decoder
    assert torch.get_num_threads() == before
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert len(trained.losses) == 10
    assert trained.seconds > 0
    assert torch.allclose(decoder.state_mean, states.mean(0), atol=1e-5)
    # A column that never changes says nothing about a user, whatever it is later.
    assert decoder.state_scale[4] == 0
    scaled = (states - decoder.state_mean) * decoder.state_scale
    assert torch.allclose(scaled[:, :4].std(0, correction=0), torch.ones(4), atol=1e-4)
    for name, weight in decoder.state_dict().items():
        if name.endswith("user.weight"):
            assert not weight[9:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_states": torch.zeros(0, 9), "codes": torch.zeros(0, 3).long()}, "at least one"),
        ({"user_states": torch.full((20, 9), torch.nan)}, "user_states must be finite"),
        ({"codes": torch.full((20, 3), 5)}, r"codes must be in \[0, 5\), got 5"),
        ({"codes": torch.zeros(20, 2).long()}, "codes must have shape"),
        ({"codes": torch.zeros(20, 3)}, "codes must be torch.int64"),
    ],
)
def test_examples_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    states, codes = examples(20)
    config = SemanticConfig(levels=3, width=5, hidden=8)
    given = {"user_states": states, "codes": codes, **change}
    with pytest.raises(ValueError, match=message):
        train_decoder(config, training=TINY, progress=False, **given)


NUM_FILMS, NUM_USERS, LENGTH, GROUPS = 120, 90, 12, 6

SCHEMA = Schema(
    user_features=(UserFeature(name="history", max_length=10),),
    item_features=(UserFeature(name="film", max_length=1),),
    signals=("popularity",),
    heads=("rated",),
    tasks=("rated",),
)
FEATURES = {"film": Ragged.from_rows([[film] for film in range(NUM_FILMS)])}
SIGNALS = np.linspace(0, 1, NUM_FILMS, dtype=np.float32)[:, None]
CONFIG = TrainingConfig(
    item="film",
    pooled=(),
    min_rating={},
    dim=16,
    steps=60,
    batch=128,
    negatives=256,
    clusters=8,
    learning_rate=0.01,
    ranker_steps=4,
    ranker_batch=16,
    ranker_hard=4,
    ranker_depth=20,
    semantic=SemanticTrainingConfig(
        decoder=SemanticConfig(levels=2, width=12, hidden=24), steps=60, batch=128
    ),
)
QUIET = Watch(progress=False)


def watched() -> tuple[Interactions, Interactions]:
    """Users who watch the films of one group, in any order; the last one is held out."""
    rng = np.random.default_rng(0)
    films = np.stack(
        [
            rng.permutation(NUM_FILMS // GROUPS)[:LENGTH] * GROUPS + user % GROUPS
            for user in range(NUM_USERS)
        ]
    )
    users, ratings = np.arange(NUM_USERS), np.full(films.shape, 4, dtype=np.float32)
    return (
        Interactions(np.repeat(users, LENGTH - 1), films[:, :-1].ravel(), ratings[:, :-1].ravel()),
        Interactions(users, films[:, -1], ratings[:, -1]),
    )


def run(watch: Watch = QUIET, resume: Checkpoint | None = None, **changes: Any) -> Trained:
    training, validation = watched()
    config = CONFIG.model_copy(update=changes)
    return train(
        SCHEMA,
        FEATURES,
        SIGNALS,
        training,
        config,
        validation=validation,
        watch=watch,
        resume=resume,
    )


@pytest.fixture(scope="module")
def trained() -> Trained:
    return run()


def test_the_last_phase_learns_the_codes_of_the_next_item(trained: Trained) -> None:
    assert len(trained.semantic_losses) == 10
    assert trained.semantic_losses[-1] < 0.8 * trained.semantic_losses[0]
    # Of 120 films the best ten in any order give 0.04; of a user's group of 20, 0.25.
    assert trained.semantic_ndcg > 0.15
    assert trained.semantic_step > 0


def test_the_trained_source_serves_the_trained_towers(trained: Trained) -> None:
    source, model = trained.semantic, trained.model
    assert source is not None
    assert not source.training
    assert not any(parameter.requires_grad for parameter in source.parameters())
    assert source.spec == SemanticSpec(
        decoder=CONFIG.semantic.decoder, state_dim=model.config.profile_dim
    )
    codes = source.item_codes(model.embed_items(FEATURES))
    assert len(codes.unique(dim=0)) > 40
    state = source.with_context(model.encode([{"history": [0, 6, 12]}]).user_state)
    assert bool(state.isfinite().all())


def test_towers_and_reranker_are_the_same_without_the_last_phase(trained: Trained) -> None:
    without = run(semantic=None)
    assert without.semantic is None
    assert without.semantic_losses == ()
    assert math.isnan(without.semantic_ndcg)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(without.model.state_dict()[name], value), name


def test_an_interrupted_training_ends_in_the_same_codes_and_decoder(trained: Trained) -> None:
    checkpoints: list[Checkpoint] = []
    rows: list[LogRow] = []
    watch = Watch(
        on_checkpoint=checkpoints.append, on_log=rows.append, checkpoint_every=25, progress=False
    )
    run(watch=watch)
    own = [one for one in checkpoints if one.progress.phase == "semantic"]
    assert [one.progress.done for one in own] == [25, 50, 60]
    logged = [row for row in rows if row.phase == "semantic"]
    assert [row.step for row in logged] == [10, 12, 20, 24, 30, 36, 40, 48, 50, 60]
    assert sum(not math.isnan(row.ndcg) for row in logged) == 5
    assert logged[-1].learning_rate < logged[0].learning_rate
    before = next(one for one in checkpoints if one.progress.phase == "reranker")
    for checkpoint in (before, *own):
        written = Checkpoint(
            Progress.model_validate_json(checkpoint.progress.model_dump_json()), checkpoint.tensors
        )
        torch.manual_seed(5)
        again = run(resume=written)
        for name, value in trained.semantic.state_dict().items():
            assert torch.equal(again.semantic.state_dict()[name], value), name
        assert again.semantic_losses == trained.semantic_losses
        assert again.semantic_ndcg == trained.semantic_ndcg
        assert again.semantic_step == trained.semantic_step


def test_the_decoder_is_restored_to_the_step_that_validates_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, states = iter((0.3, 0.6, 0.5, 0.4, 0.2)), []

    def evaluate(self: SemanticTraining) -> float:
        states.append(self.source.decoder.user.weight.detach().clone())
        return next(values)

    monkeypatch.setattr(SemanticTraining, "evaluate", evaluate)
    trained = run(steps=2, ranker_steps=0)
    assert trained.semantic_step == 24
    assert trained.semantic_ndcg == 0.6
    assert torch.equal(trained.semantic.decoder.user.weight, states[1])


def test_validation_never_offers_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every unseen film among the results, each held-out one is found."""
    monkeypatch.setattr(semantic_training, "_EVALUATED_K", NUM_FILMS - LENGTH + 1)
    reached = run(steps=1, ranker_steps=0).semantic_ndcg
    assert 1 / math.log2(NUM_FILMS - LENGTH + 2) < reached < 1


def test_the_decoder_trains_without_validation() -> None:
    training, _ = watched()
    trained = train(SCHEMA, FEATURES, SIGNALS, training, CONFIG, watch=QUIET)
    assert math.isnan(trained.semantic_ndcg)
    assert trained.semantic_step == 60
