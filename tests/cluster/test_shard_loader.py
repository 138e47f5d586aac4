import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from silvershard.cluster import shard_pb2, shard_pb2_grpc
from silvershard.cluster.follower import Follower
from silvershard.cluster.hosting import ready
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.shard_loader import ShardLoader, wanted_generations
from silvershard.cluster.shard_map import ShardEntry, ShardMap
from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert
from silvershard.shard.errors import ConfigError, StateError

SHARD_PROCESS = Path(__file__).parent / "shard_process.py"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[UpdateLog]:
    opened = open_log(f"sqlite://{tmp_path}/log.db")
    yield opened
    opened.close()


def append(log: UpdateLog, *updates: Any) -> None:
    """Log updates; their versions are their positions."""
    epoch = log.acquire(0)
    for version, update in enumerate(updates, log.end(0) + 1):
        payload = logged(mutation_to(update), version)
        deleted = isinstance(update, ItemDelete)
        log.append(0, epoch, [NewRecord(update.item_id, version, False, deleted, 0, payload)], 0)


def test_without_a_log_a_shard_stays_as_it_is(generation: Any) -> None:
    loaded = ready(ShardLoader(1, 3)(generation.path))
    assert (loaded.executor.shard, loaded.executor.num_shards) == (1, 3)
    assert loaded.follow is None
    assert loaded.executor.cut == ()


def test_with_a_log_a_shard_holds_what_was_logged_before_it_is_ready(
    generation: Any, log: UpdateLog
) -> None:
    gone = int(generation.catalogue.item_ids[0])
    append(log, ItemUpsert(1 << 41), ItemUpsert(1 << 42), ItemDelete(gone), ItemDelete(1 << 42))
    loaded = ShardLoader(0, 1, log=log)(generation.path)
    assert loaded.executor.documents == 600
    loaded = ready(loaded)
    assert loaded.executor.cut == (4,)
    assert loaded.executor.documents == 600 + 1 - 1
    assert loaded.follow is not None
    follower: Follower[Any] = loaded.follow(loaded.executor.apply)
    assert follower.lag.cut == (4,)
    assert follower.log_id == log.log_id


def test_a_record_that_is_no_mutation_is_refused_and_the_others_are_applied(
    generation: Any, log: UpdateLog, caplog: pytest.LogCaptureFixture
) -> None:
    gone, *kept = generation.catalogue.item_ids[:20].tolist()
    append(log, *(ItemPatch(one, signals={"popularity": 0.5}) for one in kept))
    epoch = log.acquire(0)
    log.append(0, epoch, [NewRecord(9, 20, False, False, 0, b"\xff\xff")], 0)
    append(log, ItemDelete(gone))
    loaded = ready(ShardLoader(0, 1, log=log)(generation.path))
    assert loaded.executor.cut == (21,)
    assert loaded.executor.documents == 599
    assert caplog.text.count("refuses an update of item") == 1
    assert "payload: must be a LoggedMutation" in caplog.text


def test_a_shard_that_follows_needs_room(log: UpdateLog) -> None:
    with pytest.raises(ConfigError, match=r"updates\.headroom must be more than 0"):
        ShardLoader(0, 1, log=log, headroom=0.0)


@pytest.mark.parametrize("same", [True, False])
def test_a_generation_that_holds_updates_of_another_log_is_refused(
    generation: Any, log: UpdateLog, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    log_id = log.log_id + (0 if same else 1)
    manifest = SimpleNamespace(log_id=log_id, spec=SimpleNamespace(generation=1))
    monkeypatch.setattr(
        "silvershard.cluster.shard_loader.open_snapshot",
        lambda _: SimpleNamespace(manifest=manifest),
    )
    load = ShardLoader(0, 1, log=log)
    if same:
        assert load(generation.path).executor.documents == 600
    else:
        with pytest.raises(StateError, match=f"holds updates of log {log_id}"):
            load(generation.path)


def test_loading_ends_between_its_parts_where_it_is_called_off(generation: Any) -> None:
    class CalledOff(Exception):
        pass

    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise CalledOff

    with pytest.raises(CalledOff):
        ShardLoader(0, 1)(generation.path, check)
    assert len(checks) == 3


def test_a_process_that_starts_again_serves_what_the_map_says_by_now(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    assert wanted_generations("", "/s/1") == ("/s/1", {})
    assert wanted_generations(str(path), "/s/1") == ("/s/1", {})
    fields = {"version": 1, "num_shards": 1, "entries": ()}
    held = {1: "/s/1", 2: "/s/2"}
    ShardMap(generation=2, snapshot="/s/2", snapshots=held, **fields).write_atomic(path)
    assert wanted_generations(str(path), "/s/1") == ("/s/2", {1: "/s/1"})
    path.write_text("{")
    assert wanted_generations(str(path), "/s/1") == ("/s/1", {})


class Process:
    def __init__(self, snapshot: Path, url: str) -> None:
        command = [sys.executable, "-P", str(SHARD_PROCESS), str(snapshot), "0", "1", "", url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def entry(self) -> ShardEntry:
        assert self.process.stdout is not None
        return ShardEntry.model_validate(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(generation: Any) -> Iterator[Callable[[str], Process]]:
    made: list[Process] = []

    def start(url: str) -> Process:
        made.append(Process(generation.path, url))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.end()


def held_by(entry: ShardEntry) -> shard_pb2.GenerationReport:
    with grpc.insecure_channel(entry.address) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)
        (report,) = stub.Inspect(shard_pb2.InspectRequest(), timeout=20).generations
    return report


@pytest.mark.slow
def test_a_killed_shard_catches_up_before_it_serves_again(log: UpdateLog, start: Any) -> None:
    append(log, *(ItemUpsert((1 << 41) + number) for number in range(5)))
    first = start(log.url)
    report = held_by(first.entry())
    assert (list(report.seen.cut), report.seen.documents) == ([5], 605)
    first.end()
    append(log, *(ItemUpsert((1 << 42) + number) for number in range(100)))
    append(log, *(ItemDelete((1 << 41) + number) for number in range(5)))
    again = start(log.url)
    entry = again.entry()
    report = held_by(entry)
    assert report.state == shard_pb2.GENERATION_STATE_PREPARED
    assert (list(report.seen.cut), report.seen.documents) == ([110], 700)
