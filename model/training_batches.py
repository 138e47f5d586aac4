"""What the steps of training draw and measure: positions, histories, items, schedules, ranks.

Shapes: N items, M interactions, B positions of a batch, U held-out users, H heads, T tasks, D
embedding dimension, m candidates per position.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from silvershard.model.bags import DEFAULT_ROW, Bags, spread
from silvershard.model.quality import ndcg_at_k
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import HeldOut, TrainingData
from silvershard.model.two_tower import History, TwoTower
from silvershard.model.two_tower_config import BAND_TABLE, QUERY_TEXT

EXCLUDED = -1e9
"""The score of what must not be chosen."""
_ITEM_CHUNK = 4096
_SELECTION_DEPTH = 100
_SELECTION_K = 10


def user_odds(data: TrainingData, positions: Tensor, config: TrainingConfig) -> Tensor:
    """Odds of drawing each position, float64."""
    return data.user_sizes[positions].double() ** (config.user_power - 1.0)


def item_odds(data: TrainingData, config: TrainingConfig) -> Tensor:
    """Odds of drawing each item as a negative, ``(N,)`` float64."""
    return data.counts.add(1).double() ** config.negative_power


def draw(positions: Tensor, odds: Tensor, count: int) -> Tensor:
    """``count`` of the positions by their odds, with replacement."""
    return positions[torch.multinomial(odds, count, replacement=True)]


def histories(model: TwoTower, data: TrainingData, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Item rows of the newest ids before each position, and their number per position."""
    lengths = (positions - data.starts[positions]).clamp(max=model.config.max_history)
    return data.item_rows[data.items[spread(positions - lengths, lengths)]], lengths


class UserBatch(NamedTuple):
    """What the user tower reads of a batch of positions."""

    history: History
    """Of B positions, thinned."""
    dropout: Tensor
    """``(B, profile)`` float32, factors of the profile: 0 or a little above 1."""


def user_batch(
    model: TwoTower, data: TrainingData, config: TrainingConfig, positions: Tensor
) -> UserBatch:
    """Thinned histories of B positions, and the dropout of their profiles."""
    rows, lengths = histories(model, data, positions)
    request = torch.arange(len(lengths)).repeat_interleave(lengths)
    emptied = torch.rand(len(lengths)) < config.empty_history
    texts, alone = drawn_texts(data, config, positions)
    emptied |= alone
    kept = (torch.rand(len(rows)) >= config.history_dropout) & ~emptied[request]
    lengths = torch.bincount(request[kept], minlength=len(lengths))
    users = without_some(model, data.users.take(positions), config.user_feature_dropout) | texts
    ones = torch.ones(len(lengths), model.config.profile_dim)
    return UserBatch(
        model.history(rows[kept], lengths, users), functional.dropout(ones, config.dropout)
    )


def drawn_texts(
    data: TrainingData, config: TrainingConfig, positions: Tensor
) -> tuple[dict[str, Bags], Tensor]:
    """Texts that ask for the items of some positions, and which of those have no history.

    Returns:
        The inputs of B positions under ``QUERY_TEXT``, nothing where the model reads no texts, and
        ``(B,)`` bool.
    """
    alone = torch.zeros(len(positions), dtype=torch.bool)
    if data.texts is None or config.text is None:
        return {}, alone
    bags, given = data.texts.draw(data.items[positions], config.text.query_share)
    return {QUERY_TEXT: bags}, given & (torch.rand(len(alone)) < config.text.alone_share)


def without_some(model: TwoTower, users: Mapping[str, Bags], dropout: float) -> dict[str, Bags]:
    """These user features, each of them absent of a share of the users."""
    thinned = {}
    for name, bags in users.items():
        count = len(bags.lengths)
        absent = model.user_features.of_columns({}, count)[name]
        both = Bags(*(torch.cat(parts) for parts in zip(bags, absent, strict=True)))
        dropped = torch.rand(count) < dropout
        thinned[name] = both.take(torch.arange(count) + count * dropped)
    return thinned


def item_batch(
    model: TwoTower, data: TrainingData, config: TrainingConfig, items: Tensor
) -> dict[str, Bags]:
    """What the item tables pool for these items, some of them without their id."""
    bags = {name: bag.take(items) for name, bag in data.bags.items()}
    ids = bags[model.config.item]
    dropped = torch.rand(len(ids.rows)) < config.item_dropout
    bags[model.config.item] = ids._replace(rows=ids.rows.masked_fill(dropped, DEFAULT_ROW))
    return bags


def all_items(model: TwoTower, data: TrainingData) -> Tensor:
    """Embeddings of the whole catalogue, ``(N, D)`` float32."""
    everything = torch.arange(data.bags[BAND_TABLE].lengths.shape[0])
    chunks = [
        model.item_embedding({name: bag.take(chunk) for name, bag in data.bags.items()})
        for chunk in torch.tensor_split(everything, max(len(everything) // _ITEM_CHUNK, 1))
    ]
    return torch.cat(chunks)


def learning_rate_factor(
    schedule: Literal["linear", "cosine", "constant"], step: int, steps: int, warm_up: int
) -> float:
    """The learning rate of a step as a share of the highest.

    It rises linearly over the first ``warm_up`` steps, at most a tenth of all, and then falls to
    zero along a line or half a cosine, or stays.
    """
    rising = min(1.0, (step + 1) / min(warm_up, max(steps // 10, 1))) if warm_up else 1.0
    if schedule == "constant":
        return rising
    done = step / steps
    return rising * (1.0 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def tower_ndcg(held: HeldOut, model: TwoTower, items: Tensor) -> float:
    """NDCG@10 on the held-out items, all items ranked by the best head."""
    scores, _, _ = _scores(held, model, items)
    top = min(_SELECTION_K, scores.shape[2])
    reached = [
        float(np.mean(ndcg_at_k(scores[:, head].topk(top, 1).indices, held.targets, top)))
        for head in range(scores.shape[1])
    ]
    return max(reached)


def ranker_ndcg(
    held: HeldOut,
    model: TwoTower,
    items: Tensor,
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> float:
    """NDCG@10 on the held-out items after the best of all heads are ranked again.

    Args:
        held: U users.
        model: the towers.
        items: ``(N, D)`` float32.
        logits: query ``(U, H, D)``, user state and candidates ``(U, m)`` to ``(U, m, T)``.
    """
    scores, query, state = _scores(held, model, items)
    depth = min(_SELECTION_DEPTH, scores.shape[2])
    union = scores.topk(depth, 2).indices.flatten(1)  # (U, H * depth)
    value = torch.sigmoid(logits(query, state, union)).sum(2)
    value = value.masked_fill(scores.amax(1).gather(1, union) == EXCLUDED, -math.inf)
    # An item of several heads comes several times, with one value: only the first counts.
    ordered, order = torch.sort(union, dim=1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    value = value.gather(1, order).masked_fill(again, -math.inf)
    top = min(_SELECTION_K, value.shape[1])
    best = value.topk(top, 1)
    found = ordered.gather(1, best.indices).masked_fill(best.values == -math.inf, -1)
    return float(np.mean(ndcg_at_k(found, held.targets, top)))


def _scores(held: HeldOut, model: TwoTower, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all items ``(U, H, N)`` but those of the history, queries and user states."""
    state = model.user_state(model.history(held.rows, held.lengths, held.users))
    query = model.user_embedding(state)
    scores = query @ items.T
    scores[held.seen[0], :, held.seen[1]] = EXCLUDED
    return scores, query, state


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer by number of the parameter and name."""
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Continue from what ``optimizer_state`` gave."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        found.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found})
