import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.metrics import Metrics
from silvershard.cluster.request_meter import RequestMeter

Request, Response = retrieval_pb2.RetrieveRequest, retrieval_pb2.RetrieveResponse
BatchRequest = retrieval_pb2.RetrieveBatchRequest
Behaviour = Callable[[Any, Any], Coroutine[Any, Any, Any]]


class Metered:
    """A meter around one method, with a clock that moves by a quarter of a second per look."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.now_s = 0.0
        self.meter = RequestMeter("x.Retrieval", self.metrics, clock=self.tick)

    def tick(self) -> float:
        self.now_s += 0.25
        return self.now_s

    def call(
        self,
        behaviour: Behaviour,
        message: Any = None,
        code: grpc.StatusCode | None = None,
        method: str = "/x.Retrieval/Retrieve",
    ) -> Any:
        async def called() -> Any:
            handler = grpc.unary_unary_rpc_method_handler(behaviour)

            async def continuation(_: Any) -> Any:
                return handler

            found = await self.meter.intercept_service(continuation, SimpleNamespace(method=method))
            return await found.unary_unary(
                Request() if message is None else message,
                SimpleNamespace(code=lambda: code, time_remaining=lambda: 1.5),
            )

        return asyncio.run(called())

    def lines(self, name: str) -> list[str]:
        return [one for one in self.metrics.text().splitlines() if one.startswith(name)]


@pytest.fixture
def metered() -> Metered:
    return Metered()


def response(documents: float, *reasons: int) -> Response:
    found = Response()
    found.coverage.documents = documents
    found.coverage.reasons.extend(reasons)
    return found


async def whole(message: Any, context: Any) -> Any:
    return response(1.0)


def test_an_answer_counts_with_its_time_and_coverage(metered: Metered) -> None:
    assert metered.call(whole) == response(1.0)
    assert metered.lines("silvershard_requests_total") == [
        'silvershard_requests_total{code="OK"} 1'
    ]
    assert 'silvershard_request_duration_seconds_bucket{le="0.5"} 1' in metered.metrics.text()
    assert metered.lines("silvershard_request_duration_seconds_sum")[0].endswith(" 0.25")
    assert 'silvershard_coverage_ratio_bucket{le="0.9999"} 0' in metered.metrics.text()
    assert 'silvershard_coverage_ratio_bucket{le="1"} 1' in metered.metrics.text()
    assert metered.lines("silvershard_degraded_total") == []


def test_a_partial_answer_counts_with_its_reasons(metered: Metered) -> None:
    async def partial(message: Any, context: Any) -> Any:
        return response(
            0.75,
            retrieval_pb2.DEGRADE_REASON_SHARD_TIMEOUT,
            retrieval_pb2.DEGRADE_REASON_UPDATES_LAGGING,
        )

    metered.call(partial)
    assert metered.lines("silvershard_degraded_total") == [
        'silvershard_degraded_total{reason="SHARD_TIMEOUT"} 1',
        'silvershard_degraded_total{reason="UPDATES_LAGGING"} 1',
    ]
    assert metered.lines("silvershard_coverage_ratio_sum")[0].endswith(" 0.75")


def test_requests_of_a_batch_count_one_by_one(metered: Metered) -> None:
    async def batch(message: Any, context: Any) -> Any:
        reply = retrieval_pb2.RetrieveBatchResponse()
        reply.items.add(response=response(1.0))
        reply.items.add(response=response(1.0))
        reply.items.add(code=grpc.StatusCode.UNAVAILABLE.value[0])
        return reply

    metered.call(batch, BatchRequest(requests=[Request()] * 3))
    assert metered.lines("silvershard_requests_total") == [
        'silvershard_requests_total{code="OK"} 2',
        'silvershard_requests_total{code="UNAVAILABLE"} 1',
    ]


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (grpc.aio.AbortError(), grpc.StatusCode.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"),
        (asyncio.CancelledError(), None, "CANCELLED"),
        (RuntimeError(), None, "UNKNOWN"),
    ],
)
@pytest.mark.parametrize(
    ("message", "requests"), [(Request(), 1), (BatchRequest(requests=[Request()] * 4), 4)]
)
def test_a_call_that_fails_counts_by_its_status(
    metered: Metered,
    error: BaseException,
    code: grpc.StatusCode | None,
    name: str,
    message: Any,
    requests: int,
) -> None:
    async def fail(message: Any, context: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        metered.call(fail, message, code)
    assert metered.lines("silvershard_requests_total") == [
        f'silvershard_requests_total{{code="{name}"}} {requests}'
    ]
    assert metered.lines("silvershard_inflight_requests") == ["silvershard_inflight_requests 0"]


def test_calls_in_flight_are_counted_while_they_last(metered: Metered) -> None:
    async def looking(message: Any, context: Any) -> Any:
        assert metered.lines("silvershard_inflight_requests") == ["silvershard_inflight_requests 1"]
        return response(1.0)

    metered.call(looking)
    assert metered.lines("silvershard_inflight_requests") == ["silvershard_inflight_requests 0"]


def test_methods_of_others_pass_uncounted(metered: Metered) -> None:
    metered.call(whole, method="/grpc.health.v1.Health/Check")
    assert metered.lines("silvershard_requests_total") == []

    async def nobody(_: Any) -> None:
        return None

    details = SimpleNamespace(method="/x.Retrieval/Nothing")
    assert asyncio.run(metered.meter.intercept_service(nobody, details)) is None
