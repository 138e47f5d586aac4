"""What a client asks again: queries that no router answered, and those of one that was ending."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.config import MEBIBYTE
from silvershard.cluster.updates import TableRows, Update

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [{"service": retrieval_pb2.DESCRIPTOR.services_by_name["Retrieval"].full_name}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.2s",
                "backoffMultiplier": 2,
                # The latter is what gRPC says of a request that reaches a router as it ends.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # A failure costs a token, an answer gives back a tenth; below half nothing is asked again.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
"""As gRPC takes it in every language. Of queries only: an update that seems lost may be logged."""

CLIENT_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 256 * MEBIBYTE),
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # A router that comes back is found within a second; by default gRPC waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
"""Of the channel of a client."""


def applied(apply: Callable[[], Any], updates: Sequence[Update]) -> Any:
    """Return what became of updates; they are sent again once if their router ended, and it may be.

    It may be if each has a version of its own and asks for none: then twice is as good as once.

    Args:
        apply: sends them.
        updates: what is sent.

    Raises:
        grpc.RpcError: as ``apply`` does.
    """
    try:
        return apply()
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED or not all(map(_may_come_twice, updates)):
            raise
        try:
            return apply()
        except ValueError:
            # It was the client that was closed.
            raise error from None


def _may_come_twice(update: Update) -> bool:
    asks_for_none = isinstance(update, TableRows) or update.if_version is None
    return bool(update.version) and asks_for_none
