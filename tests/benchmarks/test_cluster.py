import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cluster
from benchmarks import live_catalogue as live
from benchmarks.cluster import Point
from benchmarks.sleeping_shard import CANDIDATES, SleepingExecutor, expected, request_features
from silvershard.model.merge import Merge
from silvershard.model.types import Work
from silvershard.shard.errors import CandidatesExpired

ANN_K = CANDIDATES // 2


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return live.publish(tmp_path_factory.mktemp("generations"), 300, 16)


def work(executor: SleepingExecutor, numbers: list[int], k: int) -> Work:
    encoded = executor.encode([request_features(number) for number in numbers])
    batch = len(numbers)
    empty = torch.zeros(batch, 0, 4, dtype=torch.int64)
    return Work(
        embedding=encoded.embedding,
        user_state=encoded.user_state,
        scan=empty,
        verify=empty,
        exclude=torch.zeros(batch, 0, dtype=torch.int64),
        value_ops=torch.zeros(batch, 0, 2, dtype=torch.int32),
        value_constants=torch.zeros(batch, 0),
        probes=torch.ones(batch, dtype=torch.int64),
        ann_k=torch.full((batch,), ANN_K),
        semantic_k=torch.zeros(batch, dtype=torch.int64),
        k=torch.full((batch,), k),
        tasks=torch.ones(batch, len(live.schema().tasks), dtype=torch.int8),
    )


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_merge_of_sleeping_shards_is_what_the_gate_expects(
    snapshot: Path, num_shards: int
) -> None:
    shards = [SleepingExecutor(snapshot, shard, num_shards) for shard in range(num_shards)]
    assert sum(one.documents for one in shards) == 300
    asked = work(shards[0], [3, 11], 100)
    merge = Merge()
    cutoffs = merge.cutoffs([one.open("a", asked, math.inf) for one in shards], asked.ann_k)
    found = merge([one.close("a", cutoffs) for one in shards], 100)
    assert found.item_ids.tolist() == [expected(number, ANN_K, 100) for number in (3, 11)]
    assert found.kept.tolist() == [ANN_K, ANN_K]
    for one in shards:
        one.release("a")
        assert not one.is_open("a")
        with pytest.raises(CandidatesExpired):
            one.close("a", cutoffs)


def test_the_expected_answer_depends_on_the_cut_and_on_the_request() -> None:
    assert expected(1, ANN_K, 100) != expected(1, CANDIDATES, 100)
    assert not set(expected(1, ANN_K, 100)) & set(expected(2, ANN_K, 100))


def line(at_s: float, took_s: float, **more: Any) -> dict[str, Any]:
    return {
        "at_s": at_s,
        "done_s": at_s + took_s,
        "outcome": "ok",
        "code": "OK",
        "coverage": 1.0,
        "reasons": [],
        "request": {"index": 0},
        "ids": [5],
        **more,
    }


def test_a_record_with_a_wrong_answer_is_red(tmp_path: Path) -> None:
    path = tmp_path / "record"

    def read(*lines: dict[str, Any]) -> list[dict[str, Any]]:
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        return cluster.read_record(path, [[5], [6]])

    good = line(0.5, 0.1)
    assert read(line(-0.5, 0.1), good) == [good]
    with pytest.raises(RuntimeError, match="request 1 was answered with"):
        read(good, line(0.6, 0.1, request={"index": 1}))
    # Whoever lacks documents, or was answered with less work, may lack items.
    read(line(0.6, 0.1, ids=[], coverage=0.5, reasons=["SHARD_TIMEOUT"], outcome="partial"))
    read(line(0.6, 0.1, ids=[], reasons=["RERANK_DEPTH_REDUCED"], outcome="degraded"))
    read(line(0.6, 0.1, ids=[], code="UNAVAILABLE", coverage=None, outcome="error"))


@pytest.mark.parametrize(
    ("outcome", "is_failed"),
    [
        ("ok", False),
        ("degraded", False),
        ("partial", True),
        ("late", True),
        ("error", True),
        ("unsent", True),
    ],
)
def test_a_request_without_a_whole_answer_in_time_failed(outcome: str, is_failed: bool) -> None:
    one = line(0.5, 0.25, outcome=outcome)
    assert cluster.failed(one) is is_failed
    assert cluster.points_of([one]) == [Point(0.5, math.inf if is_failed else 0.25)]


def test_percentiles_are_of_requests_due_in_the_span() -> None:
    points = [Point(at / 10, at / 1000) for at in range(100)]
    assert cluster.percentile(points, 0.5, 0.0, 10.0) == 0.049
    assert cluster.percentile(points, 1.0, 2.0, 3.0) == 0.029
    assert cluster.percentile(points, 0.5, 20.0, 30.0) == 0.0


def test_recovery_takes_until_a_whole_second_is_normal() -> None:
    def fault(slow_until_s: float, latency_s: float = 0.5) -> list[Point]:
        return [
            Point(at / 100, latency_s if 4.0 <= at / 100 < slow_until_s else 0.01)
            for at in range(1000)
        ]

    assert cluster.recovery(fault(4.0), 4.0, 0.01) == 0.0
    assert cluster.recovery(fault(4.7), 4.0, 0.01) == pytest.approx(0.7, abs=0.03)
    assert cluster.recovery(fault(4.7, math.inf), 4.0, 0.01) == pytest.approx(0.7, abs=0.03)
    assert cluster.recovery(fault(99.0), 4.0, 0.01) is None


def test_every_row_stands_beside_its_goal() -> None:
    goals = [row for row in cluster.ROWS if row.goal is not None]
    found = {row.key: row.goal for row in goals} | {"warnings": {"overhead": ["doubt"]}}
    found["echo_p50_ms"] = 2.5
    lines: list[str] = []
    cluster.report_rows(found, lines.append)
    assert lines.pop(1).endswith("2.500 ms")
    assert all(one.endswith("held") for one in lines[:-1])
    assert lines[-1] == "WARNING: overhead: doubt"
    found |= {"killed_failed": 1, "hung_ratio": None, "overload_goodput": 0.9}
    lines.clear()
    cluster.report_rows(found, lines.append)
    lines.pop(1)
    assert [one.endswith("missed") for one in lines[:-1]] == [
        row.key in ("killed_failed", "hung_ratio", "overload_goodput") for row in goals
    ]


def test_what_a_process_takes_of_the_processors_is_part_of_all_that_is_taken() -> None:
    mine_s, all_s = cluster.taken_s([os.getpid()]), cluster.busy_s()
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    spent_s = cluster.taken_s([os.getpid()]) - mine_s
    assert 0.05 < spent_s <= cluster.busy_s() - all_s + 0.05
    assert cluster.taken_s([1 << 30]) == 0
