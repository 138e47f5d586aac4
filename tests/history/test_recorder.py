import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from history.checker import check
from history.events import FaultEvent, QueryEvent, WriteEvent, numbered
from history.recorder import Recorder, RecordingClient

from silvershard.cluster.client import Query, RequestRefused, Result
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.outcome import Coverage, ShardOutcome
from silvershard.cluster.updates import (
    ApplyResult,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    TableRows,
    UpdateRejection,
)
from silvershard.model.counts import Counts

PUBLISHED = 600
TOKEN = UpdateToken(7, 0, 5)


class FakeClient:
    """A client whose answers the test says."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.closed = False

    def _next(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def retrieve(self, query: Query, *, timeout_s: float | None = None) -> Any:
        return self._next()

    def apply(self, updates: Sequence[Any], **how: Any) -> Any:
        return self._next()

    def close(self) -> None:
        self.closed = True


def result(**more: Any) -> Result:
    lost = ShardOutcome(1, "0", "UNAVAILABLE", ("SHARD_UNAVAILABLE",), 50, 9, 1)
    whole = {
        "item_ids": np.array([3, 4]),
        "scores": np.array([2.0, 1.0], dtype=np.float32),
        "task_scores": {},
        "fields": {"title": ["a", None]},
        "coverage": Coverage(0.5, 2, 1, 1, ("SHARD_UNAVAILABLE",), (lost,)),
        "model": "films",
        "generation": 2,
        "content_hash": "",
        "shard_map_version": 4,
        "plan": "exact",
        "exhausted": False,
        "counts": Counts(addressed=100, probed=0, eligible=None, ann_kept=0, reranked=0),
        "timings_us": {},
        "cut": (TOKEN,),
    }
    return Result(**{**whole, **more})


@pytest.fixture
def recorder(tmp_path: Path) -> Any:
    with Recorder(tmp_path / "history.jsonl") as made:
        yield made


@pytest.fixture
def client(recorder: Recorder) -> Any:
    fake: Any = FakeClient()
    with RecordingClient(fake, recorder, "me") as made:
        yield made
    assert fake.closed


def test_a_query_and_its_answer_are_written_down(client: Any, recorder: Recorder) -> None:
    client.client.answers = [result()]
    query = Query(k=9, filter="a:$b", params={"b": np.int64(3)}, after=[TOKEN], exact=True)
    client.retrieve(query, shown=lambda one: {"look": [1, 2]})
    (event,) = recorder.events()
    assert isinstance(event, QueryEvent)
    assert event.request == {
        "k": 9,
        "filter": "a:$b",
        "params": {"b": 3},
        "exact": True,
        "after": [[7, 0, 5]],
    }
    assert (event.ids, event.fields) == ((3, 4), {"title": ["a", None], "look": [1, 2]})
    assert (event.code, event.generation, event.coverage, event.addressed) == ("OK", 2, 0.5, 100)
    assert event.lost == ((1, 50, ("SHARD_UNAVAILABLE",)),)
    assert event.cut == (TOKEN,)
    assert (event.session, event.router, event.shard_map_version) == ("me", "127.0.0.1:1", 4)
    assert event.sent_s <= event.done_s
    check(recorder.events(), names=["coverage_honesty"]).require("coverage_honesty")


def test_a_refusal_is_written_down_and_raised(client: Any, recorder: Recorder) -> None:
    client.client.answers = [RequestRefused("UNAVAILABLE", "no shard"), ValueError("too large")]
    with pytest.raises(RequestRefused):
        client.retrieve(k=3)
    with pytest.raises(ValueError, match="too large"):
        client.retrieve(k=3)
    assert [(one.code, one.message) for one in recorder.events()] == [
        ("UNAVAILABLE", "no shard"),
        ("CANCELLED", "ValueError('too large')"),
    ]


UPDATES = [
    ItemUpsert(1, attributes={"a": ["x"]}, fields={"title": "t"}, version=1, ttl_s=3.0),
    ItemPatch(2, attributes={"a": np.array([1, 2])}, version=2),
    TableRows("users", [1], np.zeros((1, 2))),
    ItemDelete(3, urgent=True, version=3),
]


def outcomes(recorder: Recorder) -> list[tuple[int, str, str]]:
    events = recorder.events()
    assert all(isinstance(one, WriteEvent) for one in events)
    return [(one.item_id, one.op, one.outcome) for one in events]


def test_updates_are_written_down_before_they_are_sent_and_when_they_are_answered(
    client: Any, recorder: Recorder
) -> None:
    seen: list[Any] = []

    class Looking(FakeClient):
        def apply(self, updates: Sequence[Any], **how: Any) -> Any:
            seen.extend(outcomes(recorder))
            rejected = (UpdateRejection(1, "ABORTED", "old"), UpdateRejection(2, "ABORTED", "old"))
            return ApplyResult((TOKEN,), rejected)

    looking: Any = Looking()
    RecordingClient(looking, recorder).apply(UPDATES)
    sent = [(1, "upsert", "unknown"), (2, "patch", "unknown"), (3, "delete", "unknown")]
    assert seen == sent
    assert outcomes(recorder)[3:] == [
        (1, "upsert", "acked"),
        (2, "patch", "refused"),
        (3, "delete", "acked"),
    ]
    upsert, patch, delete = recorder.events()[3:]
    assert isinstance(upsert, WriteEvent)
    assert (upsert.tokens, upsert.ttl_s, upsert.attributes) == ((TOKEN,), 3.0, {"a": ["x"]})
    assert isinstance(patch, WriteEvent)
    assert (patch.tokens, patch.attributes) == ((), {"a": [1, 2]})
    assert isinstance(delete, WriteEvent)
    assert (delete.tokens, delete.urgent) == ((TOKEN,), True)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RequestRefused("UNAVAILABLE", "gone"), ["unknown"]),
        (RequestRefused("DEADLINE_EXCEEDED", "late"), ["unknown"]),
        (RequestRefused("INVALID_ARGUMENT", "no"), ["unknown", "refused"]),
        (
            RequestRefused("DEADLINE_EXCEEDED", "late", logged=ApplyResult((TOKEN,), ())),
            ["unknown", "acked"],
        ),
    ],
)
def test_what_became_of_a_call_that_failed_is_said_only_where_it_is_known(
    client: Any, recorder: Recorder, error: Exception, outcome: list[str]
) -> None:
    client.client.answers = [error]
    with pytest.raises(RequestRefused):
        client.apply(UPDATES[:1])
    assert [one[2] for one in outcomes(recorder)] == outcome


def test_an_update_without_a_version_of_its_own_makes_no_history(client: Any) -> None:
    with pytest.raises(ValueError, match="must have a version, got none of item 4"):
        client.apply([ItemDelete(4)])


def test_faults_and_generations_are_written_down(recorder: Recorder, generation: Any) -> None:
    recorder.catalogue(1, generation.catalogue, num_partitions=64, marker=("title", "G1"))
    with recorder.fault("kill", "shard 1", excuses=True):
        pass
    with recorder.activation(2):
        pass
    catalogue, fault, activated = recorder.events()
    assert [one.line for one in (catalogue, fault, activated)] == [1, 2, 3]
    assert isinstance(fault, FaultEvent)
    assert fault.begin_s <= fault.end_s
    items: Any = catalogue.items  # type: ignore[union-attr]
    assert len(items) == PUBLISHED
    films = generation.catalogue
    for row, item in enumerate(films.item_ids[:50].tolist()):
        attributes = items[str(item)]
        assert attributes["genre"] == films.categories["genre"].row(row).tolist()
        assert attributes.get("price", float("nan")) == pytest.approx(
            films.numbers["price"][row], nan_ok=True
        )


def test_threads_and_processes_write_one_file(recorder: Recorder) -> None:
    each, name = 200, "x" * 300

    def write(who: str) -> None:
        for at in range(each):
            recorder.record(FaultEvent(name=name, target=f"{who} {at}", begin_s=0.0, end_s=0.0))

    line = json.dumps({"kind": "fault", "name": name, "begin_s": 0, "end_s": 0})
    code = (
        "import os, sys\n"
        "file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        f"for _ in range({each}): os.write(file, sys.argv[2].encode() + b'\\n')\n"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code, recorder.path, line])
    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert child.wait(30) == 0
    assert len(recorder.events()) == 4 * each
    assert numbered(recorder.events()) == recorder.events()
