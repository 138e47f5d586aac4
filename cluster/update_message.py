"""Updates of a client as messages.

Shapes: n rows, D embedding dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import values_to
from silvershard.cluster.consistency import duration_to
from silvershard.cluster.updates import (
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    TableRows,
    Update,
)
from silvershard.model.dtypes import INT64_MAX


def mutation_to(update: Update) -> retrieval_pb2.Mutation:
    """Return what a client asks for as a message.

    Raises:
        ValueError: naming the field that has no form on the wire.
    """
    _in_range("version", update.version, INT64_MAX)
    message = retrieval_pb2.Mutation(version=update.version)
    if isinstance(update, TableRows):
        _set_rows(message.rows, update)
        return message
    if update.if_version is not None:
        _in_range("if_version", update.if_version, INT64_MAX)
        message.if_version = update.if_version
    _in_range("item_id", update.item_id, INT64_MAX)
    if isinstance(update, ItemDelete):
        message.delete.item_id = update.item_id
        message.delete.urgent = update.urgent
    elif isinstance(update, ItemPatch):
        _set_values(message.patch, update)
    else:
        _set_values(message.upsert, update)
        if update.embedding is not None:
            message.upsert.embedding.CopyFrom(_tensor_to("embedding", update.embedding))
        if update.ttl_s is not None:
            with _naming("ttl_s"):
                message.upsert.ttl.CopyFrom(duration_to(update.ttl_s))
    return message


def _in_range(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: must be an int, got {value!r}")
    if not 0 <= value <= most:
        raise ValueError(f"{name}: must be in 0..{most}, got {value}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Make errors of a message name its field."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from None


def _set_values(
    message: retrieval_pb2.ItemUpsert | retrieval_pb2.ItemPatch, update: ItemUpsert | ItemPatch
) -> None:
    message.item_id = int(update.item_id)
    for what in ("attributes", "features"):
        for name, values in getattr(update, what).items():
            columns = getattr(message, what).features
            columns[name].CopyFrom(values_to(f"{what}.{name}", values))
    for name, value in update.fields.items():
        given = values_to(f"fields.{name}", () if value is None else value)
        message.fields.features[name].CopyFrom(given)
    for name, signal in update.signals.items():
        if isinstance(signal, bool | str):
            raise ValueError(f"signals.{name}: must be a number, got {signal!r}")
        with _naming(f"signals.{name}"):
            message.signals[name] = signal


def _set_rows(message: retrieval_pb2.RowUpdate, update: TableRows) -> None:
    message.table = update.table
    with _naming("rows"):
        message.rows.extend([int(row) for row in update.rows])
    message.values.CopyFrom(_tensor_to("values", update.values))


def _tensor_to(name: str, values: Any) -> retrieval_pb2.Tensor:
    try:
        array = np.ascontiguousarray(values, dtype="<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: must be numbers: {error}") from None
    return retrieval_pb2.Tensor(
        dtype=retrieval_pb2.Tensor.D_TYPE_F32, shape=array.shape, data=array.tobytes()
    )
