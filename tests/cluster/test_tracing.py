import asyncio
import builtins
import queue
from collections.abc import Callable, Coroutine, Iterator
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.config import OtelSection
from silvershard.cluster.tracing import RequestTracer
from silvershard.shard.errors import ConfigError

Response = retrieval_pb2.RetrieveResponse
Behaviour = Callable[[Any, Any], Coroutine[Any, Any, Any]]
ERROR = retrieval_pb2.DegradeReason.DEGRADE_REASON_SHARD_UNAVAILABLE
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"


class Traced:
    """A tracer around one method, whose calls take ``takes_ms``."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.now_ns = 10**18
        self.takes_ms = 1
        self.drawn = 0.5
        section = OtelSection(endpoint="http://nowhere:4317", **{"sample": 0.0, **options})
        self.tracer = RequestTracer(
            "x.Retrieval",
            section,
            exporter=self.exporter,
            now_ns=lambda: self.now_ns,
            draw=lambda: self.drawn,
        )

    def call(
        self,
        behaviour: Behaviour,
        *,
        code: grpc.StatusCode | None = None,
        method: str = "/x.Retrieval/Retrieve",
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        async def slowly(message: Any, context: Any) -> Any:
            self.now_ns += self.takes_ms * 10**6
            return await behaviour(message, context)

        async def called() -> Any:
            handler = grpc.unary_unary_rpc_method_handler(slowly)

            async def continuation(_: Any) -> Any:
                return handler

            details = SimpleNamespace(method=method, invocation_metadata=metadata)
            found = await self.tracer.intercept_service(continuation, details)
            return await found.unary_unary(None, SimpleNamespace(code=lambda: code))

        return asyncio.run(called())

    def spans(self) -> list[ReadableSpan]:
        self.tracer.close()
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traced() -> Iterator[Traced]:
    one = Traced()
    yield one
    one.tracer.close()


def answers(reply: Any) -> Behaviour:
    async def behaviour(message: Any, context: Any) -> Any:
        return reply

    return behaviour


def fails(error: BaseException) -> Behaviour:
    async def behaviour(message: Any, context: Any) -> Any:
        raise error

    return behaviour


def degraded() -> Any:
    reply = Response(request_id="r-1", plan="probe(probes=2,ann_k=3)", item_ids=[5, 6])
    reply.coverage.documents = 0.5
    reply.coverage.reasons.append(ERROR)
    reply.version.generation = 7
    reply.timings_us["encode"] = 123
    return reply


def test_an_ordinary_request_is_not_told(traced: Traced) -> None:
    reply = Response(request_id="kept")
    assert traced.call(answers(reply)) is reply
    assert not traced.spans()


def test_a_degraded_answer_is_told_with_what_it_says(traced: Traced) -> None:
    traced.call(answers(degraded()))
    (span,) = traced.spans()
    assert span.name == "x.Retrieval/Retrieve"
    assert span.kind.name == "SERVER"
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "x.Retrieval",
        "rpc.method": "Retrieve",
        "rpc.grpc.status_code": 0,
        "silvershard.request_id": "r-1",
        "silvershard.model": "",
        "silvershard.generation": 7,
        "silvershard.plan": "probe(probes=2,ann_k=3)",
        "silvershard.results": 2,
        "silvershard.coverage": 0.5,
        "silvershard.reasons": ("SHARD_UNAVAILABLE",),
        "silvershard.encode_us": 123,
    }
    assert span.resource.attributes["service.name"] == "silvershard"
    assert (span.end_time or 0) - (span.start_time or 0) == 10**6


def test_a_request_that_failed_is_told_with_its_status(traced: Traced) -> None:
    with pytest.raises(RuntimeError):
        traced.call(fails(RuntimeError("aborted")), code=grpc.StatusCode.UNAVAILABLE)
    (span,) = traced.spans()
    assert (span.attributes or {})["rpc.grpc.status_code"] == 14
    assert span.status.status_code.name == "ERROR"
    assert span.status.description == "UNAVAILABLE"


def test_a_cancelled_request_is_told_as_such(traced: Traced) -> None:
    with pytest.raises(asyncio.CancelledError):
        traced.call(fails(asyncio.CancelledError()))
    (span,) = traced.spans()
    assert span.status.description == "CANCELLED"


@pytest.mark.parametrize(("takes_ms", "told"), [(99, 0), (100, 1)])
def test_a_slow_request_is_told(traced: Traced, takes_ms: int, told: int) -> None:
    traced.takes_ms = takes_ms
    traced.call(answers(Response()))
    assert len(traced.spans()) == told


@pytest.mark.parametrize(("drawn", "told"), [(0.09, 1), (0.1, 0)])
def test_a_sample_of_the_others_is_told(drawn: float, told: int) -> None:
    traced = Traced(sample=0.1)
    traced.drawn = drawn
    traced.call(answers(Response()))
    assert len(traced.spans()) == told


def test_only_what_shall_always_be_told_is(traced: Traced) -> None:
    traced = Traced(always=("slow",))
    traced.call(answers(degraded()))
    with pytest.raises(RuntimeError):
        traced.call(fails(RuntimeError()))
    assert not traced.spans()


@pytest.mark.parametrize(("flags", "told"), [("01", 1), ("00", 0)])
def test_what_the_caller_samples_is_told_below_its_span(
    traced: Traced, flags: str, told: int
) -> None:
    metadata = (("traceparent", PARENT.format(flags)), ("authorization", "Bearer secret"))
    traced.call(answers(Response()), metadata=metadata)
    spans = traced.spans()
    assert len(spans) == told
    for span in spans:
        assert span.parent is not None
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
        assert "secret" not in span.to_json()


def test_a_caller_that_does_not_sample_is_the_parent_of_what_is_told_anyway(
    traced: Traced,
) -> None:
    traced.call(answers(degraded()), metadata=(("traceparent", PARENT.format("00")),))
    (span,) = traced.spans()
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", "ff" * 500])
def test_a_damaged_header_is_no_parent(traced: Traced, header: str) -> None:
    traced.call(answers(degraded()), metadata=(("traceparent", header),))
    (span,) = traced.spans()
    assert span.parent is None


def test_a_batch_is_told_when_one_of_its_requests_failed(traced: Traced) -> None:
    reply = retrieval_pb2.RetrieveBatchResponse()
    reply.items.add(response=degraded())
    traced_alone = Traced(always=("error",))
    traced_alone.call(answers(reply), method="/x.Retrieval/RetrieveBatch")
    assert not traced_alone.spans()
    reply.items.add(code=8, reason="full")
    traced.call(answers(reply), method="/x.Retrieval/RetrieveBatch")
    (span,) = traced.spans()
    attributes = span.attributes or {}
    assert attributes["silvershard.requests"] == 2
    assert attributes["silvershard.failed"] == ("RESOURCE_EXHAUSTED",)
    assert attributes["silvershard.reasons"] == ("SHARD_UNAVAILABLE",)


def test_calls_of_other_services_are_not_told(traced: Traced) -> None:
    traced.call(answers(degraded()), method="/grpc.health.v1.Health/Check")
    assert not traced.spans()


def test_a_collector_is_told_over_grpc() -> None:
    received: queue.Queue[Any] = queue.Queue()

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.put(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        one = Traced()
        section = OtelSection(endpoint=f"http://127.0.0.1:{port}", sample=1.0)
        one.tracer = RequestTracer("x.Retrieval", section)
        one.call(answers(Response(request_id="r-9")))
        one.tracer.close()
        request = received.get(timeout=30)
    finally:
        server.stop(None).wait()
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert span.name == "x.Retrieval/Retrieve"
    assert {one.key: one.value.string_value for one in span.attributes}[
        "silvershard.request_id"
    ] == "r-9"


def test_without_the_packages_the_error_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError(name="opentelemetry.exporter")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"silvershard\[otel\].*opentelemetry.exporter is not"):
        RequestTracer("x.Retrieval", OtelSection(endpoint="http://127.0.0.1:1"))


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://x:1", "http://", "http://a/b"])
def test_an_endpoint_is_a_url_without_a_path(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        OtelSection(endpoint=endpoint)
