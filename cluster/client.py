"""The client of a cluster: requests as Python values, answers as columns, refusals as errors.

Shapes: K results.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict, Unpack

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import ArrayLike, NDArray

from silvershard.cluster import retrieval_pb2, retrieval_pb2_grpc
from silvershard.cluster.client_retries import CLIENT_OPTIONS, applied
from silvershard.cluster.codec import (
    RequestRefused,
    code_name,
    counts_from,
    coverage_from,
    refused,
    request_to,
)
from silvershard.cluster.config import MEBIBYTE
from silvershard.cluster.consistency import Consistency, UpdateToken, consistency_to, freshness_from
from silvershard.cluster.degrade_policy import UNDEMANDING, DegradePolicy, policy_to
from silvershard.cluster.dialer import Dialer, client_dialer
from silvershard.cluster.field_columns import column_from
from silvershard.cluster.outcome import Coverage
from silvershard.cluster.service import refused_by
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import (
    ApplyResult,
    Column,
    Durability,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    Scalar,
    Update,
    result_from,
)
from silvershard.model.counts import Counts
from silvershard.model.request import FeatureValues, FilterMode, FilterParam, Request
from silvershard.shard.errors import DeadlineExceeded
from silvershard.shard.fields import FieldValue

_POLL_S = 0.05


@dataclass(frozen=True)
class Query(Request):
    """A request with what concerns only a cluster; the other fields are those of ``Request``."""

    return_task_scores: bool = True
    min_coverage: float | None = None
    """Share of the documents that must answer, 0..1; None leaves it to the router."""
    generation: int | None = None
    """The only generation that may answer; None for the one served."""
    alias: str = ""
    """Which one answers instead, ``live`` or ``canary``; goes with no ``generation``."""
    request_id: str = ""
    """Echoed; generated when empty."""
    after: Sequence[UpdateToken] = ()
    """Only replicas that have applied these updates may answer."""
    degrade: DegradePolicy = UNDEMANDING
    """What may be left out under overload."""
    priority: int = 0
    """The smallest is refused first."""
    tenant: str = ""
    """Whose limits apply."""
    max_staleness_s: float | None = None
    """Only replicas that lag no more behind the update log may answer; None: any."""


class QueryFields(TypedDict, total=False):
    """The fields of a ``Query``, for callers that give them one by one."""

    features: Mapping[str, FeatureValues]
    k: int
    filter: str
    params: Mapping[str, FilterParam]
    exclude_ids: Sequence[int]
    nprobe: int
    ann_k: int
    semantic_k: int | None
    plan: str
    exact: bool
    filter_mode: FilterMode
    task_weights: Mapping[str, float]
    value: str
    return_fields: Sequence[str]
    return_task_scores: bool
    min_coverage: float | None
    generation: int | None
    alias: str
    request_id: str
    after: Sequence[UpdateToken]
    degrade: DegradePolicy
    priority: int
    tenant: str
    max_staleness_s: float | None


class ItemFields(TypedDict, total=False):
    """The fields of an ``ItemPatch``, and of an ``ItemUpsert`` beside those that it adds."""

    attributes: Mapping[str, Column]
    signals: Mapping[str, float]
    fields: Mapping[str, Scalar | None]
    features: Mapping[str, Column]
    version: int
    if_version: int | None


class UpsertFields(ItemFields, total=False):
    """The fields of an ``ItemUpsert``."""

    embedding: ArrayLike | None
    ttl_s: float | None


@dataclass(frozen=True)
class Result:
    """Results best first, without padding."""

    item_ids: NDArray[np.int64]
    """``(K,)``."""
    scores: NDArray[np.float32]
    """``(K,)``, bit for bit those of the model."""
    task_scores: Mapping[str, NDArray[np.float32]]
    """``(K,)`` probability per task."""
    fields: Mapping[str, list[FieldValue]]
    """The columns asked for, K values each; None is a missing value."""
    coverage: Coverage
    model: str
    generation: int
    content_hash: str
    """SHA-256 of what the generation holds; generations of equal content have equal hashes."""
    shard_map_version: int
    plan: str
    """The text that a request may pin."""
    exhausted: bool
    """True when fewer than k eligible items exist."""
    counts: Counts
    timings_us: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    request_id: str = ""
    cut: tuple[UpdateToken, ...] = ()
    """Per log partition, the last update that the slowest answering shard had applied."""
    staleness_s: float | None = None
    """Of the slowest answering shard; None where the generation follows no update log."""

    @property
    def is_partial(self) -> bool:
        """Return True when some documents did not answer."""
        return self.coverage.documents < 1.0


class Client:
    """A connection to one router; a context manager, for any number of threads."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        timeout_s: float = 10.0,
        max_request_bytes: int = 4 * MEBIBYTE,
        token: str = "",
        root_certificates: bytes | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        """Make a client; it connects with the first call.

        Args:
            address: host:port of the router.
            model: logical model name; empty for the one that the router serves.
            timeout_s: time limit of a call that sets none.
            max_request_bytes: largest message that the router accepts.
            token: bearer token to show; empty: none. In plain text only loopback addresses get it.
            root_certificates: PEM of the CAs by which the router is known; None: plain text.
            dialer: reaches the router, instead of ``token`` and ``root_certificates``.
        """
        self.address = address
        self.model = model
        self.timeout_s = timeout_s
        self.max_request_bytes = max_request_bytes
        self._channel = (dialer or client_dialer(token, root_certificates)).channel(
            address, CLIENT_OPTIONS
        )
        self._stub = retrieval_pb2_grpc.RetrievalStub(self._channel)
        self._updates = retrieval_pb2_grpc.UpdatesStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; calls in flight fail. Closing twice is harmless."""
        self._channel.close()

    def retrieve(
        self,
        query: Query | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Unpack[QueryFields],
    ) -> Result:
        """Return the best items for a user.

        Args:
            query: the request; or give its fields instead.
            timeout_s: time limit of this call.
            fields: of ``Query``.

        Raises:
            RequestRefused: with the status of the cluster; ``code`` is UNAVAILABLE as well when
                there is no router at the address.
            ValueError: if the request has no form on the wire, or is too large for it.
        """
        if query is not None and fields:
            raise ValueError(f"give a query or its fields, got both: {', '.join(sorted(fields))}")
        message = self.message(query or Query(**fields))
        self._check_size(message)
        try:
            reply = self._stub.Retrieve(message, timeout=self._timeout_s(timeout_s))
        except grpc.RpcError as error:
            raise refused_by(error) from None
        return _result_of(reply)

    def retrieve_batch(
        self, queries: Sequence[Query], *, timeout_s: float | None = None
    ) -> list[Result | RequestRefused]:
        """Return a result or a refusal per query, in order: they share a call, not their fate.

        Raises:
            RequestRefused: if the call as a whole was refused.
            ValueError: if a request has no form on the wire, or all together are too large for it.
        """
        batch = retrieval_pb2.RetrieveBatchRequest(
            requests=[self.message(query) for query in queries]
        )
        self._check_size(batch)
        try:
            reply = self._stub.RetrieveBatch(batch, timeout=self._timeout_s(timeout_s))
        except grpc.RpcError as error:
            raise refused_by(error) from None
        return [
            refused(code_name(item.code), item.reason, item.details)
            if item.code
            else _result_of(item.response)
            for item in reply.items
        ]

    def apply(
        self,
        updates: Sequence[Update],
        *,
        durability: Durability = Durability.LOGGED,
        timeout_s: float | None = None,
    ) -> ApplyResult:
        """Change items and table rows, and return once what is not rejected is durable.

        Updates of one item are applied in their order. A call that failed for its connection may
        have been logged: with versions of their own it is harmless to send the updates again. This
        does so once where a router that ends has cancelled the call, if all have a ``version`` and
        none an ``if_version``.

        Args:
            updates: at most 10,000.
            durability: what else to wait for.
            timeout_s: time limit of this call.

        Raises:
            RequestRefused: with the status of the cluster, if all of them are refused; with
                ``logged`` set if they are durable, but not applied in time.
            ValueError: if an update has no form on the wire, or all are too large for it.
        """
        message = self._apply_message(updates, durability)
        limit_s = self._timeout_s(timeout_s)
        try:
            reply = applied(lambda: self._updates.Apply(message, timeout=limit_s), updates)
        except grpc.RpcError as error:
            raise refused_by(error) from None
        return result_from(reply)

    def apply_stream(
        self,
        batches: Iterable[Sequence[Update]],
        *,
        durability: Durability = Durability.LOGGED,
        timeout_s: float | None = None,
    ) -> Iterator[ApplyResult]:
        """Yield what became of every batch, in order, while later ones are on their way.

        A batch that cannot be accepted is rejected update by update, and the stream goes on.

        Args:
            batches: read on a thread of its own, as fast as the cluster takes them.
            durability: what else to wait for.
            timeout_s: time limit of the whole stream; None: none.

        Raises:
            RequestRefused: if the stream broke off; what was not answered may be logged or not.
            ValueError: if an update has no form on the wire.
        """
        failed: list[ValueError] = []

        def messages() -> Iterator[retrieval_pb2.ApplyRequest]:
            try:
                for batch in batches:
                    yield self._apply_message(batch, durability)
            except ValueError as error:
                failed.append(error)

        replies = self._updates.StreamUpdates(messages(), timeout=timeout_s)
        try:
            for reply in replies:
                yield result_from(reply)
        except grpc.RpcError as error:
            raise refused_by(error) from None
        finally:
            replies.cancel()
        if failed:
            raise failed[0]

    def upsert(
        self, item_id: int, *, timeout_s: float | None = None, **fields: Unpack[UpsertFields]
    ) -> tuple[UpdateToken, ...]:
        """Write a whole item and return the tokens that a query takes to read it.

        Args:
            item_id: of the item.
            timeout_s: time limit of this call.
            fields: of ``ItemUpsert``; what is not given becomes empty, null or zero.

        Raises:
            RequestRefused: if it is rejected, or the call was refused.
            ValueError: if it has no form on the wire.
        """
        return self._apply_one(ItemUpsert(item_id, **fields), timeout_s)

    def patch(
        self, item_id: int, *, timeout_s: float | None = None, **fields: Unpack[ItemFields]
    ) -> tuple[UpdateToken, ...]:
        """Change some columns of an item and return the tokens that a query takes to read them.

        Args:
            item_id: of the item.
            timeout_s: time limit of this call.
            fields: of ``ItemPatch``; what is not given stays as it is.

        Raises:
            RequestRefused: if it is rejected, or the call was refused.
            ValueError: if it has no form on the wire.
        """
        return self._apply_one(ItemPatch(item_id, **fields), timeout_s)

    def delete(
        self,
        item_id: int,
        *,
        urgent: bool = False,
        version: int = 0,
        if_version: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[UpdateToken, ...]:
        """Delete an item and return the tokens that a query takes to see that.

        Args:
            item_id: of the item.
            urgent: whether it goes ahead of everything else that waits.
            version: of the delete; 0: the next one.
            if_version: the version that the item must have now.
            timeout_s: time limit of this call.

        Raises:
            RequestRefused: if it is rejected, or the call was refused.
        """
        return self._apply_one(ItemDelete(item_id, urgent, version, if_version), timeout_s)

    def _apply_one(self, update: Update, timeout_s: float | None) -> tuple[UpdateToken, ...]:
        result = self.apply([update], timeout_s=timeout_s)
        for one in result.rejected:
            raise RequestRefused(one.code, one.reason, reason="UPDATE_REJECTED")
        return result.tokens

    def _apply_message(
        self, updates: Sequence[Update], durability: Durability
    ) -> retrieval_pb2.ApplyRequest:
        message = retrieval_pb2.ApplyRequest(
            model=self.model,
            mutations=[mutation_to(update) for update in updates],
            durability=retrieval_pb2.Durability.Name(durability.value),
        )
        self._check_size(message)
        return message

    def is_ready(self, *, timeout_s: float = 1.0) -> bool:
        """Return True when the router has reached every shard since it started."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            asked = health_pb2.HealthCheckRequest()
            reply = stub.Check(asked, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Return as soon as the router is ready.

        Raises:
            DeadlineExceeded: if it is not within ``timeout_s``.
        """
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self.is_ready(timeout_s=min(left_s, 1.0)):
                return
            time.sleep(min(_POLL_S, max(until_s - time.monotonic(), 0.0)))
        raise DeadlineExceeded(
            f"the router at {self.address} was not ready within {timeout_s:.1f} s"
        )

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    def message(self, query: Query) -> retrieval_pb2.RetrieveRequest:
        """Return a request as it goes over the wire.

        Raises:
            ValueError: if it has no form there.
        """
        message = request_to(query)
        message.model = self.model
        message.request_id = query.request_id
        message.return_task_scores = query.return_task_scores
        if query.min_coverage is not None:
            message.min_coverage = query.min_coverage
        if query.alias and query.generation is not None:
            raise ValueError("alias: must not be given beside a generation")
        if query.generation is not None:
            message.generation = query.generation
        elif query.alias:
            message.alias = query.alias
        message.priority, message.tenant = query.priority, query.tenant
        if query.degrade != UNDEMANDING:
            message.degrade.CopyFrom(policy_to(query.degrade))
        if query.after or query.max_staleness_s is not None:
            demand = Consistency(tuple(query.after), query.max_staleness_s)
            message.consistency.CopyFrom(consistency_to(demand))
        return message

    def _check_size(self, message: Message) -> None:
        size = message.ByteSize()
        if size > self.max_request_bytes:
            raise ValueError(
                f"the message must be at most {self.max_request_bytes} bytes, got {size}: "
                "exclude fewer ids, or send fewer requests or updates at once"
            )


def _result_of(reply: retrieval_pb2.RetrieveResponse) -> Result:
    freshness = freshness_from(reply.version)
    return Result(
        item_ids=np.array(reply.item_ids, dtype=np.int64),
        scores=np.array(reply.scores, dtype=np.float32),
        task_scores={
            name: np.array(column.values, dtype=np.float32)
            for name, column in reply.task_scores.items()
        },
        fields={name: column_from(column) for name, column in reply.fields.items()},
        coverage=coverage_from(reply.coverage),
        model=reply.version.model,
        generation=reply.version.generation,
        content_hash=reply.version.content_hash,
        shard_map_version=reply.version.shard_map_version,
        plan=reply.plan,
        exhausted=reply.exhausted,
        counts=counts_from(reply.counts),
        timings_us=dict(reply.timings_us),
        warnings=tuple(reply.warnings),
        request_id=reply.request_id,
        cut=freshness.cut if freshness else (),
        staleness_s=freshness.staleness_s if freshness else None,
    )
