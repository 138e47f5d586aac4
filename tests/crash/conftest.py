"""A cluster of several processes under load, what was acked there, and who is to be killed.

How much is done comes from the environment, so that the same tests are a bounded selection in
``make test`` and long in ``make test-crash``: ``SILVERSHARD_CRASH_SWAPS`` and
``SILVERSHARD_CRASH_FAULTS``.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import Client, Query, Result
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.deploy import launch
from silvershard.deploy.config import load
from silvershard.deploy.processes import Process, is_alive
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import RetrievalError
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation

WAIT_S = 90.0
OWN_ITEMS = 400
FIRST_ITEM = 1 << 41
"""Items of the tests; those of the published catalogue have smaller ids."""
PAUSE_S = 0.02
"""Between two calls of a thread: a load that leaves the machine some time for all else."""
LOST = RetrievalError, OSError


def amount(name: str, few: int) -> int:
    """Return how often something is done: a little, unless the environment says so."""
    return int(os.environ.get(f"SILVERSHARD_CRASH_{name}", few))


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def marked(catalogue: Any, generation: int) -> Any:
    """Return a catalogue whose every item names the generation that it was published in."""
    titles = np.empty(len(catalogue), dtype=object)
    titles[:] = f"generation {generation}"
    return replace(catalogue, fields={**catalogue.fields, "title": titles})


@dataclass
class Ledger:
    """What was acked of the items of the tests: their titles, None for those that were deleted."""

    titles: dict[int, str | None] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    in_doubt: Update | None = None
    """Sent and not answered; it may be there or not until it is sent again."""
    acked: int = 0


class Writer(threading.Thread):
    """Changes items one call after another; what is not answered is sent again until it is."""

    def __init__(self, address: Callable[[], str], seed: int) -> None:
        super().__init__(name="writer", daemon=True)
        self.ledger = Ledger()
        self.failures = 0
        self.rejected: list[str] = []
        self._address = address
        self._draw = random.Random(seed)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                with Client(self._address(), timeout_s=5.0) as client:
                    while not self._ended.wait(PAUSE_S):
                        self._write(client)
            except LOST:
                self.failures += 1
                self._ended.wait(0.02)

    def _write(self, client: Client) -> None:
        ledger = self.ledger
        if ledger.in_doubt is None:
            ledger.in_doubt = self._draw_update()
        result = client.apply([ledger.in_doubt])
        if any(one.code == "RESOURCE_EXHAUSTED" for one in result.rejected):
            # A shard that has just started has not said yet how much room it has.
            self._ended.wait(PAUSE_S)
            return
        update, ledger.in_doubt = ledger.in_doubt, None
        if result.rejected:
            self.rejected.append(result.rejected[0].reason)
            return
        item = update.item_id
        ledger.versions[item] = update.version
        if isinstance(update, ItemDelete):
            ledger.titles[item] = None
        else:
            ledger.titles[item] = str(update.fields["title"])
        ledger.acked += 1

    def _draw_update(self) -> Update:
        item = FIRST_ITEM + self._draw.randrange(OWN_ITEMS)
        version = self.ledger.versions.get(item, 0) + 1
        there = self.ledger.titles.get(item) is not None
        kind = self._draw.choice(("upsert", "patch", "delete", "urgent")) if there else "upsert"
        if kind == "upsert":
            return ItemUpsert(
                item,
                attributes={"year": item - FIRST_ITEM, "genre": ["own"]},
                signals={"popularity": 1.0, "freshness": 1.0},
                fields={"title": f"own {version}", "year": 0},
                features={"movie": [item], "genres": ["drama"]},
                version=version,
            )
        if kind == "patch":
            return ItemPatch(item, fields={"title": f"own {version}"}, version=version)
        return ItemDelete(item, urgent=kind == "urgent", version=version)

    def end(self) -> Ledger:
        """Stop, finish what is in doubt, and return what was acked."""
        self._ended.set()
        self.join(WAIT_S)
        assert not self.is_alive()
        give_up_s = time.monotonic() + WAIT_S
        while self.ledger.in_doubt is not None:
            assert time.monotonic() < give_up_s, "the last update found nobody"
            try:
                with Client(self._address(), timeout_s=5.0) as client:
                    self._write(client)
            except LOST:
                time.sleep(0.05)
        return self.ledger


class Reader(threading.Thread):
    """Asks one question after another and checks what every answer must hold."""

    def __init__(self, address: Callable[[], str], history: list[int]) -> None:
        super().__init__(name="reader", daemon=True)
        self.marked = 0
        """Answers that held an item which names its generation."""
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.generations: set[int] = set()
        self._address = address
        self._history = history
        self._ended = threading.Event()

    def run(self) -> None:
        query = Query(features={"history": self._history}, k=40, return_fields=["title"], nprobe=16)
        while not self._ended.is_set():
            try:
                with Client(self._address(), timeout_s=2.0) as client:
                    while not self._ended.wait(PAUSE_S):
                        self._check(client.retrieve(query))
            except LOST as error:
                self.failed.append(str(error))
                self._ended.wait(0.02)

    def _check(self, result: Result) -> None:
        self.generations.add(result.generation)
        if result.coverage.documents < 1.0:
            self.failed.append(f"coverage {result.coverage.documents}: {result.coverage.reasons}")
        titles = set(map(str, result.fields["title"]))
        self.marked += f"generation {result.generation}" in titles
        strange = {
            one
            for one in titles
            if one.startswith("generation") and one != f"generation {result.generation}"
        }
        if strange:
            self.wrong.append(f"an answer of generation {result.generation} holds {strange}")
        if len(set(result.item_ids.tolist())) < len(result.item_ids):
            self.wrong.append("an answer holds an item twice")

    def end(self) -> None:
        self._ended.set()
        self.join(WAIT_S)
        assert not self.is_alive()


class Cluster:
    """A running cluster with its processes by role."""

    def __init__(self, state: StateDir, options: dict[str, Any]) -> None:
        self.state = state
        self.options = options

    @property
    def record(self) -> ClusterRecord:
        record = self.state.read_record()
        assert record is not None
        return record

    def address(self) -> str:
        record = self.state.read_record()
        return record.address if record and record.address else "127.0.0.1:9"

    def start(self) -> None:
        config = load(None, environ={}, options=self.options)
        launch.start(self.state, config, detached=False)

    def stop(self) -> None:
        launch.stop(self.state, timeout_s=20.0)

    def restart(self) -> None:
        """Start it again, as a person does whose supervisor was killed."""
        self.stop()
        self.start()

    def is_whole(self) -> bool:
        record = self.state.read_record()
        if record is None or not record.is_whole:
            return False
        try:
            with Client(self.address(), timeout_s=2.0) as client:
                return client.retrieve(k=1).coverage.documents == 1.0
        except LOST:
            return False

    def pids(self, role: str) -> list[int]:
        record = self.record
        if role == "router":
            return [record.router.pid]
        if role == "sequencer":
            return [record.sequencer.pid] if record.sequencer else []
        if role == "supervisor":
            return [record.driver.pid]
        return [one.pid for one in record.shards if one.pid]

    def kill(self, role: str, draw: random.Random) -> int:
        """Kill one process of a role and wait until it is gone; return its pid."""
        pid = draw.choice([one for one in self.pids(role) if one])
        os.kill(pid, signal.SIGKILL)
        return pid


def processes_of(record: ClusterRecord) -> list[Process]:
    return [record.guard, record.driver, *record.processes]


@contextmanager
def running(root: Path, generations: list[Path], **options: Any) -> Iterator[Cluster]:
    """Run a cluster on copies of these generations; everything it started ends with it."""
    state = StateDir(root)
    state.create()
    state.generations.mkdir()
    for number, path in enumerate(generations, start=1):
        shutil.copytree(path, generation_dir(state.generations, number))
    cluster = Cluster(
        state, {"listen.port": 0, "model.name": "films", "sharding.threads": 1, **options}
    )
    cluster.start()
    try:
        yield cluster
    finally:
        record = state.read_record()
        cluster.stop()
        left = [one for one in processes_of(record) if is_alive(one)] if record else []
        assert not left


def assert_kept(cluster: Cluster, ledger: Ledger) -> None:
    """Every acked item is there once as it was acked last, every deleted one is gone."""
    assert ledger.acked
    with Client(cluster.address(), timeout_s=10.0) as client:

        def found(low: int, high: int) -> dict[int, str]:
            result = client.retrieve(
                Query(
                    features={},
                    k=1000,
                    filter=f"genre:own AND year >= {low} AND year < {high}",
                    exact=True,
                    return_fields=["title"],
                )
            )
            assert result.coverage.documents == 1.0
            ids = result.item_ids.tolist()
            assert len(set(ids)) == len(ids), "an item is there twice"
            return dict(zip(ids, map(str, result.fields["title"]), strict=True))

        expected = {item: title for item, title in ledger.titles.items() if title is not None}

        def settled() -> bool:
            return found(0, OWN_ITEMS) == expected

        give_up_s = time.monotonic() + WAIT_S
        while not settled():
            if time.monotonic() > give_up_s:
                there = found(0, OWN_ITEMS)
                lost = {one: expected[one] for one in expected.keys() - there.keys()}
                back = {one: there[one] for one in there.keys() - expected.keys()}
                old = {
                    one: (there[one], expected[one])
                    for one in there.keys() & expected.keys()
                    if there[one] != expected[one]
                }
                pytest.fail(f"lost {lost}, came back {back}, not as acked {old}")
            time.sleep(0.05)


class Crash:
    """What the tests of this folder share."""

    Writer, Reader, Cluster = Writer, Reader, Cluster
    running = staticmethod(running)
    marked = staticmethod(marked)
    until = staticmethod(until)
    amount = staticmethod(amount)
    assert_kept = staticmethod(assert_kept)


@pytest.fixture(scope="session")
def crash() -> type[Crash]:
    return Crash


@pytest.fixture(scope="session")
def marked_generations(generation: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two generations of the same films; every film names the one that it was published in."""
    repository = tmp_path_factory.mktemp("marked")
    return [
        publish_generation(
            repository,
            name="films",
            model=generation.model,
            builder="two_tower",
            config=generation.model.config.model_dump(mode="json"),
            catalogue=marked(generation.catalogue, number),
            schema=generation.schema,
            defaults=SearchDefaults(probes=4, ann_k=40),
            num_clusters=generation.num_clusters,
        ).path
        for number in (1, 2)
    ]
