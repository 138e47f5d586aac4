import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from silvershard.cluster import shard_pb2, shard_pb2_grpc
from silvershard.deploy.shard_host import ShardHost, held_from


class Shard(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """A shard process that holds what it is told to, and fails when the test says so."""

    def __init__(self) -> None:
        self.wishes: list[tuple[str, int, str]] = []
        self.refuses = False
        self.report = shard_pb2.ShardReport()

    def Inspect(self, request: Any, context: grpc.ServicerContext) -> shard_pb2.ShardReport:
        if self.refuses:
            context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        return self.report

    def Prepare(self, request: Any, context: grpc.ServicerContext) -> shard_pb2.GenerationReport:
        self.wishes.append(("prepare", request.generation, request.snapshot))
        return shard_pb2.GenerationReport()

    def Retire(self, request: Any, context: grpc.ServicerContext) -> shard_pb2.RetireReply:
        self.wishes.append(("retire", request.generation, ""))
        return shard_pb2.RetireReply()


@pytest.fixture
def shard() -> Iterator[tuple[Shard, str]]:
    servicer, server = Shard(), grpc.server(ThreadPoolExecutor(2))
    shard_pb2_grpc.add_ShardServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def until(true: Callable[[], object], host: ShardHost) -> None:
    give_up_s = time.monotonic() + 20.0
    while not true():
        host.poll()
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


def full_report() -> shard_pb2.ShardReport:
    report = shard_pb2.ShardReport()
    one = report.generations.add(
        generation=3,
        state=shard_pb2.GENERATION_STATE_CATCHING_UP,
        reason="the log is away",
        ends=[9, 4],
    )
    one.seen.cut.extend([7, 4])
    one.seen.documents = 300
    one.seen.staleness_us = 1_500_000
    one.pool.pages, one.pool.free_pages = 40, 11
    one.updates.rejected = 2
    report.generations.add(generation=4, state=shard_pb2.GENERATION_STATE_PREPARED)
    return report


def test_a_report_is_what_is_held() -> None:
    held = held_from(full_report())
    assert held.keys() == {3, 4}
    assert held[3].state == "catching up"
    assert held[3].reason == "the log is away"
    assert (held[3].cut, held[3].ends, held[3].documents) == ((7, 4), (9, 4), 300)
    assert (held[3].pages, held[3].free_pages, held[3].rejected) == (40, 11, 2)
    assert (held[3].staleness_s, held[3].behind, held[4].behind) == (1.5, 2, 0)
    assert (held[4].state, held[4].cut) == ("prepared", ())


def test_what_a_process_holds_is_known_after_its_first_answer(shard: tuple[Shard, str]) -> None:
    servicer, address = shard
    servicer.report = full_report()
    host = ShardHost(address)
    assert host.held is None
    until(lambda: host.held is not None, host)
    assert host.held == held_from(full_report())
    # While it does not answer, its last word stands: whoever watches the process says more.
    servicer.refuses = True
    for _ in range(20):
        host.poll()
    assert host.held == held_from(full_report())
    host.close()


def test_every_wish_arrives_though_nobody_waits_for_it(shard: tuple[Shard, str]) -> None:
    servicer, address = shard
    host = ShardHost(address)
    for generation in range(1, 30):
        host.prepare(generation, f"/g/{generation}")
        host.retire(generation)
    until(lambda: len(servicer.wishes) == 58, host)
    assert ("prepare", 7, "/g/7") in servicer.wishes
    assert ("retire", 29, "") in servicer.wishes
    host.close()


def test_a_wish_is_not_repeated_at_once(shard: tuple[Shard, str]) -> None:
    servicer, address = shard
    now_s = [50.0]
    host = ShardHost(address, clock=lambda: now_s[0])
    for _ in range(5):
        host.prepare(2, "/g/2")
    until(lambda: servicer.wishes, host)
    now_s[0] += 1.1
    host.prepare(2, "/g/2")
    until(lambda: len(servicer.wishes) == 2, host)
    host.close()
