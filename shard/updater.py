"""From mutations to what a shard writes into its index: everything that needs no index.

It runs beside the thread that answers queries, reads nothing that a commit writes, and gives the
same bits for an item whatever other mutations are in its batch.

Shapes: n upserts, m patches, D embedding dimension, S signals.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.kernels import quantize_rows
from silvershard.model.clustering import nearest_clusters
from silvershard.model.planes import encode_items
from silvershard.model.retriever import Retriever
from silvershard.shard.changes import Changes, NewItems, PatchedItems
from silvershard.shard.coalesce import Rejection, Step, coalesce
from silvershard.shard.embedding import embed_values, embedding_problems
from silvershard.shard.errors import MutationError
from silvershard.shard.item_columns import to_catalogue
from silvershard.shard.mutation_batch import (
    MutationBatch,
    SignalColumns,
    in_columns,
    item_of,
    with_signals,
)
from silvershard.shard.mutations import (
    Delete,
    ItemMutation,
    ItemValues,
    Mutation,
    Patch,
    RowChange,
    Upsert,
    check,
)
from silvershard.shard.partition import part_of, partition_of

_EMBEDDED_AT_ONCE = 128


class _Tower(Protocol):
    def update_rows(self, table: str, rows: Tensor, values: Tensor, version: int) -> bool: ...


class PreparedRows(NamedTuple):
    """A change of rows of a table, as a tower takes it."""

    table: str
    version: int
    rows: Tensor
    """``(n,)`` int64."""
    values: Tensor
    """``(n, D)`` float32."""


class Prepared(NamedTuple):
    """A batch of mutations, ready to be committed."""

    waves: tuple[tuple[Changes, ...], ...]
    """The changes of every part, to be applied one wave after another; seldom more than one."""
    rows: tuple[PreparedRows, ...]
    """Of tables, in log order."""
    rejected: tuple[Rejection, ...]
    """Mutations that this generation refuses; every replica refuses the same."""


class _Embedded(NamedTuple):
    """What the item tower makes of upserts, a row each."""

    clusters: Tensor
    """``(n,)`` int32."""
    codes: Tensor
    """``(n, D)`` int8."""
    scales: Tensor
    """``(n,)`` float32."""
    cache: Tensor
    """``(n, D)`` float16."""
    semantic_codes: Tensor | None
    """``(n, L)`` int16; None where the generation has no semantic ids."""


class ShardUpdater:
    """Prepares mutations for one shard of a generation.

    Args:
        retriever: the shard; its model embeds new items.
        owned: the partitions of the shard.
        tables: ``updatable_tables`` of the generation.
    """

    def __init__(
        self,
        retriever: Retriever,
        owned: range,
        tables: Mapping[str, tuple[int, int]],
    ) -> None:
        self._retriever = retriever
        self._owned = owned
        self._tables = tables
        self._row_versions: dict[str, int] = {}
        self._no_patches = self._patched_items(())

    @property
    def num_parts(self) -> int:
        """Return how many parts the documents of the shard are split over."""
        return len(self._retriever.parts)

    def parts_of(self, item_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part of the shard that holds each item, -1 where another shard does."""
        ids = torch.from_numpy(np.asarray(item_ids, dtype=np.int64))
        partitions = partition_of(ids, self._retriever.spec.num_partitions).numpy()
        mine = (partitions >= self._owned.start) & (partitions < self._owned.stop)
        parts: NDArray[np.int64] = np.where(mine, part_of(partitions, self.num_parts), -1)
        return parts

    def prepare(self, mutations: Sequence[Mutation]) -> Prepared:
        """Return what this shard commits of some mutations in log order; any thread may ask.

        What this generation cannot take is rejected by itself: a mutation that was checked against
        another schema, an embedding that is not finite or beyond float16, a patch of an item that
        is deleted, or one that gives an upsert more rare values than fit.
        """
        return self.prepare_batch(MutationBatch(list(enumerate(mutations))))

    @torch.inference_mode()
    def prepare_batch(
        self, batch: MutationBatch, give_way: Callable[[], None] = lambda: None
    ) -> Prepared:
        """Return what ``prepare`` does of the mutations of a batch; those in columns are quick.

        Args:
            batch: in log order.
            give_way: is called between the parts of the work, which are short.
        """
        spec = self._retriever.spec
        signals, mutations = in_columns(batch, spec.item_schema.signals)
        items, rows, rejected = self._checked(mutations)
        give_way()
        kept, embedded, row_of = self._embed(items, rejected, give_way)
        give_way()
        waves, refused = coalesce(kept, spec.planes)
        parts_of_signals = self.parts_of(signals.item_ids)
        if (parts_of_signals >= 0).any() and not waves:
            waves = [[]]
        by_part = []
        for wave, steps in enumerate(waves):
            parts = self.parts_of([step.mutation.item_id for step in steps]).tolist()
            by_part.append(
                tuple(
                    self._changes(
                        [step for step, at in zip(steps, parts, strict=True) if at == part],
                        # Their items stand nowhere else: any wave would do.
                        signals.only((parts_of_signals == part) & (wave == 0)),
                        embedded,
                        row_of,
                        give_way,
                    )
                    for part in range(self.num_parts)
                )
            )
        prepared = tuple(_prepared_rows(one) for one in rows)
        return Prepared(tuple(by_part), prepared, (*rejected, *refused))

    def write_rows(self, changes: Sequence[PreparedRows]) -> None:
        """Write rows of the tables of this shard's model, on the thread that encodes users.

        A change whose version is not above the last one of its table came before and is ignored.
        Rows of remote tables lie elsewhere, and are looked up as of the last version from then on.
        """
        for change in changes:
            if change.version <= self._row_versions.get(change.table, 0):
                continue
            self._row_versions[change.table] = change.version
            cast(_Tower, self._retriever.model).update_rows(
                change.table, change.rows, change.values, change.version
            )

    def _checked(
        self, mutations: Sequence[Mutation]
    ) -> tuple[list[ItemMutation], list[RowChange], list[Rejection]]:
        """Return the mutations of this shard's items, those of tables, and what is refused."""
        spec = self._retriever.spec
        ids = [item_of(one) for one in mutations]
        items: list[ItemMutation] = []
        rows: list[RowChange] = []
        rejected: list[Rejection] = []
        for mutation, item_id, part in zip(
            mutations, ids, self.parts_of(ids).tolist(), strict=True
        ):
            if item_id >= 0 and part < 0:
                continue
            try:
                checked = check(mutation, spec, self._tables)
            except MutationError as error:
                rejected.append((item_id, str(error)))
                continue
            if isinstance(checked, RowChange):
                rows.append(checked)
            else:
                items.append(checked)
        return items, rows, rejected

    def _embed(
        self,
        items: Sequence[ItemMutation],
        rejected: list[Rejection],
        give_way: Callable[[], None],
    ) -> tuple[list[ItemMutation], _Embedded, dict[int, int]]:
        """Embed every upsert.

        Returns:
            The items without the upserts that cannot be embedded, which are appended to
            ``rejected``; what the tower made of the others; and the row of each, by its place.
        """
        spec, model = self._retriever.spec, self._retriever.model
        upserts = [one for one in items if isinstance(one, Upsert)]
        pieces = [torch.zeros(0, spec.dim)]
        for at in range(0, len(upserts), _EMBEDDED_AT_ONCE):
            values = [one.values for one in upserts[at : at + _EMBEDDED_AT_ONCE]]
            pieces.append(embed_values(model, values, spec.item_schema))
            give_way()
        embeddings = torch.cat(pieces)
        problems = embedding_problems(embeddings)
        rejected += [
            (one.item_id, problem)
            for one, problem in zip(upserts, problems, strict=True)
            if problem
        ]
        bad = iter(problems)
        kept = [one for one in items if not (isinstance(one, Upsert) and next(bad))]
        places = [place for place, one in enumerate(kept) if isinstance(one, Upsert)]
        row_of = {place: row for row, place in enumerate(places)}
        good = torch.tensor([not problem for problem in problems], dtype=torch.bool)
        return kept, self._packed(embeddings[good]), row_of

    def _packed(self, embeddings: Tensor) -> _Embedded:
        codes, scales = quantize_rows(embeddings)
        semantic = self._retriever.semantic
        return _Embedded(
            clusters=nearest_clusters(embeddings, self._retriever.centroids),
            codes=codes,
            scales=scales,
            cache=embeddings.half(),
            semantic_codes=None if semantic is None else semantic.item_codes(embeddings),
        )

    def _changes(
        self,
        steps: Sequence[Step],
        signals: SignalColumns,
        embedded: _Embedded,
        row_of: Mapping[int, int],
        give_way: Callable[[], None],
    ) -> Changes:
        """Return the changes of one part."""
        upserts: list[Upsert] = []
        patches: list[Patch] = []
        deletes: list[Delete] = []
        rows: list[int] = []
        for mutation, source in steps:
            if isinstance(mutation, Upsert):
                upserts.append(mutation)
                rows.append(row_of[source])
            elif isinstance(mutation, Patch):
                patches.append(mutation)
            else:
                deletes.append(mutation)
        at = torch.tensor(rows, dtype=torch.int64)
        semantic = embedded.semantic_codes
        mine = _Embedded(
            embedded.clusters[at],
            embedded.codes[at],
            embedded.scales[at],
            embedded.cache[at],
            None if semantic is None else semantic[at],
        )
        patched = self._patched_items(patches) if patches else self._no_patches
        give_way()
        return Changes(
            upserts=self._new_items(upserts, mine),
            patches=with_signals(patched, signals) if len(signals.item_ids) else patched,
            deletes=_int64([one.item_id for one in deletes]),
            delete_versions=_int64([one.version for one in deletes]),
        )

    def _new_items(self, upserts: Sequence[Upsert], embedded: _Embedded) -> NewItems:
        spec = self._retriever.spec
        catalogue = to_catalogue(
            [one.item_id for one in upserts], [one.values for one in upserts], spec.item_schema
        )
        return NewItems(
            item_ids=torch.from_numpy(catalogue.item_ids),
            versions=_int64([one.version for one in upserts]),
            clusters=embedded.clusters,
            codes=embedded.codes,
            scales=embedded.scales,
            cache=embedded.cache,
            bits=encode_items(spec.planes, spec.item_schema, catalogue),
            signals=torch.from_numpy(catalogue.signals),
            fields=catalogue.fields,
            semantic_codes=embedded.semantic_codes,
        )

    def _patched_items(self, patches: Sequence[Patch]) -> PatchedItems:
        spec = self._retriever.spec
        values = [one.values for one in patches]
        catalogue = to_catalogue([one.item_id for one in patches], values, spec.item_schema)
        attributes = [one.attributes for one in values]
        fields = {name: _given([one.fields for one in values], name) for name in catalogue.fields}
        return PatchedItems(
            item_ids=torch.from_numpy(catalogue.item_ids),
            versions=_int64([one.version for one in patches]),
            bits=encode_items(spec.planes, spec.item_schema, catalogue),
            attributes={
                one.name: torch.from_numpy(given)
                for one in spec.item_schema.attributes
                if (given := _given(attributes, one.name)).any()
            },
            signals=torch.from_numpy(catalogue.signals),
            signals_given=_signals_given(values, spec.item_schema.signals),
            fields={
                name: (catalogue.fields[name], given)
                for name, given in fields.items()
                if given.any()
            },
        )


def _prepared_rows(change: RowChange) -> PreparedRows:
    rows = torch.from_numpy(np.array(change.rows, dtype=np.int64))
    return PreparedRows(change.table, change.version, rows, torch.from_numpy(change.values))


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _given(columns: Sequence[Mapping[str, object]], name: str) -> NDArray[np.bool_]:
    """Return which items give a column, ``(m,)``."""
    return np.fromiter((name in one for one in columns), dtype=np.bool_, count=len(columns))


def _signals_given(values: Sequence[ItemValues], names: Sequence[str]) -> Tensor:
    """Return which signals each item gives, ``(m, S)`` bool."""
    given = torch.zeros(len(values), len(names), dtype=torch.bool)
    for column, name in enumerate(names):
        given[:, column] = torch.from_numpy(_given([one.signals for one in values], name))
    return given
