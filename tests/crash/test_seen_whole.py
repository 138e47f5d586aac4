"""Shards and a router as processes of their own, a log that is written as fast as it takes."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from history.events import Token
from history.recorder import Recorder, RecordingClient, write_of

from silvershard.cluster import Client, Query, Result
from silvershard.cluster.config import ListenSection, PingSection, RouterConfig
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemUpsert

pytestmark = pytest.mark.slow

FEW_LOOKS = 300
ITEMS = 12
FIRST_ITEM = 1 << 42
"""Beyond every item of the other tests."""
FIRST_YEAR = 3000
SHARDS = 2
SHARD_PROCESS = Path(__file__).parents[1] / "cluster" / "shard_process.py"
GENRES = ("Action", "Comedy", "Drama", "Horror", "Sci-Fi")
VARIANTS = 12
"""Each in an embedding, a signal, an attribute and two fields of its own."""

Look = tuple[float, ...]


def item(at: int, variant: int) -> ItemUpsert:
    """An item that says in everything which variant it is; the tower embeds its genres."""
    genres = [name for bit, name in enumerate(GENRES) if variant + 1 >> bit & 1]
    return ItemUpsert(
        FIRST_ITEM + at,
        attributes={"year": FIRST_YEAR + variant, "genre": genres},
        signals={"popularity": (variant + 1) / VARIANTS, "freshness": 1 / (variant + 1)},
        fields={"title": f"variant {variant}", "year": variant},
        features={"genres": genres},
    )


def ask(client: Any, liked: list[int], variant: int, after: Any = (), **how: Any) -> Result:
    """Return the items whose attribute says that they are of a variant."""
    result: Result = client.retrieve(
        Query(
            features={"history": liked},
            k=ITEMS,
            filter=f"year = {FIRST_YEAR + variant}",
            exact=True,
            return_fields=["title", "year"],
            after=tuple(after),
            min_coverage=1.0,
        ),
        **how,
    )
    return result


def looks(result: Result) -> list[Look]:
    """Return what each item of an answer shows of its embedding and its signals."""
    columns = (result.scores, *(result.task_scores[name] for name in sorted(result.task_scores)))
    return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


class Reader(threading.Thread):
    """Asks for one variant after another; every item must be of that one in all that it shows."""

    def __init__(
        self, address: str, recorder: Recorder, liked: list[int], known: list[Look], begin: int
    ) -> None:
        super().__init__(name="reader", daemon=True)
        self.seen: list[int] = [0] * VARIANTS
        self.items = 0
        self.answers = 0
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._address = address
        self._recorder = recorder
        self._liked = liked
        self._known = known
        self._begin = begin

    def run(self) -> None:
        try:
            client = Client(self._address, timeout_s=20.0)
            with RecordingClient(client, self._recorder) as own:
                for variant in itertools.islice(
                    itertools.cycle(range(VARIANTS)), self._begin, None
                ):
                    if self.ended.is_set():
                        return
                    result = ask(own, self._liked, variant, shown=self._shown)
                    self.answers += 1
                    self.items += len(result.item_ids)
                    self.seen[variant] += bool(len(result.item_ids))
        except Exception as error:  # noqa: BLE001  # told by the test
            self.error = error

    def _shown(self, result: Result) -> dict[str, list[Any]]:
        """Return which variant each item is of by its embedding and its signals."""
        known = {look: variant for variant, look in enumerate(self._known)}
        return {"look": [known.get(one, str(one)) for one in looks(result)]}


class Writer:
    """Appends upserts of all items to the log, in the place of a sequencer."""

    def __init__(self, log: UpdateLog, recorder: Recorder) -> None:
        self._log = log
        self._recorder = recorder
        self._epoch = log.acquire(0)
        self.steps = 0

    def write(self) -> UpdateToken:
        """Change every item; neighbours are of different variants, so that all are there."""
        self.steps += 1
        sent_s = self._recorder.clock()
        changes = [item(at, (self.steps + at) % VARIANTS) for at in range(ITEMS)]
        records = [
            NewRecord(
                one.item_id,
                self.steps,
                urgent=False,
                deleted=False,
                expires_unix_ms=0,
                payload=logged(mutation_to(one), self.steps),
            )
            for one in changes
        ]
        first = self._log.append(0, self._epoch, records, int(time.time() * 1e3))
        done_s = self._recorder.clock()
        for at, one in enumerate(changes):
            event = write_of(
                replace(one, version=self.steps),
                sent_s,
                done_s,
                outcome="acked",
                tokens=(Token(self._log.log_id, 0, first + at),),
            )
            # An answer shows it by its scores.
            look = {"look": one.fields["year"]}
            self._recorder.record(replace(event, fields={**event.fields, **look}))
        return UpdateToken(self._log.log_id, 0, first + len(records) - 1)


Start = Callable[..., Callable[[], dict[str, Any]]]


@pytest.fixture
def start_process() -> Iterator[Start]:
    """``start_process(*words)`` runs Python; what it returns waits for its first line of JSON."""
    with ExitStack() as stack:

        def start(*words: object) -> Callable[[], dict[str, Any]]:
            command = [sys.executable, "-P", *map(str, words)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            line = process.stdout.readline
            return lambda: json.loads(line())  # type: ignore[no-any-return]

        yield start


@pytest.fixture
def address(start_process: Start, tmp_path: Path, generation: Any) -> str:
    """A router in front of shards that follow the log of this test."""
    map_path, config_path = tmp_path / "map.json", tmp_path / "router.json"
    url = f"sqlite://{tmp_path}/log.db"
    open_log(url).close()
    config = RouterConfig(
        map_path=str(map_path),
        listen=ListenSection(port=0),
        ping=PingSection(every_ms=100, suspect_after=100, eject_after=200),
    )
    config_path.write_text(config.model_dump_json())
    router = start_process("-m", "silvershard.deploy.router_process", "--config", config_path)
    shards = [
        start_process(SHARD_PROCESS, generation.path, shard, SHARDS, "", url)
        for shard in range(SHARDS)
    ]
    ShardMap(
        version=1,
        generation=1,
        snapshot=str(generation.path),
        num_shards=SHARDS,
        entries=tuple(ShardEntry.model_validate(said()) for said in shards),
    ).write_atomic(map_path)
    return str(router()["address"])


@pytest.mark.timeout(600)
def test_no_answer_of_a_cluster_shows_an_item_half_changed(
    tmp_path: Path, crash: Any, recorder: Recorder, address: str, generation: Any
) -> None:
    wanted = crash.amount("LOOKS", FEW_LOOKS)
    liked = generation.catalogue.item_ids[:6].tolist()
    recorder.catalogue(1, generation.catalogue)
    log = open_log(f"sqlite://{tmp_path}/log.db")
    with Client(address, timeout_s=20.0) as client:
        client.wait_until_ready(60)
        writer = Writer(log, recorder)
        token = writer.write()
        known: list[Look] = []
        for variant in range(VARIANTS):
            found = looks(ask(client, liked, variant, [token]))
            assert found
            assert set(found) == {found[0]}
            known.append(found[0])
    # Every number that an item shows tells which variant it is of.
    assert all(len(set(column)) == VARIANTS for column in zip(*known, strict=True))
    readers = [Reader(address, recorder, liked, known, begin=6 * at) for at in range(2)]
    for reader in readers:
        reader.start()

    def has_looked() -> bool:
        writer.write()
        return any(one.error for one in readers) or all(one.answers >= wanted for one in readers)

    try:
        crash.until(has_looked, f"the readers asked less than {wanted} times")
    finally:
        for reader in readers:
            reader.ended.set()
        for reader in readers:
            reader.join(30)
        log.close()
    assert [one.error for one in readers] == [None, None]
    crash.assert_right(recorder, "coverage_honesty", "no_ineligible_item", "seen_whole")
    assert all(min(one.seen) > 0 for one in readers)
    assert all(one.items >= one.answers / 2 for one in readers)
    assert writer.steps > wanted / 20
