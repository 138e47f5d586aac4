"""Tensors on the wire between routers and shards: exact bytes, checked before use, never pickle.

Shapes: B requests, H heads, D embedding dimension, Us user state, L, Lv and Y program lengths,
E exclusions, R candidates per head, S semantic candidates, C heads and, where semantic candidates
are asked for, one more, K results, T tasks.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    message = shard_pb2.TensorMap()
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TensorError(f"tensor {name!r}: dtype {tensor.dtype} has no form on the wire")
        message.tensors.add(
            name=name,
            dtype=_NAMES[tensor.dtype],
            shape=tensor.shape,
            data=tensor.detach().cpu().contiguous().numpy().tobytes(),
        )
    return message


def from_map(message: shard_pb2.TensorMap, forms: Mapping[str, _Form]) -> dict[str, Tensor]:
    """Return the tensors of a message, which are exactly those that ``forms`` names.

    Raises:
        TensorError: naming the tensor that is missing, unexpected, garbled or of another form.
    """
    found: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for one in message.tensors:
        form = forms.get(one.name)
        if form is None or one.name in found:
            raise TensorError(f"tensor {one.name[:80]!r} is unexpected here")
        shape = tuple(one.shape)
        _check_form(one.name, one.dtype, shape, form, sizes)
        wanted = math.prod(shape) * form.dtype.itemsize
        if len(one.data) != wanted:
            raise TensorError(
                f"tensor {one.name!r}: shape {shape} needs {wanted} bytes, got {len(one.data)}"
            )
        # frombuffer refuses an empty buffer, and wants one that may be written.
        found[one.name] = (
            torch.frombuffer(bytearray(one.data), dtype=form.dtype).view(shape)
            if wanted
            else torch.empty(shape, dtype=form.dtype)
        )
    for name in forms:
        if name not in found:
            raise TensorError(f"tensor {name!r} is missing")
    return found


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


def work_to_map(work: Work) -> shard_pb2.TensorMap:
    """Return a batch of work as a message."""
    return to_map(work._asdict())


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
    """Return cutoffs as a message."""
    return to_map(cutoffs._asdict())


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
    if bool(torch.isnan(found[name]).any()):
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
