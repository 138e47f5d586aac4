"""Traces of requests for an OpenTelemetry collector, chosen once they have ended.

A request that failed, was degraded or took long is always told, of the others a sample, so that
what is looked for is there and the rest costs nothing. The packages of the extra ``otel`` are
imported only where a collector is configured.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.codec import code_name
from silvershard.cluster.config import OtelSection
from silvershard.shard.errors import ConfigError

_SCHEME = "https://"


class RequestTracer(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Tells a collector of the calls of one service, each as one span of kind server.

    A caller's ``traceparent`` is the parent of its span; if the caller samples it, so does this.
    Spans are sent from a thread of their own; where they come faster than the collector takes
    them, those that come last are dropped.
    """

    def __init__(
        self,
        service: str,
        section: OtelSection,
        *,
        exporter: Any = None,
        now_ns: Callable[[], int] = time.time_ns,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Make a tracer.

        Args:
            service: full name of the service; what belongs to others is not told.
            section: where the collector is, and what it is told.
            exporter: an ``opentelemetry.sdk.trace.export.SpanExporter``; None: OTLP over gRPC to
                the endpoint of ``section``.
            now_ns: the time of day in nanoseconds.
            draw: returns a number in [0, 1) per call.

        Raises:
            ConfigError: if the packages of the extra ``otel`` are not installed.
        """
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = exporter or _exporter(section.endpoint)
        except ImportError as error:
            raise ConfigError(
                "observability.otel.endpoint needs `pip install 'silvershard[otel]'`: "
                f"{error.name} is not installed"
            ) from None
        self._service = service
        self._prefix = f"/{service}/"
        self._section = section
        self._now_ns = now_ns
        self._draw = draw
        self._provider = TracerProvider(
            # Whatever comes so far is told.
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": "silvershard"}),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("silvershard")
        self._propagator = TraceContextTextMapPropagator()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of a call, traced if it is one of the service."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if not method.startswith(self._prefix) or handler is None or handler.unary_unary is None:
            return handler
        metadata = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if key in ("traceparent", "tracestate")
        }
        return grpc.unary_unary_rpc_method_handler(
            self._traced(handler.unary_unary, method.removeprefix(self._prefix), metadata),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _traced(
        self,
        behaviour: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]],
        method: str,
        metadata: Mapping[str, str],
    ) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def traced(message: Any, context: grpc.aio.ServicerContext) -> Any:
            began_ns = self._now_ns()
            code, reply = "UNKNOWN", None
            try:
                reply = await behaviour(message, context)
                code = "OK"
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except BaseException:
                told = context.code()
                code = told.name if isinstance(told, grpc.StatusCode) else "UNKNOWN"
                raise
            finally:
                self._ended(method, metadata, began_ns, code, reply)
            return reply

        return traced

    def _ended(
        self, method: str, metadata: Mapping[str, str], began_ns: int, code: str, reply: Any
    ) -> None:
        """Tell of a call that has ended, if it is one to be told."""
        from opentelemetry import trace

        ended_ns = self._now_ns()
        parent = self._propagator.extract(metadata) if metadata else None
        is_wanted = (
            ("error" in self._section.always and _has_failed(code, reply))
            or ("degraded" in self._section.always and _is_degraded(reply))
            or (
                "slow" in self._section.always
                and ended_ns - began_ns >= self._section.slow_ms * 1e6
            )
            or self._draw() < self._section.sample
            or trace.get_current_span(parent).get_span_context().trace_flags.sampled
        )
        if not is_wanted:
            return
        span = self._tracer.start_span(
            f"{self._service}/{method}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": self._service,
                "rpc.method": method,
                "rpc.grpc.status_code": getattr(grpc.StatusCode, code).value[0],
                **_attributes(reply),
            },
            start_time=began_ns,
        )
        if code != "OK":
            span.set_status(trace.Status(trace.StatusCode.ERROR, code))
        span.end(ended_ns)

    def close(self) -> None:
        """Send what is still to be sent, for some seconds at most; blocks."""
        self._provider.shutdown()


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith(_SCHEME))


def _responses(reply: Any) -> list[retrieval_pb2.RetrieveResponse]:
    if isinstance(reply, retrieval_pb2.RetrieveResponse):
        return [reply]
    items = reply.items if isinstance(reply, retrieval_pb2.RetrieveBatchResponse) else ()
    return [item.response for item in items if item.HasField("response")]


def _has_failed(code: str, reply: Any) -> bool:
    if isinstance(reply, retrieval_pb2.RetrieveBatchResponse):
        return any(not item.HasField("response") for item in reply.items)
    return code != "OK"


def _is_degraded(reply: Any) -> bool:
    return any(one.coverage.reasons for one in _responses(reply))


def _attributes(reply: Any) -> dict[str, Any]:
    """Return what a span tells of an answer; of a batch how its requests ended."""
    if isinstance(reply, retrieval_pb2.RetrieveBatchResponse):
        codes = [code_name(item.code) for item in reply.items if not item.HasField("response")]
        return {
            "silvershard.requests": len(reply.items),
            "silvershard.failed": sorted(codes),
            "silvershard.reasons": _reasons(reply),
        }
    if not isinstance(reply, retrieval_pb2.RetrieveResponse):
        return {}
    return {
        "silvershard.request_id": reply.request_id,
        "silvershard.model": reply.version.model,
        "silvershard.generation": reply.version.generation,
        "silvershard.plan": reply.plan,
        "silvershard.results": len(reply.item_ids),
        "silvershard.coverage": reply.coverage.documents,
        "silvershard.reasons": _reasons(reply),
        **{f"silvershard.{stage}_us": spent for stage, spent in sorted(reply.timings_us.items())},
    }


def _reasons(reply: Any) -> list[str]:
    names = {
        retrieval_pb2.DegradeReason.Name(reason).removeprefix("DEGRADE_REASON_")
        for one in _responses(reply)
        for reason in one.coverage.reasons
    }
    return sorted(names)
