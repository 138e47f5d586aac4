"""What decides the shapes of a two-tower model, and the names of its tables."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from silvershard.model.encoder_config import SequenceEncoderConfig, check_encoder
from silvershard.model.limits import COLUMN_MULTIPLES
from silvershard.model.ranker_config import MLPConfig, RankerConfig, check_ranker, session_rows
from silvershard.model.ranker_session import session_width
from silvershard.model.schema import MAX_WIDTH
from silvershard.model.text_config import TextTowerConfig

BAND_TABLE = "popularity_band"
HISTORY_TABLE = "history"
RECENT_TABLE = "recent"
SESSION = "session"
ITEM_TEXT = "text:item"
"""Name of the inputs that the text of an item is projected from; no table's."""
QUERY_TEXT = "text:query"
"""The same of the text of a request."""


class ItemTable(BaseModel):
    """One feature of ids with its vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="name of the feature")
    dtype: Literal["int", "string"] = Field(description="type of its ids")
    size: int = Field(ge=0, description="number of known ids")


class NumberFeature(BaseModel):
    """One feature of numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="name of the feature")
    width: int = Field(ge=1, le=MAX_WIDTH, description="its numbers")


class HistoryPool(BaseModel):
    """An item feature that the user tower also pools over the items of the history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature: str = Field(description="name of an item feature")
    width: int = Field(ge=1, description="largest number of its ids that an item of a history has")


class TwoTowerConfig(BaseModel):
    """Everything that decides the shapes of a ``TwoTower``; its tensors hold the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dim: int = Field(default=64, ge=1, le=1024, description="embedding dimension D")
    heads: tuple[str, ...] = Field(min_length=1, description="names of the query embeddings")
    tasks: tuple[str, ...] = Field(default=(), description="names of the reranker's outputs")
    signals: tuple[str, ...] = Field(default=(), description="names of the reranker's signals")
    history: str = Field(description="user feature that lists item ids, oldest first")
    item: str = Field(description="item feature whose ids the history names")
    tables: tuple[ItemTable, ...] = Field(min_length=1, description="the item features")
    item_numbers: tuple[NumberFeature, ...] = Field(
        default=(), description="the item features of numbers"
    )
    user_ids: tuple[ItemTable, ...] = Field(
        default=(), description="user features of ids beside the history, each in its own table"
    )
    user_numbers: tuple[NumberFeature, ...] = Field(
        default=(), description="user features of numbers"
    )
    text: TextTowerConfig | None = Field(
        default=None,
        description="encoder of the texts of items and requests, whose embeddings are projected as "
        "numbers are; none: no texts",
    )
    pooled: tuple[HistoryPool, ...] = Field(
        default=(), description="item features pooled over the history"
    )
    max_history: int = Field(default=50, ge=1, description="last known ids of a history that count")
    recent: int = Field(
        default=3, ge=1, description="last ids that are pooled once more by themselves"
    )
    half_life: float = Field(default=10.0, gt=0, description="ids after which a weight has halved")
    bands: int = Field(default=24, ge=1, description="number of popularity bands")
    table_precision: Literal["float32", "int8", "int4"] = Field(
        default="float32",
        description="of the embedding tables; quantised ones are served, not trained",
    )
    remote: tuple[str, ...] = Field(
        default=(),
        description="user tables whose rows are not in the model: they are int8 and come from the "
        "source that is connected to it",
    )
    encoder: SequenceEncoderConfig | None = Field(
        default=None,
        description="sequence encoder of the newest ids of a history, whose state after the last "
        "of them stands beside the pooled features; none: those alone",
    )
    ranker: RankerConfig = Field(
        default_factory=MLPConfig, description="the reranker and its settings"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [table.name for table in self.tables]
        inputs = [*names, *(one.name for one in self.item_numbers)]
        if len(set(inputs)) != len(inputs) or BAND_TABLE in inputs:
            raise ValueError(
                "tables and item_numbers must have distinct names other than "
                f"{BAND_TABLE!r}, got {inputs}"
            )
        users = [self.history, *(one.name for one in self.user_ids)]
        users += [one.name for one in self.user_numbers]
        users += [] if self.text is None else [self.text.query]
        if len(set(users)) != len(users):
            raise ValueError(
                "history, user_ids, user_numbers and text.query must have distinct names, "
                f"got {users}"
            )
        pooled = [pool.feature for pool in self.pooled]
        if len(set(pooled)) != len(pooled):
            raise ValueError(f"pooled must name each feature once, got {pooled}")
        for field, name in (("item", self.item), *(("pooled", feature) for feature in pooled)):
            if name not in names:
                raise ValueError(f"{field} must be one of the tables {names}, got {name!r}")
        columns = COLUMN_MULTIPLES[self.table_precision]
        if self.dim % columns:
            raise ValueError(
                f"dim must be a multiple of {columns} for {self.table_precision} tables, "
                f"got {self.dim}"
            )
        check_ranker(self.ranker, dim=self.dim, session_length=self.max_history)
        if self.encoder is not None:
            check_encoder(self.encoder, dim=self.dim)
            if self.encoder.max_length > self.max_history:
                raise ValueError(
                    f"encoder.max_length must be at most max_history={self.max_history}, "
                    f"got {self.encoder.max_length}"
                )
        self._check_remote()
        return self

    def _check_remote(self) -> None:
        known = [*self.user_tables, *([SESSION] if self.session_length else [])]
        for name in self.remote:
            if name not in known or self.remote.count(name) > 1:
                raise ValueError(
                    f"remote must name tables of the user tower {known} once each, got {name!r}"
                )
        if self.remote and self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4 for remote tables, got {self.dim}")

    def table(self, name: str) -> ItemTable:
        """The item feature of that name."""
        return next(table for table in self.tables if table.name == name)

    @property
    def user_tables(self) -> dict[str, int]:
        """Rows of each table of the user tower, the default row included."""
        rows = self.table(self.item).size + 1
        derived = {
            pool_table(pool.feature): self.table(pool.feature).size + 1 for pool in self.pooled
        }
        further = {user_table(one.name): one.size + 1 for one in self.user_ids}
        return {HISTORY_TABLE: rows, RECENT_TABLE: rows, **derived, **further}

    @property
    def local_user_tables(self) -> dict[str, int]:
        """Rows of each table of the user tower that is in the model."""
        return {name: rows for name, rows in self.user_tables.items() if name not in self.remote}

    @property
    def remote_user_tables(self) -> dict[str, int]:
        """Rows of each table of the user tower that is pooled and not in the model."""
        return {name: rows for name, rows in self.user_tables.items() if name in self.remote}

    @property
    def item_tables(self) -> dict[str, int]:
        """Rows of each table of the item tower, the default row included."""
        return {**{table.name: table.size + 1 for table in self.tables}, BAND_TABLE: self.bands}

    @property
    def profile_dim(self) -> int:
        """Width of what the query embeddings are made of, which the user state begins with."""
        return self.encoder_column + (self.encoder is not None) * self.dim

    @property
    def encoder_column(self) -> int:
        """Width of the profile before the encoder's state: pooled tables, numbers, the text."""
        return self.text_column + (self.text is not None) * self.dim

    @property
    def text_column(self) -> int:
        """Width of the profile before the projected text of the request."""
        return (len(self.user_tables) + len(self.user_numbers)) * self.dim

    @property
    def state_dim(self) -> int:
        """Width Us of the user state: the profile, then the session of the reranker."""
        return self.profile_dim + session_width(session_rows(self.ranker), self.dim)

    @property
    def session_length(self) -> int:
        """Newest ids of a history that encoder or reranker read one by one."""
        encoded = 0 if self.encoder is None else self.encoder.max_length
        return max(encoded, session_rows(self.ranker))


def pool_table(feature: str) -> str:
    """Return the name of the table in which a feature of the history is pooled."""
    return f"{HISTORY_TABLE}_{feature}"


def user_table(feature: str) -> str:
    """Return the name of the table of a user feature of ids."""
    return f"user_{feature}"


def number_inputs(feature: str) -> str:
    """Return the name of the inputs that a feature of numbers is projected from; no table's."""
    return f"numbers:{feature}"
