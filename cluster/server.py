"""The public gRPC service of a router: it checks what a request addresses, and states its fate."""

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.batcher import Batcher
from silvershard.cluster.codec import Refusal, request_from, status_of, status_row
from silvershard.cluster.config import QuerySection
from silvershard.cluster.coordinator import Coordinator, Query
from silvershard.cluster.response import response_of
from silvershard.cluster.rounds import Fate, Served
from silvershard.model.request import RequestError
from silvershard.shard.errors import RetrievalError

SERVICE = "silvershard.v1.Retrieval"
LIVE = "live"

_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"

_log = logging.getLogger(__name__)

_CODES = {code.value[0]: code for code in grpc.StatusCode}

M = TypeVar("M", bound=Message)


class Serving(NamedTuple):
    """What a router serves at a moment."""

    coordinator: Coordinator
    content_hash: str
    """Of the generation."""
    map_version: int


class _Malformed(NamedTuple):
    """A message that is not of its type."""

    message: str


class RetrievalService:
    """``silvershard.v1.Retrieval`` on top of a batcher."""

    def __init__(
        self,
        serving: Callable[[], Serving | None],
        batcher: Batcher,
        query: QuerySection,
        clock: Callable[[], float],
    ) -> None:
        """Make the service.

        Args:
            serving: what is served now; None before the first shard map.
            batcher: runs the requests.
            query: limits and defaults.
            clock: must be the clock of the event loop.
        """
        self._serving = serving
        self._batcher = batcher
        self._query = query
        self._clock = clock

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server that is not started yet."""
        methods = {
            "Retrieve": (self._retrieve, retrieval_pb2.RetrieveRequest),
            "RetrieveBatch": (self._retrieve_batch, retrieval_pb2.RetrieveBatchRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=_parser(kind),
                response_serializer=_serialize,
            )
            for name, (behaviour, kind) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _retrieve(
        self,
        message: retrieval_pb2.RetrieveRequest | _Malformed,
        context: grpc.aio.ServicerContext,
    ) -> retrieval_pb2.RetrieveResponse:
        try:
            if isinstance(message, _Malformed):
                raise RequestError("message", message.message)
            (fate,) = await self._fates([message], context)
            if isinstance(fate, retrieval_pb2.RetrieveResponse):
                return fate
            raise fate
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await _abort(context, error)

    async def _retrieve_batch(
        self,
        message: retrieval_pb2.RetrieveBatchRequest | _Malformed,
        context: grpc.aio.ServicerContext,
    ) -> retrieval_pb2.RetrieveBatchResponse:
        try:
            if isinstance(message, _Malformed):
                raise RequestError("message", message.message)
            if len(message.requests) > self._query.queue:
                raise RequestError(
                    "requests",
                    f"at most {self._query.queue}, which the queue of the router holds, "
                    f"got {len(message.requests)}",
                )
            reply = retrieval_pb2.RetrieveBatchResponse()
            for fate in await self._fates(message.requests, context):
                if isinstance(fate, retrieval_pb2.RetrieveResponse):
                    reply.items.add(response=fate)
                else:
                    status = _logged_status(fate)
                    reply.items.add(code=status.code, reason=status.message, details=status.details)
            return reply
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await _abort(context, error)

    async def _fates(
        self,
        messages: Sequence[retrieval_pb2.RetrieveRequest],
        context: grpc.aio.ServicerContext,
    ) -> list[retrieval_pb2.RetrieveResponse | Exception]:
        """Return a response or an error per request.

        Raises:
            Refusal: if nothing is served yet.
            Overloaded: if the queue has no room for all of them.
        """
        arrived_s = self._clock()
        deadline_s = arrived_s + self._time_limit_s(context.time_remaining())
        serving = self._serving()
        if serving is None:
            raise Refusal("UNAVAILABLE", "the router has no shard map yet", "NOT_READY")
        checked: list[Query | Exception] = []
        for message in messages:
            try:
                checked.append(self._query_of(message, serving, arrived_s, deadline_s))
            except (RequestError, RetrievalError) as error:
                checked.append(error)
        queries = [one for one in checked if isinstance(one, Query)]
        answered = iter(
            await self._batcher.submit(queries, serving.coordinator.answer) if queries else ()
        )
        return [
            self._response(next(answered), message, serving) if isinstance(one, Query) else one
            for one, message in zip(checked, messages, strict=True)
        ]

    def _time_limit_s(self, remaining_s: float | None) -> float:
        if remaining_s is None:
            return self._query.default_deadline_ms / 1e3
        return min(remaining_s, self._query.deadline_max_ms / 1e3)

    def _query_of(
        self,
        message: retrieval_pb2.RetrieveRequest,
        serving: Serving,
        arrived_s: float,
        deadline_s: float,
    ) -> Query:
        """Return a request with its objective.

        Raises:
            Refusal: if it addresses what is not served.
            RequestError: naming the field.
        """
        spec = serving.coordinator.spec
        if message.model and message.model != spec.model:
            raise Refusal(
                "NOT_FOUND",
                f"no model {message.model[:80]!r}; this router serves {spec.model!r}",
                "MODEL_NOT_FOUND",
            )
        version = message.WhichOneof("version")
        if version == "alias" and message.alias not in ("", LIVE):
            raise Refusal(
                "NOT_FOUND",
                f"no alias {message.alias[:80]!r}; there is {LIVE!r}",
                "ALIAS_NOT_FOUND",
            )
        if version == "generation" and message.generation != spec.generation:
            raise Refusal(
                "ABORTED",
                f"generation {message.generation} is not served; {spec.generation} is",
                "GENERATION_NOT_SERVED",
            )
        min_coverage = self._query.min_coverage
        if message.HasField("min_coverage"):
            min_coverage = message.min_coverage
            if math.isnan(min_coverage) or not 0 <= min_coverage <= 1:
                raise RequestError("min_coverage", f"must be in 0..1, got {min_coverage}")
        return Query(request_from(message), min_coverage, deadline_s, arrived_s)

    def _response(
        self, fate: Fate, message: retrieval_pb2.RetrieveRequest, serving: Serving
    ) -> retrieval_pb2.RetrieveResponse | Exception:
        if not isinstance(fate, Served):
            return fate
        spec = serving.coordinator.spec
        response = response_of(fate, spec.item_schema, task_scores=message.return_task_scores)
        response.request_id = message.request_id or uuid.uuid4().hex
        response.version.model = spec.model
        response.version.generation = spec.generation
        response.version.content_hash = serving.content_hash
        response.version.shard_map_version = serving.map_version
        return response


def _parser(kind: type[M]) -> Callable[[bytes], M | _Malformed]:
    """Return a parser that tells malformed bytes apart from bugs."""

    def parse(data: bytes) -> M | _Malformed:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return _Malformed(f"must be a {kind.DESCRIPTOR.full_name}")
        return message

    return parse


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _logged_status(error: Exception) -> status_pb2.Status:
    """Return the status of an error; a bug is logged under the id that its status carries."""
    row = status_row(error)
    if row is not None and row.code != "INTERNAL":
        return status_of(error)
    error_id = uuid.uuid4().hex[:12]
    _log.error("internal error %s", error_id, exc_info=error)
    return status_of(error, error_id)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    status = _logged_status(error)
    trailing: list[tuple[str, str | bytes]] = [(_DETAILS, status.SerializeToString())]
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            delay_ms = math.ceil(retry.retry_delay.ToNanoseconds() / 1e6)
            trailing.append((_PUSHBACK, str(delay_ms)))
    await context.abort(_CODES[status.code], status.message, tuple(trailing))
    raise AssertionError("abort always raises")
