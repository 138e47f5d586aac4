"""Training of a two-tower model on interactions: the towers first, then the reranker.

The towers predict the next item at every position of every training history, by sampled softmax
with log-Q correction. Meanwhile the item embeddings are pulled towards the centres of their
clusters, so that an inverted file over them finds nearly everything in a few lists. The reranker
then learns to tell the next item from items that the towers rank high and from random ones.

Shapes: N items, M interactions, B positions of a batch, H heads, T tasks, D embedding dimension,
n negatives, m candidates per position, C clusters.

Source: Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural
Probabilistic Language Model", IEEE TNN 2008, section III (sampled softmax); Yi et al.,
"Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
section 4 (log-Q correction).
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from silvershard.model.catalogue import Ragged
from silvershard.model.clustering import spherical_kmeans
from silvershard.model.embeddings import DEFAULT_ROW, Bags, spread
from silvershard.model.quality import ndcg_at_k
from silvershard.model.schema import Schema
from silvershard.model.training_data import (
    HeldOut,
    Interactions,
    TrainingConfig,
    TrainingData,
    held_out,
    prepare,
)
from silvershard.model.two_tower import BAND_TABLE, TwoTower

_CENTRE_EVERY = 50
_CENTRE_ITERATIONS = 10
_CHECKPOINTS = 5
_EXCLUDED = -1e9
_SELECTION_DEPTH = 100
_SELECTION_K = 10
_WARM_UP_STEPS = 50


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
        ranker_step: steps after which the reranker was kept; 0 is the untrained one.
        seconds: time that training took.
    """

    model: TwoTower
    tower_losses: tuple[float, ...]
    ranker_losses: tuple[float, ...]
    tower_ndcg: float
    ranker_ndcg: float
    ranker_step: int
    seconds: float


def train(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
    *,
    validation: Interactions | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Trained:
    """Train towers and reranker.

    The result depends only on the arguments and the instruction set. The global random state and
    the number of threads are left as they were.

    Args:
        schema: declares the features, heads, tasks and signals.
        features: raw ids of each item feature, N rows each.
        signals: ``(N, Vs)`` float32.
        interactions: what the model learns from.
        config: the recipe.
        validation: the next item of some users, at most one each. It only chooses how long the
            reranker is trained; no weight is fitted to it.
        seed: of the initial weights, the batches and the dropout.
        progress: show progress bars.

    Raises:
        ValueError: if an interaction names an item without features, or no user has two of them.
    """
    began = time.perf_counter()
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, data = prepare(schema, features, signals, interactions, config)
        held = None if validation is None else held_out(model, data, interactions, validation)
        model.train()
        tower_losses = _train_towers(model, data, config, seed, progress)
        model.eval()
        ranking = _RankerTraining(model, data, config, held)
        ranker_losses = ranking.run(progress)
    model.requires_grad_(requires_grad=False)
    return Trained(
        model=model,
        tower_losses=tower_losses,
        ranker_losses=ranker_losses,
        tower_ndcg=ranking.tower_ndcg,
        ranker_ndcg=ranking.ranker_ndcg,
        ranker_step=ranking.kept_step,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_towers(
    model: TwoTower, data: TrainingData, config: TrainingConfig, seed: int, progress: bool
) -> tuple[float, ...]:
    parameters = [
        *model.user_tables.parameters(),
        *model.item_tables.parameters(),
        *model.user_head.parameters(),
    ]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    schedule = _schedule(optimizer, config.steps)
    odds = data.counts.add(1).double() ** config.negative_power
    log_odds = (odds / odds.sum()).log().float()
    user_odds = _user_odds(data, data.tower_positions, config)
    centroids: Tensor | None = None
    losses = []
    for step in _steps(config.steps, "training the towers", progress):
        positions = _draw(data.tower_positions, user_odds, config.batch)
        targets = data.items[positions]
        negatives = torch.multinomial(odds, config.negatives, replacement=True)
        query = _user_batch(model, data, config, positions)  # (B, H, D)
        chosen = torch.cat([targets, negatives])
        items = model.item_embedding(_item_batch(model, data, config, chosen))  # (B + n, D)
        logits = torch.cat(
            [
                (query * items[: config.batch, None]).sum(2, keepdim=True),
                (query.flatten(0, 1) @ items[config.batch :].T).view(*query.shape[:2], -1),
            ],
            2,
        )  # (B, H, 1 + n)
        per_head = _sampled_softmax(
            logits / config.temperature, targets, negatives, log_odds[negatives]
        )
        counted = data.head_positive[positions].float()
        loss = ((per_head * counted).sum(0) / counted.sum(0).clamp(min=1)).sum()
        if config.cluster_pull and step >= config.cluster_start * config.steps:
            if centroids is None or step % _CENTRE_EVERY == 0:
                centroids = _centres(model, data, config, centroids, seed)
            nearest = (items.detach() @ centroids.T).argmax(1)
            loss = loss + config.cluster_pull * (1 - (items * centroids[nearest]).sum(1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return _tenths(losses)


def _sampled_softmax(
    logits: Tensor, targets: Tensor, negatives: Tensor, log_odds: Tensor
) -> Tensor:
    """Cross-entropy against the whole catalogue, estimated from sampled items.

    Args:
        logits: ``(B, H, 1 + n)``; the first is of the target.
        targets: ``(B,)`` items.
        negatives: ``(n,)`` items, drawn with replacement; the target itself does not count.
        log_odds: ``(n,)`` log probability of drawing each of ``negatives``.

    Returns:
        ``(B, H)``.
    """
    hit, miss = logits[..., 0], logits[..., 1:]
    miss = miss - (log_odds + math.log(len(negatives)))
    miss = miss.masked_fill((targets[:, None] == negatives)[:, None], _EXCLUDED)
    return torch.logsumexp(torch.cat([hit[..., None], miss], 2), 2) - hit


@torch.no_grad()
def _centres(
    model: TwoTower,
    data: TrainingData,
    config: TrainingConfig,
    before: Tensor | None,
    seed: int,
) -> Tensor:
    """Cluster centres ``(C, D)`` of the present embeddings, moved on from those before."""
    items = _all_items(model, data)
    if before is None:
        clusters = min(config.clusters, items.shape[0])
        return spherical_kmeans(
            items, clusters, seed=seed, iterations=_CENTRE_ITERATIONS, max_imbalance=clusters
        ).centroids
    sums = torch.zeros_like(before).index_add_(0, (items @ before.T).argmax(1), items)
    return torch.where(sums.any(1, keepdim=True), functional.normalize(sums, dim=1), before)


class _RankerTraining:
    """Training of the reranker on frozen towers, and the choice of its best state."""

    def __init__(
        self,
        model: TwoTower,
        data: TrainingData,
        config: TrainingConfig,
        held: HeldOut | None,
    ) -> None:
        self._model = model
        self._data = data
        self._config = config
        self._held = held
        with torch.no_grad():
            self._items = _all_items(model, data)
        self.kept_step = 0
        self.tower_ndcg = math.nan if held is None else self._ndcg(rerank=False)
        self.ranker_ndcg = math.nan if held is None else self._ndcg(rerank=True)

    def run(self, progress: bool) -> tuple[float, ...]:
        model, data, config = self._model, self._data, self._config
        ranker = model.ranker
        steps = config.ranker_steps if model.config.tasks else 0
        optimizer = torch.optim.Adam(ranker.parameters(), lr=config.ranker_learning_rate)
        schedule = _schedule(optimizer, max(steps, 1))
        odds = data.counts.add(1).double() ** config.negative_power
        user_odds = _user_odds(data, data.ranker_positions, config)
        best = {name: value.clone() for name, value in ranker.state_dict().items()}
        losses = []
        for step in _steps(steps, "training the reranker", progress):
            positions = _draw(data.ranker_positions, user_odds, config.ranker_batch)
            targets = data.items[positions]
            with torch.no_grad():
                rows, lengths = _histories(model, data, positions)
                state = model.user_state(model.history_bags(rows, lengths))
                query = model.user_embedding(state)
                hard, found = self._hard(query, positions)
            random = torch.multinomial(odds, targets.shape[0] * config.ranker_random, True)
            random = random.view(targets.shape[0], -1)
            candidates = torch.cat([targets[:, None], hard, random], 1)  # (B, m)
            logits = self._logits(query, state, candidates)  # (B, m, T)
            repeated = candidates == targets[:, None]
            repeated[:, 0] = False
            loss = _ranker_loss(logits, data.task_positive[positions], repeated, found)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if (step + 1) % max(steps // _CHECKPOINTS, 1) == 0 or step + 1 == steps:
                reached = math.inf if self._held is None else self._ndcg(rerank=True)
                if self._held is None or reached > self.ranker_ndcg:
                    self.kept_step = step + 1
                    self.ranker_ndcg = math.nan if self._held is None else reached
                    best = {name: value.clone() for name, value in ranker.state_dict().items()}
        ranker.load_state_dict(best)
        return _tenths(losses)

    def _hard(self, query: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Items that a random head of each position ranks high.

        Returns:
            ``(B, ranker_hard)`` int64 of the ``ranker_depth`` best, and ``(B,)`` bool: whether the
            item that came next is among those best.
        """
        head = torch.randint(query.shape[1], (query.shape[0],))
        scores = query[torch.arange(query.shape[0]), head] @ self._items.T  # (B, N)
        before = positions - self._data.starts[positions]
        user = torch.arange(query.shape[0]).repeat_interleave(before)
        scores[user, self._data.items[spread(self._data.starts[positions], before)]] = _EXCLUDED
        depth = min(self._config.ranker_depth, scores.shape[1])
        top = scores.topk(depth, 1).indices
        chosen = torch.rand(top.shape).argsort(1)[:, : self._config.ranker_hard]
        found = (top == self._data.items[positions][:, None]).any(1)
        return top.gather(1, chosen), found

    def _logits(self, query: Tensor, state: Tensor, candidates: Tensor) -> Tensor:
        """Task logits ``(B, m, T)`` of candidates ``(B, m)``."""
        batch, width = candidates.shape
        request = torch.arange(batch).repeat_interleave(width)
        items = self._items[candidates.flatten()]
        refined = (query[request] * items[:, None]).sum(2)
        signals = self._data.signals[candidates.flatten()]
        logits = self._model.rank(query, state, request, items, refined, signals)
        return logits.view(batch, width, -1)

    @torch.no_grad()
    def _ndcg(self, *, rerank: bool) -> float:
        """NDCG@10 on the held-out items: of the best head, or of the reranked union."""
        assert self._held is not None
        held = self._held
        state = self._model.user_state(self._model.history_bags(held.rows, held.lengths))
        query = self._model.user_embedding(state)
        scores = query @ self._items.T  # (U, H, N)
        scores[held.seen[0], :, held.seen[1]] = _EXCLUDED
        if not rerank:
            top = min(_SELECTION_K, scores.shape[2])
            reached = [
                float(np.mean(ndcg_at_k(scores[:, head].topk(top, 1).indices, held.targets, top)))
                for head in range(scores.shape[1])
            ]
            return max(reached)
        depth = min(_SELECTION_DEPTH, scores.shape[2])
        union = scores.topk(depth, 2).indices.flatten(1)  # (U, H * depth)
        value = torch.sigmoid(self._logits(query, state, union)).sum(2)
        value = value.masked_fill(scores.amax(1).gather(1, union) == _EXCLUDED, -math.inf)
        # An item of several heads comes several times, with one value: only the first counts.
        ordered, order = torch.sort(union, dim=1, stable=True)
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        value = value.gather(1, order).masked_fill(again, -math.inf)
        top = min(_SELECTION_K, value.shape[1])
        best = value.topk(top, 1)
        found = ordered.gather(1, best.indices).masked_fill(best.values == -math.inf, -1)
        return float(np.mean(ndcg_at_k(found, held.targets, top)))


def _ranker_loss(logits: Tensor, positive: Tensor, repeated: Tensor, found: Tensor) -> Tensor:
    """Binary cross-entropy of all candidates plus softmax cross-entropy of the positives.

    Args:
        logits: ``(B, m, T)``; candidate 0 is the item that came next.
        positive: ``(B, T)`` bool, whether it counts for the task.
        repeated: ``(B, m)`` bool, candidates that are left out.
        found: ``(B,)`` bool, positions that count. Where the towers did not find the item it would
            teach that what they rank high is wrong.
    """
    labels = torch.zeros_like(logits)
    labels[:, 0] = positive.float()
    kept = (~repeated & found[:, None]).float()[..., None]
    binary = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    pointwise = (binary * kept).sum((0, 1)) / kept.sum().clamp(min=1)
    masked = logits.masked_fill(repeated[..., None], _EXCLUDED)
    chosen = torch.logsumexp(masked, 1) - masked[:, 0]  # (B, T)
    counted = (positive & found[:, None]).float()
    listwise = (chosen * counted).sum(0) / counted.sum(0).clamp(min=1)
    return (pointwise + listwise).sum()


def _user_odds(data: TrainingData, positions: Tensor, config: TrainingConfig) -> Tensor:
    """Odds of drawing each position, float64."""
    return data.user_sizes[positions].double() ** (config.user_power - 1.0)


def _draw(positions: Tensor, odds: Tensor, count: int) -> Tensor:
    """``count`` of the positions by their odds, with replacement."""
    return positions[torch.multinomial(odds, count, replacement=True)]


def _histories(model: TwoTower, data: TrainingData, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Item rows of the newest ids before each position, and their number per position."""
    lengths = (positions - data.starts[positions]).clamp(max=model.config.max_history)
    return data.item_rows[data.items[spread(positions - lengths, lengths)]], lengths


def _user_batch(
    model: TwoTower, data: TrainingData, config: TrainingConfig, positions: Tensor
) -> Tensor:
    """Query embeddings ``(B, H, D)`` of thinned histories."""
    rows, lengths = _histories(model, data, positions)
    request = torch.arange(len(lengths)).repeat_interleave(lengths)
    emptied = torch.rand(len(lengths)) < config.empty_history
    kept = (torch.rand(len(rows)) >= config.history_dropout) & ~emptied[request]
    lengths = torch.bincount(request[kept], minlength=len(lengths))
    state = model.user_state(model.history_bags(rows[kept], lengths))
    return model.user_embedding(functional.dropout(state, config.dropout))


def _item_batch(
    model: TwoTower, data: TrainingData, config: TrainingConfig, items: Tensor
) -> dict[str, Bags]:
    """What the item tables pool for these items, some of them without their id."""
    bags = {name: bag.take(items) for name, bag in data.bags.items()}
    ids = bags[model.config.item]
    dropped = torch.rand(len(ids.rows)) < config.item_dropout
    bags[model.config.item] = ids._replace(rows=ids.rows.masked_fill(dropped, DEFAULT_ROW))
    return bags


def _all_items(model: TwoTower, data: TrainingData) -> Tensor:
    everything = torch.arange(data.bags[BAND_TABLE].lengths.shape[0])
    chunks = [
        model.item_embedding({name: bag.take(chunk) for name, bag in data.bags.items()})
        for chunk in torch.tensor_split(everything, max(len(everything) // 4096, 1))
    ]
    return torch.cat(chunks)


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that rises for the first steps and then falls linearly to zero."""
    warm_up = min(_WARM_UP_STEPS, max(steps // 10, 1))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1.0 - step / steps)
    )


def _steps(steps: int, what: str, progress: bool) -> Iterator[int]:
    return iter(tqdm(range(steps), desc=what, unit="step", disable=not progress, mininterval=0.5))


def _tenths(losses: list[float]) -> tuple[float, ...]:
    """The mean of each tenth; fewer where there are fewer than ten losses."""
    parts = np.array_split(np.array(losses), 10)
    return tuple(float(part.mean()) for part in parts if len(part))
