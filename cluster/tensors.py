"""Tensors on the wire between routers and shards: exact bytes, checked before use, never pickle.

Shapes: B requests, H heads, D embedding dimension, Us user state, L, Lv and Y program lengths,
E exclusions, R candidates per head, S semantic candidates, C heads and, where semantic candidates
are asked for, one more, K results, T tasks.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from silvershard.cluster import shard_pb2
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, StageTimes, Work

if sys.byteorder != "little":
    raise ImportError("silvershard.cluster.tensors needs a little-endian machine")

_DTYPES: dict[str, torch.dtype] = {
    "f16": torch.float16,
    "f32": torch.float32,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

T = TypeVar("T")

_SIZE = re.compile("[0-9]{1,9}")
_ALIGNMENT = 8
"""Bytes; every tensor begins at a multiple of it."""


class TensorError(ValueError):
    """A tensor message that is truncated, garbled, or not what the operation takes."""


class _Form(NamedTuple):
    dtype: torch.dtype
    dims: str
    """One letter per dimension; equal letters in a message are equal sizes, digits are literal."""


_I64, _I32, _F32 = torch.int64, torch.int32, torch.float32

WORK = {
    "embedding": _Form(_F32, "BHD"),
    "user_state": _Form(_F32, "BU"),
    "scan": _Form(_I64, "BL4"),
    "verify": _Form(_I64, "BV4"),
    "exclude": _Form(_I64, "BE"),
    "value_ops": _Form(_I32, "BY2"),
    "value_constants": _Form(_F32, "BY"),
    "probes": _Form(_I64, "B"),
    "ann_k": _Form(_I64, "B"),
    "semantic_k": _Form(_I64, "B"),
    "k": _Form(_I64, "B"),
    "tasks": _Form(torch.int8, "BT"),
}
CUTOFFS = {"scores": _Form(_F32, "BC"), "item_ids": _Form(_I64, "BC")}
ROUND_ONE = {
    "scores": _Form(_F32, "BHR"),
    "item_ids": _Form(_I64, "BHR"),
    "probed": _Form(_I64, "B"),
    "eligible": _Form(_I64, "B"),
    "semantic_scores": _Form(_F32, "BS"),
    "semantic_item_ids": _Form(_I64, "BS"),
}
ROUND_TWO = {
    "item_ids": _Form(_I64, "BK"),
    "values": _Form(_F32, "BK"),
    "refined": _Form(_F32, "BK"),
    "tasks": _Form(_F32, "BKT"),
    "kept": _Form(_I64, "B"),
    "semantic_kept": _Form(_I64, "B"),
    "reranked": _Form(_I64, "B"),
}
SCAN = {"scan": _Form(_I64, "BL4")}
COUNT = {"count": _Form(_I64, "B")}
ENCODED = {"embedding": _Form(_F32, "BHD"), "user_state": _Form(_F32, "BU")}


def to_map(tensors: Mapping[str, Tensor]) -> shard_pb2.TensorMap:
    """Return the tensors as a message; their bytes are kept exactly.

    Raises:
        TensorError: if a dtype has no form on the wire.
    """
    lines: list[str] = []
    parts: list[bytes] = []
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype)
        if dtype is None:
            raise TensorError(f"tensor {name!r}: dtype {tensor.dtype} has no form on the wire")
        lines.append(" ".join([name, dtype, *map(str, tensor.shape)]))
        data = tensor.numpy(force=True).tobytes()
        parts.append(data)
        if len(data) % _ALIGNMENT:
            parts.append(bytes(-len(data) % _ALIGNMENT))
    return shard_pb2.TensorMap(layout="\n".join(lines), data=b"".join(parts))


def from_map(message: shard_pb2.TensorMap, forms: Mapping[str, _Form]) -> dict[str, Tensor]:
    """Return the tensors of a message, which are exactly those that ``forms`` names.

    Raises:
        TensorError: naming the tensor that is missing, unexpected, garbled or of another form.
    """
    places, size = _places(message.layout, tuple(forms.items()))
    # frombuffer wants a buffer that may be written.
    data = bytearray(message.data)
    if len(data) != size:
        shapes = ", ".join(f"{one.name!r} {one.shape}" for one in places)
        raise TensorError(f"tensors {shapes} need {size} bytes, got {len(data)}")
    return {
        # It refuses an empty one.
        name: torch.frombuffer(data, dtype=dtype, count=length, offset=offset).view(shape)
        if length
        else torch.empty(shape, dtype=dtype)
        for name, dtype, shape, length, offset in places
    }


class _Place(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    length: int
    """Of its values."""
    offset: int
    """Of its first byte."""


@lru_cache(maxsize=1024)
def _places(layout: str, forms: tuple[tuple[str, _Form], ...]) -> tuple[tuple[_Place, ...], int]:
    """Return where the tensors of a layout lie, and the bytes that they take together.

    The same few layouts come again and again.

    Raises:
        TensorError: as ``from_map`` does.
    """
    wanted, sizes = dict(forms), dict[str, int]()
    found: dict[str, _Place] = {}
    end = 0
    for line in layout.splitlines():
        name, *rest = line.split(" ")
        form = wanted.get(name)
        if form is None or name in found:
            raise TensorError(f"tensor {name[:80]!r} is unexpected here")
        dtype, *dims = rest or [""]
        if not all(_SIZE.fullmatch(dim) for dim in dims):
            raise TensorError(f"tensor {name!r}: {line[:80]!r} tells no shape")
        shape = tuple(map(int, dims))
        _check_form(name, dtype, shape, form, sizes)
        length = math.prod(shape)
        found[name] = _Place(name, form.dtype, shape, length, end)
        end += -(length * form.dtype.itemsize // -_ALIGNMENT) * _ALIGNMENT
    for name in wanted:
        if name not in found:
            raise TensorError(f"tensor {name!r} is missing")
    return tuple(found.values()), end


def _check_form(
    name: str, dtype: str, shape: tuple[int, ...], form: _Form, sizes: dict[str, int]
) -> None:
    if dtype != _NAMES[form.dtype]:
        raise TensorError(
            f"tensor {name!r}: dtype must be {_NAMES[form.dtype]}, got {dtype[:20]!r}"
        )
    if len(shape) != len(form.dims):
        raise TensorError(f"tensor {name!r}: must have {len(form.dims)} dimensions, got {shape}")
    for dim, size in zip(form.dims, shape, strict=True):
        wanted = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
        if size != wanted:
            raise TensorError(f"tensor {name!r}: dimension {dim} must be {wanted}, got {size}")


class _Newest(Generic[T]):
    """Makes messages, and one only for whoever is sent the same as the one before.

    All shards get the work of a batch, and its cutoffs, right one after the other.
    """

    def __init__(self, make: Callable[[T], shard_pb2.TensorMap]) -> None:
        self._make = make
        self._newest: tuple[T, shard_pb2.TensorMap] | None = None

    def __call__(self, found: T) -> shard_pb2.TensorMap:
        newest = self._newest
        if newest is None or newest[0] is not found:
            newest = self._newest = found, self._make(found)
        return newest[1]


_work_message = _Newest[Work](lambda work: to_map(work._asdict()))
_cutoffs_message = _Newest[Cutoffs](lambda cutoffs: to_map(cutoffs._asdict()))


def work_to_map(work: Work) -> shard_pb2.TensorMap:
    """Return a batch of work as a message, which others may have been given, too."""
    return _work_message(work)


def work_from_map(message: shard_pb2.TensorMap) -> Work:
    """Return the batch of work in a message.

    Raises:
        TensorError: if the message is not one, or asks for nothing.
    """
    work = Work(**from_map(message, WORK))
    if not work.k.shape[0] or not work.embedding.shape[1]:
        raise TensorError("work must hold at least one request and one head")
    for name, counts in (("probes", work.probes), ("ann_k", work.ann_k), ("k", work.k)):
        if int(counts.min()) < 1:
            raise TensorError(f"tensor {name!r}: must be at least 1, got {int(counts.min())}")
    if int(work.semantic_k.min()) < 0:
        raise TensorError(
            f"tensor 'semantic_k': must be at least 0, got {int(work.semantic_k.min())}"
        )
    return work


def cutoffs_to_map(cutoffs: Cutoffs) -> shard_pb2.TensorMap:
    """Return cutoffs as a message, which others may have been given, too."""
    return _cutoffs_message(cutoffs)


def cutoffs_from_map(message: shard_pb2.TensorMap) -> Cutoffs:
    """Return the cutoffs in a message.

    Raises:
        TensorError: if the message is not one.
    """
    return Cutoffs(**from_map(message, CUTOFFS))


def round_to_map(result: RoundOne | RoundTwo) -> shard_pb2.TensorMap:
    """Return the tensors of a round as a message; its times travel apart."""
    tensors = result._asdict()
    del tensors["times"]
    return to_map(tensors)


def _check_order(name: str, found: Mapping[str, Tensor]) -> None:
    """Refuse numbers that have no place in an order, before they fail a whole batch."""
    if found[name].numel() and bool(torch.isnan(found[name]).any()):
        raise TensorError(f"tensor {name!r}: must not hold NaN")


def round_one_from_map(message: shard_pb2.TensorMap, times: StageTimes) -> RoundOne:
    """Return the first round in a message.

    Raises:
        TensorError: if the message is not one.
    """
    found = from_map(message, ROUND_ONE)
    _check_order("scores", found)
    _check_order("semantic_scores", found)
    return RoundOne(**found, times=times)


def round_two_from_map(message: shard_pb2.TensorMap, times: StageTimes) -> RoundTwo:
    """Return the second round in a message.

    Raises:
        TensorError: if the message is not one.
    """
    found = from_map(message, ROUND_TWO)
    _check_order("values", found)
    return RoundTwo(**found, times=times)


def warnings_of(reply: shard_pb2.ShardReply, num_users: int) -> list[tuple[str, ...]]:
    """Return what the encoder said of each user.

    Raises:
        TensorError: if the reply speaks of another number of users.
    """
    if len(reply.warnings) != num_users:
        raise TensorError(f"warnings must be of {num_users} users, got {len(reply.warnings)}")
    return [tuple(one.texts) for one in reply.warnings]


def add_warnings(reply: shard_pb2.ShardReply, warnings: Sequence[Sequence[str]]) -> None:
    """Write what the encoder said of each user into a reply."""
    for texts in warnings:
        reply.warnings.add(texts=texts)
