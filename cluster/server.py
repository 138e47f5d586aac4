"""The public gRPC service of a router: it checks what a request addresses, and states its fate."""

import asyncio
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grpc
import grpc.aio

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.batcher import Batcher
from silvershard.cluster.codec import Refusal, request_from
from silvershard.cluster.config import QuerySection
from silvershard.cluster.consistency import ANY, consistency_from, stamp
from silvershard.cluster.coordinator import Coordinator, Query
from silvershard.cluster.degrade_policy import policy_from
from silvershard.cluster.recall_audit import Run
from silvershard.cluster.response import expected_recall, response_of
from silvershard.cluster.rounds import Fate, Served
from silvershard.cluster.security import tenant_of
from silvershard.cluster.service import Malformed, abort, logged_status, parser, serialize
from silvershard.cluster.shard_map import LIVE
from silvershard.model.recall_calibration import RecallCalibration
from silvershard.model.request import RequestError
from silvershard.shard.errors import Overloaded, RetrievalError

SERVICE = "silvershard.v1.Retrieval"


class Serving(NamedTuple):
    """One generation, as a router serves it at a moment."""

    coordinator: Coordinator
    content_hash: str
    """Of the generation."""
    map_version: int
    calibration: RecallCalibration | None = None
    """What its plans find of exact answers; None: nobody knows."""


class Offer(NamedTuple):
    """All generations that a router serves at a moment."""

    live: int
    """The one that answers whoever names none."""
    generations: Mapping[int, Serving]
    aliases: Mapping[str, int]
    """Names of generations beside ``live``."""

    def find(self, message: retrieval_pb2.RetrieveRequest) -> Serving:
        """Return the generation that a request addresses.

        Raises:
            Refusal: if it addresses what is not served.
        """
        version, wanted = message.WhichOneof("version"), self.live
        if version == "alias" and message.alias not in ("", LIVE):
            if message.alias not in self.aliases:
                known = " and ".join(repr(name) for name in sorted({LIVE, *self.aliases}))
                raise Refusal(
                    "NOT_FOUND",
                    f"no alias {message.alias[:80]!r}; there is {known}",
                    "ALIAS_NOT_FOUND",
                )
            wanted = self.aliases[message.alias]
        elif version == "generation":
            wanted = message.generation
        serving = self.generations.get(wanted)
        if serving is None:
            served = ", ".join(str(one) for one in sorted(self.generations))
            raise Refusal(
                "ABORTED",
                f"generation {wanted} is not served; {served} is",
                "GENERATION_NOT_SERVED",
            )
        model = serving.coordinator.spec.model
        if message.model and message.model != model:
            raise Refusal(
                "NOT_FOUND",
                f"no model {message.model[:80]!r}; this router serves {model!r}",
                "MODEL_NOT_FOUND",
            )
        return serving


class RetrievalService:
    """``silvershard.v1.Retrieval`` on top of a batcher."""

    def __init__(
        self,
        offer: Callable[[], Offer | None],
        batcher: Batcher,
        query: QuerySection,
        clock: Callable[[], float],
        *,
        served: Callable[[Query, Served, Run, int], None] | None = None,
    ) -> None:
        """Make the service.

        Args:
            offer: what is served now; None before the first shard map.
            batcher: runs the requests.
            query: limits and defaults.
            clock: must be the clock of the event loop.
            served: hears of every answer, with what answers over the same generation and its
                number of clusters.
        """
        self._offer = offer
        self._batcher = batcher
        self._query = query
        self._clock = clock
        self._served = served

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server that is not started yet."""
        methods = {
            "Retrieve": (self._retrieve, retrieval_pb2.RetrieveRequest),
            "RetrieveBatch": (self._retrieve_batch, retrieval_pb2.RetrieveBatchRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=parser(kind),
                response_serializer=serialize,
            )
            for name, (behaviour, kind) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _retrieve(
        self,
        message: retrieval_pb2.RetrieveRequest | Malformed,
        context: grpc.aio.ServicerContext,
    ) -> retrieval_pb2.RetrieveResponse:
        try:
            if isinstance(message, Malformed):
                raise RequestError("message", message.message)
            (fate,) = await self._fates([message], context)
            if isinstance(fate, retrieval_pb2.RetrieveResponse):
                return fate
            raise fate
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await abort(context, error)

    async def _retrieve_batch(
        self,
        message: retrieval_pb2.RetrieveBatchRequest | Malformed,
        context: grpc.aio.ServicerContext,
    ) -> retrieval_pb2.RetrieveBatchResponse:
        try:
            if isinstance(message, Malformed):
                raise RequestError("message", message.message)
            if len(message.requests) > self._batcher.capacity:
                raise RequestError(
                    "requests",
                    f"at most {self._batcher.capacity}, which the queue of the router holds, "
                    f"got {len(message.requests)}",
                )
            reply = retrieval_pb2.RetrieveBatchResponse()
            for fate in await self._fates(message.requests, context):
                if isinstance(fate, retrieval_pb2.RetrieveResponse):
                    reply.items.add(response=fate)
                else:
                    status = logged_status(fate)
                    reply.items.add(code=status.code, reason=status.message, details=status.details)
            return reply
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a process border; what is a bug is logged
            await abort(context, error)

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
        offer = self._offer()
        if offer is None:
            raise Refusal("UNAVAILABLE", "the router has no shard map yet", "NOT_READY")
        fates: dict[int, retrieval_pb2.RetrieveResponse | Exception] = {}
        # A generation that goes out of service meanwhile still answers those that it was asked.
        asked: dict[int, list[tuple[int, Query]]] = {}
        for at, message in enumerate(messages):
            try:
                serving = offer.find(message)
                query = self._query_of(message, arrived_s, deadline_s)
                asked.setdefault(serving.coordinator.spec.generation, []).append((at, query))
            except (RequestError, RetrievalError) as error:
                fates[at] = error
        works = [
            self._batcher.submit(
                [query for _, query in queries], offer.generations[number].coordinator.answer
            )
            for number, queries in asked.items()
        ]
        answered: Sequence[list[Fate] | BaseException]
        if len(works) == 1:
            answered = [await works[0]]
        else:
            answered = await asyncio.gather(*works, return_exceptions=True)
        for (number, queries), found in zip(asked.items(), answered, strict=True):
            if isinstance(found, BaseException):
                # Nothing was executed of what the queue had no room for.
                if not isinstance(found, Overloaded):
                    raise found
                found = [found] * len(queries)
            coordinator = offer.generations[number].coordinator
            for (at, query), fate in zip(queries, found, strict=True):
                if self._served is not None and isinstance(fate, Served):
                    self._served(query, fate, coordinator.answer, coordinator.spec.num_clusters)
                fates[at] = self._response(fate, messages[at], offer.generations[number])
        return [fates[at] for at in range(len(messages))]

    def _time_limit_s(self, remaining_s: float | None) -> float:
        if remaining_s is None:
            return self._query.default_deadline_ms / 1e3
        return min(remaining_s, self._query.deadline_max_ms / 1e3)

    def _query_of(
        self, message: retrieval_pb2.RetrieveRequest, arrived_s: float, deadline_s: float
    ) -> Query:
        """Return a request with its objective.

        Raises:
            RequestError: naming the field.
            Refusal: if the token of the call is of another tenant.
        """
        min_coverage = self._query.min_coverage
        if message.HasField("min_coverage"):
            min_coverage = message.min_coverage
            if math.isnan(min_coverage) or not 0 <= min_coverage <= 1:
                raise RequestError("min_coverage", f"must be in 0..1, got {min_coverage}")
        consistency = ANY
        if message.HasField("consistency"):
            consistency = consistency_from(message.consistency)
        return Query(
            request_from(message),
            min_coverage,
            deadline_s,
            arrived_s,
            consistency,
            message.priority,
            tenant_of(message.tenant),
            policy_from(message.degrade),
            message.return_task_scores,
        )

    def _response(
        self, fate: Fate, message: retrieval_pb2.RetrieveRequest, serving: Serving
    ) -> retrieval_pb2.RetrieveResponse | Exception:
        if not isinstance(fate, Served):
            return fate
        spec = serving.coordinator.spec
        response = response_of(fate, spec.item_schema, task_scores=message.return_task_scores)
        expected = expected_recall(serving.calibration, fate, message)
        if expected is not None:
            response.coverage.expected_recall = expected
        response.request_id = message.request_id or uuid.uuid4().hex
        response.version.model = spec.model
        response.version.generation = spec.generation
        response.version.content_hash = serving.content_hash
        response.version.shard_map_version = serving.map_version
        if fate.freshness is not None:
            stamp(response.version, fate.freshness)
        return response
