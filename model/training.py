"""Training of a two-tower model on interactions: towers, reranker, then semantic ids if wanted.

A training can be interrupted after any step and continued from a checkpoint; the result has the
same bits as that of a training without interruption.

Shapes: N items, Vs signals.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from silvershard.model.catalogue import Ragged
from silvershard.model.distributed_step import LocalStep, StartStep
from silvershard.model.ranker_training import RankerTraining
from silvershard.model.schema import Schema
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.semantic_training import SemanticTraining
from silvershard.model.tower_training import TowerTraining, with_prefix
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import (
    HeldOut,
    Interactions,
    TrainingData,
    held_out,
    prepare,
)
from silvershard.model.training_texts import TrainingTexts
from silvershard.model.two_tower import TwoTower

_LOG_EVERY = 10


Phase = TowerTraining | RankerTraining | SemanticTraining


class LogRow(NamedTuple):
    """One line of the log of a training."""

    phase: str
    """towers, reranker or semantic"""
    step: int
    """Steps of the phase so far."""
    loss: float
    """Mean of the steps behind the last multiple of ten, at most ten of them."""
    learning_rate: float
    ndcg: float
    """NDCG@10 on the validation items, NaN where it was not measured."""
    seconds: float
    """Since training began; continued trainings count from their checkpoint."""


class Progress(BaseModel):
    """Where a training stands, beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["towers", "reranker", "semantic"] = Field(description="what is being trained")
    done: int = Field(ge=0, description="steps of the phase so far")
    losses: dict[str, tuple[float, ...]] = Field(description="loss of every step by phase")
    kept: dict[str, int] = Field(description="steps after which each phase was best")
    reached: dict[str, float] = Field(description="NDCG@10 of each phase at its best")
    stale: int = Field(default=0, ge=0, description="evaluations since the best")
    seconds: float = Field(default=0.0, ge=0, description="time spent so far")


class Checkpoint(NamedTuple):
    """All that a training needs to go on."""

    progress: Progress
    tensors: dict[str, Tensor]
    """Weights, optimizer, random state, best weights; safe to write as safetensors."""


@dataclass(frozen=True)
class Watch:
    """Who hears of a training while it runs.

    Attributes:
        on_log: gets a row every ten steps and after every evaluation.
        on_checkpoint: gets a checkpoint every ``checkpoint_every`` steps and at the end of a phase.
        checkpoint_every: steps.
        progress: show progress bars.
    """

    on_log: Callable[[LogRow], None] | None = None
    on_checkpoint: Callable[[Checkpoint], None] | None = None
    checkpoint_every: int = 100
    progress: bool = True


@dataclass(frozen=True)
class Trained:
    """A trained model and how its training went.

    Attributes:
        model: in eval mode, without gradients.
        tower_losses: mean loss of each tenth of the tower steps.
        ranker_losses: mean loss of each tenth of the reranker steps.
        tower_ndcg: NDCG@10 on the validation items, the whole catalogue ranked by the best head;
            NaN without validation.
        ranker_ndcg: the same after reranking each head's best; NaN without validation.
        tower_step: steps after which the towers were kept.
        ranker_step: steps after which the reranker was kept; 0 is the untrained one.
        seconds: time that training took.
        centroids: of the index, ``(C, D)`` float32, trained with the towers; None without joint.
        semantic: the source of semantic candidates, without gradients; None where none was wanted.
        semantic_losses: mean loss of each tenth of its steps.
        semantic_ndcg: NDCG@10 of its best items on the validation items; NaN without validation.
        semantic_step: steps after which it was kept.
    """

    model: TwoTower
    tower_losses: tuple[float, ...]
    ranker_losses: tuple[float, ...]
    tower_ndcg: float
    ranker_ndcg: float
    tower_step: int
    ranker_step: int
    seconds: float
    centroids: Tensor | None = None
    semantic: SemanticSource | None = None
    semantic_losses: tuple[float, ...] = ()
    semantic_ndcg: float = math.nan
    semantic_step: int = 0


def train(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
    *,
    validation: Interactions | None = None,
    seed: int = 0,
    watch: Watch | None = None,
    resume: Checkpoint | None = None,
    start: StartStep = LocalStep,
    texts: TrainingTexts | None = None,
) -> Trained:
    """Train towers and reranker, and semantic ids where the recipe has a section for them.

    The result depends only on the arguments and the instruction set, not on where a training was
    interrupted. The global random state and the number of threads are left as they were.

    Args:
        schema: declares the features, heads, tasks and signals.
        features: raw ids of each item feature, N rows each.
        signals: ``(N, Vs)`` float32.
        interactions: what the model learns from.
        config: the recipe.
        validation: the next item of some users, at most one each. It only chooses how long towers
            and reranker are trained; no weight is fitted to it.
        seed: of the initial weights, the batches and the dropout.
        watch: hears of the training; by default progress bars are shown.
        resume: a checkpoint of a training with the same other arguments.
        start: makes the towers ready on this process. Where there are several, this one must be the
            one that leads, and the others ``assist``.
        texts: what the encoder of ``config.text`` makes of all texts.

    Raises:
        ValueError: if an interaction names an item without features, no user has two of them, or
            the checkpoint is of another model.
    """
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, data = prepare(schema, features, signals, interactions, config, texts)
        held = _held(model, data, interactions, validation)
        run = _Run(model, config, watch or Watch(), validated=held is not None)
        if resume is not None:
            run.load(resume)
        towers = TowerTraining(model, data, config, held, seed, start)
        tower_ndcg = run.towers(towers, resume)
        # The reranker starts from the finished towers, so it is made only now.
        ranker = RankerTraining(model, data, config, held)
        run.phase(ranker, resume)
        semantic = None
        if config.semantic is not None:
            decoder = SemanticTraining(model, data, config, held, seed)
            run.phase(decoder, resume)
            semantic = decoder.source.eval().requires_grad_(requires_grad=False)
    model.eval().requires_grad_(requires_grad=False)
    return Trained(
        model=model,
        tower_losses=_tenths(run.losses[towers.name]),
        ranker_losses=_tenths(run.losses[ranker.name]),
        tower_ndcg=tower_ndcg,
        ranker_ndcg=run.reached.get(ranker.name, math.nan),
        tower_step=run.kept[towers.name],
        ranker_step=run.kept[ranker.name],
        seconds=run.seconds,
        centroids=run.centroids,
        semantic=semantic,
        semantic_losses=_tenths(run.losses.get(SemanticTraining.name, [])),
        semantic_ndcg=run.reached.get(SemanticTraining.name, math.nan),
        semantic_step=run.kept.get(SemanticTraining.name, 0),
    )


def assist(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
    *,
    checkpoint_every: int,
    validation: Interactions | None = None,
    seed: int = 0,
    resume: Checkpoint | None = None,
    start: StartStep,
    texts: TrainingTexts | None = None,
) -> None:
    """Train the towers beside the process that leads, whose business all the rest is.

    Args:
        schema: like all arguments but ``start`` the same as those of ``train`` there.
        features: raw ids of each item feature.
        signals: of the items.
        interactions: what the model learns from.
        config: the recipe.
        checkpoint_every: steps, as ``Watch`` has them there.
        validation: the next item of some users.
        seed: of everything that is drawn.
        resume: a checkpoint.
        start: makes the towers ready on this process.
        texts: of the items and of those who ask for them.

    Raises:
        ValueError: as ``train`` does.
    """
    watch = Watch(on_checkpoint=lambda _: None, checkpoint_every=checkpoint_every, progress=False)
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, data = prepare(schema, features, signals, interactions, config, texts)
        held = _held(model, data, interactions, validation)
        run = _Run(model, config, watch, validated=held is not None)
        if resume is not None:
            run.load(resume)
        towers = TowerTraining(model, data, config, held, seed, start)
        run.towers(towers, resume)


@dataclass
class _Run:
    """The steps of all phases, with evaluation, early stopping, log and checkpoints."""

    model: TwoTower
    config: TrainingConfig
    watch: Watch
    validated: bool
    losses: dict[str, list[float]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    centroids: Tensor | None = None
    """Of the finished towers."""
    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0
    """Seconds spent before the checkpoint."""

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def load(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress
        weights = with_prefix(checkpoint.tensors, "model.")
        own = self.model.state_dict()
        if {name: one.shape for name, one in weights.items()} != {
            name: one.shape for name, one in own.items()
        }:
            raise ValueError("the checkpoint must be of a model of this schema and config")
        self.losses = {name: list(losses) for name, losses in progress.losses.items()}
        self.kept, self.reached = dict(progress.kept), dict(progress.reached)
        self.stale, self.before = progress.stale, progress.seconds
        self.centroids = checkpoint.tensors.get("centroids")
        self.model.load_state_dict(weights)

    def towers(self, towers: TowerTraining, resume: Checkpoint | None) -> float:
        """Train the towers; return their NDCG@10."""
        self.phase(towers, resume)
        if towers.done:  # Else the training went on behind the towers, from its checkpoint.
            self.centroids = towers.centroids
        # Without evaluations on the way the towers are as the last step left them.
        return self.reached.get(towers.name) or towers.evaluate()

    def phase(self, phase: Phase, resume: Checkpoint | None) -> None:
        name = phase.name
        if resume is not None and name in resume.progress.losses:
            if resume.progress.phase != name:
                return
            phase.load_state(with_prefix(resume.tensors, "phase."), resume.progress.done)
            torch.set_rng_state(resume.tensors["random"])
        else:
            self.losses[name], self.kept[name], self.stale = [], 0, 0
            if name == RankerTraining.name:
                self._evaluate(phase)
        losses = self.losses[name]
        bar = tqdm(
            total=phase.steps,
            initial=phase.done,
            desc=f"training: {name}",
            unit="step",
            disable=not self.watch.progress,
            mininterval=0.5,
        )
        patience = self.config.patience
        while phase.done < phase.steps and not (patience and self.stale >= patience):
            rate = phase.learning_rate
            loss = phase.step()
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of {name} must be finite, got {loss} at step {phase.done}: "
                    "lower the learning rate"
                )
            losses.append(loss)
            bar.update()
            last = phase.done == phase.steps
            evaluated = self._is_due(phase)
            if evaluated:
                self._evaluate(phase)
            if evaluated or last or phase.done % _LOG_EVERY == 0:
                self._log(phase, rate, evaluated=evaluated)
            if not last and phase.done % self.watch.checkpoint_every == 0:
                self._checkpoint(phase)
        bar.close()
        if name in self.reached:
            phase.restore()
        else:
            self.kept[name] = phase.done
        self._checkpoint(phase)

    def _is_due(self, phase: Phase) -> bool:
        every = phase.evaluate_every
        return bool(every) and (phase.done % every == 0 or phase.done == phase.steps)

    def _evaluate(self, phase: Phase) -> None:
        if not self.validated:
            return
        reached = phase.evaluate()
        if reached > self.reached.get(phase.name, -math.inf):
            self.reached[phase.name] = reached
            self.kept[phase.name] = phase.done
            self.stale = 0
            phase.keep()
        else:
            self.stale += 1

    def _log(self, phase: Phase, learning_rate: float, *, evaluated: bool) -> None:
        if self.watch.on_log is None:
            return
        since = (phase.done - 1) // _LOG_EVERY * _LOG_EVERY
        self.watch.on_log(
            LogRow(
                phase=phase.name,
                step=phase.done,
                loss=float(np.mean(self.losses[phase.name][since:])),
                learning_rate=learning_rate,
                ndcg=phase.ndcg if evaluated and self.validated else math.nan,
                seconds=self.seconds,
            )
        )

    def _checkpoint(self, phase: Phase) -> None:
        if self.watch.on_checkpoint is None:
            return
        # The state of the phase comes first: with it the model has its present weights.
        tensors = {f"phase.{name}": one for name, one in phase.state().items()}
        tensors |= {f"model.{name}": one for name, one in self.model.state_dict().items()}
        tensors["random"] = torch.get_rng_state()
        if self.centroids is not None:
            tensors["centroids"] = self.centroids
        self.watch.on_checkpoint(
            Checkpoint(
                Progress(
                    phase=phase.name,
                    done=phase.done,
                    losses={name: tuple(one) for name, one in self.losses.items()},
                    kept=self.kept,
                    reached=self.reached,
                    stale=self.stale,
                    seconds=self.seconds,
                ),
                {name: one.detach().clone() for name, one in tensors.items()},
            )
        )


def _held(
    model: TwoTower,
    data: TrainingData,
    interactions: Interactions,
    validation: Interactions | None,
) -> HeldOut | None:
    """The validation as tensors; None where there is none, or nobody in it."""
    if validation is None or not len(validation.user_ids):
        return None
    return held_out(model, data, interactions, validation)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tenths(losses: list[float]) -> tuple[float, ...]:
    """The mean of each tenth; fewer where there are fewer than ten losses."""
    parts = np.array_split(np.array(losses), 10)
    return tuple(float(part.mean()) for part in parts if len(part))
