"""The two-tower model: histories to query embeddings, items to embeddings, pairs to task logits.

Shapes: B requests, N items, H heads, D embedding dimension, T tasks, Us user state, Vs signals,
L history length, n values of all requests together.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from silvershard.model.bags import (
    DEFAULT_ROW,
    Bags,
    Sequences,
    Vocabulary,
    mean_bags,
    shares_of,
    spread,
)
from silvershard.model.catalogue import Ragged
from silvershard.model.dense import PaddedLinear
from silvershard.model.embeddings import (
    PooledTables,
    QuantizedSequences,
    QuantizedTables,
    SequenceTables,
)
from silvershard.model.encoders import SequenceEncoder, build_encoder
from silvershard.model.numbers import NumberFeatures
from silvershard.model.placement import Precision
from silvershard.model.ranker import build_ranker
from silvershard.model.ranker_session import pack_session
from silvershard.model.remote_tables import Looked, NoTables, RemoteTables
from silvershard.model.text_features import TextFeatures
from silvershard.model.two_tower_config import (
    BAND_TABLE,
    HISTORY_TABLE,
    ITEM_TEXT,
    QUERY_TEXT,
    RECENT_TABLE,
    SESSION,
    TwoTowerConfig,
    pool_table,
)
from silvershard.model.unit_rows import unit_rows
from silvershard.model.user_features import UserFeatures, flattened, unknown_values

_ITEM_CHUNK = 4096
_SMALLEST_SUM = 1e-24


class Encoded(NamedTuple):
    """What the user tower says of a batch of users."""

    embedding: Tensor
    """``(B, H, D)`` float32, unit length."""
    user_state: Tensor
    """``(B, Us)`` float32, the user side of the reranker."""
    warnings: tuple[tuple[str, ...], ...]
    """What was wrong with the features of each request; empty where nothing was."""
    fallback: tuple[bool, ...] = ()
    """Whether default rows stand for rows of remote tables, of each request; none: of nobody."""


class History(NamedTuple):
    """The histories of a batch of users, as the user tower reads them."""

    bags: dict[str, Bags]
    """What the user tables pool and the projections of numbers read, B bags each."""
    session: Sequences
    """The newest rows of each history, oldest first; empty where nothing reads them."""


def _newest(embedded: Tensor, lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The last ``most`` rows of each list, left-aligned.

    Args:
        embedded: ``(n, D)`` float32, the rows of all lists.
        lengths: ``(B,)`` int64, their sum is n.
        most: M.

    Returns:
        ``(B, M, D)`` float32, zeros beyond a list, and ``(B,)`` int64.
    """
    counts = lengths.clamp(max=most)
    chosen = embedded[spread(lengths.cumsum(0) - counts, counts)]
    request = torch.arange(lengths.shape[0]).repeat_interleave(counts)
    position = spread(torch.zeros_like(counts), counts)
    rows = embedded.new_zeros(lengths.shape[0], most, embedded.shape[1])
    return rows.index_put((request, position), chosen), counts


def _pooled(
    rows: Mapping[str, int], config: TwoTowerConfig
) -> PooledTables | QuantizedTables | NoTables:
    if not rows:
        return NoTables()
    if config.table_precision == "float32":
        return PooledTables(rows, config.dim)
    return QuantizedTables(rows, config.dim, config.table_precision)


def _sequences(
    rows: Mapping[str, int], config: TwoTowerConfig
) -> SequenceTables | QuantizedSequences:
    if config.table_precision == "float32":
        return SequenceTables(rows, config.dim)
    return QuantizedSequences(rows, config.dim, config.table_precision)


def recency_weights(max_history: int, half_life: float) -> Tensor:
    """Weights ``(L + 1, L)`` float32 by number of ids and age (0 is the newest); rows sum to 1."""
    age = torch.arange(max_history, dtype=torch.float64)
    count = torch.arange(max_history + 1, dtype=torch.float64)[:, None]
    weights = torch.where(age < count, 0.5 ** (age / half_life), 0.0)
    return (weights / weights.sum(1, keepdim=True).clamp(min=_SMALLEST_SUM)).float()


class TwoTower(nn.Module):
    """A user tower over history and user features, an item tower, and a reranker.

    Row 0 of every table is the default for what is absent or unknown; it is trained, so that a user
    without a history and an item without a known id get sensible embeddings. Every output row has
    the same bits alone and in any batch.
    """

    recency: Tensor
    bands: Tensor

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabularies = nn.ModuleDict(
            {f"of_{table.name}": Vocabulary(table.size, table.dtype) for table in config.tables}
        )
        num_items = config.table(config.item).size + 1
        self.register_buffer("recency", recency_weights(config.max_history, config.half_life))
        self.register_buffer("bands", torch.zeros(num_items, dtype=torch.int64))
        for pool in config.pooled:
            links = torch.full((num_items, pool.width), -1, dtype=torch.int64)
            links[:, 0] = DEFAULT_ROW
            self.register_buffer(f"links_{pool.feature}", links)
        self.user_tables = _pooled(config.local_user_tables, config)
        self.item_tables = _pooled(config.item_tables, config)
        self.user_features = UserFeatures(config)
        self.item_numbers = NumberFeatures(config.item_numbers, config.dim)
        self.text = None if config.text is None else TextFeatures(config.text, config.dim)
        num_heads = len(config.heads)
        self.session_table: SequenceTables | QuantizedSequences | None = None
        sessions = {SESSION: num_items} if config.session_length else {}
        remote_sessions = sessions if SESSION in config.remote else {}
        if sessions and not remote_sessions:
            self.session_table = _sequences(sessions, config)
        self.remote: RemoteTables | None = None
        if config.remote:
            self.remote = RemoteTables(config.remote_user_tables, remote_sessions, config.dim)
        self.encoder: SequenceEncoder | None = None
        if config.encoder is not None:
            self.encoder = build_encoder(config.encoder, config.dim)
        self.user_head = PaddedLinear(config.profile_dim, num_heads * config.dim)
        self.ranker = build_ranker(
            config.ranker,
            dim=config.dim,
            num_heads=num_heads,
            state_dim=config.profile_dim,
            session_length=config.max_history,
            num_signals=len(config.signals),
            num_tasks=max(len(config.tasks), 1),
        )

    def quantized(self, precision: Precision) -> "TwoTower":
        """Return this tower with quantised tables, for serving.

        Args:
            precision: of the codes; every row has a scale and a bias of its own.

        Raises:
            ValueError: if the tables are quantised already, ``dim`` does not fit the precision, or
                a table has a value that float16 cannot hold.
        """
        config = self.config.model_dump() | {"table_precision": precision}
        made = TwoTower(TwoTowerConfig.model_validate(config))
        tables = ("user_tables", "item_tables", "session_table")
        for name in tables:
            own, other = getattr(self, name), getattr(made, name)
            if own is not None and own.features:
                other.quantize({one: own.weight(one) for one in own.features})
        others = {
            name: one for name, one in self.state_dict().items() if not name.startswith(tables)
        }
        made.load_state_dict(made.state_dict() | others)
        return made.requires_grad_(requires_grad=False).eval()

    def tower_parameters(self) -> Iterator[nn.Parameter]:
        """What towers learn: all parameters but those of the reranker."""
        for part in (
            self.user_tables,
            self.item_tables,
            self.user_features,
            self.item_numbers,
            self.user_head,
        ):
            yield from part.parameters()
        if self.text is not None:
            yield from self.text.item.parameters()
            yield from self.text.query.parameters()
        if self.encoder is not None and self.session_table is not None:
            yield from self.encoder.parameters()
            yield from self.session_table.parameters()

    @torch.no_grad()
    def share_history_table(self) -> None:
        """Give the session table the rows of the history table where no encoder trains it."""
        if self.session_table is not None and self.encoder is None:
            self.session_table.weight(SESSION).copy_(self.user_tables.weight(HISTORY_TABLE))

    @torch.no_grad()
    def update_rows(self, table: str, rows: Tensor, values: Tensor, version: int = 1) -> bool:
        """Write rows of a table of the user tower in place; return whether there is such a table.

        Args:
            table: its name; the source of a remote table is told of the change and its version.
            rows: ``(n,)`` int64, distinct, all of them in the table.
            values: ``(n, D)`` float32.
            version: of the change.

        Raises:
            ValueError: if the values do not fit the precision of the table.
        """
        for part in (self.user_tables, self.session_table):
            if part is None or table not in part.features:
                continue
            if isinstance(part, QuantizedTables | QuantizedSequences):
                part.update_rows(table, rows, values)
            else:
                part.weight(table).index_copy_(0, rows, values)
            return True
        return self.remote is not None and self.remote.write(table, version, rows, values)

    def vocabulary(self, feature: str) -> Vocabulary:
        """The known ids of an item feature."""
        found = self.vocabularies[f"of_{feature}"]
        assert isinstance(found, Vocabulary)
        return found

    def links(self, feature: str) -> Tensor:
        """Rows of a pooled feature per item row, ``(rows, width)`` int64 padded with -1."""
        return self.get_buffer(f"links_{feature}")

    def history(
        self,
        rows: Tensor,
        lengths: Tensor,
        users: Mapping[str, Bags] | None = None,
        weights: Tensor | None = None,
    ) -> History:
        """The histories of a batch of users, and their further features.

        Args:
            rows: ``(n,)`` int64 item rows of all histories, oldest first, none of them the default.
            lengths: ``(B,)`` int64 ids per history; an empty one counts as the default row.
            users: what ``user_features`` makes of the further features, and ``text`` of the text;
                None: all are absent, as the text is where it is not among them.
            weights: ``(n,)`` float32, not 0, factors of the recency weights and of the mean of the
                newest ids; None: all are 1.
        """
        config = self.config
        history = self._last(rows, lengths, config.max_history, self.recency, weights)
        recent = self._last(rows, lengths, config.recent, None, weights)
        bags = {HISTORY_TABLE: history, RECENT_TABLE: recent}
        bags |= users or self.user_features.of_columns({}, lengths.shape[0])
        if self.text is not None and QUERY_TEXT not in bags:
            bags[QUERY_TEXT] = self.text.query.bags(torch.zeros(0), torch.zeros_like(lengths))
        request = torch.arange(lengths.shape[0]).repeat_interleave(history.lengths)
        for pool in config.pooled:
            links = self.links(pool.feature)[history.rows]  # (n, width)
            known = links >= 0
            counts = known.sum(1)
            weights = (history.weights / counts)[:, None].expand_as(links)
            values = torch.zeros_like(lengths).index_add_(0, request, counts)
            bags[pool_table(pool.feature)] = Bags(links[known], weights[known], values)
        counts = lengths.clamp(max=config.session_length)
        newest = rows[spread(lengths.cumsum(0) - counts, counts)]
        return History(bags, Sequences(newest, counts))

    @staticmethod
    def _last(
        rows: Tensor,
        lengths: Tensor,
        most: int,
        recency: Tensor | None,
        factors: Tensor | None,
    ) -> Bags:
        """The last ``most`` rows of each list, weighted by count and age, else their mean.

        Where a factor is not 1, the weights times the factors are divided by their absolute sum.
        """
        counts = lengths.clamp(max=most)
        filled = counts.clamp(min=1)
        begins = filled.cumsum(0) - filled
        out = torch.full((int(filled.sum()),), DEFAULT_ROW, dtype=torch.int64)
        newest = spread(lengths.cumsum(0) - counts, counts)
        at = spread(begins, counts)
        out[at] = rows[newest]
        per_value = filled.repeat_interleave(filled)
        if recency is None:
            weights = 1.0 / per_value.float()
        else:
            ends = (begins + filled - 1).repeat_interleave(filled)
            weights = recency[per_value, ends - torch.arange(out.shape[0])]
        if factors is not None:
            scale = torch.ones(out.shape[0], dtype=torch.float64)
            scale[at] = factors[newest].double()
            bag = torch.arange(lengths.shape[0]).repeat_interleave(filled)
            plain = torch.bincount(bag[scale != 1], minlength=lengths.shape[0]) == 0
            shares = shares_of(weights.double() * scale, bag, lengths.shape[0])
            weights = torch.where(plain[bag], weights, shares)
        return Bags(out, weights, filled)

    def look_up_remote(self, history: History) -> Looked | None:
        """What the remote tables have of the histories of a batch; None where there are none."""
        if self.remote is None:
            return None
        bags = {name: history.bags[name] for name in self.remote.pooled}
        sequences = dict.fromkeys(self.remote.sequences, history.session)
        found: Looked = self.remote(bags, sequences)
        return found

    def user_state(self, history: History, remote: Looked | None = None) -> Tensor:
        """The profile of each user, then the session of the reranker, ``(B, Us)`` float32.

        Args:
            history: the histories.
            remote: what the remote tables have of them.
        """
        pooled = self.user_tables({one: history.bags[one] for one in self.user_tables.features})
        if remote is not None:
            pooled |= remote.pooled
        parts = [pooled[name] for name in self.config.user_tables]
        parts += self.user_features(history.bags)
        if self.text is not None:
            parts.append(self.text.query(history.bags[QUERY_TEXT]))
        if self.config.session_length:
            lengths = history.session.lengths
            if self.session_table is not None:
                embedded = self.session_table({SESSION: history.session})[SESSION]
            else:
                assert remote is not None
                embedded = remote.sequences[SESSION]
            if self.encoder is not None:
                session, counts = _newest(embedded, lengths, self.encoder.max_length)
                parts.append(self.encoder.forward_last(session, counts))
            if self.ranker.session_rows:
                parts.append(pack_session(*_newest(embedded, lengths, self.ranker.session_rows)))
        return torch.cat(parts, 1)

    def user_embedding(self, user_state: Tensor) -> Tensor:
        """Query embeddings ``(B, H, D)`` float32 of unit length."""
        heads = self.user_head(user_state[:, : self.config.profile_dim])
        return unit_rows(heads.view(-1, len(self.config.heads), self.config.dim))

    def encode(self, features: Sequence[Mapping[str, Sequence[Any]]]) -> Encoded:
        """Return the query embeddings and the reranker's user state of each user.

        Ids that the model does not know are left out and reported, ids of weight 0 are left out; a
        history without known ids gets the default embedding.

        Args:
            features: user features of B requests, checked against the schema; B may be 0.
        """
        name = self.config.history
        flat, given, weights = flattened([one.get(name, ()) for one in features])
        rows = self.vocabulary(self.config.item).rows(flat)
        users, further = self.user_features.of_requests(features)
        if self.text is not None:
            users[QUERY_TEXT], cut = self.text.of_requests(features)
            further = [[*one, *more] for one, more in zip(further, cut, strict=True)]
        warnings: list[list[str]] = [[] for _ in features]
        unknown_values(name, rows, given, warnings)
        request = torch.arange(len(features)).repeat_interleave(given)
        kept = rows != DEFAULT_ROW
        if weights is not None:
            kept &= weights != 0
            weights = weights[kept]
        lengths = torch.bincount(request[kept], minlength=len(features))
        history = self.history(rows[kept], lengths, users, weights)
        remote = self.look_up_remote(history)
        state = self.user_state(history, remote)
        fallback = () if remote is None else remote.fallback
        said = tuple((*one, *more) for one, more in zip(warnings, further, strict=True))
        return Encoded(self.user_embedding(state), state, said, fallback)

    def item_bags(
        self, features: Mapping[str, Ragged], texts: Tensor | None = None
    ) -> dict[str, Bags]:
        """What the item tables pool for each item; features that are not given are absent.

        Args:
            features: the values of each item feature, N rows each.
            texts: ``(N, E)`` float32, what ``text.embed_items`` made of them; None: it does so now.
        """
        rows: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        num_items = max((len(column) for column in features.values()), default=0)
        for table in self.config.tables:
            column = features.get(table.name)
            if column is None:
                rows[table.name] = torch.zeros(0, dtype=torch.int64)
                lengths[table.name] = torch.zeros(num_items, dtype=torch.int64)
                continue
            if len(column) != num_items:
                raise ValueError(
                    f"feature {table.name} must have {num_items} rows, got {len(column)}"
                )
            rows[table.name] = self.vocabulary(table.name).rows(column.values)
            lengths[table.name] = torch.from_numpy(column.lengths)
        bags = {name: mean_bags(rows[name], lengths[name]) for name in rows}
        bags |= self.item_numbers.bags(features, num_items)
        if self.text is not None:
            texts = self.text.embed_items(features, num_items) if texts is None else texts
            bags[ITEM_TEXT] = self.text.item_bags(texts)
        item = bags[self.config.item]
        first = item.rows[item.lengths.cumsum(0) - item.lengths]
        ones = torch.ones(num_items)
        return {**bags, BAND_TABLE: Bags(self.bands[first], ones, ones.long())}

    def item_embedding(self, bags: Mapping[str, Bags]) -> Tensor:
        """Embeddings ``(N, D)`` float32 of unit length."""
        pooled = self.item_tables({name: bags[name] for name in self.item_tables.features})
        total = pooled[BAND_TABLE]
        for table in self.config.tables:
            total = total + pooled[table.name]
        for column in self.item_numbers(bags):
            total = total + column
        if self.text is not None:
            total = total + self.text.item(bags[ITEM_TEXT])
        return unit_rows(total)

    def embed_items(self, features: Mapping[str, Ragged]) -> Tensor:
        """Return the embedding of each item, ``(N, D)`` float32 of unit length.

        Unknown ids are left out; an item without known ids of a feature has the feature's default.

        Args:
            features: the raw ids of each item feature, N rows each.

        Raises:
            ValueError: if the features have different numbers of rows.
        """
        bags = self.item_bags(features)
        chunks = torch.split(torch.arange(bags[BAND_TABLE].lengths.shape[0]), _ITEM_CHUNK)
        embedded = [
            self.item_embedding({name: bag.take(chunk) for name, bag in bags.items()})
            for chunk in chunks
        ]
        return torch.cat(embedded)

    def rank(
        self,
        query: Tensor,
        user_state: Tensor,
        items: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return task logits ``(B, U, T)`` float32 of candidates.

        Args:
            query: ``(B, H, D)`` float32, as encoded.
            user_state: ``(B, Us)`` float32, as encoded.
            items: ``(B, U, D)`` float32.
            refined: ``(B, U, H)`` float32 scores.
            signals: ``(B, U, Vs)`` float32.
        """
        logits: Tensor = self.ranker(query, user_state, items, refined, signals)
        return logits[:, :, : len(self.config.tasks)]

    def rank_slots(
        self,
        query: Tensor,
        user_state: Tensor,
        cache: Tensor,
        slots: Tensor,
        refined: Tensor,
        signals: Tensor,
    ) -> Tensor:
        """Return task logits ``(B, U, T)`` float32 of cached candidates, for serving.

        Args:
            query: ``(B, H, D)`` float32, as encoded.
            user_state: ``(B, Us)`` float32, as encoded.
            cache: ``(N, G, D)`` float16 item embeddings.
            slots: ``(B, U)`` int64 in [-1, N G); -1 is padding, whose logits are zeros.
            refined: ``(B, U, H)`` float32 scores.
            signals: ``(B, U, Vs)`` float32.
        """
        logits = self.ranker.rank_slots(query, user_state, cache, slots, refined, signals)
        return logits[:, :, : len(self.config.tasks)]
