"""What training works on: the interactions, and the tensors made of them.

Shapes: N items of the catalogue, M interactions, H heads, T tasks, D embedding dimension, B users,
Vs signals.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.bags import DEFAULT_ROW, Bags, spread
from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.initial_weights import fill_text_weights, fill_weights
from silvershard.model.numbers import NumberFeatures, numbers_of
from silvershard.model.ranker_config import check_ranker
from silvershard.model.schema import Schema, UserFeature
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_texts import QueryTexts, TrainingTexts, query_texts
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import (
    ITEM_TEXT,
    HistoryPool,
    ItemTable,
    NumberFeature,
    TwoTowerConfig,
)

_FEWEST_TO_RESERVE = 4


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who interacted with what, ordered by user and then by time.

    Attributes:
        user_ids: ``(M,)`` int64, ascending.
        item_ids: ``(M,)`` ids of the item feature that histories name.
        ratings: ``(M,)`` float32.
        features: user features beside the history, as the model may know them when it predicts an
            interaction: nothing that happened later. All columns have the same rows.
        feature_rows: ``(M,)`` int64, the row of the columns for each interaction; None: the columns
            have one row per user, in the order of their ids.
    """

    user_ids: NDArray[np.int64]
    item_ids: NDArray[Any]
    ratings: NDArray[np.float32]
    features: Mapping[str, UserColumn] = field(default_factory=dict)
    feature_rows: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if not len(self.user_ids) == len(self.item_ids) == len(self.ratings):
            raise ValueError(
                "user_ids, item_ids and ratings must have the same length, got "
                f"{len(self.user_ids)}, {len(self.item_ids)} and {len(self.ratings)}"
            )
        if (np.diff(self.user_ids) < 0).any():
            raise ValueError("user_ids must be ascending")
        self._check_features()

    def _check_features(self) -> None:
        if not self.features:
            return
        count = self.num_feature_rows
        for name, column in self.features.items():
            if len(column.values) != count:
                raise ValueError(f"feature {name} must have {count} rows, got {len(column.values)}")
        rows = self.rows_of_features
        if len(rows) != len(self.user_ids) or (
            len(rows) and not 0 <= rows.min() <= rows.max() < count
        ):
            raise ValueError(
                f"feature_rows must be {len(self.user_ids)} rows in [0, {count}), got {len(rows)}"
            )

    @property
    def num_feature_rows(self) -> int:
        """Rows of every column of features; 0 without features."""
        if self.feature_rows is None and self.features:
            return len(np.unique(self.user_ids))
        return max((len(column.values) for column in self.features.values()), default=0)

    @property
    def rows_of_features(self) -> NDArray[np.int64]:
        """The row of the features of each interaction, ``(M,)`` int64."""
        if self.feature_rows is not None:
            return self.feature_rows
        return np.unique(self.user_ids, return_inverse=True)[1].astype(np.int64)


class Users(NamedTuple):
    """The user features beside the history, as user tables and projections read them."""

    bags: Mapping[str, Bags]
    rows: Tensor
    """int64 row of the bags of each interaction."""

    def take(self, positions: Tensor) -> dict[str, Bags]:
        """The features of interactions ``(B,)`` int64; empty where the model has none."""
        return {name: bags.take(self.rows[positions]) for name, bags in self.bags.items()}


NO_USERS = Users({}, torch.zeros(0, dtype=torch.int64))


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
    users: Users = NO_USERS
    """User features of each interaction."""
    texts: QueryTexts | None = None
    """The texts that ask for items; None where the model reads none."""
    max_lengths: Mapping[str, int] = MappingProxyType({})
    """How many ids of each user feature are kept."""


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
    users: Mapping[str, Bags] = NO_USERS.bags
    """User features, B bags each."""


def prepare(
    schema: Schema,
    features: Mapping[str, Ragged],
    signals: NDArray[np.float32],
    interactions: Interactions,
    config: TrainingConfig,
    texts: TrainingTexts | None = None,
) -> tuple[TwoTower, TrainingData]:
    """Return the model with its initial weights and the tensors that it is trained on.

    Raises:
        ValueError: if an interaction names an item without features, no user has two of them, or
            the features of users or items are not as schema and config say, or texts are there
            without a section for them or are missing.
    """
    if (texts is None) != (config.text is None):
        raise ValueError("texts must be given where config has a section text, and only there")
    max_lengths = {one.name: one.max_length for one in schema.user_features if one.kind == "ids"}
    interactions = _as_served(interactions, max_lengths)
    tower, known = _tower_config(schema, features, interactions, config, texts)
    model = TwoTower(tower)
    embedded = None
    if model.text is not None and texts is not None:
        model.text.encoder.load_state_dict(texts.encoder.state_dict())
        model.text.fill(texts.items, texts.queries)
        embedded = texts.items
    for name, values in known.items():
        model.vocabulary(name).fill(values)
    for name in model.user_features.ids:
        model.user_features.vocabulary(name).fill(_distinct(interactions.features[name].values))
    of_users = {name: column.values for name, column in interactions.features.items()}
    _fill_numbers(model.user_features.numbers, of_users)
    _fill_numbers(model.item_numbers, features)
    num_items = len(signals)
    bags = model.item_bags(features, embedded)
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
        _fill_links(model.links(name), item_rows, bags[name])
    fill_weights(model, items[~reserved], users[~reserved], item_rows, config)
    asking = None
    if model.text is not None and texts is not None:
        asking = query_texts(texts, model.text)
        fill_text_weights(model, bags[ITEM_TEXT], asking.bags, item_rows)
    _fill_signal_scale(model, torch.from_numpy(signals))
    data = TrainingData(
        bags=model.item_bags(features, embedded),
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
        users=users_of(model, interactions),
        texts=asking,
        max_lengths=max_lengths,
    )
    return model, data


def _as_served(interactions: Interactions, max_lengths: Mapping[str, int]) -> Interactions:
    """The interactions with the ids of users that a request would keep."""
    kept = {
        name: column.kept(max_lengths[name]) if name in max_lengths else column
        for name, column in interactions.features.items()
    }
    return replace(interactions, features=kept)


def users_of(model: TwoTower, interactions: Interactions) -> Users:
    """The features of the users of interactions, in the form the model reads; others are left out.

    Raises:
        ValueError: naming the feature that is missing, or of which a row has a wrong number of
            numbers.
    """
    features = model.user_features
    if not features.names:
        return NO_USERS
    for name in features.names:
        if name not in interactions.features:
            raise ValueError(f"interactions must have the user feature {name}")
    columns = {name: interactions.features[name] for name in features.names}
    return Users(
        features.of_columns(columns, interactions.num_feature_rows),
        torch.from_numpy(interactions.rows_of_features),
    )


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
    return HeldOut(
        data.item_rows[seen],
        ends - begins,
        targets,
        torch.stack([user, seen]),
        users_of(model, _as_served(following, data.max_lengths)).take(torch.arange(len(users))),
    )


def popularity_bands(counts: Tensor, num_bands: int) -> Tensor:
    """The band of each count, int64: three per factor of four, none for a count of 0."""
    bands = (torch.log2(counts.double() + 1.0) * 1.5).floor().long()
    return bands.clamp(max=num_bands - 1)


def _distinct(column: Ragged) -> list[Any]:
    return sorted(set(column.values.tolist()))


def _fill_numbers(numbers: NumberFeatures, columns: Mapping[str, Ragged]) -> None:
    """Standardise each feature by all its rows."""
    for name in numbers.names:
        projection = numbers.projection(name)
        found, _ = numbers_of(name, columns[name], projection.width)
        projection.fill(found.view(-1, projection.width))


def _user_features(
    schema: Schema, interactions: Interactions, config: TrainingConfig
) -> dict[str, UserFeature]:
    """The user features that the tower reads beside the history, by name."""
    declared = {one.name: one for one in schema.user_features if one.name != config.history}
    chosen = {}
    for name in config.user_features:
        feature = declared.get(name)
        if feature is None or feature.kind == "text":
            known = [one.name for one in declared.values() if one.kind != "text"]
            raise ValueError(
                "user_features must name user features of ids or numbers beside the history, "
                f"which are {', '.join(known) or 'none'}, got {name!r}"
            )
        if name not in interactions.features:
            raise ValueError(f"interactions must have the user feature {name}")
        interactions.features[name].validate(feature)
        chosen[name] = feature
    return chosen


def _id_table(feature: UserFeature, values: Sequence[Any]) -> ItemTable:
    dtype = cast(Literal["int", "string"], feature.dtype)
    return ItemTable(name=feature.name, dtype=dtype, size=len(values))


def _tower_config(
    schema: Schema,
    features: Mapping[str, Ragged],
    interactions: Interactions,
    config: TrainingConfig,
    texts: TrainingTexts | None,
) -> tuple[TwoTowerConfig, dict[str, list[Any]]]:
    users = _user_features(schema, interactions, config)
    known = {
        feature.name: _distinct(features[feature.name])
        for feature in schema.item_features
        if feature.kind == "ids"
    }
    if texts is not None:
        asked = [one.name for one in schema.user_features if one.kind == "text"]
        if texts.encoder.config.query not in asked:
            raise ValueError(
                f"the schema must have the user feature {texts.encoder.config.query} of kind text, "
                f"it has {', '.join(asked) or 'none'}"
            )
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
            _id_table(feature, known[feature.name])
            for feature in schema.item_features
            if feature.kind == "ids"
        ),
        item_numbers=_numbers(schema.item_features),
        user_ids=tuple(
            _id_table(feature, _distinct(interactions.features[name].values))
            for name, feature in users.items()
            if feature.kind == "ids"
        ),
        user_numbers=_numbers(users.values()),
        text=texts.encoder.config if texts else None,
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


def _numbers(features: Iterable[UserFeature]) -> tuple[NumberFeature, ...]:
    return tuple(
        NumberFeature(name=feature.name, width=feature.width)
        for feature in features
        if feature.kind == "numbers"
    )


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
