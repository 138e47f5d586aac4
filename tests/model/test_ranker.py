from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.ranker import build_ranker
from silvershard.model.ranker_attention import SelfAttentionRanker
from silvershard.model.ranker_config import (
    MixtureOfLogitsConfig,
    MLPConfig,
    RankerConfig,
    SelfAttentionConfig,
)
from silvershard.model.ranker_interface import Ranker
from silvershard.model.ranker_mixture import MixtureOfLogitsRanker
from silvershard.model.ranker_mlp import MLPRanker
from silvershard.model.ranker_session import session_width
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training import Watch, train
from silvershard.model.training_data import Interactions, TrainingConfig

CONFIGS = (MLPConfig(), SelfAttentionConfig(session_rows=5), MixtureOfLogitsConfig())


def build(config: RankerConfig, **changes: int) -> Ranker:
    sizes = {
        "dim": 12,
        "num_heads": 2,
        "state_dim": 20,
        "session_length": 9,
        "num_signals": 3,
        "num_tasks": 2,
    }
    torch.manual_seed(5)
    return build_ranker(config, **{**sizes, **changes})


def inputs(made: Ranker, batch: int = 4, width: int = 30) -> dict[str, Any]:
    shape = made.shape
    generator = torch.Generator().manual_seed(8)
    state = torch.zeros(batch, shape.state_dim + session_width(made.session_rows, shape.dim))
    return {
        "query": torch.randn(batch, shape.num_heads, shape.dim, generator=generator),
        "user_state": state,
        "items": torch.randn(batch, width, shape.dim, generator=generator),
        "refined": torch.randn(batch, width, shape.num_heads, generator=generator),
        "signals": torch.rand(batch, width, shape.num_signals, generator=generator),
    }


@pytest.mark.parametrize(
    ("config", "kind"),
    list(zip(CONFIGS, (MLPRanker, SelfAttentionRanker, MixtureOfLogitsRanker), strict=True)),
)
def test_a_config_builds_its_ranker(config: RankerConfig, kind: type[Ranker]) -> None:
    assert type(build(config)) is kind


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_an_untrained_ranker_orders_each_task_as_its_head_does(config: RankerConfig) -> None:
    made = build(config)
    given = inputs(made)
    logits = made(**given)
    for task in range(2):
        order = given["refined"][:, :, task].argsort(1)
        assert torch.equal(logits[:, :, task].argsort(1), order)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_an_untrained_ranker_with_other_tasks_orders_as_the_mean_of_the_heads(
    config: RankerConfig,
) -> None:
    made = build(config, num_tasks=3)
    given = inputs(made)
    logits = made(**given)
    assert logits.shape == (4, 30, 3)
    assert torch.equal(logits[:, :, 2].argsort(1), given["refined"].mean(2).argsort(1))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_the_smallest_sizes_can_be_built(config: RankerConfig) -> None:
    smallest = {"dim": 2, "num_heads": 1, "state_dim": 1, "num_signals": 0, "num_tasks": 1}
    made = build(config, **smallest)
    assert torch.isfinite(made(**inputs(made))).all()


def test_only_self_attention_reads_a_session() -> None:
    assert [build(config).session_rows for config in CONFIGS] == [0, 5, 0]


def test_a_ranker_that_does_not_fit_the_tower_is_not_built() -> None:
    with pytest.raises(ValueError, match=r"ranker.session_rows .* 9 ids \(max_history\), got 31"):
        build(SelfAttentionConfig())
    with pytest.raises(ValueError, match=r"ranker.attention_heads must divide dim 12, got 8"):
        build(SelfAttentionConfig(session_rows=5, attention_heads=8))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_every_ranker_learns_from_interactions(config: RankerConfig) -> None:
    """Users watch films of one of four groups; whoever saw an even film goes on with an odd one."""
    rng = np.random.default_rng(0)
    watched = np.stack(
        [rng.permutation(20)[:10] // 2 * 8 + np.arange(10) % 2 * 4 + user % 4 for user in range(60)]
    )
    ratings = np.where(watched % 8 >= 4, 5.0, 3.0).astype(np.float32)
    schema = Schema(
        user_features=(UserFeature(name="history", max_length=10),),
        item_features=(UserFeature(name="film", max_length=1),),
        signals=("length",),
        heads=("rated",),
        tasks=("rated", "liked"),
    )
    trained = train(
        schema,
        {"film": Ragged.from_rows([[film] for film in range(80)])},
        np.linspace(0, 1, 80, dtype=np.float32)[:, None],
        Interactions(np.repeat(np.arange(60), 10), watched.ravel(), ratings.ravel()),
        TrainingConfig(
            item="film",
            dim=16,
            pooled=(),
            min_rating={"liked": 4.0},
            threads=1,
            steps=30,
            batch=64,
            negatives=64,
            clusters=4,
            ranker=config,
            ranker_share=0.5,
            ranker_steps=60,
            ranker_batch=32,
            ranker_hard=8,
            ranker_depth=30,
            ranker_learning_rate=0.01,
        ),
        watch=Watch(progress=False),
    )
    assert type(trained.model.ranker) is type(build(config))
    assert trained.ranker_losses[-1] < 0.85 * trained.ranker_losses[0]
    state = trained.model.encode([{"history": watched[0].tolist()}]).user_state
    assert state.shape == (1, trained.model.config.state_dim)
