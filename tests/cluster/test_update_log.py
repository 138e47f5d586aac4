import random
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from silvershard.cluster.update_log import (
    NO_ITEM,
    READ_BYTES,
    AppliedRecords,
    Head,
    LogRecord,
    NewRecord,
    UpdateLog,
    check_dense,
    open_log,
)
from silvershard.shard.errors import ConfigError, Fenced, LogDamaged, LogTrimmed, LogUnavailable

STORES = ("sqlite", "redis")
LARGEST = (1 << 63) - 1
NOW_MS = 1_700_000_000_000

Open = Callable[..., UpdateLog]


def record(item_id: int, version: int = 1, **changes: Any) -> NewRecord:
    settings = {"urgent": False, "deleted": False, "expires_unix_ms": 0, "payload": b"payload"}
    return NewRecord(item_id, version, **{**settings, **changes})


def rows_of(table: str, version: int) -> NewRecord:
    return record(NO_ITEM, version, table=table)


def logged(position: int, new: NewRecord, logged_unix_ms: int = NOW_MS) -> LogRecord:
    return LogRecord(position, new.item_id, new.version, logged_unix_ms, new.urgent, new.payload)


@pytest.fixture(scope="module", params=STORES)
def url_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """``url_of(name)``: where a log of that name is, in the store under test."""
    if request.param == "sqlite":
        directory = tmp_path_factory.mktemp("logs")
        return lambda name: f"sqlite://{directory}/{name}.db"
    return request.getfixturevalue("make_redis")().url


@pytest.fixture
def url(url_of: Callable[[str], str], request: pytest.FixtureRequest) -> str:
    return url_of(re.sub(r"\W", "-", request.node.name))


@pytest.fixture
def open_here(url: str) -> Iterator[Open]:
    """Opens the log of this test, any number of times."""
    logs: list[UpdateLog] = []

    def opened(num_partitions: int | None = 1, **options: Any) -> UpdateLog:
        logs.append(open_log(url, num_partitions, **options))
        return logs[-1]

    yield opened
    for one in logs:
        one.close()


@pytest.fixture
def log(open_here: Open) -> UpdateLog:
    return open_here()


def test_positions_begin_at_one_and_have_no_gaps(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    assert (log.start(0), log.end(0), log.read(0, 0, 10)) == (0, 0, [])
    first, second = [record(7), record(8)], [record(9, 3, payload=b"")]
    assert log.append(0, epoch, first, NOW_MS) == 1
    assert log.append(0, epoch, second, NOW_MS + 1) == 3
    assert log.end(0) == 3
    assert log.read(0, 0, 10) == [
        logged(1, first[0]),
        logged(2, first[1]),
        logged(3, second[0], NOW_MS + 1),
    ]
    assert log.read(0, 1, 1) == [logged(2, first[1])]
    assert log.read(0, 3, 10) == []


def test_thousands_of_records_are_one_append(log: UpdateLog) -> None:
    rng = random.Random(3)
    records = [
        record(rng.randrange(2000), version, payload=rng.randbytes(rng.randrange(300)))
        for version in range(1, 5001)
    ]
    assert log.append(0, log.acquire(0), records, NOW_MS) == 1
    found: list[LogRecord] = []
    while page := log.read(0, len(found), 777):
        found += page
    assert found == [logged(at, new) for at, new in enumerate(records, 1)]


def test_an_append_of_nothing_stores_nothing(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    assert log.append(0, epoch, [], NOW_MS) == 2
    assert log.end(0) == 1


def test_the_largest_numbers_and_any_bytes_come_back_as_they_were(log: UpdateLog) -> None:
    records = [
        record(LARGEST, LARGEST, payload=bytes(range(256)), urgent=True),
        record(0, LARGEST - 1, payload=b"\0" * (1 << 20)),
        rows_of("table of \N{SNOWMAN}", LARGEST),
    ]
    log.append(0, log.acquire(0), records, LARGEST)
    assert log.read(0, 0, 9) == [logged(at, new, LARGEST) for at, new in enumerate(records, 1)]
    assert log.heads(0, [LARGEST, 0]) == {
        LARGEST: Head(LARGEST, False, 1, 0),
        0: Head(LARGEST - 1, False, 2, 0),
    }
    assert log.row_version(0, "table of \N{SNOWMAN}") == LARGEST


def test_an_append_that_fails_in_its_middle_leaves_nothing(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    with pytest.raises(struct.error):
        log.append(0, epoch, [record(1), record(2, LARGEST + 1)], NOW_MS)
    assert (log.end(0), log.read(0, 0, 9), log.heads(0, [1, 2])) == (0, [], {})
    assert log.append(0, epoch, [record(3)], NOW_MS) == 1
    assert [one.item_id for one in log.read(0, 0, 9)] == [3]


def test_partitions_are_logs_of_their_own(open_here: Open) -> None:
    log = open_here(4)
    for partition in range(4):
        new = [record(5, partition + 1)] * (partition + 1)
        assert log.append(partition, log.acquire(partition), new, NOW_MS) == 1
    assert [log.end(partition) for partition in range(4)] == [1, 2, 3, 4]
    assert [len(log.read(partition, 0, 9)) for partition in range(4)] == [1, 2, 3, 4]
    assert [log.heads(one, [5])[5].version for one in range(4)] == [1, 2, 3, 4]
    assert log.trim(3, 4) == 4
    assert [log.start(partition) for partition in range(4)] == [0, 0, 0, 4]
    with pytest.raises(ConfigError, match="at most 3, got 4"):
        log.read(4, 0, 1)


def test_a_later_writer_fences_the_earlier_one(open_here: Open) -> None:
    earlier, later = open_here(2), open_here(2)
    old = earlier.acquire(0)
    earlier.append(0, old, [record(1)], NOW_MS)
    new = later.acquire(0)
    assert new > old
    with pytest.raises(Fenced) as caught:
        earlier.append(0, old, [record(1, 2), rows_of("users", 2), record(3)], NOW_MS)
    assert (caught.value.partition, caught.value.epoch, caught.value.current) == (0, old, new)
    assert later.append(0, new, [record(2)], NOW_MS) == 2
    with pytest.raises(Fenced):
        earlier.append(0, old, [], NOW_MS)
    assert [one.item_id for one in earlier.read(0, 0, 9)] == [1, 2]
    assert earlier.heads(0, [1, 2, 3]) == {1: Head(1, False, 1, 0), 2: Head(1, False, 2, 0)}
    assert later.row_version(0, "users") == 0
    # The other partition has a writer of its own.
    assert earlier.append(1, earlier.acquire(1), [record(1)], NOW_MS) == 1


def test_a_writer_renews_its_epoch_only_while_it_has_the_newest(open_here: Open) -> None:
    one, other = open_here(), open_here()
    first = one.acquire(0)
    one.append(0, first, [record(1)], NOW_MS)
    renewed = one.acquire(0, first)
    assert renewed > first
    with pytest.raises(Fenced):
        one.append(0, first, [record(2)], NOW_MS)
    assert one.append(0, renewed, [record(2)], NOW_MS) == 2
    taken = other.acquire(0)
    with pytest.raises(Fenced) as caught:
        one.acquire(0, renewed)
    assert (caught.value.epoch, caught.value.current) == (renewed, taken)
    assert other.append(0, taken, [record(3)], NOW_MS) == 3


def test_two_writers_that_race_leave_no_gap_and_nothing_after_the_fence(open_here: Open) -> None:
    stored: list[int] = []

    def write(log: UpdateLog, rounds: int) -> None:
        epoch = log.acquire(0)
        for number in range(rounds):
            try:
                log.append(0, epoch, [record(number, epoch)] * 3, NOW_MS)
            except Fenced:
                return
            stored.append(epoch)

    logs = [open_here() for _ in range(4)]
    threads = [threading.Thread(target=write, args=(log, 20)) for log in logs]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    epochs = [one.version for one in logs[0].read(0, 0, 999)]
    assert len(epochs) == 3 * len(stored)
    assert epochs == sorted(epochs)
    assert sorted(stored * 3) == epochs


def test_threads_share_one_writer(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    firsts: list[int] = []

    def write() -> None:
        firsts.extend(log.append(0, epoch, [record(1)] * 2, NOW_MS) for _ in range(25))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(firsts) == list(range(1, 200, 2))


def test_a_head_is_the_last_record_of_its_item(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1), record(2), record(1, 5, expires_unix_ms=NOW_MS)], NOW_MS)
    assert log.heads(0, [1, 2, 3]) == {1: Head(5, False, 3, NOW_MS), 2: Head(1, False, 2, 0)}
    log.append(0, epoch, [record(1, 6, deleted=True)], NOW_MS)
    assert log.heads(0, [1]) == {1: Head(6, True, 4, 0)}
    assert log.heads(0, []) == {}
    many = [record(item_id, 9) for item_id in range(3000)]
    log.append(0, epoch, many, NOW_MS)
    assert len(log.heads(0, range(5000))) == 3000


def test_a_head_tells_whether_the_log_has_patches_alone(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1, patched=True), record(2), record(3, deleted=True)], NOW_MS)
    assert log.heads(0, [1, 2, 3]) == {
        1: Head(1, False, 1, 0, True),
        2: Head(1, False, 2, 0, False),
        3: Head(1, True, 3, 0, False),
    }
    log.append(0, epoch, [record(1, 2, expires_unix_ms=NOW_MS)], NOW_MS)
    assert log.heads(0, [1]) == {1: Head(2, False, 4, NOW_MS)}


def test_versions_of_rows_are_kept_by_table(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    assert log.row_version(0, "users") == 0
    log.append(0, epoch, [rows_of("users", 3), rows_of("makers", 2), rows_of("users", 4)], NOW_MS)
    assert (log.row_version(0, "users"), log.row_version(0, "makers")) == (4, 2)
    assert [one.item_id for one in log.read(0, 0, 9)] == [NO_ITEM] * 3
    assert log.heads(0, [NO_ITEM]) == {}


def test_items_expire_in_the_order_of_their_time(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    times = {1: 50, 2: 10, 3: 90, 4: 0, 5: 10}
    log.append(0, epoch, [record(one, 1, expires_unix_ms=at) for one, at in times.items()], NOW_MS)
    assert [item_id for item_id, _ in log.expired(0, 60, 9)] == [2, 5, 1]
    assert log.expired(0, 50, 9)[-1] == (1, Head(1, False, 1, 50))
    assert log.expired(0, 9, 9) == []
    assert len(log.expired(0, 60, 1)) == 1
    later = [
        record(2, 2, expires_unix_ms=70),
        record(5, 2),
        record(1, 2, deleted=True),
    ]
    log.append(0, epoch, later, NOW_MS)
    assert log.expired(0, 60, 9) == []
    # Nor do those that no longer expire take the place of those that do.
    assert [item_id for item_id, _ in log.expired(0, 100, 2)] == [2, 3]


def test_urgent_records_can_be_read_ahead_of_the_others(log: UpdateLog) -> None:
    records = [record(at, urgent=at % 3 == 0, deleted=at % 3 == 0) for at in range(1, 11)]
    log.append(0, log.acquire(0), records, NOW_MS)
    assert log.read_urgent(0, 0, 9) == [logged(at, records[at - 1]) for at in (3, 6, 9)]
    assert [one.position for one in log.read_urgent(0, 3, 1)] == [6]
    assert log.read_urgent(0, 9, 9) == []
    assert log.trim(0, 4) == 4
    assert [one.position for one in log.read_urgent(0, 4, 9)] == [6, 9]
    with pytest.raises(LogTrimmed):
        log.read_urgent(0, 3, 9)


def test_a_read_ends_where_it_has_bytes_enough(log: UpdateLog) -> None:
    epoch, size = log.acquire(0), 1 << 20
    most = READ_BYTES // size
    larger = b"x" * (READ_BYTES + 1)
    payloads = [b"", *[b"x" * size] * (most + 3), b"small", larger, b"next", b"last"]
    records = [record(at, payload=one, urgent=True) for at, one in enumerate(payloads)]
    for at in range(0, len(records), 5):
        log.append(0, epoch, records[at : at + 5], NOW_MS)
    for read in (log.read, log.read_urgent):
        assert [one.position for one in read(0, 0, 99)] == list(range(1, most + 2))
        assert len(read(0, 0, 3)) == 3
        # What is too large for a read by itself comes all the same.
        assert [one.position for one in read(0, most + 1, 99)] == list(range(most + 2, most + 7))
        assert [one.position for one in read(0, most + 5, 99)] == [most + 6]
        assert [one.payload for one in read(0, most + 6, 99)] == [b"next", b"last"]


@pytest.mark.parametrize("trimmed", [False, True])
def test_what_was_applied_before_the_start_is_known_where_the_log_has_it(
    log: UpdateLog, trimmed: bool
) -> None:
    log.append(0, log.acquire(0), [record(at) for at in range(4)], NOW_MS)
    if trimmed:
        log.trim(0, 3)
    applied = AppliedRecords(log)
    applied.check(0, 3, 4)
    with pytest.raises(LogDamaged, match="partition 0 ends at 2, but 3 was applied already"):
        applied.check(0, 3, 2)
    if trimmed:
        with pytest.raises(LogTrimmed):
            applied.check(0, 3, 4)
        # What came since is known again.
        applied.note(0, log.read(0, 3, 1)[0])
        applied.check(0, 4, 4)
    for _ in range(2):
        applied.check(0, 3 + trimmed, 4)


def test_waiting_ends_with_the_next_record(open_here: Open) -> None:
    writer, reader = open_here(2), open_here(2)
    epoch = writer.acquire(0)
    assert reader.wait(0, 0, 0.0) is False
    assert reader.wait(0, 0, 0.02) is False
    found: list[Any] = []

    def follow() -> None:
        found.append(reader.wait(0, 0, 30))
        found.append(reader.read(0, 0, 9))

    thread = threading.Thread(target=follow)
    thread.start()
    writer.append(1, writer.acquire(1), [record(1)], NOW_MS)
    writer.append(0, epoch, [record(2)], NOW_MS)
    thread.join(20)
    assert found == [True, [logged(1, record(2))]]
    assert reader.wait(0, 0, 30) is True
    assert reader.wait(0, 1, 0.0) is False


def test_trimming_forgets_records_and_keeps_heads(log: UpdateLog) -> None:
    epoch = log.acquire(0)
    records = [record(at, at) for at in range(1, 21)]
    log.append(0, epoch, records, NOW_MS)
    assert log.trim(0, 5) == 5
    assert (log.start(0), log.end(0)) == (5, 20)
    assert log.read(0, 5, 3) == [logged(at, records[at - 1]) for at in (6, 7, 8)]
    with pytest.raises(LogTrimmed, match=r"beyond position 4 .* trimmed up to 5") as caught:
        log.read(0, 4, 3)
    assert (caught.value.partition, caught.value.after, caught.value.start) == (0, 4, 5)
    assert log.heads(0, [1])[1] == Head(1, False, 1, 0)
    assert log.trim(0, 3) == 5
    assert log.trim(0, 99) == 20
    assert log.read(0, 20, 3) == []
    assert log.append(0, epoch, [record(1, 99)], NOW_MS) == 21
    assert log.read(0, 20, 3) == [logged(21, record(1, 99))]


def test_trimming_goes_on_in_steps_where_there_is_much(
    log: UpdateLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[type(log).__module__]
    monkeypatch.setattr(module, "_TRIMMED_AT_ONCE", 7)
    log.append(0, log.acquire(0), [record(1)] * 50, NOW_MS)
    assert log.trim(0, 40) == 40
    assert [one.position for one in log.read(0, 40, 99)] == list(range(41, 51))


def test_trimming_never_passes_a_pin(open_here: Open) -> None:
    log = open_here(2)
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)] * 10, NOW_MS)
    log.pin("snapshot 2", (6, 0))
    log.pin("snapshot 1", (4, 0))
    assert open_here(2).pins() == {"snapshot 1": (4, 0), "snapshot 2": (6, 0)}
    assert log.trim(0, 9) == 4
    log.unpin("snapshot 1")
    log.unpin("never pinned")
    assert log.trim(0, 9) == 6
    log.pin("snapshot 2", (8, 0))
    assert log.trim(0, 9) == 8
    with pytest.raises(LogTrimmed, match="beyond position 7"):
        log.pin("too late", (7, 0))
    assert log.pins() == {"snapshot 2": (8, 0)}
    log.unpin("snapshot 2")
    assert log.trim(0, 9) == 9
    assert log.pins() == {}


def test_a_pin_holds_all_partitions_and_an_empty_cut_everything(open_here: Open) -> None:
    log = open_here(2)
    for partition in range(2):
        log.append(partition, log.acquire(partition), [record(1)] * 5, NOW_MS)
    log.pin("first", ())
    assert log.pins() == {"first": (0, 0)}
    assert [log.trim(partition, 5) for partition in range(2)] == [0, 0]
    log.pin("first", (2, 3))
    assert [log.trim(partition, 5) for partition in range(2)] == [2, 3]
    for wrong in ((1,), (1, 2, 3), (-1, 2)):
        with pytest.raises(ConfigError, match="2 positions"):
            log.pin("wrong", wrong)


def test_a_log_keeps_its_identity_and_its_partitions(open_here: Open) -> None:
    with pytest.raises(LogUnavailable, match="there is no"):
        open_here(4, create=False)
    log = open_here(4)
    assert 0 < log.log_id < 1 << 63
    for again in (open_here(4), open_here(4, create=False), open_here(None)):
        assert (again.log_id, again.num_partitions, again.url) == (log.log_id, 4, log.url)
    for other in (1, 2, 8):
        with pytest.raises(ConfigError, match=f"has 4 partitions .* got num_partitions {other}"):
            open_here(other)
    for impossible in (0, 3, 128, -1):
        with pytest.raises(ConfigError, match="a power of two up to 64"):
            open_here(impossible)


def test_two_logs_have_different_ids(url_of: Callable[[str], str]) -> None:
    ids = []
    for name in ("one", "another"):
        log = open_log(url_of(name))
        ids.append(log.log_id)
        log.close()
    assert len(set(ids)) == 2


def test_several_who_create_a_log_at_once_get_the_same(open_here: Open) -> None:
    logs: list[UpdateLog] = []
    threads = [threading.Thread(target=lambda: logs.append(open_here(2))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len({log.log_id for log in logs}) == 1
    assert len(logs) == 4


def test_a_closed_log_says_so(open_here: Open) -> None:
    log = open_here()
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    log.close()
    for call in (
        lambda: log.read(0, 0, 1),
        lambda: log.append(0, epoch, [record(1)], NOW_MS),
        lambda: log.wait(0, 5, 5),
        lambda: log.pin("snapshot", (0,)),
    ):
        with pytest.raises(LogUnavailable, match="is closed"):
            call()
    assert open_here().end(0) == 1


def test_closing_ends_a_wait(open_here: Open) -> None:
    log = open_here()
    ended = threading.Event()

    def follow() -> None:
        with pytest.raises(LogUnavailable):
            log.wait(0, 0, 60)
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    log.close()
    thread.join(20)
    assert ended.is_set()


WRITER = """
import sys
from silvershard.cluster.update_log import NewRecord, open_log
log = open_log(sys.argv[1], 1)
epoch = log.acquire(0)
for number in range(1, 201):
    records = [NewRecord(at, number, False, False, 0, b"new") for at in range(number % 7 + 1)]
    log.append(0, epoch, records, number)
log.close()
"""


def test_readers_in_other_processes_see_whole_appends_in_order(open_here: Open, url: str) -> None:
    log = open_here()
    process = subprocess.Popen([sys.executable, "-P", "-c", WRITER, url])
    try:
        found: list[LogRecord] = []
        total = sum(number % 7 + 1 for number in range(1, 201))
        while len(found) < total:
            assert log.wait(0, len(found), 30)
            page = log.read(0, len(found), 100_000)
            found += page
            # A page ends where an append ends, and heads are not behind what was read before.
            last = found[-1].version
            assert len([one for one in found if one.version == last]) == last % 7 + 1
            assert log.heads(0, [0])[0].version >= last
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert [one.position for one in found] == list(range(1, total + 1))
    assert [one.version for one in found] == sorted(one.version for one in found)


class Model:
    """What a log must be equal to, in lists."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.heads: dict[int, Head] = {}
        self.tables: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.start = 0

    def append(self, records: list[NewRecord]) -> None:
        for new in records:
            position = len(self.records) + 1
            self.records.append(logged(position, new))
            if new.table:
                self.tables[new.table] = new.version
            else:
                head = Head(new.version, new.deleted, position, new.expires_unix_ms)
                self.heads[new.item_id] = head

    def expired(self, now_ms: int) -> list[tuple[int, Head]]:
        over = [
            one
            for one in self.heads.items()
            if 0 < one[1].expires_unix_ms <= now_ms and not one[1].deleted
        ]
        return sorted(over, key=lambda one: (one[1].expires_unix_ms, one[0]))


def random_record(rng: random.Random) -> NewRecord:
    if rng.random() < 0.1:
        return rows_of(rng.choice(("users", "makers")), rng.randrange(1, 100))
    deleted = rng.random() < 0.2
    return NewRecord(
        rng.randrange(30),
        rng.randrange(1, 1000),
        rng.random() < 0.3,
        deleted,
        0 if deleted or rng.random() < 0.5 else rng.randrange(1, 100),
        rng.randbytes(rng.randrange(20)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_work_gives_what_lists_give(open_here: Open, seed: int) -> None:
    rng, model, log = random.Random(seed), Model(), open_here()
    epoch = log.acquire(0)
    for _ in range(80):
        action = rng.random()
        if action < 0.5:
            records = [random_record(rng) for _ in range(rng.randrange(6))]
            assert log.append(0, epoch, records, NOW_MS) == len(model.records) + 1
            model.append(records)
        elif action < 0.65:
            upto = rng.randrange(len(model.records) + 5)
            bounds = [upto, len(model.records), *model.pins.values()]
            model.start = max(model.start, min(bounds))
            assert log.trim(0, upto) == model.start
        elif action < 0.8:
            name, position = rng.choice("ab"), rng.randrange(model.start, len(model.records) + 1)
            log.pin(name, (position,))
            model.pins[name] = position
        elif action < 0.9:
            log.unpin("a")
            model.pins.pop("a", None)
        else:
            log.close()
            log = open_here()
            epoch = log.acquire(0)
        after, limit = rng.randrange(model.start, len(model.records) + 1), rng.randrange(1, 9)
        wanted = model.records[after:]
        assert log.read(0, after, limit) == wanted[:limit]
        assert log.read_urgent(0, after, limit) == [one for one in wanted if one.urgent][:limit]
        assert log.heads(0, range(30)) == model.heads
        assert log.expired(0, 50, 99) == model.expired(50)
        assert {name: log.row_version(0, name) for name in model.tables} == model.tables
        assert log.pins() == {name: (position,) for name, position in model.pins.items()}


def test_a_missing_record_is_noticed_wherever_it_was() -> None:
    records = [logged(at, record(1)) for at in (4, 5, 6)]
    check_dense("log", 0, 3, 6, 10, records)
    check_dense("log", 0, 3, 9, 3, records)
    check_dense("log", 0, 9, 6, 3, [])
    large = record(1, payload=b"x" * (READ_BYTES // 2))
    check_dense("log", 0, 3, 9, 5, [logged(at, large) for at in (4, 5)])
    for after, end, limit, found, missing in (
        (3, 9, 5, [logged(4, large)], 5),
        (3, 9, 5, [logged(at, large) for at in (4, 6)], 5),
        (2, 6, 10, records, 3),
        (3, 7, 10, records, 7),
        (3, 6, 10, records[1:], 4),
        (3, 6, 10, [records[0], records[2]], 5),
        (3, 6, 10, [], 4),
    ):
        with pytest.raises(LogDamaged, match=f"position {missing} of partition 0 is missing"):
            check_dense("log", 0, after, end, limit, found)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("postgres://host/db", "must start with sqlite:/// or redis://"),
        ("/var/log/updates.db", "must start with sqlite:/// or redis://"),
        ("sqlite://updates.db", "sqlite:///ABSOLUTE/PATH"),
        ("sqlite:///updates.db?mode=memory", "sqlite:///ABSOLUTE/PATH"),
        ("sqlite:///tmp/updates#1.db", "sqlite:///ABSOLUTE/PATH"),
        ("sqlite:///", "sqlite:///ABSOLUTE/PATH"),
        ("redis://127.0.0.1:1/0?trust_durability=maybe", "trust_durability 0 or 1"),
        ("redis://127.0.0.1:1/0?prefix=", "a prefix that is not empty"),
    ],
)
def test_a_url_that_names_no_log_is_refused(wrong: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_log(wrong)


def test_redis_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    for name in ("redis_log", "redis_server"):
        monkeypatch.delitem(sys.modules, f"silvershard.cluster.{name}", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'silvershard\[redis\]'"):
        open_log("redis://127.0.0.1:1/0")
