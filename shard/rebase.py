"""The items and tables of a generation as its update log left them, to publish the next one from.

Shapes: n rows, D embedding dimension, W bytes of a record.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from silvershard.model.catalogue import Catalogue
from silvershard.model.quantized_rows import quantize_rows
from silvershard.model.remote_tables import PRECISION, RemoteTables, StoredRows
from silvershard.model.schema import Schema
from silvershard.model.semantic_source import SemanticSource
from silvershard.shard.coalesce import coalesce
from silvershard.shard.embedding import embed_values, embedding_problems
from silvershard.shard.errors import MutationError
from silvershard.shard.item_columns import to_catalogue, to_values
from silvershard.shard.load import load_model, load_semantic
from silvershard.shard.mutations import (
    Delete,
    ItemMutation,
    Mutation,
    RowChange,
    Upsert,
    conform,
    updatable_tables,
)
from silvershard.shard.snapshot import Snapshot

_BATCH = 4096


class _Tower(Protocol):
    def update_rows(self, table: str, rows: Tensor, values: Tensor) -> bool: ...


class Rebased(NamedTuple):
    """What ``publish_generation`` makes the next generation of."""

    model: nn.Module
    """Of the generation, with the rows of its tables as they are now."""
    semantic: SemanticSource | None
    remote_rows: Mapping[str, Tensor]
    """Records ``(rows, W)`` uint8 of each remote table, as they are now."""
    catalogue: Catalogue
    """By item id, so that it does not depend on the order of the log."""


def rebase(snapshot: Snapshot, mutations: Iterable[Mutation]) -> Rebased:
    """Return what a generation has become after some updates.

    Raw features that were patched count from now on. What the live generation refused because its
    planes were full is taken: the next one chooses its own.

    Args:
        snapshot: the generation.
        mutations: all since its cut, in log order; read once.

    Raises:
        SnapshotError: if a file of the snapshot is missing or damaged.
    """
    builder, spec = snapshot.manifest.builder, snapshot.spec
    model, _ = load_model(snapshot)
    remote = [part for part in model.modules() if isinstance(part, RemoteTables)]
    rows = {name: snapshot.load_rows(name) for part in remote for name in part.rows}
    for part in remote:
        part.connect(StoredRows(rows))
    tables = updatable_tables(builder.name, builder.config)

    def items() -> Iterator[ItemMutation]:
        versions: dict[str, int] = {}
        for mutation in mutations:
            try:
                checked = conform(mutation, spec.item_schema, tables)
            except MutationError:
                # The shards refused it too, and said so.
                continue
            if not isinstance(checked, RowChange):
                yield checked
            elif checked.version > versions.get(checked.table, 0):
                versions[checked.table] = checked.version
                _write_rows(model, rows, checked)

    held = [snapshot.load_partition(number) for number in range(spec.num_partitions)]
    parts = [one.catalogue for one in held if one is not None]
    base = Catalogue.concat(parts) if parts else to_catalogue([], [], spec.item_schema)
    catalogue = catalogue_at(base, _embeddable(items(), model, spec.item_schema), spec.item_schema)
    return Rebased(model, load_semantic(snapshot), rows, catalogue)


def catalogue_at(base: Catalogue, mutations: Iterable[ItemMutation], schema: Schema) -> Catalogue:
    """Return the items that checked mutations, in log order, make of a catalogue, by item id.

    A patch of an item that is not there changes nothing.
    """
    waves = coalesce(mutations, None).waves
    changes = [step.mutation for step in waves[0]] if waves else []
    upserts = [one for one in changes if isinstance(one, Upsert)]
    replaced = [one.item_id for one in changes if isinstance(one, Upsert | Delete)]
    patches = {one.item_id: one.values for one in changes if not isinstance(one, Upsert | Delete)}
    patched = np.flatnonzero(np.isin(base.item_ids, list(patches)))
    kept = ~np.isin(base.item_ids, replaced)
    kept[patched] = False
    parts = [base.take(np.flatnonzero(kept))]
    for start in range(0, len(patched), _BATCH):
        old = base.take(patched[start : start + _BATCH])
        ids = old.item_ids.tolist()
        values = [
            one.patched(patches[item_id])
            for item_id, one in zip(ids, to_values(old, schema), strict=True)
        ]
        parts.append(to_catalogue(ids, values, schema))
    parts.append(
        to_catalogue([one.item_id for one in upserts], [one.values for one in upserts], schema)
    )
    whole = Catalogue.concat(parts)
    return whole.take(np.argsort(whole.item_ids))


def _embeddable(
    mutations: Iterator[ItemMutation], model: nn.Module, schema: Schema
) -> Iterator[ItemMutation]:
    """Yield the mutations without the upserts whose embedding no index can hold."""
    while batch := list(islice(mutations, _BATCH)):
        values = [one.values for one in batch if isinstance(one, Upsert)]
        problems = embedding_problems(embed_values(model, values, schema)) if values else []
        bad = iter(problems)
        yield from (one for one in batch if not (isinstance(one, Upsert) and next(bad)))


def _write_rows(model: nn.Module, remote: Mapping[str, Tensor], change: RowChange) -> None:
    """Write rows into the model, or into the records of a remote table."""
    rows, values = torch.tensor(change.rows), torch.from_numpy(change.values)
    if change.table in remote:
        remote[change.table][rows] = quantize_rows(values, PRECISION)
    else:
        cast(_Tower, model).update_rows(change.table, rows, values)
