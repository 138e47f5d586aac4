"""A cluster of several processes under load, what was acked there, and who is to be killed.

How much is done comes from the environment, so that the same tests are bounded in CI and long in
``make test-crash``: ``SILVERSHARD_CRASH_SWAPS`` and ``SILVERSHARD_CRASH_FAULTS``.
"""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from history.checker import check
from history.recorder import Recorder, RecordingClient

from silvershard.cluster import Client, Query, Result
from silvershard.cluster.consistency import UpdateToken, newest
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.deploy import launch
from silvershard.deploy.config import load
from silvershard.deploy.processes import Process, descendants, identify, is_alive, kill_all
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import RetrievalError
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 120.0
OWN_ITEMS = 200
"""Of one writer."""
FIRST_ITEM = 1 << 41
"""Items of the tests; those of the published catalogue have smaller ids."""
MOST_AT_ONCE = 4
AUDIT_EVERY = 4
"""Of the questions of a reader, one in so many reads what was written."""
PAUSE_S = 0.02
"""Between two calls of a thread: a load that leaves the machine some time for all else."""
LOST = RetrievalError, OSError
LOST_PAUSE_S = 0.05


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


class Acked(NamedTuple):
    """An item as it was acked last."""

    version: int
    title: str | None
    """None: it is deleted."""


NOTHING = Acked(0, None)


@dataclass
class Ledger:
    """What was acked of the items of one writer."""

    first: int
    """Its first item; there are ``OWN_ITEMS`` of them."""
    items: dict[int, Acked] = field(default_factory=dict)
    in_doubt: list[Update] = field(default_factory=list)
    """Sent and not answered; they may be there or not until they are sent again."""
    tokens: tuple[UpdateToken, ...] = ()
    acked: int = 0


class Writer(threading.Thread):
    """Changes items one call after another; what is not answered is sent again until it is."""

    def __init__(
        self,
        address: Callable[[], str],
        recorder: Recorder,
        seed: int,
        *,
        number: int = 0,
        pause_s: float = PAUSE_S,
    ) -> None:
        super().__init__(name=f"writer {number}", daemon=True)
        self.ledger = Ledger(FIRST_ITEM + number * OWN_ITEMS)
        self.failures: list[str] = []
        self.rejected: list[str] = []
        self._address = address
        self._recorder = recorder
        self._pause_s = pause_s
        self._draw = random.Random(seed)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                with self._client() as client:
                    while not self._ended.wait(self._pause_s):
                        self._write(client)
            except LOST as error:
                self.failures.append(str(error))
                self._ended.wait(LOST_PAUSE_S)

    def _client(self) -> RecordingClient:
        client = Client(self._address(), timeout_s=5.0)
        return RecordingClient(client, self._recorder, session=self.name)

    def _write(self, client: RecordingClient) -> None:
        ledger = self.ledger
        if not ledger.in_doubt:
            ledger.in_doubt = self._draw_updates()
        result = client.apply(ledger.in_doubt)
        refused = {one.index: one for one in result.rejected}
        sent, ledger.in_doubt = ledger.in_doubt, []
        ledger.tokens = newest((*ledger.tokens, *result.tokens))
        for at, update in enumerate(sent):
            if at not in refused:
                self._take(update)
            elif refused[at].code == "RESOURCE_EXHAUSTED":
                # A shard that has just started has not said yet how much room it has.
                ledger.in_doubt.append(update)
            else:
                self.rejected.append(refused[at].reason)

    def _take(self, update: Update) -> None:
        title = None if isinstance(update, ItemDelete) else str(update.fields["title"])
        self.ledger.items[update.item_id] = Acked(update.version, title)
        self.ledger.acked += 1

    def _draw_updates(self) -> list[Update]:
        items = self._draw.sample(range(OWN_ITEMS), self._draw.randint(1, MOST_AT_ONCE))
        return [self._draw_update(self.ledger.first + item) for item in items]

    def _draw_update(self, item: int) -> Update:
        before = self.ledger.items.get(item, NOTHING)
        version = before.version + 1
        kinds = ("upsert", "patch", "delete", "urgent")
        kind = self._draw.choice(kinds) if before.title is not None else "upsert"
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

    def stop(self) -> None:
        self._ended.set()
        self.join(WAIT_S)
        assert not self.is_alive()

    def end(self) -> Ledger:
        """Stop, finish what is in doubt, and return what was acked."""
        self.stop()
        give_up_s = time.monotonic() + WAIT_S
        while self.ledger.in_doubt:
            assert time.monotonic() < give_up_s, "the last updates found nobody"
            try:
                with self._client() as client:
                    self._write(client)
            except LOST:
                time.sleep(0.01)
        return self.ledger


@contextmanager
def working(*threads: "Writer | Reader") -> Iterator[None]:
    """Let writers and readers work as long as the context lasts, however it ends."""
    with ExitStack() as stack:
        for one in threads:
            one.start()
            stack.callback(one.stop)
        yield


def audit(client: RecordingClient, ledger: Ledger, *, settled: bool = False) -> float:
    """Read what was written, on its tokens unless all is settled; return the coverage."""
    low = ledger.first - FIRST_ITEM
    result = client.retrieve(
        Query(
            features={},
            k=1000,
            filter=f"genre:own AND year >= {low} AND year < {low + OWN_ITEMS}",
            exact=True,
            return_fields=["title"],
            after=() if settled else ledger.tokens,
        ),
        settled=settled,
    )
    return result.coverage.documents


class Reader(threading.Thread):
    """Asks one question after another, for the history of the test."""

    def __init__(
        self,
        address: Callable[[], str],
        recorder: Recorder,
        liked: list[int],
        ledgers: Sequence[Ledger] = (),
        *,
        timeout_s: float = 2.0,
    ) -> None:
        super().__init__(name="reader", daemon=True)
        self.marked = 0
        """Answers that held an item which names its generation."""
        self.audits = 0
        """Answers that held all that was acked."""
        self.generations: set[int] = set()
        self._address = address
        self._recorder = recorder
        self._liked = liked
        self._ledgers = ledgers
        self._timeout_s = timeout_s
        self._ended = threading.Event()

    def run(self) -> None:
        query = Query(features={"history": self._liked}, k=40, return_fields=["title"], nprobe=16)
        asked = 0
        while not self._ended.is_set():
            try:
                client = Client(self._address(), timeout_s=self._timeout_s)
                with RecordingClient(client, self._recorder, session=self.name) as own:
                    while not self._ended.wait(PAUSE_S):
                        asked += 1
                        if self._ledgers and asked % AUDIT_EVERY == 0:
                            ledger = self._ledgers[asked % len(self._ledgers)]
                            self.audits += audit(own, ledger) == 1.0
                        else:
                            self._count(own.retrieve(query))
            except LOST:
                self._ended.wait(LOST_PAUSE_S)

    def _count(self, result: Result) -> None:
        self.generations.add(result.generation)
        self.marked += f"generation {result.generation}" in set(map(str, result.fields["title"]))

    def stop(self) -> None:
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

    def kill(
        self, role: str, draw: random.Random, when: Callable[[], object] = lambda: None
    ) -> int:
        """Kill one living process of a role and wait until it is gone; return its pid."""
        living = [one for one in map(identify, filter(None, self.pids(role))) if one is not None]
        doomed = draw.choice(living)
        when()
        assert not kill_all([doomed])
        return doomed.pid

    def kill_everything(self, when: Callable[[], object] = lambda: None) -> None:
        """Kill every process at once, as a power cut does; the one that writes the log is first."""
        writing = [one for one in map(identify, self.pids("sequencer")) if one is not None]
        record = self.record
        doomed = [*writing, *processes_of(record), *descendants(record.guard.pid)]
        when()
        assert not kill_all(doomed)


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
    own = {
        "listen.port": 0,
        "model.name": "films",
        "sharding.threads": 1,
        "runtime.start_timeout_s": 2 * WAIT_S,
    }
    cluster = Cluster(state, {**own, **options})
    cluster.start()
    try:
        yield cluster
    finally:
        record = state.read_record()
        cluster.stop()
        left = [one for one in processes_of(record) if is_alive(one)] if record else []
        assert not left


def look_at_all(
    cluster: Cluster, recorder: Recorder, *ledgers: Ledger, settled: bool = False
) -> None:
    """Read all that was acked, for the history: every item must be as it was acked last.

    That is so at once for who shows the tokens of the acks; who waits is only for a cluster that
    does not answer from every document yet.
    """
    give_up_s = time.monotonic() + WAIT_S
    for ledger in ledgers:
        assert ledger.acked
        coverage = 0.0
        while coverage < 1.0:
            assert time.monotonic() < give_up_s, "no answer holds all documents"
            client = Client(cluster.address(), timeout_s=10.0)
            try:
                with RecordingClient(client, recorder, session="all") as own:
                    coverage = audit(own, ledger, settled=settled)
            except LOST:
                time.sleep(0.01)


def assert_right(recorder: Recorder, *names: str) -> None:
    """Check the history of the test; these properties had something to look at."""
    check(recorder.events()).require(*names)


class Crash:
    """What the tests of this folder share."""

    Writer, Reader, Cluster = Writer, Reader, Cluster
    running = staticmethod(running)
    working = staticmethod(working)
    marked = staticmethod(marked)
    until = staticmethod(until)
    amount = staticmethod(amount)
    audit = staticmethod(audit)
    look_at_all = staticmethod(look_at_all)
    assert_right = staticmethod(assert_right)


@pytest.fixture(scope="session")
def crash() -> type[Crash]:
    return Crash


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    """The history of the test."""
    with Recorder(tmp_path / "history.jsonl") as made:
        yield made


@pytest.fixture
def marked_recorder(
    recorder: Recorder, marked_generations: list[Path], generation: Any
) -> Recorder:
    """The history of a test on ``marked_generations``."""
    for number, path in enumerate(marked_generations, start=1):
        recorder.catalogue(
            number,
            generation.catalogue,
            num_partitions=open_snapshot(path).spec.num_partitions,
            marker=("title", f"generation {number}"),
        )
    return recorder


@pytest.fixture(scope="session")
def marked_generations(generation: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three generations of the same films; every film names the one that it was published in."""
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
        for number in (1, 2, 3)
    ]
