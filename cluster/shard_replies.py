"""What a shard says in its replies to routers: rounds, columns, errors."""

from google.rpc import code_pb2

from silvershard.cluster import shard_pb2, tensors
from silvershard.cluster.codec import code_number, status_row
from silvershard.cluster.consistency import Consistency, UpdateToken
from silvershard.cluster.field_columns import column_to
from silvershard.cluster.freshness import Demand
from silvershard.cluster.hosting import Hosted
from silvershard.model.request import RequestError
from silvershard.shard.errors import CandidatesExpired, GenerationError, RemoteError


def failed(
    reply: shard_pb2.ShardReply, error: Exception, error_id: str = ""
) -> shard_pb2.ShardReply:
    """Return a reply that reports an error.

    Args:
        reply: addressed, else empty.
        error: what went wrong; of a bug nothing but ``error_id`` is said.
        error_id: under which the log tells more.
    """
    if isinstance(error, GenerationError):
        reply.generation = error.held
    row = status_row(error)
    if isinstance(error, tensors.TensorError):
        reply.code, reply.reason = code_pb2.INVALID_ARGUMENT, "MALFORMED_TENSOR"
        reply.message = str(error)
    elif row is None:
        reply.code, reply.reason = code_pb2.INTERNAL, "INTERNAL"
        reply.message = f"internal error {error_id}"
    else:
        reply.code, reply.reason = code_number(row.code), row.reason
        reply.message = error.message if isinstance(error, RemoteError) else str(error)
        if isinstance(error, RequestError):
            reply.field, reply.message = error.field, error.message
    return reply


def set_round(
    reply: shard_pb2.ShardReply, message: shard_pb2.TensorMap, times: dict[str, int]
) -> None:
    """Answer with the tensors of a round and the microseconds of its stages."""
    reply.tensors.CopyFrom(message)
    for stage, spent in times.items():
        reply.times_us[stage] = spent


def set_fields(reply: shard_pb2.ShardReply, call: shard_pb2.ShardCall, hosted: Hosted) -> None:
    """Answer with the columns that a call asks for.

    Raises:
        CandidatesExpired: if the candidates that it needs are open no more.
        RequestError: if there is no such column.
    """
    dtypes, names = hosted.dtypes, list(call.fields.names)
    for name in names:
        if name not in dtypes:
            raise RequestError("names", f"unknown field {name!r}")
    executor = hosted.executor_in_service
    if call.key and not executor.is_open(call.key):
        # Items that were found may have changed since.
        raise CandidatesExpired(call.key)
    found = executor.fields(list(call.fields.item_ids), names, call.key or None)
    reply.fields.SetInParent()
    for name, values in found.items():
        reply.fields.columns[name].CopyFrom(column_to(values, dtypes[name]))


def demand_from(message: shard_pb2.Freshness) -> Demand:
    """Return what a call demands."""
    tokens = tuple(
        UpdateToken(message.log_id, one.partition, one.position) for one in message.after
    )
    most_s = message.max_staleness_us / 1e6 if message.HasField("max_staleness_us") else None
    return Demand(Consistency(tokens, most_s), message.wait_us / 1e6)
