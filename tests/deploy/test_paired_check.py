"""Two sets of shards are compared; those here are a few threads of this process."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.client import Query, RequestRefused, Result
from silvershard.cluster.config import RouterConfig
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.hosting import ready
from silvershard.cluster.outcome import Coverage
from silvershard.cluster.shard_loader import ShardLoader
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.deploy.paired_check import compare, questions_of
from silvershard.model.counts import Counts
from silvershard.shard.errors import ShardUnavailable


def answer(**changes: Any) -> Result:
    scores = np.array([2.5, 1.5], np.float32)
    fields = {
        "item_ids": np.array([7, 3]),
        "scores": scores,
        "task_scores": {"like": scores / 4},
        "fields": {"title": ["a", None]},
        "coverage": Coverage(1.0, 2, 2, 0),
        "model": "films",
        "generation": 4,
        "content_hash": "a" * 64,
        "shard_map_version": 1,
        "plan": "all_pages",
        "exhausted": False,
        "counts": Counts(600, 0, None, 2, 2),
        "timings_us": {},
        "cut": (UpdateToken(1, 0, 9),),
    }
    return Result(**{**fields, **changes})


class Asked:
    """A set of shards that answers what the test says, the last answer again and again."""

    def __init__(self, *answers: Result | Exception) -> None:
        self.answers = list(answers)
        self.queries: list[Query] = []

    def __call__(self, query: Query) -> Result:
        self.queries.append(query)
        found = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def compared(old: Asked, new: Asked, questions: int = 1) -> str:
    now_s = 0.0

    def pause(seconds: float) -> None:
        nonlocal now_s
        now_s += 1.0

    asked = [Query(k=2, generation=4)] * questions
    return compare(old, new, asked, patience_s=5.0, clock=lambda: now_s, pause=pause)


def test_equal_answers_to_all_questions() -> None:
    old, new = Asked(answer()), Asked(answer(shard_map_version=2, plan="all_pages(ann_k=9)"))
    assert compared(old, new, 3) == ""
    assert [one.exact for one in old.queries] == [True] * 3
    # The new set is asked for what the old one had applied.
    assert [(one.exact, one.after) for one in new.queries] == [(True, (UpdateToken(1, 0, 9),))] * 3


SCORES = np.array([2.5, 1.5], np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"item_ids": np.array([7, 4])}, "generation 4: got first, required second"),
        ({"item_ids": np.array([7]), "scores": SCORES[:1]}, "got first, required second"),
        ({"scores": np.nextafter(SCORES, np.float32(9))}, "got first, required second"),
        ({"task_scores": {"like": SCORES}}, "task like, got first, required second"),
        ({"exhausted": True}, "exhausted is True and must be False"),
        ({"fields": {"title": ["a", "b"]}}, "the stored fields of the items are not the same"),
    ],
)
def test_a_difference_that_stays_is_named(changes: dict[str, Any], words: str) -> None:
    old, new = Asked(answer()), Asked(answer(), answer(**changes))
    found = compared(old, new, 2)
    assert found.startswith("question 1 of 2: ")
    assert words in found
    assert len(new.queries) == 8


def test_a_difference_that_goes_is_an_update_on_its_way() -> None:
    late = answer(item_ids=np.array([7, 4]))
    refused = ShardUnavailable(1, "no replica is connected")
    assert compared(Asked(answer()), Asked(late, refused, late, answer())) == ""
    assert compared(Asked(refused, answer()), Asked(answer())) == ""


def test_an_answer_that_never_comes_is_a_difference() -> None:
    found = compared(Asked(answer()), Asked(ShardUnavailable(1, "no replica is connected")))
    assert "no replica is connected" in found


def test_what_is_too_large_to_be_exact_is_compared_by_its_plan() -> None:
    large = RequestRefused("INVALID_ARGUMENT", "an exact search would keep too many")
    old, new = Asked(large, answer(plan="probe(5)")), Asked(answer(plan="probe(5)"))
    assert compared(old, new) == ""
    assert [one.exact for one in old.queries] == [True, False]
    assert [(one.exact, one.plan) for one in new.queries] == [(False, "probe(5)")]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs on a thread."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join(60)
    made.close()


@pytest.fixture
def serve(
    tmp_path: Path, generation: Any, loop: asyncio.AbstractEventLoop
) -> Iterator[Callable[[str, int, int], Path]]:
    """``serve(name, S, of)`` serves S shards as those of a cut into ``of`` ones, by a map."""
    servers: list[ShardServer] = []

    def make(name: str, num_shards: int, of: int) -> Path:
        entries = []
        for shard in range(num_shards):
            load = ShardLoader(shard, of)
            server = ShardServer(ready(load(generation.path)), load=load, snapshot="")
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
            servers.append(server)
            entry = ShardEntry(
                shard=shard,
                replica=0,
                address=server.address,
                epoch=server.epoch,
                documents=1,
                pid=1,
            )
            entries.append(entry)
        ShardMap(
            version=1,
            generation=1,
            snapshot=str(generation.path),
            num_shards=num_shards,
            entries=tuple(entries),
        ).write_atomic(tmp_path / name)
        return tmp_path / name

    yield make
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(60)


def test_every_golden_request_of_every_generation_is_asked_and_one_for_everything(
    serve: Callable[..., Path], generation: Any
) -> None:
    shard_map = ShardMap.read(serve("map.json", 1, 1))
    questions = questions_of(shard_map)
    assert len(questions) == 25
    assert (questions[0].k, questions[0].generation, questions[0].min_coverage) == (1000, 1, 1.0)
    assert set(questions[0].return_fields) == {one.name for one in generation.schema.fields}


@pytest.mark.slow
def test_the_process_tells_a_right_cut_from_a_wrong_one(
    serve: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "router.json"
    config.write_text(RouterConfig(map_path="unused").model_dump_json())

    def run(old: Path, new: Path) -> tuple[int, str]:
        code = (
            "import sys; from silvershard.deploy import paired_check as check; "
            "check.compare.__kwdefaults__['patience_s'] = 0.2; sys.exit(check.main(sys.argv[1:]))"
        )
        files = ["--config", str(config), "--old", str(old), "--new", str(new)]
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *files, "--parent", str(os.getpid())],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout

    two, three = serve("two.json", 2, 2), serve("three.json", 3, 3)
    assert run(two, three) == (0, "")
    # Three shards of four: their items are right, and some are missing.
    code, said = run(two, serve("four.json", 3, 4))
    assert code == 1
    assert said.startswith("question 0 of 25: generation 1: ")
    assert said.count("\n") == 1
    code, said = run(two, tmp_path / "none.json")
    assert (code, said.startswith("the answers could not be compared: shard map ")) == (1, True)
