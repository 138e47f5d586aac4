import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.table_changes import log_partition
from silvershard.cluster.table_follower import TableFollower
from silvershard.cluster.update_log import NO_ITEM, NewRecord, UpdateLog, open_log
from silvershard.shard.errors import ConfigError, LogDamaged, LogTrimmed, LogUnavailable
from silvershard.shard.table import TableShard
from silvershard.shard.table_plan import TablePlan
from silvershard.shard.table_rows import dequantize_rows

ROWS, DIM = 60, 4
NAMES = ("users", "history")


class Bench:
    """A log, and the changes of rows that it was given."""

    def __init__(self, path: Path, num_partitions: int) -> None:
        self.log: UpdateLog = open_log(f"sqlite:///{path}/log.sqlite", num_partitions)
        self.epochs = [self.log.acquire(one) for one in range(num_partitions)]
        self.versions = dict.fromkeys(NAMES, 0)

    def _append(self, partition: int, *records: NewRecord) -> int:
        return self.log.append(partition, self.epochs[partition], records, 1)

    def change(self, table: str, value: float, *rows: int, dim: int = DIM) -> int:
        """Log that all values of some rows are one number now; return the version."""
        self.versions[table] += 1
        version = self.versions[table]
        data = np.full((len(rows), dim), value, dtype=np.float32)
        tensor = retrieval_pb2.Tensor(shape=data.shape, data=data.tobytes())
        update = retrieval_pb2.RowUpdate(table=table, rows=rows, values=tensor)
        payload = logged(retrieval_pb2.Mutation(rows=update), version)
        record = NewRecord(NO_ITEM, version, False, False, 0, payload, table)
        self._append(log_partition(table, len(self.epochs)), record)
        return version

    def items(self, partition: int, count: int) -> None:
        delete = retrieval_pb2.Mutation(delete=retrieval_pb2.ItemDelete(item_id=1))
        for version in range(1, count + 1):
            payload = logged(delete, version)
            self._append(partition, NewRecord(1, version, False, True, 0, payload))

    def shards(self, table: str, num_shards: int = 1) -> list[TableShard]:
        plan = TablePlan(name=table, num_rows=ROWS, dim=DIM, num_shards=num_shards)
        zeros = np.zeros((ROWS, DIM), dtype=np.float32)
        return [TableShard.from_blocks(plan, one, [zeros]) for one in range(num_shards)]


def values(table: TableShard, at: int | None = None) -> dict[int, float]:
    """The rows that are not 0, by number."""
    span = np.arange(table.span.start, table.span.stop)
    found = dequantize_rows(table.take(span, at))
    rows = table.plan.rows(span)
    return {int(row): float(one[0]) for row, one in zip(rows, found, strict=True) if one[0]}


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(num_partitions: int = 1) -> Bench:
        made.append(Bench(tmp_path, num_partitions))
        return made[-1]

    yield make
    for one in made:
        one.log.close()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.002)


@pytest.mark.parametrize("num_partitions", [1, 4])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_process_applies_the_rows_that_it_holds(
    make_bench: Any, num_shards: int, num_partitions: int
) -> None:
    bench = make_bench(num_partitions)
    tables = {name: bench.shards(name, num_shards) for name in NAMES}
    bench.change("users", 1, *range(0, 60, 2))
    bench.items(0, 5)
    bench.change("history", 7, 3, 4)
    bench.change("users", 2, 4, 5)
    followers = [
        TableFollower(bench.log, [tables[name][shard] for name in NAMES], ())
        for shard in range(num_shards)
    ]
    for one in followers:
        one.catch_up()
    users = {row: value for one in tables["users"] for row, value in values(one).items()}
    assert users == {**dict.fromkeys(range(0, 60, 2), 1.0), 4: 2.0, 5: 2.0}
    history = {row: value for one in tables["history"] for row, value in values(one).items()}
    assert history == {3: 7.0, 4: 7.0}
    assert {one.row_version for one in tables["users"]} == {2}
    for one in followers:
        progress = one.progress("users")
        assert progress.partition == log_partition("users", num_partitions)
        assert progress.position == progress.end == bench.log.end(progress.partition)
        assert (progress.changes, one.rejected, one.trouble) == (2, 0, "")
        assert one.log_id == bench.log.log_id


def test_what_is_in_the_rows_is_not_applied_again(make_bench: Any) -> None:
    bench = make_bench()
    bench.change("users", 1, 3)
    bench.items(0, 2)
    (table,) = bench.shards("users")
    follower = TableFollower(bench.log, [table], (3,))
    bench.change("users", 2, 4)
    follower.catch_up()
    assert values(table) == {4: 2.0}
    assert values(table, 0) == {}
    with pytest.raises(ConfigError, match="a cut of this log has 1 positions"):
        TableFollower(bench.log, [table], (3, 4))


def test_a_process_that_starts_again_has_what_the_last_one_had(make_bench: Any) -> None:
    bench = make_bench()
    (first,) = bench.shards("users")
    follower = TableFollower(bench.log, [first], ())
    generator = np.random.default_rng(0)
    for value in range(1, 40):
        rows = generator.permutation(ROWS)[: generator.integers(1, 30)]
        bench.change("users", value, *rows.tolist())
        if value % 7 == 0:
            follower.step()
    follower.catch_up()
    (again,) = bench.shards("users")
    TableFollower(bench.log, [again], ()).catch_up()
    for version in range(40):
        assert values(again, version) == values(first, version)


def test_what_every_shard_refuses_is_passed_over(
    make_bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench()
    (table,) = bench.shards("users")
    bench.change("users", 1, 3)
    bench.change("users", 2, 3, dim=DIM + 1)
    bench.change("users", 3, 4)
    follower = TableFollower(bench.log, [table], ())
    follower.catch_up()
    assert values(table) == {3: 1.0, 4: 3.0}
    assert (table.row_version, follower.rejected) == (3, 1)
    assert "a change of rows is refused: values: must be (1, 4), got (1, 5)" in caplog.text


def test_following_tells_of_changes_and_ends(make_bench: Any) -> None:
    bench = make_bench()
    (table,) = bench.shards("users")
    follower = TableFollower(bench.log, [table], ())
    told = threading.Event()
    follower.start(told.set)
    version = bench.change("users", 1, 3)
    until(lambda: table.row_version == version)
    told.clear()
    assert told.wait(10)
    follower.stop()
    bench.change("users", 2, 3)
    assert table.row_version == version


def test_a_log_that_cannot_be_read_leaves_the_rows_until_it_can(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    (table,) = bench.shards("users")
    follower = TableFollower(bench.log, [table], ())
    follower.start()
    read = bench.log.read

    def fail(*_: Any) -> Any:
        raise LogDamaged(bench.log.url, "the record at position 1 of partition 0 is damaged")

    monkeypatch.setattr(bench.log, "read", fail)
    bench.change("users", 1, 3)
    until(lambda: "position 1 of partition 0 is damaged" in follower.trouble)
    assert values(table) == {}
    monkeypatch.setattr(bench.log, "read", read)
    until(lambda: table.row_version == 1)
    until(lambda: not follower.trouble)
    follower.stop()


def test_a_log_that_is_away_is_waited_for_and_a_trimmed_one_is_not(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    (table,) = bench.shards("users")
    bench.change("users", 1, 3)
    follower = TableFollower(bench.log, [table], ())
    end, left = bench.log.end, [2]

    def away(partition: int) -> int:
        if left[0]:
            left[0] -= 1
            raise LogUnavailable(bench.log.url, "it is away")
        return end(partition)

    monkeypatch.setattr(bench.log, "end", away)
    follower.catch_up()
    assert values(table) == {3: 1.0}
    bench.log.trim(0, 1)
    with pytest.raises(LogTrimmed):
        TableFollower(bench.log, bench.shards("users"), ()).catch_up()


def test_an_end_before_what_was_applied_is_damage(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    bench.change("users", 1, 3)
    follower = TableFollower(bench.log, bench.shards("users"), ())
    follower.catch_up()
    monkeypatch.setattr(bench.log, "end", lambda _: 0)
    with pytest.raises(LogDamaged, match="ends at 0, but 1 was applied already"):
        follower.step()


@pytest.mark.parametrize("applied_here", [True, False])
def test_a_log_that_grew_again_is_followed_only_if_it_holds_what_was_applied(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch, applied_here: bool
) -> None:
    bench = make_bench()
    bench.change("users", 1, 3)
    bench.change("users", 2, 4)
    (table,) = bench.shards("users")
    follower = TableFollower(bench.log, [table], () if applied_here else (2,))
    follower.catch_up()
    before = values(table)
    read = bench.log.read
    with monkeypatch.context() as lost:
        lost.setattr(bench.log, "end", lambda _: 1)
        with pytest.raises(LogDamaged, match="ends at 1, but 2 was applied already"):
            follower.step()
    bench.change("users", 3, 5)
    with monkeypatch.context() as other:
        other.setattr(
            bench.log, "read", lambda *at: [one._replace(payload=b"other") for one in read(*at)]
        )
        for _ in range(2):
            with pytest.raises(LogDamaged, match="position 2 of partition 0 is not what was"):
                follower.step()
    assert values(table) == before
    follower.catch_up()
    assert values(table) == {**before, 5: 3.0}


def test_a_follower_of_tables_needs_no_torch() -> None:
    code = (
        "import sys, silvershard.cluster.table_follower, silvershard.cluster.log_reach\n"
        "import silvershard.cluster.sqlite_log\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr
