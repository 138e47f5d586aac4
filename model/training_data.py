"""What training works on: the interactions, and the tensors made of them.

Shapes: N items of the catalogue, M interactions, H heads, T tasks, D embedding dimension, B users,
Vs signals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.bags import DEFAULT_ROW, Bags, spread
from silvershard.model.catalogue import Ragged
from silvershard.model.ranker_config import check_ranker
from silvershard.model.schema import Schema
from silvershard.model.training_config import TrainingConfig
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import (
    HISTORY_TABLE,
    RECENT_TABLE,
    SESSION,
    HistoryPool,
    ItemTable,
    TwoTowerConfig,
)

_CONTENT_SCALE = 0.4
_FEWEST_TO_RESERVE = 4
_ID_NOISE = 0.02
_POOL_SCALE = 0.3


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who interacted with what, ordered by user and then by time.

    Attributes:
        user_ids: ``(M,)`` int64, ascending.
        item_ids: ``(M,)`` ids of the item feature that histories name.
        ratings: ``(M,)`` float32.
    """

    user_ids: NDArray[np.int64]
    item_ids: NDArray[Any]
    ratings: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not len(self.user_ids) == len(self.item_ids) == len(self.ratings):
            raise ValueError(
                "user_ids, item_ids and ratings must have the same length, got "
                f"{len(self.user_ids)}, {len(self.item_ids)} and {len(self.ratings)}"
            )
        if (np.diff(self.user_ids) < 0).any():
            raise ValueError("user_ids must be ascending")


class TrainingData(NamedTuple):
    """The training set as tensors; items are numbered by their row in the catalogue."""

    bags: Mapping[str, Bags]
    """What the item tables pool for each item."""
    item_rows: Tensor
    """``(N,)`` int64 table row of each item."""
    items: Tensor
    """``(M,)`` int64 item of each interaction."""
    starts: Tensor
    """``(M,)`` int64 first interaction of the same user."""
    head_positive: Tensor
    """``(M, H)`` bool."""
    task_positive: Tensor
    """``(M, T)`` bool."""
    tower_positions: Tensor
    """int64 interactions with a history that the towers learn to predict."""
    ranker_positions: Tensor
    """int64 later interactions, which only the reranker learns to predict."""
    user_sizes: Tensor
    """``(M,)`` int64 interactions of the same user."""
    counts: Tensor
    """``(N,)`` int64 interactions of each item."""
    signals: Tensor
    """``(N, Vs)`` float32."""


class HeldOut(NamedTuple):
    """Users with the item that comes next."""

    rows: Tensor
    """int64 item rows of all histories, oldest first."""
    lengths: Tensor
    """``(B,)`` int64."""
    targets: Tensor
    """``(B,)`` int64 item that comes next."""
    seen: Tensor
    """``(2, n)`` int64 pairs of user and an item of its history."""


def prepare(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
) -> tuple[TwoTower, TrainingData]:
    """Return the model with its initial weights and the tensors that it is trained on.

    Raises:
        ValueError: if an interaction names an item without features, or no user has two of them.
    """
    tower, known = _tower_config(schema, features, config)
    model = TwoTower(tower)
    for name, values in known.items():
        model.vocabulary(name).fill(values)
    num_items = len(signals)
    bags = model.item_bags(features)
    item_rows = bags[config.item].take(torch.arange(num_items)).rows
    if item_rows.shape[0] != num_items:
        raise ValueError(f"feature {config.item} must have one id per item")
    items = items_of(model, item_rows, interactions.item_ids)
    if bool((items < 0).any()):
        missing = interactions.item_ids[int(torch.nonzero(items < 0)[0])]
        raise ValueError(f"interactions must name items with features, got {config.item} {missing}")
    users = torch.from_numpy(interactions.user_ids)
    _, lengths = torch.unique_consecutive(users, return_counts=True)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    sizes = lengths.repeat_interleave(lengths)
    age = starts + sizes - 1 - torch.arange(len(users))
    reserved = age < (sizes * config.ranker_share).ceil()
    reserved &= sizes > _FEWEST_TO_RESERVE
    with_history = torch.arange(len(users)) > starts
    if not bool(with_history.any()):
        raise ValueError("interactions must have a user with at least two, got none")
    counts = torch.bincount(items, minlength=num_items)
    model.bands[item_rows] = popularity_bands(counts, tower.bands)
    for name in config.pooled:
        _fill_links(model.links(name), item_rows, model.item_bags(features)[name])
    _fill_weights(model, items[~reserved], users[~reserved], item_rows, config)
    _fill_signal_scale(model, torch.from_numpy(signals))
    data = TrainingData(
        bags=model.item_bags(features),
        item_rows=item_rows,
        items=items,
        starts=starts,
        head_positive=_positive(schema.heads, interactions.ratings, config),
        task_positive=_positive(schema.tasks, interactions.ratings, config),
        tower_positions=torch.nonzero(with_history & ~reserved).flatten(),
        ranker_positions=torch.nonzero(with_history & (reserved | ~reserved.any())).flatten(),
        user_sizes=sizes,
        counts=counts,
        signals=torch.from_numpy(signals),
    )
    return model, data


def items_of(model: TwoTower, item_rows: Tensor, item_ids: NDArray[Any]) -> Tensor:
    """The catalogue row of each id, int64; -1 where there is none."""
    vocabulary = model.vocabulary(model.config.item)
    item_of_row = torch.full((vocabulary.keys.shape[0] + 1,), -1, dtype=torch.int64)
    item_of_row[item_rows] = torch.arange(item_rows.shape[0])
    item_of_row[DEFAULT_ROW] = -1
    return item_of_row[vocabulary.rows(item_ids)]


def held_out(
    model: TwoTower, data: TrainingData, interactions: Interactions, following: Interactions
) -> HeldOut:
    """The users of ``following`` with their histories from ``interactions``.

    Raises:
        ValueError: if a user comes twice or an item is unknown.
    """
    users = following.user_ids
    if len(np.unique(users)) != len(users):
        raise ValueError("validation must have at most one interaction per user")
    targets = items_of(model, data.item_rows, following.item_ids)
    if bool((targets < 0).any()):
        raise ValueError("validation must name items with features")
    begins = torch.from_numpy(np.searchsorted(interactions.user_ids, users, side="left"))
    ends = torch.from_numpy(np.searchsorted(interactions.user_ids, users, side="right"))
    items = items_of(model, data.item_rows, interactions.item_ids)
    seen = items[spread(begins, ends - begins)]
    user = torch.arange(len(users)).repeat_interleave(ends - begins)
    return HeldOut(data.item_rows[seen], ends - begins, targets, torch.stack([user, seen]))


def popularity_bands(counts: Tensor, num_bands: int) -> Tensor:
    """The band of each count, int64: three per factor of four, none for a count of 0."""
    bands = (torch.log2(counts.double() + 1.0) * 1.5).floor().long()
    return bands.clamp(max=num_bands - 1)


def _tower_config(
    schema: Schema, features: Mapping[str, Ragged], config: TrainingConfig
) -> tuple[TwoTowerConfig, dict[str, list[Any]]]:
    known = {
        feature.name: sorted(set(features[feature.name].values.tolist()))
        for feature in schema.item_features
    }
    lengths = {feature.name: feature.max_length for feature in schema.user_features}
    if config.history not in lengths:
        raise ValueError(f"history must be a user feature of the schema, got {config.history!r}")
    for name in config.pooled:
        if name not in known:
            raise ValueError(
                f"pooled must name item features, which are {', '.join(known)}, got {name!r}"
            )
    if config.item not in known:
        raise ValueError(f"item must be one of {', '.join(known)}, got {config.item!r}")
    for name in config.min_rating:
        if name not in (*schema.heads, *schema.tasks):
            raise ValueError(
                f"min_rating must name heads and tasks, which are "
                f"{', '.join(dict.fromkeys((*schema.heads, *schema.tasks)))}, got {name!r}"
            )
    longest = lengths[config.history]
    if config.encoder is not None and config.encoder.max_length > longest:
        raise ValueError(
            f"encoder.max_length must be at most {longest}, the ids kept of {config.history}, "
            f"got {config.encoder.max_length}"
        )
    check_ranker(config.ranker, dim=config.dim, session_length=longest)
    tower = TwoTowerConfig(
        dim=config.dim,
        heads=schema.heads,
        tasks=schema.tasks,
        signals=schema.signals,
        history=config.history,
        item=config.item,
        tables=tuple(
            ItemTable(name=feature.name, dtype=feature.dtype, size=len(known[feature.name]))
            for feature in schema.item_features
        ),
        pooled=tuple(
            HistoryPool(feature=name, width=max(int(features[name].lengths.max(initial=0)), 1))
            for name in config.pooled
        ),
        max_history=longest,
        recent=config.recent,
        half_life=config.half_life,
        encoder=config.encoder,
        ranker=config.ranker,
    )
    return tower, known


def _positive(names: Sequence[str], ratings: NDArray[np.float32], config: TrainingConfig) -> Tensor:
    """Which interactions are positive for each name, ``(M, len(names))`` bool."""
    least = [config.min_rating.get(name, -np.inf) for name in names]
    return torch.from_numpy(ratings)[:, None] >= torch.tensor(least, dtype=torch.float32)


def _fill_links(links: Tensor, item_rows: Tensor, bags: Bags) -> None:
    """Write the rows that each item has of a pooled feature, in place."""
    item = torch.arange(item_rows.shape[0]).repeat_interleave(bags.lengths)
    column = spread(torch.zeros_like(bags.lengths), bags.lengths)
    links[item_rows[item], column] = bags.rows


@torch.no_grad()
def _fill_signal_scale(model: TwoTower, signals: Tensor) -> None:
    if signals.numel():
        deviation = signals.double().std(0, correction=0)
        scale = torch.where(deviation > 0, 1.0 / deviation.clamp(min=1e-9), 1.0)
        model.ranker.signal_mean.copy_(signals.double().mean(0))
        model.ranker.signal_scale.copy_(scale)


@torch.no_grad()
def _fill_weights(
    model: TwoTower, items: Tensor, users: Tensor, item_rows: Tensor, config: TrainingConfig
) -> None:
    """Start the item tables from a factorisation of the training interactions."""
    dim = config.dim
    for tables in (model.user_tables, model.item_tables):
        for name in tables.features:
            tables.weight(name).normal_(std=_CONTENT_SCALE * dim**-0.5)
    factors = _item_factors(items, users, item_rows.shape[0], dim)
    ids = model.item_tables.weight(config.item)
    ids[item_rows] = factors + _ID_NOISE * torch.randn_like(factors)
    for name in (HISTORY_TABLE, RECENT_TABLE):
        model.user_tables.weight(name)[item_rows] = factors
    if model.session_table is not None:
        session = model.session_table.weight(SESSION)
        session.normal_(std=_CONTENT_SCALE * dim**-0.5)
        session[item_rows] = factors
    # Each head starts as a weighted sum of the pooled features, so that histories start out near
    # the items that share their factors.
    model.user_head.weight.zero_()
    model.user_head.bias.zero_()
    for place, name in enumerate(model.user_tables.features):
        scale = 1.0 if name in (HISTORY_TABLE, RECENT_TABLE) else _POOL_SCALE
        for head in range(len(model.config.heads)):
            block = model.user_head.weight[place * dim :, head * dim :]
            block[:dim, :dim].diagonal().fill_(scale)
    if model.encoder is not None:
        for head in range(len(model.config.heads)):
            block = model.user_head.weight[len(model.user_tables.features) * dim :, head * dim :]
            block[:dim, :dim].diagonal().fill_(_POOL_SCALE)


def _item_factors(items: Tensor, users: Tensor, num_items: int, dim: int) -> Tensor:
    """Factors ``(N, D)`` float32 of the degree-normalised interaction matrix, mean length 1.

    Rows of items without interactions are zero. Normalising items by the fourth root of their
    degree keeps part of their popularity.
    """
    _, user = torch.unique_consecutive(users, return_inverse=True)
    num_users = int(user[-1]) + 1
    of_user = torch.bincount(user).float()
    of_item = torch.bincount(items, minlength=num_items).float()
    values = of_user[user] ** -0.5 * of_item[items] ** -0.25
    matrix = torch.sparse_coo_tensor(
        torch.stack([user, items]), values, (num_users, num_items), check_invariants=False
    ).coalesce()
    rank = min(dim, num_users, num_items)
    _, strength, right = torch.svd_lowrank(matrix, q=rank, niter=4)
    factors = torch.zeros(num_items, dim)
    factors[:, :rank] = right * strength
    lengths = torch.linalg.vector_norm(factors, dim=1)
    scaled: Tensor = factors / lengths[lengths > 0].mean().clamp(min=1e-6)
    return scaled
