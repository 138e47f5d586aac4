"""What a router counts of the requests it serves: how they ended, how long they took, and coverage.

It sits around the methods of the public service and reads their answers, so nothing else has to
count.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import code_name
from silvershard.cluster.metrics import Counter, Gauge, Histogram, Metrics

_DURATION_BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)
_STAGE_BOUNDS_S = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0)
_COVERAGE_BOUNDS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


class RequestMeter(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts the requests of one service."""

    def __init__(
        self,
        service: str,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a meter and its metrics.

        Args:
            service: full name of the service; what belongs to others passes uncounted.
            metrics: where the metrics are added.
            clock: in seconds.
        """
        self._prefix = f"/{service}/"
        self._clock = clock
        self._inflight = 0
        self._requests = Counter("code")
        self._seconds = Histogram(_DURATION_BOUNDS_S)
        self._coverage = Histogram(_COVERAGE_BOUNDS)
        self._degraded = Counter("reason")
        self._exhausted = Counter()
        self._stages = Histogram(_STAGE_BOUNDS_S, "stage")
        self._waits = Histogram(_STAGE_BOUNDS_S)
        self._left = Histogram(_DURATION_BOUNDS_S)
        metrics.add(
            "silvershard_requests_total",
            "Requests that ended, by the name of their gRPC status; those of a batch one by one.",
            self._requests,
        )
        metrics.add(
            "silvershard_request_duration_seconds",
            "Time from the arrival of a call to its answer, of calls with one request or many.",
            self._seconds,
        )
        metrics.add(
            "silvershard_inflight_requests",
            "Calls that have arrived and are not answered.",
            Gauge(lambda: self._inflight),
        )
        metrics.add(
            "silvershard_coverage_ratio",
            "Documents that answered / documents addressed, of each answer.",
            self._coverage,
        )
        metrics.add(
            "silvershard_degraded_total",
            "Answers that were not what they should be, by reason; one may have several.",
            self._degraded,
        )
        metrics.add(
            "silvershard_exhausted_total",
            "Answers with fewer results than were asked for, because no more are eligible.",
            self._exhausted,
        )
        metrics.add(
            "silvershard_stage_duration_seconds",
            "Time that an answer took in each stage.",
            self._stages,
        )
        metrics.add(
            "silvershard_queue_wait_seconds",
            "Time that a request which was answered waited for its batch.",
            self._waits,
        )
        metrics.add(
            "silvershard_deadline_remaining_seconds",
            "Time that a call with a deadline had left when it came.",
            self._left,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of a call, counted if it is one of the service."""
        handler = await continuation(handler_call_details)
        is_ours = handler_call_details.method.startswith(self._prefix)
        if not is_ours or handler is None or handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._counted(handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _counted(
        self, behaviour: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
    ) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def counted(message: Any, context: grpc.aio.ServicerContext) -> Any:
            began_s = self._clock()
            self._inflight += 1
            left_s = context.time_remaining()
            if left_s is not None:
                self._left.observe(left_s)
            try:
                reply = await behaviour(message, context)
            except asyncio.CancelledError:
                self._ended(message, "CANCELLED")
                raise
            except BaseException:
                self._ended(message, _code_of(context))
                raise
            finally:
                self._inflight -= 1
                self._seconds.observe(self._clock() - began_s)
            self._answered(reply)
            return reply

        return counted

    def _ended(self, message: Any, code: str) -> None:
        """Count the requests of a call that ended without an answer."""
        of_batch = isinstance(message, retrieval_pb2.RetrieveBatchRequest)
        self._requests.add(code, len(message.requests) if of_batch else 1)

    def _answered(self, reply: Any) -> None:
        if isinstance(reply, retrieval_pb2.RetrieveResponse):
            self._served(reply)
            return
        for item in reply.items:
            if item.HasField("response"):
                self._served(item.response)
            else:
                self._requests.add(code_name(item.code))

    def _served(self, response: retrieval_pb2.RetrieveResponse) -> None:
        self._requests.add("OK")
        self._coverage.observe(response.coverage.documents)
        if response.exhausted:
            self._exhausted.add()
        for stage, spent_us in response.timings_us.items():
            if stage == "queue":
                self._waits.observe(spent_us / 1e6)
            elif stage != "total":
                self._stages.observe(spent_us / 1e6, stage)
        for reason in response.coverage.reasons:
            name = retrieval_pb2.DegradeReason.Name(reason)
            self._degraded.add(name.removeprefix("DEGRADE_REASON_"))


def _code_of(context: grpc.aio.ServicerContext) -> str:
    """Return the name of the status that a call was aborted with."""
    code = context.code()
    return str(code.name) if isinstance(code, grpc.StatusCode) else "UNKNOWN"
