"""Payloads of the update log that patch signals, read many at a time.

Where one payload has been understood, others of the same shape differ from it in their numbers
alone, and those lie at the same places: they are compared and read as columns of bytes.

Shapes: n payloads, m of one shape, S signals.

Source: Google, "Protocol Buffers: Encoding" (wire format), 2024.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.shard.mutation_batch import SignalPatches

_Ints = NDArray[np.int64]

# Fewer payloads of one length are read faster one by one: the calls take 20 us.
_FEWEST = 8
# Clients and releases write the parts of a payload in other orders, but seldom in many.
_MOST_SHAPES = 8

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# A varint of ten bytes is no version: it is negative, or beyond int64.
_LONGEST_VERSION = 9

_RECORD_MUTATION = update_pb2.LoggedMutation.MUTATION_FIELD_NUMBER << 3 | _BYTES
_PATCH = retrieval_pb2.Mutation.PATCH_FIELD_NUMBER << 3 | _BYTES
_VERSION = retrieval_pb2.Mutation.VERSION_FIELD_NUMBER << 3 | _VARINT
_ITEM_ID = retrieval_pb2.ItemPatch.ITEM_ID_FIELD_NUMBER << 3 | _FIXED64
_SIGNAL = retrieval_pb2.ItemPatch.SIGNALS_FIELD_NUMBER << 3 | _BYTES
_KEY = 1 << 3 | _BYTES
_VALUE = 2 << 3 | _FIXED32


class _Span(NamedTuple):
    """The value of a field of a message."""

    tag: int
    start: int
    stop: int


class _Shape(NamedTuple):
    """Where the numbers of payloads of one shape are, and all else that is in them."""

    mask: NDArray[np.uint8]
    """``(length,)`` bits that are alike in all of them."""
    fixed: NDArray[np.uint8]
    """``(length,)`` those bits."""
    item_id: int
    """Where the item id begins."""
    version: slice
    names: tuple[str, ...]
    values: tuple[int, ...]
    """``(S,)`` where each signal begins."""


class SignalRecords:
    """Reads payloads, and remembers the shapes that it has met."""

    def __init__(self) -> None:
        self._shapes: dict[int, list[_Shape]] = {}

    def read(self, payloads: Sequence[bytes]) -> tuple[list[SignalPatches], list[int]]:
        """Return the patches of signals among some payloads, and the places of all others.

        What is read is what the generated code reads; a payload of any doubt is among the others,
        as are those with a shape that few of them have.
        """
        lengths = np.fromiter(map(len, payloads), np.int64, len(payloads))
        found: list[SignalPatches] = []
        is_read = np.zeros(len(payloads), dtype=np.bool_)
        distinct, counts = np.unique(lengths, return_counts=True)
        for length in distinct[counts >= _FEWEST].tolist():
            places = np.flatnonzero(lengths == length)
            joined = b"".join([payloads[place] for place in places.tolist()])
            rows = np.frombuffer(joined, dtype=np.uint8).reshape(len(places), length)
            for patches in self._read_rows(places, rows):
                found.append(patches)
                is_read[patches.places] = True
        return found, np.flatnonzero(~is_read).tolist()

    def _read_rows(self, places: _Ints, rows: NDArray[np.uint8]) -> Iterator[SignalPatches]:
        """Yield the patches among payloads of one length, shape by shape."""
        known = self._shapes.setdefault(rows.shape[1], [])
        for shape in known:
            alike = ((rows & shape.mask) == shape.fixed).all(1)
            if alike.any():
                yield _patches(shape, places[alike], rows[alike])
                places, rows = places[~alike], rows[~alike]
        if len(places) >= _FEWEST and len(known) < _MOST_SHAPES:
            shape_of_first = _shape_of(rows[0].tobytes())
            if shape_of_first is not None:
                known.append(shape_of_first)
                yield from self._read_rows(places, rows)


def _patches(shape: _Shape, places: _Ints, rows: NDArray[np.uint8]) -> SignalPatches:
    item_ids = rows[:, shape.item_id : shape.item_id + 8].copy().view("<i8")[:, 0]
    versions = np.zeros(len(rows), dtype=np.int64)
    for place, column in enumerate(rows[:, shape.version].T):
        versions |= (column & 0x7F).astype(np.int64) << 7 * place
    values = np.empty((len(rows), len(shape.values)), dtype=np.float32)
    for signal, start in enumerate(shape.values):
        values[:, signal] = rows[:, start : start + 4].copy().view("<f4")[:, 0]
    return SignalPatches(places, item_ids.astype(np.int64), versions, shape.names, values)


def _shape_of(payload: bytes) -> _Shape | None:
    """Return the shape of a payload, None unless it patches signals and nothing else."""
    try:
        (mutation,) = _spans(payload, 0, len(payload))
        version, patch = sorted(_spans(payload, mutation.start, mutation.stop), reverse=True)
        item, *signals = sorted(_spans(payload, patch.start, patch.stop))
        pairs = [sorted(_spans(payload, one.start, one.stop)) for one in signals]
        names = [payload[key.start : key.stop].decode() for key, _ in pairs]
    except (ValueError, IndexError):
        return None
    tags = [mutation.tag, version.tag, patch.tag, item.tag]
    tags += [one.tag for part in (signals, *pairs) for one in part]
    wanted = [_RECORD_MUTATION, _VERSION, _PATCH, _ITEM_ID]
    wanted += [_SIGNAL] * len(signals) + [_KEY, _VALUE] * len(pairs)
    if tags != wanted or len(set(names)) < len(names):
        return None
    if version.stop - version.start > _LONGEST_VERSION or payload[item.stop - 1] & 0x80:
        return None
    mask = np.full(len(payload), 0xFF, dtype=np.uint8)
    mask[version.start : version.stop] = 0x80
    for start, stop in [item[1:], *(value[1:] for _, value in pairs)]:
        mask[start:stop] = 0
    # No id has this bit.
    mask[item.stop - 1] = 0x80
    return _Shape(
        mask,
        np.frombuffer(payload, dtype=np.uint8) & mask,
        item.start,
        slice(version.start, version.stop),
        tuple(names),
        tuple(value.start for _, value in pairs),
    )


def _spans(data: bytes, start: int, stop: int) -> list[_Span]:
    """Return the fields of a message, in the order in which they are written.

    Raises:
        ValueError: if they do not end where the message does.
        IndexError: if the data end before.
    """
    spans = []
    while start < stop:
        tag, at = _varint(data, start)
        kind = tag & 7
        if kind == _VARINT:
            end = _varint(data, at)[1]
        elif kind == _FIXED64:
            end = at + 8
        elif kind == _FIXED32:
            end = at + 4
        elif kind == _BYTES:
            size, at = _varint(data, at)
            end = at + size
        else:
            raise ValueError(f"there is no wire type {kind}")
        if end > stop:
            raise ValueError(f"a field ends at {end}, its message at {stop}")
        spans.append(_Span(tag, at, end))
        start = end
    return spans


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    number, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
