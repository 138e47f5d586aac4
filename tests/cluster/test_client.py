import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

import silvershard.cluster
from silvershard.cluster.client import Client, Query, QueryFields, RequestRefused, Result
from silvershard.cluster.consistency import Consistency, UpdateToken, consistency_from
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.outcome import Coverage
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import SequencerServer
from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.cluster.update_service import UpdateService
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert
from silvershard.model.request import FilterMode, Request, WeightedIds
from silvershard.shard.errors import DeadlineExceeded, RemoteError


@pytest.fixture
def cluster(make_cluster: Any) -> Any:
    return make_cluster(2)


@pytest.fixture
def client(cluster: Any) -> Iterator[Client]:
    with cluster.client(model="films", timeout_s=20) as client:
        client.wait_until_ready(10)
        yield client


def test_the_client_is_what_the_package_offers() -> None:
    assert silvershard.cluster.Client is Client
    assert silvershard.cluster.Result is Result


def test_every_kind_of_request_gets_the_answer_of_one_process_bit_for_bit(
    client: Client, generation: Any, request_maker: Any, as_query: Any, ask_whole: Any
) -> None:
    requests = request_maker(generation, 40, seed=31)
    batch = client.retrieve_batch([as_query(one) for one in requests])
    for one, in_batch in zip(requests, batch, strict=True):
        answer = ask_whole(one)
        for result in (client.retrieve(as_query(one)), in_batch):
            assert isinstance(result, Result)
            assert result.item_ids.dtype == np.int64
            assert result.item_ids.tolist() == answer.item_ids.tolist()
            assert result.scores.dtype == np.float32
            assert result.scores.tobytes() == answer.scores.numpy().tobytes()
            assert set(result.task_scores) == {"rated", "liked"}
            for task, scores in answer.task_scores.items():
                assert result.task_scores[task].tobytes() == scores.numpy().tobytes()
            assert result.plan == str(answer.plan)
            assert result.exhausted == answer.exhausted
            assert result.counts == answer.counts
            assert result.warnings == answer.warnings


def test_all_fields_of_a_result_are_filled(client: Client) -> None:
    result = client.retrieve(
        features={"history": [1, 2]},
        k=5,
        filter="year > $y",
        params={"y": 1980},
        return_fields=["title", "year"],
        request_id="mine",
    )
    assert len(result.item_ids) == len(result.scores) == 5
    assert all(title.startswith("Film ") for title in result.fields["title"])
    assert all(year > 1950 for year in result.fields["year"])
    assert result.coverage == Coverage(1.0, 2, 2, 0)
    assert not result.is_partial
    assert (result.model, result.generation, result.shard_map_version) == ("films", 1, 1)
    assert len(result.content_hash) == 64
    assert result.request_id == "mine"
    assert result.counts.addressed == 600
    assert {"queue", "tower", "filter", "ann", "rerank", "value", "merge", "network"} <= set(
        result.timings_us
    )
    assert result.timings_us["total"] > 0
    assert result.warnings


def test_a_float_parameter_is_compared_exactly(
    client: Client, generation: Any, ask_whole: Any
) -> None:
    prices = generation.catalogue.numbers["price"]
    price = float(prices[np.isfinite(prices)][0])
    assert price != float(np.float32(price))
    wanted = Request(k=600, filter="price = $p", params={"p": price}, exact=True)
    answer = ask_whole(wanted)
    assert len(answer.item_ids) > 0
    result = client.retrieve(k=600, filter="price = $p", params={"p": price}, exact=True)
    assert result.item_ids.tolist() == answer.item_ids.tolist()


def test_weights_of_a_history_reach_the_tower(
    client: Client, generation: Any, ask_whole: Any, as_query: Any
) -> None:
    ids = generation.catalogue.item_ids[:6].tolist()
    weighted = Request(features={"history": WeightedIds(ids, [3, -1, 0.5, 0, 1, 2])}, k=20)
    result, answer = client.retrieve(as_query(weighted)), ask_whole(weighted)
    assert result.item_ids.tolist() == answer.item_ids.tolist()
    assert result.scores.tobytes() == answer.scores.numpy().tobytes()
    plain = client.retrieve(features={"history": ids}, k=20)
    assert plain.scores.tobytes() != result.scores.tobytes()
    with pytest.raises(RequestRefused) as raised:
        client.retrieve(features={"history": WeightedIds(ids[:2], [1.0, float("nan")])})
    assert raised.value.code == "INVALID_ARGUMENT"
    assert raised.value.violations == (
        ("features.history", "weight 1 must be a finite float32, got float nan"),
    )


def test_a_plan_of_an_answer_can_be_pinned(client: Client) -> None:
    first = client.retrieve(k=5, filter="year > 2010")
    again = client.retrieve(k=5, filter="year > 2010", plan=first.plan)
    assert again.plan == first.plan
    assert again.item_ids.tolist() == first.item_ids.tolist()


def test_a_generation_can_be_pinned(client: Client) -> None:
    assert client.retrieve(k=1, generation=1).generation == 1
    with pytest.raises(RequestRefused) as raised:
        client.retrieve(k=1, generation=9)
    assert raised.value.code == "ABORTED"
    assert raised.value.reason == "GENERATION_NOT_SERVED"


def test_an_alias_names_the_generation_that_answers(client: Client) -> None:
    assert client.retrieve(k=1, alias="live").generation == 1
    with pytest.raises(RequestRefused, match="no alias 'canary'") as raised:
        client.retrieve(k=1, alias="canary")
    assert raised.value.code == "NOT_FOUND"
    with pytest.raises(ValueError, match="alias: must not be given beside a generation"):
        client.retrieve(k=1, alias="live", generation=1)


def test_the_model_of_the_client_goes_with_every_request(cluster: Any) -> None:
    with cluster.client(model="songs") as client:
        with pytest.raises(RequestRefused) as raised:
            client.retrieve(k=1)
        assert raised.value.code == "NOT_FOUND"
        (refused,) = client.retrieve_batch([Query(k=1)])
        assert isinstance(refused, RequestRefused)
        assert refused.reason == "MODEL_NOT_FOUND"


def test_a_refusal_carries_its_fields(client: Client) -> None:
    with pytest.raises(RemoteError) as raised:
        client.retrieve(k=5, filter="nobody:1")
    refused = raised.value
    assert isinstance(refused, RequestRefused)
    assert refused.code == "INVALID_ARGUMENT"
    assert refused.reason == "INVALID_REQUEST"
    assert refused.message.startswith("filter: position 0: unknown attribute 'nobody'")
    (violation,) = refused.violations
    assert violation.field == "filter"
    assert violation.description.startswith("position 0: unknown attribute")
    assert refused.coverage is None
    assert refused.retry_after_s is None


def test_a_partial_answer_says_so_and_below_the_minimum_it_is_refused(
    cluster: Any, client: Client, make_executors: Any
) -> None:
    cluster.thread.call(cluster.servers[0].stop(0))
    share = make_executors(2)[1].documents / 600
    result = client.retrieve(k=5, min_coverage=0.0)
    assert result.is_partial
    assert result.coverage.documents == share
    assert result.coverage.reasons == ("SHARD_UNAVAILABLE",)
    assert result.coverage.shards[0].shard == 0
    with pytest.raises(RequestRefused) as raised:
        client.retrieve(k=5, min_coverage=0.99)
    assert raised.value.code == "UNAVAILABLE"
    assert raised.value.reason == "COVERAGE_TOO_LOW"
    assert raised.value.coverage is not None
    assert raised.value.coverage.documents == share
    fates = client.retrieve_batch([Query(k=5, min_coverage=0.0), Query(k=5, min_coverage=1.0)])
    assert isinstance(fates[0], Result)
    assert isinstance(fates[1], RequestRefused)
    assert fates[1].coverage is not None
    assert fates[1].coverage.documents == share


def test_a_message_that_is_too_large_is_refused_before_it_is_sent(client: Client) -> None:
    client.max_request_bytes = 1000
    with pytest.raises(ValueError, match="must be at most 1000 bytes, got"):
        client.retrieve(k=1, exclude_ids=range(1000))
    with pytest.raises(ValueError, match="must be at most 1000 bytes, got"):
        client.retrieve_batch([Query(k=1, exclude_ids=range(100))] * 2)


def test_a_query_and_its_fields_are_not_mixed(client: Client) -> None:
    with pytest.raises(ValueError, match="give a query or its fields, got both: k"):
        client.retrieve(Query(k=5), k=6)


def test_the_fields_that_can_be_given_are_those_of_a_query() -> None:
    assert set(QueryFields.__annotations__) == {one.name for one in dataclasses.fields(Query)}
    assert Query().filter_mode is FilterMode.DEFAULT


def test_without_a_router_a_call_is_unavailable_and_never_ready() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client:
        with pytest.raises(RequestRefused) as raised:
            client.retrieve(k=1)
        assert raised.value.code == "UNAVAILABLE"
        assert not client.is_ready(timeout_s=0.05)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.1 s"):
            client.wait_until_ready(0.1)
        assert time.monotonic() - started < 2


def test_closing_fails_what_is_in_flight_and_may_be_repeated(
    make_cluster: Any, make_executors: Any
) -> None:
    executors = make_executors(1)
    reached, let_go = threading.Event(), threading.Event()

    def encode(_: object) -> None:
        reached.set()
        let_go.wait(20)
        raise ZeroDivisionError

    executors[0].encode = encode
    client = make_cluster(1, executors=executors).client()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            client.retrieve(k=1)
        except RequestRefused as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert reached.wait(5)
    client.close()
    client.close()
    thread.join(10)
    let_go.set()
    assert [error.code for error in errors] == ["CANCELLED"]
    with pytest.raises(ValueError, match="closed channel"):
        client.retrieve(k=1)


class UpdateServer:
    """A router's update service with its sequencer, on an event loop of another thread."""

    def __init__(self, thread: Any, log: UpdateLog, path: Path) -> None:
        self.log = log
        self.address = ""
        self._thread = thread
        live = load_live_generation(path)
        self.sequencer = thread.call(self._started(Sequencer(log, live)))

    async def _started(self, sequencer: Sequencer) -> SequencerServer:
        server = SequencerServer(sequencer)
        await server.start()
        self._service = UpdateService(lambda: server.address)
        self._front = grpc.aio.server()
        self._service.add_to(self._front)
        self.address = f"127.0.0.1:{self._front.add_insecure_port('127.0.0.1:0')}"
        await self._front.start()
        return server

    def close(self) -> None:
        self._thread.call(self._front.stop(0))
        self._thread.call(self._service.aclose())
        self._thread.call(self.sequencer.stop(0))


@pytest.fixture
def updates(loop_thread: Any, tmp_path: Path, generation: Any) -> Iterator[UpdateServer]:
    log = open_log(f"sqlite://{tmp_path}/log.db")
    server = UpdateServer(loop_thread, log, generation.path)
    yield server
    server.close()
    log.close()


@pytest.fixture
def writer(updates: UpdateServer) -> Iterator[Client]:
    with Client(updates.address, model="films") as client:
        yield client


def test_updates_are_acked_with_tokens_and_rejected_one_by_one(
    writer: Client, updates: UpdateServer
) -> None:
    result = writer.apply(
        [
            ItemUpsert(5, attributes={"year": 1990}, signals={"popularity": 0.5}, ttl_s=60),
            ItemPatch(6),
            ItemDelete(7, version=3, urgent=True),
        ]
    )
    assert result.tokens == (UpdateToken(updates.log.log_id, 0, 2),)
    (refusal,) = result.rejected
    assert (refusal.index, refusal.code) == (1, "NOT_FOUND")
    assert [one.item_id for one in updates.log.read(0, 0, 9)] == [5, 7]


def test_one_item_is_written_changed_and_deleted(writer: Client, updates: UpdateServer) -> None:
    assert writer.upsert(5, fields={"title": "Film"}, if_version=0)[0].position == 1
    assert writer.patch(5, signals={"popularity": 1.0}, version=9)[0].position == 2
    assert writer.delete(5, urgent=True, if_version=9)[0].position == 3
    with pytest.raises(RequestRefused, match="no item 5 to patch") as raised:
        writer.patch(5)
    assert (raised.value.code, raised.value.reason) == ("NOT_FOUND", "UPDATE_REJECTED")
    assert [one.version for one in updates.log.read(0, 0, 9)] == [1, 9, 10]


def test_a_stream_of_batches_is_acked_in_order(writer: Client) -> None:
    batches = [[ItemUpsert(at), ItemUpsert(at + 100)] for at in range(50)]
    batches.insert(20, [ItemPatch(3, signals={"nothing": 1.0})])  # type: ignore[list-item]
    found = list(writer.apply_stream(batches))
    positions = [one.tokens[0].position for one in found if one.tokens]
    assert positions == list(range(2, 102, 2))
    assert [one.code for one in found[20].rejected] == ["INVALID_ARGUMENT"]


def test_a_stream_that_is_left_early_ends(writer: Client) -> None:
    given = iter([[ItemUpsert(1)], [ItemUpsert(2)]])
    stream = writer.apply_stream(given)
    assert next(stream).tokens
    stream.close()
    assert writer.apply([ItemUpsert(1)]).tokens


def test_an_update_without_a_form_on_the_wire_breaks_its_stream_off(writer: Client) -> None:
    stream = writer.apply_stream([[ItemUpsert(1)], [ItemUpsert(-1)], [ItemUpsert(2)]])
    assert next(stream).tokens
    with pytest.raises(ValueError, match="item_id: must be in"):
        list(stream)


def test_updates_that_cannot_be_sent_are_refused_here(writer: Client) -> None:
    with pytest.raises(ValueError, match="send fewer requests or updates at once"):
        writer.apply([ItemUpsert(1, fields={"title": "x" * 100})] * 100_000)
    with pytest.raises(ValueError, match="ttl_s: must be in"):
        writer.upsert(1, ttl_s=-1)


def test_updates_for_nobody_are_refused(updates: UpdateServer) -> None:
    with Client(updates.address, model="books") as client:
        with pytest.raises(RequestRefused, match="no model 'books'"):
            client.apply([ItemUpsert(1)])
        (found,) = client.apply_stream([[ItemUpsert(1)]])
        assert [one.code for one in found.rejected] == ["NOT_FOUND"]


def test_a_stream_to_nobody_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(RequestRefused) as raised:
            list(client.apply_stream([[ItemUpsert(1)]]))
        assert raised.value.code == "UNAVAILABLE"


def test_a_query_says_how_fresh_its_answer_must_be() -> None:
    with Client("127.0.0.1:1") as client:
        token = UpdateToken(9, 0, 5)
        message = client.message(Query(after=(token,), max_staleness_s=0.5))
        assert consistency_from(message.consistency) == Consistency((token,), 0.5)
        assert not client.message(Query()).HasField("consistency")
