"""What every service of a cluster does at its border: it parses messages and states failures."""

import logging
import math
import uuid
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from silvershard.cluster.codec import (
    RequestRefused,
    code_name,
    refused,
    status_of,
    status_row,
)

DETAILS = "grpc-status-details-bin"
"""Metadata that carries the rich status of a call."""
PUSHBACK = "grpc-retry-pushback-ms"
"""Metadata that tells when to try again."""

_log = logging.getLogger(__name__)

_CODES = {code.value[0]: code for code in grpc.StatusCode}

M = TypeVar("M", bound=Message)


class Malformed(NamedTuple):
    """A message that is not of its type."""

    message: str


def parser(kind: type[M]) -> Callable[[bytes], M | Malformed]:
    """Return a parser that tells malformed bytes apart from bugs."""

    def parse(data: bytes) -> M | Malformed:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return Malformed(f"must be a {kind.DESCRIPTOR.full_name}")
        return message

    return parse


def serialize(message: Message) -> bytes:
    """Return the bytes of a message."""
    return message.SerializeToString()


def logged_status(error: Exception) -> status_pb2.Status:
    """Return the status of an error; a bug is logged under the id that its status carries."""
    row = status_row(error)
    if row is not None and row.code != "INTERNAL":
        return status_of(error)
    error_id = uuid.uuid4().hex[:12]
    _log.error("internal error %s", error_id, exc_info=error)
    return status_of(error, error_id)


def refused_by(error: grpc.RpcError) -> RequestRefused:
    """Return a failed call as the error that its client raises, with the details of its status."""
    code = error.code().name
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                continue
            if code_name(status.code) == code:
                return refused(code, status.message, status.details)
    return refused(code, error.details() or "", ())


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End a call with the status of an error, its details and the delay to wait."""
    status = logged_status(error)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS, status.SerializeToString())]
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            delay_ms = math.ceil(retry.retry_delay.ToNanoseconds() / 1e6)
            trailing.append((PUSHBACK, str(delay_ms)))
    await context.abort(_CODES[status.code], status.message, tuple(trailing))
    raise AssertionError("abort always raises")
