"""Shards that follow a real update log, behind a real router: what a reader may rely on."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster.client import Client, RequestRefused
from silvershard.cluster.config import ListenSection, PingSection, QuerySection, RouterConfig
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.hosting import ready
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.router import Router
from silvershard.cluster.shard_loader import ShardLoader
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.shard_server import ShardServer
from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import LogUnavailable
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import open_snapshot

MAKER = 777
"""An attribute value that only items of these tests have."""
MARKED = f"maker:{MAKER}"
FIRST = 1 << 41
"""Beyond every published item."""


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the state that was waited for did not come"
        time.sleep(0.002)


class Broken:
    """A log in front of another one that can be taken away."""

    def __init__(self, log: UpdateLog) -> None:
        self._log = log
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        if self.broken and name in ("end", "read", "read_urgent", "wait"):
            raise LogUnavailable("test://", "unplugged")
        return getattr(self._log, name)


class Following:
    """Shard servers that follow a log, and a router, in threads of this process."""

    def __init__(self, folder: Path, snapshots: dict[int, Path], num_shards: int) -> None:
        self.folder = folder
        self.snapshots = snapshots
        self.num_shards = num_shards
        self.log = open_log(f"sqlite://{folder}/log.db")
        self.epoch = self.log.acquire(0)
        self.versions = itertools.count(1)
        self.servers: list[ShardServer] = []
        self.logs: list[Broken] = []
        self.router: Router | None = None
        self.map_version = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def serve(self, shard: int, replica: int = 0, generation: int = 1) -> ShardServer:
        self.logs.append(Broken(self.log))
        load = ShardLoader(shard, self.num_shards, log=self.logs[-1], headroom=0.5)
        path = self.snapshots[generation]
        server = ShardServer(ready(load(path)), snapshot=str(path), load=load, replica=replica)
        self.servers.append(server)
        self.run(server.start())
        return server

    def write_map(self, generation: int = 1, **more: Any) -> None:
        entries = tuple(
            ShardEntry(
                shard=one.shard,
                replica=one.replica,
                address=one.address,
                epoch=one.epoch,
                documents=1,
                pid=1,
            )
            for one in self.servers
        )
        ShardMap(
            version=next(self.map_version),
            generation=generation,
            snapshot=str(self.snapshots[generation]),
            num_shards=self.num_shards,
            entries=entries,
            **more,
        ).write_atomic(self.folder / "map.json")

    def route(self, **query: Any) -> str:
        config = RouterConfig(
            map_path=str(self.folder / "map.json"),
            poll_ms=5,
            drain_s=1.0,
            listen=ListenSection(port=0),
            query=QuerySection(**{"min_coverage": 1.0, "default_deadline_ms": 10_000, **query}),
            ping=PingSection(every_ms=5, suspect_after=200, eject_after=400),
        )
        self.router = Router(config)
        self.run(self.router.start())
        return self.router.address

    def append(self, *updates: Any) -> UpdateToken:
        """Log updates with versions of their own; return the token of the last one."""
        records = []
        for update in updates:
            version = next(self.versions)
            records.append(
                NewRecord(
                    update.item_id,
                    version,
                    urgent=isinstance(update, ItemDelete) and update.urgent,
                    deleted=isinstance(update, ItemDelete),
                    expires_unix_ms=0,
                    payload=logged(mutation_to(update), version),
                )
            )
        first = self.log.append(0, self.epoch, records, int(time.time() * 1e3))
        return UpdateToken(self.log.log_id, 0, first + len(records) - 1)

    def close(self) -> None:
        if self.router is not None:
            self.run(self.router.stop())
        for server in self.servers:
            self.run(server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self.log.close()


def item(number: int, variant: str = "A") -> ItemUpsert:
    """A marked item in one of two variants that differ in everything."""
    is_a = variant == "A"
    return ItemUpsert(
        FIRST + number,
        attributes={
            "genre": ("Action",) if is_a else ("Comedy", "Drama"),
            "maker": (MAKER,),
            "year": 2001 if is_a else 2002,
        },
        signals={"popularity": 0.125 if is_a else 0.75},
        fields={"title": variant, "year": 2001 if is_a else 2002},
        features={"genres": ("Action",) if is_a else ("Comedy", "Drama")},
    )


@pytest.fixture(scope="module")
def generations(generation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two generations of the same films; the titles say which of them they are of."""
    repository = tmp_path_factory.mktemp("generations")
    paths = {}
    for number in (1, 2):
        titles = np.array([f"G{number}"] * len(generation.catalogue), dtype=object)
        fields = {**generation.catalogue.fields, "title": titles}
        published = publish_generation(
            repository,
            name="films",
            model=generation.model,
            builder="two_tower",
            config=generation.model.config.model_dump(mode="json"),
            catalogue=replace(generation.catalogue, fields=fields),
            schema=generation.schema,
            defaults=SearchDefaults(probes=4, ann_k=40),
            num_clusters=16,
            false_positive_rate=0.1,
            max_exact_planes=6,
        )
        paths[open_snapshot(published.path).spec.generation] = published.path
    assert sorted(paths) == [1, 2]
    return paths


@pytest.fixture
def follow(tmp_path: Path, generations: dict[int, Path]) -> Iterator[Callable[..., Following]]:
    with contextlib.ExitStack() as stack:

        def make(num_shards: int) -> Following:
            made = Following(tmp_path, generations, num_shards)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def two_shards(follow: Any) -> Following:
    made: Following = follow(2)
    for shard in range(2):
        made.serve(shard)
    made.write_map()
    return made


@contextlib.contextmanager
def asking(cluster: Following, **query: Any) -> Iterator[Client]:
    with Client(cluster.route(**query), timeout_s=20) as client:
        client.wait_until_ready(20)
        yield client


def found(client: Client, **more: Any) -> list[tuple[int, str]]:
    result = client.retrieve(k=50, filter=MARKED, return_fields=["title"], **more)
    titles = [str(one) for one in result.fields["title"]]
    return sorted(zip((result.item_ids - FIRST).tolist(), titles, strict=True))


def test_a_token_lets_a_reader_see_what_it_wrote(two_shards: Following) -> None:
    with asking(two_shards) as client:
        for round_ in range(5):
            expected = []
            token = None
            for number in range(8):
                variant = "AB"[(round_ + number) % 2]
                token = two_shards.append(item(number, variant))
                expected.append((number, variant))
            assert token is not None
            assert found(client, after=[token]) == expected
        token = two_shards.append(
            ItemDelete(FIRST + 3), ItemPatch(FIRST + 4, fields={"title": "patched"})
        )
        seen = dict(found(client, after=[token]))
        assert 3 not in seen
        assert seen[4] == "patched"
        assert len(seen) == 7


def test_documents_are_counted_as_they_are_now(two_shards: Following) -> None:
    with asking(two_shards) as client:
        assert client.retrieve(k=1).counts.addressed == 600
        token = two_shards.append(*(item(number) for number in range(9)))
        client.retrieve(k=1, after=[token])
        token = two_shards.append(ItemDelete(FIRST), ItemDelete(FIRST + 1, urgent=True))
        assert client.retrieve(k=1, after=[token]).counts.addressed == 607


def test_the_cut_of_answers_only_grows_and_staleness_is_told(two_shards: Following) -> None:
    with asking(two_shards) as client:
        last = 0
        for number in range(40):
            two_shards.append(item(number % 5))
            result = client.retrieve(k=1)
            (token,) = result.cut
            assert (token.log_id, token.partition) == (two_shards.log.log_id, 0)
            assert token.position >= last
            assert result.staleness_s is not None
            assert result.staleness_s < 5
            last = token.position
        until(lambda: client.retrieve(k=1).cut[0].position == 40)
        assert client.retrieve(k=1, max_staleness_s=0.0).cut[0].position == 40


def test_what_no_shard_will_reach_is_an_error_and_never_an_old_answer(
    two_shards: Following,
) -> None:
    with asking(two_shards) as client:
        token = two_shards.append(item(1))
        late = token._replace(position=token.position + 1)
        with pytest.raises(RequestRefused) as raised:
            client.retrieve(k=1, after=[late], timeout_s=20)
        assert raised.value.code == "INVALID_ARGUMENT"
        (violation,) = raised.value.violations
        assert violation.field == "consistency.after"
        assert violation.description == (
            f"must be at most {token.position} in log partition 0, where the update log ends, "
            f"got {late.position}"
        )
        foreign = token._replace(log_id=token.log_id + 1)
        with pytest.raises(RequestRefused, match="update log that is followed") as raised:
            client.retrieve(k=1, after=[foreign])
        assert (raised.value.code, raised.value.reason) == ("FAILED_PRECONDITION", "FOREIGN_TOKEN")
        with pytest.raises(RequestRefused, match="log partition below 1, got 3"):
            client.retrieve(k=1, after=[token._replace(partition=3)])
        assert found(client, after=[token]) == [(1, "A")]


def looks(client: Client, number: int, **more: Any) -> set[tuple[Any, ...]]:
    """Everything that an answer tells of each marked item."""
    result = client.retrieve(
        features={"history": []},
        k=number,
        filter=MARKED,
        return_fields=["title", "year"],
        exact=True,
        **more,
    )
    assert len(result.item_ids) == number
    return {
        (
            int(one),
            title,
            year,
            float(score),
            *(float(of[at]) for of in result.task_scores.values()),
        )
        for at, (one, title, year, score) in enumerate(
            zip(
                result.item_ids,
                result.fields["title"],
                result.fields["year"],
                result.scores,
                strict=True,
            )
        )
    }


@pytest.mark.slow
def test_an_update_is_seen_whole_by_readers_in_a_tight_loop(two_shards: Following) -> None:
    number = 24
    with asking(two_shards) as client:
        whole: set[tuple[Any, ...]] = set()
        for variant in "AB":
            token = two_shards.append(*(item(one, variant) for one in range(number)))
            seen = looks(client, number, after=[token])
            assert {one[1:3] for one in seen} == {(variant, 2001 if variant == "A" else 2002)}
            whole |= seen
        assert len({one[3] for one in whole}) > 1
        ended = threading.Event()
        strange: list[Any] = []
        seen_variants: set[str] = set()
        rounds = [0]

        def read() -> None:
            with Client(two_shards.router.address, timeout_s=20) as own:  # type: ignore[union-attr]
                while not ended.is_set():
                    seen = looks(own, number)
                    strange.extend(seen - whole)
                    seen_variants.update(one[1] for one in seen)
                    rounds[0] += 1
                    for one in own.retrieve(
                        k=number, filter=f"{MARKED} AND year = 2001", return_fields=["title"]
                    ).fields["title"]:
                        if one != "A":
                            strange.append(one)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for step in range(60):
                variant = "AB"[step % 2]
                two_shards.append(*(item(one, variant) for one in range(number)))
                before = rounds[0]
                until(lambda before=before: rounds[0] > before or bool(strange))  # type: ignore[misc]
        finally:
            ended.set()
            for reader in readers:
                reader.join(30)
        assert strange == []
        assert seen_variants == {"A", "B"}


def test_without_its_log_a_shard_serves_on_ages_and_recovers(two_shards: Following) -> None:
    with asking(two_shards, lagging_ms=50) as client:
        token = two_shards.append(item(1))
        assert found(client, after=[token]) == [(1, "A")]
        for log in two_shards.logs:
            log.broken = True
        ages = []

        def has_aged() -> bool:
            result = client.retrieve(k=1)
            assert result.coverage.documents == 1.0
            ages.append(result.staleness_s)
            return result.coverage.reasons == ("UPDATES_LAGGING",)

        until(has_aged)
        assert ages[-1] > 0.05
        later = two_shards.append(item(1, "B"))
        assert found(client) == [(1, "A")]
        with pytest.raises(RequestRefused) as raised:
            found(client, max_staleness_s=0.01, timeout_s=2.0)
        assert raised.value.coverage is not None
        assert raised.value.coverage.reasons == ("STALE_REPLICA_DROPPED",)
        for log in two_shards.logs:
            log.broken = False
        assert found(client, after=[later], timeout_s=10) == [(1, "B")]
        until(lambda: not client.retrieve(k=1).coverage.degraded)


def test_a_replica_that_is_behind_is_not_asked_for_what_the_other_one_has(follow: Any) -> None:
    cluster: Following = follow(1)
    cluster.serve(0, replica=0)
    cluster.serve(0, replica=1)
    cluster.write_map()
    with asking(cluster) as client:
        cluster.logs[0].broken = True
        token = cluster.append(item(1))
        result = client.retrieve(k=1, filter=MARKED, after=[token])
        assert result.item_ids.tolist() == [FIRST + 1]
        assert not result.coverage.degraded
        cluster.logs[1].broken = True
        token = cluster.append(item(2))
        with pytest.raises(RequestRefused):
            client.retrieve(k=1, filter=MARKED, after=[token], timeout_s=2.0)


def titles_of(client: Client, **more: Any) -> set[str]:
    return {
        str(one) for one in client.retrieve(k=40, return_fields=["title"], **more).fields["title"]
    }


def prepare(cluster: Following, generation: int) -> None:
    for server in cluster.servers:
        loop = cluster._loop
        path = str(cluster.snapshots[generation])
        loop.call_soon_threadsafe(server.hosting.prepare, generation, path)
    until(lambda: all(len(one.hosting.served) == 2 for one in cluster.servers))


@pytest.mark.slow
def test_two_generations_serve_side_by_side_and_never_mix(two_shards: Following) -> None:
    cluster = two_shards
    with asking(cluster) as client:
        early = cluster.append(*(item(number) for number in range(4)))
        assert titles_of(client) == {"G1"}
        prepare(cluster, 2)
        ended = threading.Event()
        strange: list[Any] = []
        generations: list[int] = []

        def read() -> None:
            with Client(cluster.router.address, timeout_s=20) as own:  # type: ignore[union-attr]
                while not ended.is_set():
                    result = own.retrieve(k=40, return_fields=["title"])
                    wanted = {f"G{result.generation}"}
                    if set(result.fields["title"]) - {"A", "B"} != wanted:
                        strange.append((result.generation, result.fields["title"]))
                    generations.append(result.generation)

        reader = threading.Thread(target=read)
        reader.start()
        held = {1: str(cluster.snapshots[1]), 2: str(cluster.snapshots[2])}
        connections = cluster.router._connections  # type: ignore[union-attr]
        before = {id(one) for one, _ in connections._held.values()}
        try:
            for step in range(6):
                live = 2 - step % 2
                cluster.write_map(live, snapshots=held, aliases={"canary": 3 - live})
                count = len(generations)
                until(lambda count=count, live=live: live in generations[count:])  # type: ignore[misc]
                late = cluster.append(item(step, "B"))
                for generation in (1, 2):
                    seen = dict(found(client, after=[early, late], generation=generation))
                    assert seen[step] == "B"
        finally:
            ended.set()
            reader.join(30)
        assert strange == []
        # The processes are the same, and so are the connections to them.
        assert {id(one) for one, _ in connections._held.values()} == before
        assert titles_of(client, generation=1) <= {"G1", "A", "B"}
        assert titles_of(client, generation=2) <= {"G2", "A", "B"}
        with pytest.raises(RequestRefused, match="generation 3 is not served; 1, 2 is"):
            client.retrieve(k=1, generation=3)
        for server in cluster.servers:
            cluster._loop.call_soon_threadsafe(server.hosting.retire, 1)
        cluster.write_map(2)
        until(lambda: [len(one.hosting.served) for one in cluster.servers] == [1, 1])
        assert titles_of(client, generation=2) <= {"G2", "A", "B"}

        def is_gone() -> bool:
            try:
                client.retrieve(k=1, generation=1)
            except RequestRefused as error:
                return error.code == "ABORTED"
            return False

        until(is_gone)


def test_a_generation_that_is_prepared_late_has_every_update(two_shards: Following) -> None:
    cluster = two_shards
    expected = []
    for number in range(30):
        cluster.append(item(number, "A"))
        if number % 3:
            cluster.append(item(number, "B"))
            expected.append((number, "B"))
        else:
            cluster.append(ItemDelete(FIRST + number))
    with asking(cluster) as client:
        prepare(cluster, 2)
        held = {1: str(cluster.snapshots[1])}
        cluster.write_map(2, snapshots=held)
        until(lambda: client.retrieve(k=1).generation == 2)
        assert found(client) == expected
        until(lambda: found(client, generation=1) == expected)


def same(one: Any, other: Any) -> bool:
    return (one.item_ids.tolist(), one.scores.tolist()) == (
        other.item_ids.tolist(),
        other.scores.tolist(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3])
def test_answers_at_the_same_cut_are_the_same_bytes_on_any_number_of_shards(
    two_shards: Following, num_shards: int, request_maker: Any, generation: Any
) -> None:
    requests = request_maker(generation, 12, seed=5)
    for number in range(40):
        two_shards.append(item(number % 17, "AB"[number % 2]))
    end = two_shards.append(
        ItemDelete(FIRST + 5), ItemDelete(int(generation.catalogue.item_ids[0]))
    )
    with asking(two_shards) as client:
        expected = [ask(client, one, end) for one in requests]
    two_shards.run(two_shards.router.stop())  # type: ignore[union-attr]
    other = two_shards
    for server in other.servers:
        other.run(server.stop(0))
    other.servers, other.num_shards = [], num_shards
    for shard in range(num_shards):
        other.serve(shard)
    other.write_map()
    with asking(other) as client:
        for wanted, one in zip(expected, requests, strict=True):
            assert same(ask(client, one, end), wanted)


def ask(client: Client, request: Any, token: UpdateToken) -> Any:
    names: Sequence[str] = ("features", "k", "filter", "exclude_ids", "nprobe", "ann_k", "exact")
    fields = {name: getattr(request, name) for name in names}
    return client.retrieve(**fields, after=[token])
