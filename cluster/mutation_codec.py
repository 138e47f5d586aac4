"""Mutations out of messages: what clients send, what the log keeps, and what shards apply.

Shapes: n rows, D embedding dimension.
"""

import math

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.codec import values_from
from silvershard.cluster.consistency import duration_from
from silvershard.model.request import RequestError
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import (
    Delete,
    ItemValues,
    Mutation,
    Patch,
    RowChange,
    Scalar,
    Upsert,
)

MAX_TTL_S = 100 * 365 * 86_400
"""A hundred years."""

_WIDTHS = {
    retrieval_pb2.Tensor.D_TYPE_F32: 4,
    retrieval_pb2.Tensor.D_TYPE_F16: 2,
    retrieval_pb2.Tensor.D_TYPE_BF16: 2,
}


def mutation_from(
    message: retrieval_pb2.Mutation, version: int, expires_unix_ms: int = 0
) -> Mutation:
    """Return the mutation in a message; what only a generation can tell is not checked.

    Args:
        message: its own version, ttl and ``if_version`` are not looked at.
        version: of the mutation.
        expires_unix_ms: of an upsert: when its item is deleted; 0: never.

    Raises:
        MutationError: naming the field.
    """
    op = message.WhichOneof("op")
    if op == "upsert":
        upsert = message.upsert
        embedding = None
        if upsert.HasField("embedding"):
            embedding = tuple(_tensor_from("embedding", upsert.embedding, 1).tolist())
        return Upsert(upsert.item_id, version, _values_of(upsert), embedding, expires_unix_ms)
    if op == "patch":
        return Patch(message.patch.item_id, version, _values_of(message.patch))
    if op == "delete":
        return Delete(message.delete.item_id, version, message.delete.urgent)
    if op == "rows":
        rows = message.rows
        return RowChange(
            rows.table, version, tuple(rows.rows), _tensor_from("values", rows.values, 2)
        )
    raise MutationError("op", "must be upsert, patch, delete or rows, got none that is known")


def ttl_s(message: retrieval_pb2.Mutation) -> float | None:
    """Return after how many seconds an upserted item is deleted; None: never.

    Raises:
        MutationError: if it is not above 0 and at most a hundred years.
    """
    if message.WhichOneof("op") != "upsert" or not message.upsert.HasField("ttl"):
        return None
    try:
        seconds = duration_from("ttl", message.upsert.ttl)
    except RequestError as error:
        raise MutationError(error.field, error.message) from None
    if not 0 < seconds <= MAX_TTL_S:
        raise MutationError("ttl", f"must be above 0 and at most {MAX_TTL_S} s, got {seconds} s")
    return seconds


def logged(message: retrieval_pb2.Mutation, version: int, expires_unix_ms: int = 0) -> bytes:
    """Return the payload of the record that the log keeps of a mutation."""
    record = update_pb2.LoggedMutation(mutation=message, expires_unix_ms=expires_unix_ms)
    record.mutation.version = version
    record.mutation.ClearField("if_version")
    if record.mutation.HasField("upsert"):
        record.mutation.upsert.ClearField("ttl")
    payload: bytes = record.SerializeToString()
    return payload


def logged_from(payload: bytes) -> Mutation:
    """Return the mutation in the payload of a record.

    Raises:
        MutationError: if there is none: another release wrote it.
    """
    record = update_pb2.LoggedMutation()
    try:
        record.ParseFromString(payload)
    except DecodeError:
        raise MutationError("payload", "must be a LoggedMutation") from None
    return mutation_from(record.mutation, record.mutation.version, record.expires_unix_ms)


def _tensor_from(name: str, message: retrieval_pb2.Tensor, rank: int) -> NDArray[np.float32]:
    """Return the numbers of a tensor as float32.

    Raises:
        MutationError: if they are not numbers, of another rank, or not as many as its shape says.
    """
    width = _WIDTHS.get(message.dtype)
    if width is None:
        raise MutationError(name, f"must be F32, F16 or BF16, got dtype {message.dtype}")
    if len(message.shape) != rank:
        raise MutationError(name, f"must have {rank} dimensions, got {len(message.shape)}")
    size = math.prod(message.shape) * width
    if len(message.data) != size:
        raise MutationError(
            name, f"must have {size} bytes for its shape, got {len(message.data)} bytes"
        )
    if message.dtype == retrieval_pb2.Tensor.D_TYPE_BF16:
        halves = np.frombuffer(message.data, dtype="<u2").astype(np.uint32)
        numbers = (halves << 16).view(np.float32)
    else:
        numbers = np.frombuffer(message.data, dtype=f"<f{width}").astype(np.float32)
    return numbers.reshape(tuple(message.shape))


def _values_of(
    message: retrieval_pb2.ItemUpsert | retrieval_pb2.ItemPatch,
) -> ItemValues:
    return ItemValues(
        attributes=_columns("attributes", message),
        signals=dict(message.signals),
        fields={
            name: _single(f"fields.{name}", values)
            for name, values in _columns("fields", message).items()
        },
        features=_columns("features", message),
    )


def _columns(
    what: str, message: retrieval_pb2.ItemUpsert | retrieval_pb2.ItemPatch
) -> dict[str, tuple[Scalar, ...]]:
    if not message.HasField(what):
        return {}
    columns = getattr(message, what).features
    return {name: _column(what, name, columns[name]) for name in columns}


def _column(what: str, name: str, message: retrieval_pb2.Values) -> tuple[Scalar, ...]:
    given = message.ListFields()
    if not given:
        return ()
    # Nearly every column has values of one kind and nothing else: half the time of looking at all.
    if len(given) == 1 and given[0][0].name != "weights":
        return tuple(given[0][1])
    path = f"{what}.{name}"
    try:
        values_from(path, message)
    except RequestError as error:
        raise MutationError(error.field, error.message) from None
    raise MutationError(path, "must have no weights, which go with ids of user features alone")


def _single(name: str, values: tuple[Scalar, ...]) -> Scalar | None:
    if len(values) > 1:
        raise MutationError(name, f"must have one value, or none for null, got {len(values)}")
    return values[0] if values else None
