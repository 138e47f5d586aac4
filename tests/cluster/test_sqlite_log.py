import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.sqlite_log import SqliteLog
from silvershard.cluster.update_log import NewRecord, open_log
from silvershard.shard.errors import ConfigError, LogDamaged, LogUnavailable

NOW_MS = 1_700_000_000_000


def record(item_id: int, version: int = 1, payload: bytes = b"payload") -> NewRecord:
    return NewRecord(item_id, version, False, False, 0, payload)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "updates.db"


@pytest.fixture
def open_file(path: Path) -> Iterator[Callable[..., SqliteLog]]:
    logs: list[SqliteLog] = []

    def opened(**options: Any) -> SqliteLog:
        logs.append(
            SqliteLog(f"sqlite://{path}", 1, **{"create": True, "timeout_s": 5.0, **options})
        )
        return logs[-1]

    yield opened
    for one in logs:
        one.close()


def change(path: Path, statement: str, *values: Any) -> None:
    """Change the file behind the log's back."""
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


def test_every_connection_writes_ahead_and_syncs_every_commit(
    open_file: Callable[..., SqliteLog],
) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(1)], NOW_MS)
    log.read(0, 0, 1)
    for one in (log._writer, *log._readers):
        assert one.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert one.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_file_that_cannot_write_ahead_is_refused(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    open_file().close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    with pytest.raises(ConfigError, match="journal_mode wal and synchronous 2, got delete and 2"):
        open_file()


def test_creating_leaves_one_file_and_no_draft(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    open_file().close()
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all " * 100, b"SQLite format 3\0" + bytes(200)]
)
def test_a_file_that_is_no_log_is_refused_and_left_alone(
    open_file: Callable[..., SqliteLog], path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    with pytest.raises(LogDamaged, match=r"is not an update log|the file is damaged"):
        open_file()
    assert path.read_bytes() == content


def test_a_database_of_something_else_is_refused(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    change(path, "CREATE TABLE films (title TEXT)")
    with pytest.raises(LogDamaged, match="is not an update log"):
        open_file()


def test_a_log_of_another_format_is_refused(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    open_file().close()
    change(path, "PRAGMA user_version=2")
    with pytest.raises(LogDamaged, match="the format must be 1, got 2"):
        open_file()


def test_a_flipped_bit_of_a_record_is_noticed(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    log = open_file()
    log.append(
        0, log.acquire(0), [record(at, payload=b"number %d" % at) for at in (1, 2, 3)], NOW_MS
    )
    log.close()
    content = path.read_bytes()
    assert content.count(b"number 2") == 1
    path.write_bytes(content.replace(b"number 2", b"number 3"))
    log = open_file()
    assert [one.item_id for one in log.read(0, 0, 1)] == [1]
    with pytest.raises(LogDamaged, match="the record at position 2 of partition 0 is damaged"):
        log.read(0, 0, 9)
    assert [one.item_id for one in log.read(0, 2, 9)] == [3]


@pytest.mark.parametrize("column", ["item_id", "version", "logged_unix_ms", "urgent"])
def test_every_column_of_a_record_is_checked(
    open_file: Callable[..., SqliteLog], path: Path, column: str
) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(1)], NOW_MS)
    change(path, f"UPDATE records SET {column} = 1 - {column}")
    if column == "item_id":
        change(path, "UPDATE records SET item_id = 7")
    if column == "version":
        change(path, "UPDATE records SET version = 7")
    with pytest.raises(LogDamaged, match="position 1 of partition 0 is damaged"):
        log.read(0, 0, 9)


def test_records_that_changed_places_are_noticed(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(1), record(2)], NOW_MS)
    for before, after in ((1, 9), (2, 1), (9, 2)):
        change(path, "UPDATE records SET key = ? WHERE key = ?", after, before)
    with pytest.raises(LogDamaged, match="position 1 of partition 0 is damaged"):
        log.read(0, 0, 9)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_record_is_noticed(
    open_file: Callable[..., SqliteLog], path: Path, missing: int
) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(at) for at in (1, 2, 3)], NOW_MS)
    change(path, "DELETE FROM records WHERE key = ?", missing)
    with pytest.raises(LogDamaged, match=f"position {missing} of partition 0 is missing"):
        log.read(0, 0, 9)


def test_damaged_pages_are_told_in_words(open_file: Callable[..., SqliteLog], path: Path) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(at, payload=bytes(900)) for at in range(500)], NOW_MS)
    log.close()
    content = bytearray(path.read_bytes())
    for page in range(8192, len(content), 4096):
        content[page : page + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(LogDamaged, match="the file is damaged: database disk image is malformed"):
        open_file().read(0, 0, 500)


def test_a_file_that_was_cut_off_is_told_in_words(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    log = open_file()
    log.append(0, log.acquire(0), [record(at, payload=bytes(900)) for at in range(500)], NOW_MS)
    log.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(LogDamaged):
        open_file().read(0, 0, 500)


def test_a_replaced_file_is_not_written_to(open_file: Callable[..., SqliteLog], path: Path) -> None:
    log = open_file()
    epoch = log.acquire(0)
    os.rename(path, path.with_suffix(".old"))
    with pytest.raises(LogUnavailable, match="was replaced or removed"):
        log.append(0, epoch, [record(1)], NOW_MS)
    other = open_file()
    assert other.log_id != log.log_id
    with pytest.raises(LogUnavailable, match="was replaced or removed"):
        log.end(0)


def test_a_full_disk_stores_nothing_and_goes_on_with_room(
    open_file: Callable[..., SqliteLog],
) -> None:
    log = open_file()
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    (pages,) = log._writer.execute("PRAGMA page_count").fetchone()
    log._writer.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(LogUnavailable, match="disk is full"):
        log.append(0, epoch, [record(at, payload=bytes(9000)) for at in range(9)], NOW_MS)
    assert (log.end(0), log.heads(0, [5])) == (1, {})
    log._writer.execute("PRAGMA max_page_count=100000")
    assert log.append(0, epoch, [record(2)], NOW_MS) == 2
    assert [one.item_id for one in log.read(0, 0, 9)] == [1, 2]


def test_a_writer_that_holds_the_file_too_long_is_told(
    open_file: Callable[..., SqliteLog], path: Path
) -> None:
    log = open_file(timeout_s=0.02)
    epoch = log.acquire(0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogUnavailable, match="database is locked"):
        log.append(0, epoch, [record(1)], NOW_MS)
    assert log.end(0) == 0
    other.execute("ROLLBACK")
    other.close()
    assert log.append(0, epoch, [record(1)], NOW_MS) == 1


def test_a_folder_that_is_missing_is_told(path: Path) -> None:
    with pytest.raises(LogUnavailable, match=r"unable to open|No such file"):
        open_log(f"sqlite://{path.parent}/missing/updates.db")


def test_what_is_looked_up_is_indexed(open_file: Callable[..., SqliteLog]) -> None:
    log = open_file()
    asked: list[str] = []
    reader = log._connect()
    reader.set_trace_callback(asked.append)
    log._readers.append(reader)
    log.read_urgent(0, 0, 9)
    log.heads(0, [1, 2])
    log.expired(0, NOW_MS, 9)
    log.read(0, 0, 9)
    reader.set_trace_callback(None)
    steps = [
        step
        for statement in asked
        if statement.startswith("SELECT")
        for *_, step in log._writer.execute(f"EXPLAIN QUERY PLAN {statement}")
    ]
    assert any("urgent_records" in step for step in steps)
    assert any("expiring_heads" in step for step in steps)
    scans = [step for step in steps if step.startswith("SCAN") and "json_each" not in step]
    assert scans == []
    assert [step for step in steps if "TEMP B-TREE" in step] == []


# Acknowledges each append on its standard output, until it is killed.
APPENDS = """
import random, sys
from silvershard.cluster.update_log import NewRecord, open_log
url, relaxed, seed = sys.argv[1], sys.argv[2] == "relaxed", int(sys.argv[3])
log = open_log(url)
if relaxed:
    log._writer.execute("PRAGMA synchronous=OFF")
epoch, rng = log.acquire(0), random.Random(seed)
log._writer.execute("PRAGMA wal_autocheckpoint=20")
while True:
    records = [
        NewRecord(rng.randrange(50), epoch, False, False, 0, rng.randbytes(rng.randrange(600)))
        for _ in range(rng.randrange(1, 30))
    ]
    first = log.append(0, epoch, records, 1)
    print(first + len(records) - 1, flush=True)
"""


def append_until_killed(url: str, environment: dict[str, str], mode: str, seed: int) -> int:
    """Return the last position that was acknowledged before the writer was killed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", APPENDS, url, mode, str(seed)],
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    try:
        rng = random.Random(seed)
        acks = [int(process.stdout.readline()) for _ in range(rng.randrange(1, 60))]
        # An append takes about a millisecond; the blow falls anywhere in it.
        time.sleep(rng.random() * 2e-3)
        process.send_signal(signal.SIGKILL)
        acks += [int(line) for line in process.stdout.read().split() if line]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return acks[-1]


def test_what_was_acknowledged_survives_a_power_cut(unsynced: Any) -> None:
    url, undone = f"sqlite://{unsynced.folder}/updates.db", 0
    open_log(url).close()
    for seed in range(20):
        acked = append_until_killed(url, unsynced.environment, "durable", seed)
        rng = random.Random(seed)
        undone += unsynced.lose(lambda count, rng=rng: rng.randrange(count + 1))
        log = open_log(url)
        end = log.end(0)
        records = log.read(0, 0, end)
        newest = {one.item_id: one.position for one in records}
        heads = log.heads(0, range(50))
        log.close()
        assert end >= acked
        assert len(records) == end
        assert {item_id: head.position for item_id, head in heads.items()} == newest
        # Until something was lost, this test has shown nothing.
        if seed >= 3 and undone:
            break
    assert undone > 0


def test_a_log_that_does_not_sync_loses_what_it_acknowledged(unsynced: Any) -> None:
    url = f"sqlite://{unsynced.folder}/updates.db"
    open_log(url).close()
    acked = append_until_killed(url, unsynced.environment, "relaxed", 1)
    assert unsynced.lose() > 0
    log = open_log(url)
    assert log.end(0) < acked
    log.close()


def test_a_log_is_there_after_a_power_cut_once_it_was_opened(unsynced: Any) -> None:
    url = f"sqlite://{unsynced.folder}/updates.db"
    code = "import sys; from silvershard.cluster.update_log import open_log; open_log(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-P", "-c", code, url],
        env={**os.environ, **unsynced.environment},
        check=True,
    )
    unsynced.lose()
    open_log(url, create=False).close()


@pytest.mark.parametrize("slashes", ["sqlite://", "sqlite:///"])
def test_a_path_is_taken_with_three_slashes_or_four(path: Path, slashes: str) -> None:
    log = open_log(f"{slashes}{path}")
    assert path.is_file()
    log.close()
