import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from silvershard.cluster import Client, ItemDelete, ItemPatch, ItemUpsert, TableRows, retrieval_pb2
from silvershard.cluster.client_retries import SERVICE_CONFIG
from silvershard.cluster.service import RequestRefused
from silvershard.cluster.updates import Update

UNAVAILABLE, CANCELLED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED


class FakeRouter:
    """Fails as often as it is told, and then answers."""

    def __init__(self) -> None:
        self.failures: list[grpc.StatusCode] = []
        self.asked = 0
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4))
        services = {
            "Retrieval": ("Retrieve", retrieval_pb2.RetrieveRequest),
            "Updates": ("Apply", retrieval_pb2.ApplyRequest),
        }
        for service, (method, request) in services.items():
            name = retrieval_pb2.DESCRIPTOR.services_by_name[service].full_name
            handler = grpc.unary_unary_rpc_method_handler(
                self._answer_to(method),
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(name, {method: handler}),)
            )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _answer_to(self, method: str) -> Callable[[Any, Any], Any]:
        def answer(_: Any, context: Any) -> Any:
            with self._lock:
                self.asked += 1
                code = self.failures.pop(0) if self.failures else None
            if code is not None:
                context.abort(code, "it ends")
            if method == "Apply":
                return retrieval_pb2.ApplyResponse()
            return retrieval_pb2.RetrieveResponse(coverage=retrieval_pb2.Coverage(documents=1.0))

        return answer

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    made = FakeRouter()
    yield made
    made.stop()


@pytest.mark.parametrize("code", [UNAVAILABLE, CANCELLED])
def test_a_query_that_an_ending_router_failed_is_asked_again(
    router: FakeRouter, code: grpc.StatusCode
) -> None:
    router.failures = [code, code]
    with Client(router.address) as client:
        assert client.retrieve(k=1).coverage.documents == 1.0
    assert router.asked == 3


def test_what_is_refused_for_good_is_not_asked_again(router: FakeRouter) -> None:
    for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED):
        router.failures, router.asked = [code], 0
        with Client(router.address) as client, pytest.raises(RequestRefused) as refused:
            client.retrieve(k=1)
        assert (refused.value.code, router.asked) == (code.name, 1)


def test_where_much_fails_nothing_is_asked_again(router: FakeRouter) -> None:
    router.failures = [UNAVAILABLE] * 1000
    with Client(router.address) as client:
        for _ in range(100):
            with pytest.raises(RequestRefused):
                client.retrieve(k=1)
    # Half of the tokens were spent on second and third calls, and no more.
    throttling = SERVICE_CONFIG["retryThrottling"]
    assert router.asked <= 100 + throttling["maxTokens"]


TWICE: list[Update] = [
    ItemUpsert(1, version=2),
    ItemPatch(1, version=3),
    ItemDelete(1, version=4),
    TableRows("user", [1], [[0.5]], version=5),
]


@pytest.mark.parametrize("update", TWICE)
def test_updates_that_may_come_twice_are_sent_again_once(
    router: FakeRouter, update: Update
) -> None:
    with Client(router.address) as client:
        router.failures = [CANCELLED]
        client.apply([update])
        assert router.asked == 2
        router.failures, router.asked = [CANCELLED, CANCELLED], 0
        with pytest.raises(RequestRefused):
            client.apply([update])
        assert router.asked == 2


@pytest.mark.parametrize(
    ("updates", "code"),
    [
        ([ItemUpsert(1)], CANCELLED),
        ([ItemUpsert(1, version=2), ItemPatch(1)], CANCELLED),
        ([ItemUpsert(1, version=2, if_version=0)], CANCELLED),
        # It may be logged and late.
        ([ItemUpsert(1, version=2)], UNAVAILABLE),
    ],
)
def test_other_updates_are_sent_once(
    router: FakeRouter, updates: list[Update], code: grpc.StatusCode
) -> None:
    router.failures = [code]
    with Client(router.address) as client, pytest.raises(RequestRefused):
        client.apply(updates)
    assert router.asked == 1
