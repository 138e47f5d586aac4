"""Training of the towers: sampled softmax over the next item, and a pull towards cluster centres.

The towers predict the next item at positions of the training histories. Meanwhile the item
embeddings are pulled towards the centres of their clusters, so that an inverted file over them
finds nearly everything in a few lists. In training through the index these are its centroids.

Shapes: N items, B positions of a batch, H heads, D embedding dimension, n negatives, C clusters.

Source: Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural
Probabilistic Language Model", IEEE TNN 2008, section III (sampled softmax); Yi et al.,
"Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
section 4 (log-Q correction).
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from silvershard.model.clustering import default_clusters, spherical_kmeans
from silvershard.model.distributed_step import LocalStep, StartStep
from silvershard.model.joint import JointIndex, straight_through
from silvershard.model.training_batches import (
    EXCLUDED,
    all_items,
    draw,
    item_batch,
    item_odds,
    learning_rate_factor,
    tower_ndcg,
    user_batch,
    user_odds,
)
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import HeldOut, TrainingData
from silvershard.model.two_tower import TwoTower

_CENTRE_EVERY = 50
_CENTRE_ITERATIONS = 10
_SEED_STRIDE = 1_000_003


class TowerTraining:
    """The first phase of training; ``done`` counts its steps."""

    name: Final = "towers"

    def __init__(
        self,
        model: TwoTower,
        data: TrainingData,
        config: TrainingConfig,
        held: HeldOut | None,
        seed: int,
        start: StartStep = LocalStep,
    ) -> None:
        self.done = 0
        self.steps = config.steps
        self.evaluate_every = config.evaluate_every
        self.ndcg = math.nan
        """Of the last evaluation."""
        self._model = model
        self._data = data
        self._config = config
        self._held = held
        self._seed = seed
        self._towers = start(model)
        self._synchronised = True
        self._parameters = list(model.tower_parameters())
        self._joint: JointIndex | None = None
        if config.joint is not None:
            self._joint = JointIndex(config.joint, config.cluster_pull, self._first_centres())
            self._joint.to(self._towers.device)
        learned = [*self._towers.parameters, *(self._joint.parameters() if self._joint else ())]
        self._parameters += learned[len(self._towers.parameters) :]
        self._optimizer = torch.optim.Adam(learned, lr=config.learning_rate)
        odds = item_odds(data, config)
        self._odds = odds
        self._log_odds = (odds / odds.sum()).log().float()
        self._user_odds = user_odds(data, data.tower_positions, config)
        self._centroids: Tensor | None = None
        self._best: dict[str, Tensor] = {}

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        config = self._config
        return config.learning_rate * learning_rate_factor(
            config.schedule, self.done, self.steps, config.warm_up
        )

    def step(self) -> float:
        """Train on one batch and return its loss."""
        model, data, config = self._model, self._data, self._config
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        positions = draw(data.tower_positions, self._user_odds, config.batch)
        targets = data.items[positions]
        negatives = torch.multinomial(self._odds, config.negatives, replacement=True)
        users = user_batch(model, data, config, positions)
        chosen = item_batch(model, data, config, torch.cat([targets, negatives]))
        seed = self._seed * _SEED_STRIDE + self.done
        query, items = self._towers.embed(users, chosen, seed)  # (B, H, D), (B + n, D)
        log_odds, counted = self._log_odds[negatives], data.head_positive[positions].float()
        targets, negatives, log_odds, counted = (
            one.to(query.device) for one in (targets, negatives, log_odds, counted)
        )
        scored = items if self._joint is None else straight_through(items)
        logits = torch.cat(
            [
                (query * scored[: config.batch, None]).sum(2, keepdim=True),
                (query.flatten(0, 1) @ scored[config.batch :].T).view(*query.shape[:2], -1),
            ],
            2,
        )  # (B, H, 1 + n)
        per_head = sampled_softmax(logits / config.temperature, targets, negatives, log_odds)
        loss = ((per_head * counted).sum(0) / counted.sum(0).clamp(min=1)).sum()
        if self._joint is not None:
            loss = loss + self._joint(query, items, logits[..., 1:], log_odds, config.temperature)
        elif config.cluster_pull and self.done >= config.cluster_start * self.steps:
            loss = loss + config.cluster_pull * self._spread(items)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._synchronised = False
        self.done += 1
        return loss.item()

    def _spread(self, items: Tensor) -> Tensor:
        """The mean distance of items ``(n, D)`` from the nearest centre."""
        if self._centroids is None or self.done % _CENTRE_EVERY == 0:
            self._synchronise()
            self._centroids = self._towers.agree(self._centres)
        centroids = self._centroids.to(items.device)
        nearest = (items.detach() @ centroids.T).argmax(1)
        return (1 - (items * centroids[nearest]).sum(1)).mean()

    def _synchronise(self) -> None:
        """Bring the present weights into the model, where training goes on."""
        if not self._synchronised:
            self._towers.synchronise()
            self._synchronised = True

    @torch.no_grad()
    def _first_centres(self) -> Tensor:
        """Cluster centres ``(C, D)`` of the present embeddings."""
        items = all_items(self._model, self._data)
        clusters = min(self._config.clusters or default_clusters(len(items)), len(items))
        return spherical_kmeans(
            items,
            clusters,
            seed=self._seed,
            iterations=_CENTRE_ITERATIONS,
            max_imbalance=clusters,
        ).centroids

    @torch.no_grad()
    def _centres(self) -> Tensor:
        """Cluster centres ``(C, D)`` of the present embeddings, moved on from those before."""
        before = self._centroids
        if before is None:
            return self._first_centres()
        items = all_items(self._model, self._data)
        sums = torch.zeros_like(before).index_add_(0, (items @ before.T).argmax(1), items)
        return torch.where(sums.any(1, keepdim=True), functional.normalize(sums, dim=1), before)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return NDCG@10 on the held-out items; NaN without them."""
        self._synchronise()
        self._model.eval()
        held = self._held
        if held is not None:
            self.ndcg = self._towers.agree(
                lambda: tower_ndcg(held, self._model, all_items(self._model, self._data))
            )
        return self.ndcg

    def keep(self) -> None:
        """Remember the present weights as the best."""
        self._best = {str(at): one.detach().clone() for at, one in enumerate(self._parameters)}

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best weights, if any were kept."""
        self._synchronise()
        for number, value in self._best.items():
            self._parameters[int(number)].copy_(value)

    @property
    def centroids(self) -> Tensor | None:
        """Centroids ``(C, D)`` float32 that were trained with the towers; none without joint."""
        return None if self._joint is None else self._joint.centroids.detach()

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights of the model that the next step depends on."""
        self._synchronise()
        optimizer = self._towers.optimizer_state(self._optimizer)
        tensors = {f"optimizer.{key}": one for key, one in optimizer.items()}
        tensors |= {f"best.{key}": one for key, one in self._best.items()}
        if self._centroids is not None:
            tensors["centroids"] = self._centroids
        if self._joint is not None:
            tensors |= {f"joint.{key}": one for key, one in self._joint.state_dict().items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Continue after ``done`` steps from what ``state`` gave."""
        self.done = done
        optimizer = with_prefix(tensors, "optimizer.")
        self._towers.load_optimizer_state(self._optimizer, optimizer)
        self._best = with_prefix(tensors, "best.")
        self._centroids = tensors.get("centroids")
        if self._joint is not None:
            self._joint.load_state_dict(with_prefix(tensors, "joint."))


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix."""
    return {
        name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)
    }


def sampled_softmax(logits: Tensor, targets: Tensor, negatives: Tensor, log_odds: Tensor) -> Tensor:
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
    miss = miss.masked_fill((targets[:, None] == negatives)[:, None], EXCLUDED)
    return torch.logsumexp(torch.cat([hit[..., None], miss], 2), 2) - hit
