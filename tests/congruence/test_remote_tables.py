"""Remote tables, and tables on several devices, give the answers of local ones on any shards."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.mutation_codec import logged, logged_from
from silvershard.cluster.table_config import RemoteTableSection
from silvershard.cluster.table_follower import TableFollower
from silvershard.cluster.table_map import TableEntry, TableShardMap, map_path
from silvershard.cluster.table_server import TableServer
from silvershard.cluster.table_source import RemoteSources
from silvershard.cluster.update_log import NO_ITEM, NewRecord, UpdateLog, open_log
from silvershard.model.answer import Answer
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.ranker_config import SelfAttentionConfig
from silvershard.model.request import Request
from silvershard.shard.executor import ShardExecutor
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.snapshot import open_snapshot
from silvershard.shard.table import TableShard
from silvershard.shard.table_files import row_files
from silvershard.shard.table_placement import TableSettings

MODEL = {
    "encoder": HSTUEncoderConfig(max_length=12, layers=1),
    "ranker": SelfAttentionConfig(session_rows=8),
}
REMOTE = ("history", "recent", "history_genres", "session")

Ask = Callable[[Sequence[ShardExecutor], Sequence[Request], str], list[Answer]]


@pytest.fixture(scope="module")
def local(publish_model: Any) -> Any:
    return publish_model("int8", **MODEL)


@pytest.fixture(scope="module")
def requests(local: Any, request_maker: Any) -> list[Request]:
    made: list[Request] = request_maker(local, 40, seed=4)
    return made


@pytest.fixture(scope="module")
def expected(local: Any, requests: list[Request]) -> list[Answer]:
    whole = load_retriever(local.path)[0]
    return [whole([request])[0] for request in requests]


def assert_same(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for got, wanted in zip(answers, expected, strict=True):
        assert torch.equal(got.item_ids, wanted.item_ids)
        assert torch.equal(got.scores, wanted.scores)
        for task, scores in wanted.task_scores.items():
            assert torch.equal(got.task_scores[task], scores)


def executors(path: Path, num_shards: int, **options: Any) -> list[ShardExecutor]:
    return [load_executor(path, shard, num_shards, **options) for shard in range(num_shards)]


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_remote_tables_answer_like_local_ones_on_any_shards(
    publish_model: Any,
    requests: list[Request],
    expected: list[Answer],
    ask_shards: Ask,
    num_shards: int,
) -> None:
    remote = publish_model("int8", remote=REMOTE, **MODEL)
    shards = executors(remote.path, num_shards)
    assert_same(ask_shards(shards, requests, "all"), expected)
    alone = [ask_shards(shards, [request], "one")[0] for request in requests[:15]]
    assert_same(alone, expected[:15])


def test_tables_on_several_devices_answer_like_whole_ones(
    local: Any, requests: list[Request], expected: list[Answer], ask_shards: Ask
) -> None:
    settings = TableSettings(sharding={"history": "row", "session": "row", "recent": "table"})
    shards = executors(local.path, 2, devices=("cpu", "cpu", "cpu"), tables=settings)
    assert_same(ask_shards(shards, requests, "all"), expected)


class Tier:
    """The table processes of a generation as servers of this one, which follow a log by steps."""

    def __init__(self, folder: Path, path: Path, num_processes: int, log: UpdateLog) -> None:
        self.folder = folder
        generation = open_snapshot(path).spec.generation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: list[TableServer] = []
        self.followers: list[TableFollower] = []
        files = row_files(path)
        for process in range(num_processes):
            tables = [
                TableShard.from_file(one.plan(num_processes), process, one.path) for one in files
            ]
            self.followers.append(TableFollower(log, tables, ()))
            self._servers += [TableServer(one, follower=self.followers[-1]) for one in tables]
        for server in self._servers:
            self._run(server.start())
        map_path(folder, generation, "").parent.mkdir()
        for one in files:
            plan = one.plan(num_processes)
            entries = tuple(
                TableEntry(
                    shard=server.table.shard,
                    address=server.address,
                    epoch=server.epoch,
                    rows=len(server.table.span),
                    pid=1,
                )
                for server in self._servers
                if server.table.plan.name == one.name
            )
            TableShardMap(
                version=1, plan=plan, entries=entries, default_row=one.default_row
            ).write_atomic(map_path(folder, generation, one.name))

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def step(self, process: int) -> None:
        """Let a process come to the end of the log."""
        self.followers[process].catch_up()
        for server in self._servers:
            server.advanced()

    def close(self) -> None:
        for server in self._servers:
            self._run(server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[UpdateLog]:
    made = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    yield made
    made.close()


@pytest.fixture
def make_tier(tmp_path: Path, log: UpdateLog) -> Iterator[Callable[[Path, int], Tier]]:
    made: list[Tier] = []

    def make(path: Path, num_processes: int) -> Tier:
        folder = tmp_path / f"tier-{len(made)}"
        folder.mkdir()
        made.append(Tier(folder, path, num_processes, log))
        return made[-1]

    yield make
    for one in made:
        one.close()


def append_change(log: UpdateLog, version: int, path: Path) -> None:
    """Log new random rows of one of the tables, most of them, so that every answer changes."""
    generator = np.random.default_rng(version)
    file = row_files(path)[version % len(REMOTE)]
    rows = generator.permutation(file.num_rows)[: generator.integers(1, file.num_rows)]
    values = generator.standard_normal((len(rows), file.dim)).astype(np.float32) * 0.3
    tensor = retrieval_pb2.Tensor(shape=values.shape, data=values.tobytes())
    update = retrieval_pb2.RowUpdate(table=file.name, rows=rows.tolist(), values=tensor)
    payload = logged(retrieval_pb2.Mutation(rows=update), version)
    record = NewRecord(NO_ITEM, version, False, False, 0, payload, file.name)
    log.append(0, log.acquire(0), [record], 1)


def commit(executor: ShardExecutor, log: UpdateLog) -> None:
    """Let a shard apply the next record."""
    (record,) = log.read(0, executor.cut[0] if executor.cut else 0, 1)
    prepared = executor.updater.prepare([logged_from(record.payload)])
    assert prepared.rejected == ()
    assert executor.apply(prepared, (record.position,)) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 3])
def test_answers_at_a_cut_are_those_of_local_tables_however_far_table_processes_are(
    local: Any,
    publish_model: Any,
    requests: list[Request],
    ask_shards: Ask,
    make_tier: Callable[[Path, int], Tier],
    log: UpdateLog,
    num_processes: int,
) -> None:
    remote = publish_model("int8", remote=REMOTE, **MODEL)
    tier = make_tier(remote.path, num_processes)
    config = RemoteTableSection(deadline_ms=20_000)
    sources = RemoteSources(tier.folder, config, timeout_s=20.0)
    few, num_changes = requests[:12], 10
    held = [
        # The tables in the model of each shard, loaded with it as one process does, and remote.
        *executors(local.path, 2, headroom=0.2),
        *executors(remote.path, 2, headroom=0.2),
        *executors(remote.path, 2, headroom=0.2, tables=TableSettings(sources)),
    ]
    ways = [held[at : at + 2] for at in (0, 2, 4)]
    generator = np.random.default_rng(num_processes)
    seen: set[bytes] = set()
    try:
        for version in range(1, num_changes + 1):
            append_change(log, version, remote.path)
        for _ in range(num_changes):
            # Every process is at the cut of the shards or beyond it, as it comes.
            for process in range(num_processes):
                if generator.random() < 0.5:
                    tier.step(process)
            for one in held:
                commit(one, log)
            late = threading.Timer(0.01, lambda: [tier.step(at) for at in range(num_processes)])
            late.start()
            local_answers, loaded, answers = (ask_shards(one, few, "cut") for one in ways)
            late.join()
            assert_same(answers, local_answers)
            assert_same(loaded, local_answers)
            seen.add(b"".join(one.scores.numpy().tobytes() for one in local_answers))
        # Some changes are of rows that nobody reads.
        assert len(seen) > num_changes // 2
        assert all(one.defaulted == 0 for one in sources.counts().values())
    finally:
        for tables in list(sources._open.values()):
            for table in tables.values():
                table.close()
