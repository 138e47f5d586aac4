import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray._private.state import state as ray_state

from silvershard.cluster import retrieval_pb2, update_pb2, update_pb2_grpc
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, Update, result_from

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[UpdateLog]:
    one = open_log(f"sqlite://{tmp_path}/log.db")
    yield one
    one.close()


@pytest.fixture
def start(ray: Any, log: UpdateLog, generation: Any, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    from silvershard.cluster.sequencer_actor import SequencerActor

    actors = []

    def started() -> Any:
        actor_class: Any = SequencerActor
        actor = actor_class.remote(
            str(generation.path),
            log.url,
            map_path=str(tmp_path / "map.json"),
            feed_block=0.9,
            hysteresis=0.05,
        )
        actors.append(actor)
        return actor

    yield started
    for actor in actors:
        ray.kill(actor, no_restart=True)


def apply(address: str, *updates: Update) -> Any:
    message = retrieval_pb2.ApplyRequest(mutations=[mutation_to(one) for one in updates])
    with grpc.insecure_channel(address) as channel:
        stub = update_pb2_grpc.SequencerStub(channel)
        return result_from(stub.Apply(message, timeout=10, wait_for_ready=True))


def described(ray: Any, actor: Any, not_pid: int = 0) -> dict[str, Any]:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        try:
            found: dict[str, Any] = ray.get(actor.describe.remote(), timeout=60)
        except ray.exceptions.RayActorError:
            continue
        if found["pid"] != not_pid:
            return found
    raise AssertionError("the actor did not come back")


def ask_for_a_minute(ray: Any, actor: Any) -> None:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        ray.get(actor.describe.remote(), timeout=60)
        time.sleep(0.01)


def test_an_actor_that_is_killed_takes_the_log_again_and_lost_no_ack(
    ray: Any, start: Any, log: UpdateLog
) -> None:
    actor = start()
    first = described(ray, actor)
    assert first["log_id"] == log.log_id
    assert first["generation"] == 1
    assert os.getpriority(os.PRIO_PROCESS, first["pid"]) >= 5
    assert apply(first["address"], ItemDelete(5, version=3)).tokens[0].position == 1
    os.kill(first["pid"], signal.SIGKILL)
    second = described(ray, actor, first["pid"])
    assert second["epochs"][0] > first["epochs"][0]
    again = apply(second["address"], ItemDelete(5, version=3), ItemDelete(6, version=1))
    assert again.tokens[0].position == 2
    assert [one.item_id for one in log.read(0, 0, 9)] == [5, 6]


def test_a_fenced_actor_ends_for_good(
    ray: Any, start: Any, log: UpdateLog, generation: Any
) -> None:
    actor = start()
    found = described(ray, actor)
    successor = Sequencer(log, load_live_generation(generation.path))
    with pytest.raises(grpc.RpcError, match="is over"):
        apply(found["address"], ItemDelete(5, version=3))
    with pytest.raises(ray.exceptions.RayActorError):
        ask_for_a_minute(ray, actor)
    table = ray_state.actor_table(actor._actor_id.hex())
    assert (table["State"], table["NumRestarts"]) == ("DEAD", 0)
    assert successor.fenced is None
    assert log.end(0) == 0


def test_the_report_is_for_everybody(ray: Any, start: Any, log: UpdateLog) -> None:
    found = described(ray, start())
    with grpc.insecure_channel(found["address"]) as channel:
        stub = update_pb2_grpc.SequencerStub(channel)
        report = stub.Report(update_pb2.SequencerReportRequest(), timeout=10)
    assert (report.log_id, report.model) == (log.log_id, "films")
