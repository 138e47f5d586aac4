from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from silvershard.cluster import shard_pb2, shard_pb2_grpc, update_pb2, update_pb2_grpc
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.freshness import freshness, render
from silvershard.deploy.processes import myself
from silvershard.deploy.state import (
    ClusterRecord,
    RouterRecord,
    SequencerRecord,
    ShardRecord,
    StateDir,
)


class Process(shard_pb2_grpc.ShardServicer, update_pb2_grpc.SequencerServicer):  # type: ignore[misc]
    """A shard and a sequencer that say what the test says."""

    def __init__(self) -> None:
        self.shard = shard_pb2.ShardReport()
        one = self.shard.generations.add(
            generation=3, state=shard_pb2.GENERATION_STATE_PREPARED, ends=[57]
        )
        one.seen.cut.append(40)
        one.seen.documents = 10
        one.pool.pages, one.pool.free_pages = 8, 3
        one.pool.longest_list, one.pool.mean_list = 21, 10.0
        one.pool.assignment_error = 0.0123
        self.sequencer = update_pb2.SequencerReport(log_id=99, generation=3, queued=5)
        self.sequencer.partitions.add(partition=0, start=12, end=57, epoch=2)

    def Inspect(self, request: Any, context: grpc.ServicerContext) -> shard_pb2.ShardReport:
        return self.shard

    def Report(self, request: Any, context: grpc.ServicerContext) -> update_pb2.SequencerReport:
        return self.sequencer


@pytest.fixture
def process() -> Iterator[tuple[Process, str]]:
    servicer, server = Process(), grpc.server(ThreadPoolExecutor(2))
    shard_pb2_grpc.add_ShardServicer_to_server(servicer, server)
    update_pb2_grpc.add_SequencerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def state_of(root: Path, address: str, **changes: Any) -> StateDir:
    state = StateDir(root)
    state.create()
    record: dict[str, Any] = {
        "guard": myself(),
        "driver": myself(),
        "address": "127.0.0.1:8001",
        "model": "films",
        "generation": 3,
        "documents": 10,
        "map_version": 2,
        "router": RouterRecord(state="serving"),
        "shards": (ShardRecord(shard=0, state="serving", documents=10, address=address),),
        "sequencer": SequencerRecord(state="serving", address=address),
        "ray_dir": "",
        "since_unix_s": 0.0,
        **changes,
    }
    state.write_record(ClusterRecord(**record))
    return state


def test_log_and_shards_are_said_together(tmp_path: Path, process: tuple[Process, str]) -> None:
    document, code = freshness(state_of(tmp_path, process[1]))
    assert (code, document["lag"]) == (ExitCode.OK, 17)
    assert document["sequencer"]["partitions"] == [
        {"partition": 0, "start": 12, "end": 57, "epoch": 2}
    ]
    assert document["sequencer"]["data_as_of"] == "99:57"
    (shard,) = document["shards"]
    assert (shard["cut"], shard["lag"], shard["free_pages"], shard["pages"]) == ([40], 17, 3, 8)
    assert (shard["list_skew"], shard["assignment_error"]) == (2.1, 0.0123)
    assert document["hints"] == []
    shown = render(document)
    assert "publish --data-as-of 99:57" in shown
    for text in ("99, positions 12 to 57", "3 of 8", "pass", "prepared", "2.1", "1.2%"):
        assert text in shown
    assert "hint" not in shown


def test_clusters_that_fit_the_live_items_no_more_are_said_with_what_to_do(
    tmp_path: Path, process: tuple[Process, str]
) -> None:
    servicer, address = process
    state = state_of(tmp_path, address)
    pool = servicer.shard.generations[0].pool
    pool.longest_list, pool.assignment_error = 81, 0.0501
    # Another generation is none of anybody's business.
    other = servicer.shard.generations.add(generation=2)
    other.pool.pages, other.pool.mean_list, other.pool.longest_list = 8, 1.0, 900
    document, code = freshness(state)
    assert code == ExitCode.OK
    assert len(document["hints"]) == 2
    shown = render(document)
    assert "hint: the longest list is 8.1 times the mean, more than 8: `silvershard" in shown
    assert "hint: 5.0% of the items stand in another cluster than the nearest, more than" in shown
    pool.longest_list, pool.assignment_error = 80, 0.05
    assert freshness(state)[0]["hints"] == []


def test_refused_upserts_are_said_with_numbers_and_are_degraded(
    tmp_path: Path, process: tuple[Process, str]
) -> None:
    servicer, address = process
    servicer.sequencer.blocked.add(shard=0, use=0.9123, limit=0.9)
    document, code = freshness(state_of(tmp_path, address))
    assert code == ExitCode.DEGRADED
    assert "refused: shard 0 is 91.2% full, limit 90.0%" in render(document)


def test_a_shard_that_cannot_follow_the_log_is_degraded_and_says_why(
    tmp_path: Path, process: tuple[Process, str]
) -> None:
    servicer, address = process
    servicer.shard.generations[0].reason = "update log test: position 5 is not what was applied"
    document, code = freshness(state_of(tmp_path, address))
    assert (code, document["shards"][0]["state"]) == (ExitCode.DEGRADED, "prepared")
    assert "position 5 is not what was applied" in render(document)


def test_a_shard_that_left_service_says_why(tmp_path: Path, process: tuple[Process, str]) -> None:
    servicer, address = process
    servicer.shard.generations[0].state = shard_pb2.GENERATION_STATE_FAILED
    servicer.shard.generations[0].reason = "the log was trimmed"
    document, code = freshness(state_of(tmp_path, address))
    assert code == ExitCode.DEGRADED
    assert "the log was trimmed" in render(document)


def test_what_does_not_answer_is_degraded(tmp_path: Path) -> None:
    shards = (
        ShardRecord(shard=0, state="serving", documents=1, address="127.0.0.1:1"),
        ShardRecord(shard=1, state="restarting", documents=1, reason="process 7 ended"),
    )
    document, code = freshness(state_of(tmp_path, "127.0.0.1:1", shards=shards))
    assert code == ExitCode.DEGRADED
    shown = render(document)
    assert shown.count("no answer: ") == 2
    assert "process 7 ended" in shown


def test_without_updates_there_is_nothing_to_say(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no cluster runs on"):
        freshness(StateDir(tmp_path / "none"))
    with pytest.raises(CommandError, match=r"takes no updates: set updates\.enabled"):
        freshness(state_of(tmp_path / "s", "127.0.0.1:1", sequencer=None))
