import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.service import (
    DETAILS,
    PUSHBACK,
    Malformed,
    abort,
    logged_status,
    parser,
    refused_by,
    serialize,
)
from silvershard.shard.errors import Overloaded, StateError


class Context:
    """A call that notes how it ends."""

    def __init__(self) -> None:
        self.ended: Any = None

    async def abort(self, code: Any, message: str, trailing: Any) -> None:
        self.ended = (code, message, dict(trailing))
        raise grpc.aio.AbortError


def test_bytes_that_are_no_message_are_told_apart() -> None:
    parse = parser(retrieval_pb2.UpdateToken)
    assert parse(b"\xff\xff") == Malformed("must be a silvershard.v1.UpdateToken")
    token = retrieval_pb2.UpdateToken(position=3)
    assert parse(serialize(token)) == token


def test_a_refusal_carries_its_details_and_the_delay() -> None:
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(abort(context, Overloaded("it is full", 0.2501)))  # type: ignore[arg-type]
    code, message, trailing = context.ended
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message.startswith("it is full")
    assert trailing[PUSHBACK] == "251"
    assert status_pb2.Status.FromString(trailing[DETAILS]).message == message


def test_only_a_bug_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert logged_status(StateError("no")).message == "no"
    assert not caplog.records
    found = logged_status(ZeroDivisionError("secret"))
    assert "secret" not in found.message
    assert found.message.split()[-1] in caplog.text


class Failed(grpc.RpcError):
    """A call that failed, as its client sees it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        self.code = lambda: code
        self.details = lambda: details
        self.trailing_metadata = lambda: trailing


def test_a_failed_call_is_the_error_that_its_status_tells() -> None:
    status = logged_status(Overloaded("it is full", 0.25)).SerializeToString()
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = refused_by(Failed(code, "full", ((PUSHBACK, "250"), (DETAILS, status))))
    assert (error.code, error.reason, error.retry_after_s) == (code.name, "OVERLOADED", 0.25)
    # A status that is damaged, or of another call, says nothing.
    for details in (b"\xff", logged_status(StateError("no")).SerializeToString()):
        error = refused_by(Failed(code, "full", ((DETAILS, details),)))
        assert (error.code, error.message, error.reason) == (code.name, "full", "")
    assert refused_by(Failed(code, "full", None)).message == "full"
