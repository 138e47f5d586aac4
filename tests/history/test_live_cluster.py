"""A router, a sequencer and shards with two replicas each, in threads: what readers may rely on.

It is small and quick, so that a planted bug can be looked for with it: replicas fall behind and
leave, a shard is gone, generations swap, and all that anybody saw is checked.
"""

import asyncio
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from history.checker import PROPERTIES, check
from history.recorder import Recorder, RecordingClient

from silvershard.cluster.client import Client, Query, RequestRefused
from silvershard.cluster.config import ListenSection, PingSection, QuerySection, RouterConfig
from silvershard.cluster.consistency import UpdateToken, newest
from silvershard.cluster.hosting import ready
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.router import Router
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import SequencerServer
from silvershard.cluster.shard_loader import ShardLoader
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import LogUnavailable
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import open_snapshot

SHARDS, REPLICAS = 2, 2
FIRST = 1 << 41
OWN_ITEMS = 40
FILMS = 20
"""So many of the published ones are written too."""
GENRES = ("Action", "Comedy", "Drama", "Horror", "Sci-Fi")
RECOVERY_S = 20.0
WAIT_S = 60.0
FILTERS = (
    "genre:own",
    "genre:own AND NOT genre:Drama",
    "genre:own AND year >= 2002",
    "NOT genre:Drama AND year < 1990",
    "NOT maker:7 AND genre:Horror",
    "maker IN (3, 7, 11, 19)",
    "genre:Comedy AND NOT (maker:3 OR maker:20)",
)


def until(condition: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.002)


class Stalling:
    """A log in front of another one that can be taken away from one reader."""

    def __init__(self, log: UpdateLog) -> None:
        self._log = log
        self.stalled = False

    def __getattr__(self, name: str) -> Any:
        if self.stalled and name in ("end", "read", "read_urgent", "wait"):
            raise LogUnavailable("test://", "stalled")
        return getattr(self._log, name)


class LiveCluster:
    """The processes of a cluster as threads of this one."""

    def __init__(self, folder: Path, snapshots: dict[int, Path], recorder: Recorder) -> None:
        self.recorder = recorder
        self.snapshots = snapshots
        self.generation = 1
        self.logs: dict[tuple[int, int], Stalling] = {}
        self.servers: dict[tuple[int, int], ShardServer] = {}
        self._map_path = folder / "map.json"
        self._map_version = 0
        self._log = open_log(f"sqlite://{folder}/log.db")
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        live = load_live_generation(snapshots[1])
        self._sequencer = SequencerServer(Sequencer(self._log, live, num_shards=SHARDS))
        self.run(self._sequencer.start())
        for shard in range(SHARDS):
            for replica in range(REPLICAS):
                self.serve(shard, replica)
        self.write_map()
        self._router = Router(
            RouterConfig(
                map_path=str(self._map_path),
                poll_ms=5,
                drain_s=1.0,
                listen=ListenSection(port=0),
                query=QuerySection(min_coverage=0.1, default_deadline_ms=10_000),
                ping=PingSection(every_ms=20, suspect_after=100, eject_after=400),
            )
        )
        self.run(self._router.start())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def serve(self, shard: int, replica: int) -> None:
        """Start a replica that has caught up."""
        place = shard, replica
        self.logs[place] = Stalling(self._log)
        log: Any = self.logs[place]
        load = ShardLoader(shard, SHARDS, log=log, headroom=0.5)
        path = self.snapshots[self.generation]
        server = ShardServer(ready(load(path)), snapshot=str(path), load=load, replica=replica)
        self.run(server.start())
        self.servers[place] = server

    def stop(self, *places: tuple[int, int]) -> None:
        """End replicas at once."""
        for place in places:
            self.run(self.servers.pop(place).stop(0))

    def write_map(self, **more: Any) -> None:
        self._map_version += 1
        entries = tuple(
            ShardEntry(
                shard=shard,
                replica=replica,
                address=one.address,
                epoch=one.epoch,
                documents=1,
                pid=1,
            )
            for (shard, replica), one in self.servers.items()
        )
        ShardMap(
            version=self._map_version,
            generation=self.generation,
            snapshot=str(self.snapshots[self.generation]),
            num_shards=SHARDS,
            entries=entries,
            sequencer=self._sequencer.address,
            log_url=self._log.url,
            **more,
        ).write_atomic(self._map_path)

    def swap(self, generation: int) -> None:
        """Load another generation everywhere and let it answer from then on."""
        for server in self.servers.values():
            path = str(self.snapshots[generation])
            self.loop.call_soon_threadsafe(server.hosting.prepare, generation, path)

        def is_prepared() -> bool:
            held = [server.hosting.served for server in self.servers.values()]
            return all(generation in [one.generation for one in each] for each in held)

        until(is_prepared, f"generation {generation} is not prepared")
        before = self.generation
        with self.recorder.activation(generation):
            self.generation = generation
            self.write_map(snapshots={before: str(self.snapshots[before])})

    def client(self, session: str) -> RecordingClient:
        return RecordingClient(
            Client(self._router.address, timeout_s=WAIT_S), self.recorder, session
        )

    def close(self) -> None:
        if hasattr(self, "_router"):
            self.run(self._router.stop())
        self.stop(*self.servers)
        self.run(self._sequencer.stop(0))
        self._log.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Load(threading.Thread, ABC):
    """Does one thing after another, until it is stopped or fails."""

    def __init__(self, cluster: LiveCluster, seed: int, films: list[int]) -> None:
        super().__init__(daemon=True)
        self.done = 0
        self.error: Exception | None = None
        self._cluster = cluster
        self._draw = random.Random(seed)
        self._films = films
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            with self._cluster.client(type(self).__name__ + str(id(self))) as client:
                while not self._ended.is_set():
                    self.step(client)
                    self.done += 1
        except Exception as error:  # noqa: BLE001  # told by the test
            self.error = error

    @abstractmethod
    def step(self, client: RecordingClient) -> None:
        """Do one thing."""

    def stop(self) -> None:
        self._ended.set()
        self.join(WAIT_S)


class Writer(Load):
    """Changes own items and some of the films."""

    tokens: tuple[UpdateToken, ...] = ()

    def __init__(self, cluster: LiveCluster, seed: int, films: list[int]) -> None:
        super().__init__(cluster, seed, films)
        self._versions: dict[int, int] = {}
        self._there = set(films)

    def step(self, client: RecordingClient) -> None:
        items = self._draw.sample([*range(FIRST, FIRST + OWN_ITEMS), *self._films], 3)
        updates = [self._update(item) for item in items]
        result = client.apply(updates)
        refused = {one.index for one in result.rejected}
        self.tokens = newest((*self.tokens, *result.tokens))
        for at, update in enumerate(updates):
            if at not in refused and isinstance(update, ItemDelete):
                self._there.discard(update.item_id)
            elif at not in refused:
                self._there.add(update.item_id)
        self._ended.wait(0.005)

    def _update(self, item: int) -> Update:
        version = self._versions[item] = self._versions.get(item, 0) + 1
        op = self._draw.choice(("upsert", "patch", "delete"))
        genres = self._draw.sample(GENRES, self._draw.randint(0, 2))
        if op == "delete" and item in self._there:
            return ItemDelete(item, urgent=self._draw.random() < 0.3, version=version)
        if op == "patch" and item in self._there:
            return ItemPatch(item, fields={"title": f"own {version}"}, version=version)
        return ItemUpsert(
            item,
            attributes={
                "genre": ["own", *genres],
                "maker": self._draw.sample(range(24), 2),
                "year": self._draw.randint(2000, 2004),
            },
            signals={"popularity": self._draw.random()},
            fields={"title": f"own {version}", "year": version},
            features={"genres": genres},
            version=version,
        )


class Reader(Load):
    """Asks all kinds of questions."""

    def __init__(self, cluster: LiveCluster, seed: int, films: list[int], writer: Writer) -> None:
        super().__init__(cluster, seed, films)
        self._writer = writer

    def step(self, client: RecordingClient) -> None:
        kind = self._draw.random()
        after = self._writer.tokens if self._draw.random() < 0.6 else ()
        if kind < 0.3:
            asked = Query(features={"history": self._films[:4]}, k=40, after=after)
        else:
            text = FILTERS[0] if kind < 0.5 else self._draw.choice(FILTERS)
            asked = Query(filter=text, k=500, exact=True, after=after)
        try:
            client.retrieve(replace(asked, return_fields=["title", "year"]))
        except RequestRefused:
            # The history says so.
            self._ended.wait(0.01)


@pytest.fixture(scope="module")
def snapshots(generation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two generations of the same films, whose titles say of which they are."""
    repository = tmp_path_factory.mktemp("history")
    paths = {}
    for number in (1, 2):
        titles = np.array([f"G{number}"] * len(generation.catalogue), dtype=object)
        published = publish_generation(
            repository,
            name="films",
            model=generation.model,
            builder="two_tower",
            config=generation.model.config.model_dump(mode="json"),
            catalogue=replace(
                generation.catalogue, fields={**generation.catalogue.fields, "title": titles}
            ),
            schema=generation.schema,
            defaults=SearchDefaults(probes=4, ann_k=40),
            num_clusters=16,
            false_positive_rate=0.1,
            max_exact_planes=6,
        )
        paths[number] = published.path
    return paths


@pytest.fixture
def recorder(tmp_path: Path, snapshots: dict[int, Path], generation: Any) -> Iterator[Recorder]:
    with Recorder(tmp_path / "history.jsonl") as made:
        for number, path in snapshots.items():
            partitions = open_snapshot(path).spec.num_partitions
            made.catalogue(
                number,
                generation.catalogue,
                num_partitions=partitions,
                marker=("title", f"G{number}"),
            )
        yield made


@pytest.fixture
def cluster(
    tmp_path: Path, snapshots: dict[int, Path], recorder: Recorder
) -> Iterator[LiveCluster]:
    made = LiveCluster(tmp_path, snapshots, recorder)
    try:
        with made.client("first") as client:
            client.client.wait_until_ready(WAIT_S)
        yield made
    finally:
        made.close()


@contextmanager
def working(*loads: Load) -> Iterator[None]:
    for one in loads:
        one.start()
    try:
        yield
    finally:
        for one in loads:
            one.stop()
    assert [one.error for one in loads] == [None] * len(loads)


def drive(cluster: LiveCluster, writer: Writer, readers: list[Reader]) -> None:
    """Let replicas fall behind and leave, generations swap and a shard be gone, under load."""
    recorder = cluster.recorder

    def goes_on(times: int = 12) -> None:
        loads = (writer, *readers)
        before = [one.done for one in loads]
        until(
            lambda: any(one.error for one in loads)
            or all(one.done >= at + times for one, at in zip(loads, before, strict=True)),
            "nobody gets on",
        )

    with working(writer, *readers):
        goes_on(20)
        with recorder.fault("stall log", "a replica of each shard"):
            for shard in range(SHARDS):
                cluster.logs[shard, shard].stalled = True
            goes_on()
            for log in cluster.logs.values():
                log.stalled = False
        cluster.swap(2)
        goes_on()
        with recorder.fault("stop", "a replica"):
            cluster.stop((1, 0))
            goes_on()
            # It knows nothing of the generation that serves when it is named again.
            cluster.generation = 1
            cluster.serve(1, 0)
            cluster.generation = 2
            cluster.write_map()
        goes_on()
        with recorder.fault("stop", "a shard", excuses=True, recovery_s=RECOVERY_S):
            cluster.stop((1, 0), (1, 1))
            goes_on()
            cluster.serve(1, 0)
            cluster.serve(1, 1)
            cluster.write_map()
            with cluster.client("waiting") as client:
                until(
                    lambda: client.client.retrieve(k=1).coverage.documents == 1.0,
                    "the shard did not come back",
                )
        goes_on(20)
    # The last look finds all that was acked.
    with cluster.client("last") as client:
        client.retrieve(
            filter="genre:own", k=500, exact=True, return_fields=["title"], after=writer.tokens
        )


@pytest.mark.slow
def test_readers_find_nothing_that_cannot_be(
    cluster: LiveCluster, recorder: Recorder, generation: Any
) -> None:
    films = generation.catalogue.item_ids[:FILMS].tolist()
    writer = Writer(cluster, 1, films)
    readers = [Reader(cluster, seed, films, writer) for seed in (2, 3)]
    try:
        drive(cluster, writer, readers)
    finally:
        # A cluster that breaks down may have said what cannot be before.
        check(recorder.events()).require()
    check(recorder.events()).require(*PROPERTIES)
