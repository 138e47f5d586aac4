"""Mutations out of messages: what clients send, what the log keeps, and what shards apply.

Shapes: n rows, D embedding dimension.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.codec import values_from
from silvershard.cluster.consistency import duration_from
from silvershard.cluster.signal_records import SignalRecords
from silvershard.model.request import RequestError
from silvershard.shard.errors import MutationError
from silvershard.shard.mutation_batch import MutationBatch
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

_READ_AT_ONCE = 128
_WEIGHTS = retrieval_pb2.Values.WEIGHTS_FIELD_NUMBER

# Tags of the fields that a record adds to the bytes of a mutation.
_VERSION = bytes([retrieval_pb2.Mutation.VERSION_FIELD_NUMBER << 3])
_MUTATION = bytes([update_pb2.LoggedMutation.MUTATION_FIELD_NUMBER << 3 | 2])
_EXPIRES = bytes([update_pb2.LoggedMutation.EXPIRES_UNIX_MS_FIELD_NUMBER << 3])
_BYTES = tuple(bytes([one]) for one in range(0x80))

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
    own = retrieval_pb2.Mutation()
    own.CopyFrom(message)
    return sealed(body_of(own), version, expires_unix_ms)


def body_of(message: retrieval_pb2.Mutation) -> bytes:
    """Return what the log keeps of a mutation, but its version; the message loses the rest."""
    message.ClearField("version")
    message.ClearField("if_version")
    if message.HasField("upsert"):
        message.upsert.ClearField("ttl")
    body: bytes = message.SerializeToString()
    return body


def sealed(body: bytes, version: int, expires_unix_ms: int = 0) -> bytes:
    """Return the payload of a record: a ``LoggedMutation`` made of the bytes of its mutation.

    Source: Google, "Protocol Buffers: Encoding" (fields of a message in any order), 2024.

    Args:
        body: as ``body_of`` gives it.
        version: of the mutation.
        expires_unix_ms: of an upsert: when its item is deleted; 0: never.
    """
    mutation = body + _VERSION + _varint(version)
    payload = _MUTATION + _varint(len(mutation)) + mutation
    return payload + _EXPIRES + _varint(expires_unix_ms) if expires_unix_ms else payload


def _varint(number: int) -> bytes:
    """Return a number that is not negative in the form of protobuf."""
    if number < 0x80:
        return _BYTES[number]
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def logged_from(payload: bytes) -> Mutation:
    """Return the mutation in the payload of a record.

    Raises:
        MutationError: if there is none: another release wrote it.
    """
    try:
        record = update_pb2.LoggedMutation.FromString(payload)
    except DecodeError:
        raise MutationError("payload", "must be a LoggedMutation") from None
    message = record.mutation
    return mutation_from(message, message.version, record.expires_unix_ms)


def logged_batch(
    payloads: Sequence[bytes],
    signals: SignalRecords,
    give_way: Callable[[], None] = lambda: None,
) -> tuple[MutationBatch, list[tuple[int, str]]]:
    """Return the mutations in the payloads of records in log order, and what is no mutation.

    Args:
        payloads: of the records.
        signals: reads those that patch signals.
        give_way: is called between the parts of the work, which are short.

    Returns:
        The batch; and for each payload without a mutation the item id, as far as it says one, else
        -1, with the reason.
    """
    patches, others = signals.read(payloads)
    placed, refused = [], []
    for count, place in enumerate(others):
        if count % _READ_AT_ONCE == 0:
            give_way()
        try:
            placed.append((place, logged_from(payloads[place])))
        except MutationError as error:
            refused.append((_item_of(payloads[place]), str(error)))
    return MutationBatch(placed, tuple(patches)), refused


def _item_of(payload: bytes) -> int:
    """Return the item that a payload without a mutation names, -1 if none."""
    try:
        message = update_pb2.LoggedMutation.FromString(payload).mutation
    except DecodeError:
        return -1
    named = [one.item_id for one in (message.upsert, message.patch, message.delete)]
    return max(named) or -1


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
    # Half the time of asking for one field after the other.
    given = {one.name: value for one, value in message.ListFields()}
    fields = _columns("fields", given)
    return ItemValues(
        attributes=_columns("attributes", given),
        signals=dict(given.get("signals", ())),
        fields={name: _single(f"fields.{name}", values) for name, values in fields.items()},
        features=_columns("features", given),
    )


def _columns(what: str, given: dict[str, Any]) -> dict[str, tuple[Scalar, ...]]:
    message = given.get(what)
    if message is None:
        return {}
    columns = message.features
    return {name: _column(what, name, columns[name]) for name in columns}


def _column(what: str, name: str, message: retrieval_pb2.Values) -> tuple[Scalar, ...]:
    given = message.ListFields()
    if not given:
        return ()
    # Nearly every column has values of one kind and nothing else: half the time of looking at all.
    if len(given) == 1 and given[0][0].number != _WEIGHTS:
        return tuple(given[0][1][:])
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
