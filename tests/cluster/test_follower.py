import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.follower import Follower
from silvershard.cluster.update_log import READ_BYTES, LogRecord, NewRecord, open_log
from silvershard.shard.errors import (
    LogDamaged,
    LogTrimmed,
    LogUnavailable,
    MutationError,
    PoolExhausted,
)

UNIX_S = 1_700_000_000.0


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class MemoryLog:
    """A log of L partitions in memory; ``error`` is what the next reads raise."""

    url = "test://"
    log_id = 9

    def __init__(self, num_partitions: int = 1) -> None:
        self.num_partitions = num_partitions
        self.records: list[list[LogRecord]] = [[] for _ in range(num_partitions)]
        self.error: Exception | None = None
        self.urgent_reads = 0

    def add(
        self, name: str, *, partition: int = 0, urgent: bool = False, at_s: float = UNIX_S
    ) -> None:
        position = len(self.records[partition]) + 1
        self.records[partition].append(
            LogRecord(position, position, 1, int(at_s * 1e3), urgent, name.encode())
        )

    def end(self, partition: int) -> int:
        self._fail()
        return len(self.records[partition])

    def read(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        self._fail()
        return self.records[partition][after : after + limit]

    def read_urgent(self, partition: int, after: int, limit: int) -> list[LogRecord]:
        self.urgent_reads += 1
        return [one for one in self.records[partition][after:] if one.urgent][:limit]

    def wait(self, partition: int, after: int, timeout_s: float) -> bool:
        self._fail()
        return len(self.records[partition]) > after

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


class Shard:
    """Notes what is committed; ``faults`` are raised by the next commits."""

    def __init__(self) -> None:
        self.commits: list[tuple[list[str], tuple[int, ...] | None]] = []
        self.refused: list[tuple[int, str]] = []
        self.faults: list[Exception] = []
        self.before_commit: Callable[[], None] = lambda: None
        self.before_prepare: Callable[[], None] = lambda: None

    @property
    def names(self) -> list[str]:
        return [name for names, _ in self.commits for name in names]

    def prepare(self, mutations: Any, give_way: Callable[[], None]) -> list[str]:
        self.before_prepare()
        give_way()
        return list(mutations)

    def commit(self, prepared: list[str], cut: tuple[int, ...] | None) -> list[tuple[int, str]]:
        self.before_commit()
        if self.faults:
            raise self.faults.pop(0)
        self.commits.append((prepared, cut))
        return self.refused


def decode(payload: bytes) -> Any:
    if payload == b"bad":
        raise MutationError("op", "must be known")
    return payload.decode()


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def unix_clock() -> Clock:
    return Clock(UNIX_S)


@pytest.fixture
def shard() -> Shard:
    return Shard()


@pytest.fixture
def make(clock: Clock, unix_clock: Clock, shard: Shard) -> Iterator[Callable[..., Follower[Any]]]:
    made: list[Follower[Any]] = []

    def follower(log: Any, **options: Any) -> Follower[Any]:
        settings = {"clock": clock, "unix_clock": unix_clock, **options}
        made.append(Follower(log, shard, shard.commit, decode, **settings))
        return made[-1]

    yield follower
    for one in made:
        one.stop()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "the state that was waited for did not come"
        time.sleep(0.001)


def test_records_are_committed_in_order_and_the_cut_moves_with_them(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    for number in range(5):
        log.add(f"r{number}")
    follower = make(log, max_batch=2)
    assert [follower.step() for _ in range(3)] == [True, True, False]
    assert shard.commits == [(["r0", "r1"], (2,)), (["r2", "r3"], (4,)), (["r4"], (5,))]
    assert follower.step() is False
    assert len(shard.commits) == 3
    assert follower.lag.cut == follower.lag.ends == (5,)


def test_it_goes_on_from_the_cut_of_its_snapshot(make: Any, shard: Shard) -> None:
    log = MemoryLog(2)
    for number in range(4):
        log.add(f"r{number}")
    follower = make(log, cut=(3, 0))
    follower.catch_up()
    assert shard.commits == [(["r3"], (4, 0))]


def test_a_busy_partition_holds_up_no_other(make: Any, shard: Shard) -> None:
    log = MemoryLog(4)
    for number in range(20):
        log.add(f"busy{number}", partition=1)
    log.add("quiet", partition=3)
    follower = make(log, max_batch=4)
    for _ in range(4):
        follower.step()
    assert "quiet" in shard.names
    while follower.step():
        pass
    assert [name for name in shard.names if name != "quiet"] == [f"busy{at}" for at in range(20)]
    assert follower.lag.cut == (0, 20, 0, 1)


def test_urgent_records_go_ahead_of_a_backlog_once_and_again_in_their_turn(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    for number in range(6):
        log.add(f"r{number}")
    log.add("take-down", urgent=True)
    follower = make(log, max_batch=2)
    follower.step()
    assert shard.commits == [(["take-down"], None), (["r0", "r1"], (2,))]
    while follower.step():
        pass
    assert shard.names == ["take-down", *(f"r{at}" for at in range(6)), "take-down"]
    assert follower.counts.urgent == 1
    reads = log.urgent_reads
    log.add("next", urgent=True)
    follower.step()
    assert log.urgent_reads == reads
    assert shard.commits[-1] == (["next"], (8,))


def test_staleness_is_the_time_since_it_was_up_to_date(
    make: Any, clock: Clock, unix_clock: Clock
) -> None:
    log = MemoryLog()
    log.add("r0", at_s=UNIX_S - 50)
    follower = make(log)
    clock.now_s += 2
    assert follower.staleness_s == 2.0
    follower.step()
    assert follower.staleness_s == 0.0
    clock.now_s += 0.25
    assert follower.staleness_s == 0.25
    follower.step()
    assert follower.staleness_s == 0.0


def test_staleness_is_the_age_of_what_is_left_where_that_is_more(
    make: Any, unix_clock: Clock
) -> None:
    log = MemoryLog()
    for at in range(4):
        log.add(f"r{at}", at_s=UNIX_S - 30 + at)
    follower = make(log, max_batch=2)
    assert follower.step() is True
    # The second record was logged 29 s ago; what is left came after it.
    assert follower.staleness_s == 29.0
    assert follower.step() is False
    assert follower.staleness_s == 0.0


def test_an_update_that_came_while_the_log_was_read_counts_as_missing(
    make: Any, shard: Shard, clock: Clock
) -> None:
    log = MemoryLog()
    log.add("r0")

    def late() -> None:
        clock.now_s += 3
        log.add("late")

    shard.before_commit = late
    follower = make(log)
    follower.step()
    assert follower.staleness_s == 3.0


def test_without_the_log_it_waits_says_so_once_and_goes_on(
    make: Any, shard: Shard, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    follower = make(log, clock=time.monotonic)
    log.error = LogUnavailable("test://", "unplugged")
    looks: list[int] = []
    follower.start(lambda: looks.append(1))
    until(lambda: follower.trouble == "update log test://: unplugged")
    aged_s = follower.staleness_s
    until(lambda: follower.staleness_s > aged_s)
    log.add("r0")
    assert looks == []
    log.error = None
    until(lambda: shard.names == ["r0"])
    until(lambda: follower.trouble == "")
    assert follower.failure == ""
    assert caplog.text.count("cannot follow for now") == 1


@pytest.mark.parametrize(
    "error",
    [LogTrimmed("test://", 0, 0, 7), LogDamaged("test://", "record 3 is damaged")],
    ids=["trimmed", "damaged"],
)
def test_what_cannot_be_read_is_looked_at_again_and_only_loading_ends_with_it(
    make: Any, shard: Shard, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    log.add("r0")
    follower = make(log, clock=time.monotonic)
    follower.start()
    until(lambda: shard.names == ["r0"])
    log.error = error
    log.add("r1")
    until(lambda: follower.trouble == str(error))
    aged_s = follower.staleness_s
    until(lambda: follower.staleness_s > aged_s)
    assert follower.failure == ""
    assert follower.lag.cut == (1,)
    assert caplog.text.count("cannot follow for now") == 1
    with pytest.raises(type(error)):
        make(log).catch_up()
    log.error = None
    until(lambda: shard.names == ["r0", "r1"])
    until(lambda: follower.trouble == "")


def test_a_log_that_lost_what_was_applied_is_not_followed(make: Any, shard: Shard) -> None:
    log = MemoryLog(2)
    log.add("r0", partition=1)
    follower = make(log, cut=(0, 5))
    with pytest.raises(LogDamaged, match="partition 1 ends at 1, but 5 was applied already"):
        follower.step()
    for number in range(9):
        log.add(f"other{number}", partition=1)
    with pytest.raises(LogDamaged, match="position 5 of partition 1 is not what was applied"):
        follower.step()
    assert shard.commits == []


def test_a_log_that_lost_an_urgent_record_that_was_applied_is_not_followed(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    for number in range(3):
        log.add(f"r{number}")
    log.add("take-down", urgent=True)
    follower = make(log, max_batch=1)
    follower.step()
    assert shard.names[:2] == ["take-down", "r0"]
    whole = list(log.records[0])
    log.records[0] = whole[:3]
    with pytest.raises(LogDamaged, match="ends at 3, but 4 was applied"):
        follower.step()
    log.add("other")
    with pytest.raises(LogDamaged, match="position 4 of partition 0 is not what was applied"):
        follower.step()
    log.records[0] = whole
    while follower.step():
        pass
    assert shard.names[-1] == "take-down"


def test_a_log_that_grew_again_is_followed_only_if_it_holds_what_was_applied(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    for number in range(3):
        log.add(f"r{number}")
    follower = make(log)
    follower.step()
    whole = list(log.records[0])
    log.records[0] = whole[:1]
    with pytest.raises(LogDamaged, match="ends at 1, but 3 was applied"):
        follower.step()
    for number in range(3):
        log.add(f"other{number}")
    with pytest.raises(LogDamaged, match="position 3 of partition 0 is not what was applied"):
        follower.step()
    assert shard.names == ["r0", "r1", "r2"]
    log.records[0] = whole
    log.add("r3")
    assert follower.step() is False
    assert shard.names == ["r0", "r1", "r2", "r3"]


def test_a_follower_that_has_just_started_takes_its_log_back(make: Any, shard: Shard) -> None:
    log = MemoryLog(2)
    for number in range(5):
        log.add(f"r{number}", partition=1)
    follower = make(log, cut=(0, 5))
    assert follower.step() is False
    whole = list(log.records[1])
    log.records[1] = whole[:2]
    with pytest.raises(LogDamaged, match="ends at 2, but 5 was applied"):
        follower.step()
    for number in range(3):
        log.add(f"other{number}", partition=1)
    with pytest.raises(LogDamaged, match="position 5 of partition 1 is not what was applied"):
        follower.step()
    log.records[1] = whole
    log.add("new", partition=1)
    assert follower.step() is False
    assert shard.names == ["new"]


def test_a_batch_is_cut_by_bytes_and_what_is_urgent_passes_the_rest(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog(2)
    third = "x" * (READ_BYTES // 3)
    for partition in (1, 0):
        for number in range(2):
            log.add(f"{partition}{number}{third}", partition=partition)
    log.add("0" + "y" * READ_BYTES)
    log.add("hot", urgent=True)
    follower = make(log)
    assert follower.step() is True
    # The largest number of records that fits: two of a partition, none of the next one.
    assert [[name[:2] for name in names] for names, _ in shard.commits] == [["10", "11"]]
    while follower.step():
        pass
    committed = [([name[:2] for name in names], cut) for names, cut in shard.commits]
    assert committed == [
        (["10", "11"], (0, 2)),
        (["ho"], None),
        (["00", "01"], (2, 2)),
        (["0y"], (3, 2)),
        (["ho"], (4, 2)),
    ]
    assert follower.lag.cut == (4, 2)


def test_a_bug_ends_the_following_and_is_logged(
    make: Any, shard: Shard, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    log.add("r0")
    log.add("r1")
    shard.faults = [ZeroDivisionError("odd")]
    follower = make(log, max_batch=1)
    follower.start()
    until(lambda: bool(follower.failure))
    assert follower.failure == "internal error: ZeroDivisionError: odd"
    assert "Traceback" in caplog.text
    # It skips nothing: the record after the one that failed is not applied either.
    assert shard.commits == []


def test_a_full_pool_is_waited_for_while_queries_are_open(
    make: Any, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.follower._ROOM_RETRY_S", 0.001)
    log = MemoryLog()
    log.add("r0")
    shard.faults = [PoolExhausted(3, 0, 2)] * 3
    follower = make(log)
    assert follower.step() is False
    assert shard.commits == [(["r0"], (1,))]
    assert follower.trouble == ""


def test_urgent_deletes_pass_a_batch_that_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silvershard.cluster.follower._ROOM_RETRY_S", 0.001)
    log = MemoryLog()
    log.add("r0")
    log.add("take-down of the batch", urgent=True)

    class Full(Shard):
        def commit(self, prepared: list[str], cut: tuple[int, ...] | None) -> list[tuple[int, str]]:
            if "r0" in prepared and "later take-down" not in self.names:
                if len(log.records[0]) == 2:
                    log.add("later take-down", urgent=True)
                raise PoolExhausted(3, 0, 2)
            return super().commit(prepared, cut)

    shard = Full()
    follower = Follower(log, shard, shard.commit, decode)  # type: ignore[arg-type]
    follower.step()
    follower.step()
    assert shard.commits == [
        (["take-down of the batch", "later take-down"], None),
        (["r0", "take-down of the batch"], (2,)),
        (["later take-down"], (3,)),
    ]
    assert follower.counts.urgent == 2
    assert follower.trouble == ""


def test_a_batch_that_finds_no_room_in_one_piece_is_applied_in_halves(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    for at in range(4):
        log.add(f"r{at}")
    shard.faults = [PoolExhausted(4, 2, 0), PoolExhausted(2, 1, 0)]
    follower = make(log)
    assert follower.step() is False
    assert shard.commits == [(["r0"], (0,)), (["r1"], (0,)), (["r2", "r3"], (4,))]
    assert follower.lag.cut == (4,)
    assert follower.counts.records == 4


def test_a_pool_that_stays_full_ends_the_following(
    make: Any, shard: Shard, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.follower._ROOM_RETRY_S", 0.0)
    log = MemoryLog()
    log.add("r0")
    shard.faults = [PoolExhausted(3, 0, 2)] * 99

    def later() -> None:
        clock.now_s += 1

    shard.before_commit = later
    follower = make(log)
    follower.start()
    until(lambda: follower.failure == str(PoolExhausted(3, 0, 2)))
    assert 14 <= 99 - len(shard.faults) <= 17


def test_refusals_are_logged_and_counted_and_the_rest_is_applied(
    make: Any, shard: Shard, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    for name in ("r0", "bad", "r2"):
        log.add(name)
    shard.refused = [(77, "the item is not held")]
    follower = make(log, name="shard 3")
    with caplog.at_level(logging.WARNING):
        follower.step()
    assert shard.commits == [(["r0", "r2"], (3,))]
    assert follower.counts.rejected == 2
    assert "shard 3 refuses an update of item 2: op: must be known" in caplog.text
    assert "shard 3 refuses an update of item 77: the item is not held" in caplog.text


def test_batches_shrink_when_they_take_long_and_grow_again(
    make: Any, shard: Shard, clock: Clock
) -> None:
    log = MemoryLog()
    for at in range(20_000):
        log.add(f"r{at}")
    pace_s = [1.0]

    def slow() -> None:
        clock.now_s += pace_s[0]

    shard.before_prepare = slow
    # What it waits for the model is no work of its own.
    shard.before_commit = lambda: setattr(clock, "now_s", clock.now_s + 9)
    follower = make(log, max_batch=1000)
    for _ in range(3):
        follower.step()
    sizes = [len(names) for names, _ in shard.commits]
    assert sizes == [1000, 64, 64]
    pace_s[0] = 1e-4
    for _ in range(8):
        follower.step()
    sizes = [len(names) for names, _ in shard.commits]
    assert sizes[3:8] == [64, 128, 256, 512, 1000]
    assert max(sizes) == 1000


def test_urgent_records_pass_a_batch_between_its_parts_and_wait_for_no_gap(clock: Clock) -> None:
    log = MemoryLog()
    log.add("r0")
    gaps: list[float] = []

    def gap() -> float:
        clock.now_s += 0.02
        gaps.append(0.02)
        return 0.02

    class Working(Shard):
        def prepare(self, mutations: Any, give_way: Callable[[], None]) -> list[str]:
            if list(mutations) == ["r0"]:
                log.add("take-down", urgent=True)
            return super().prepare(mutations, give_way)

    shard = Working()
    follower = Follower(
        log,  # type: ignore[arg-type]
        shard,
        shard.commit,
        decode,
        gap=gap,
        clock=clock,
    )
    follower.step()
    assert shard.commits == [(["take-down"], None), (["r0"], (1,))]
    # Between preparing and committing the batch, and before: none for what is urgent.
    assert len(gaps) == 2
    follower.step()
    assert shard.commits[2] == (["take-down"], (2,))


def test_all_urgent_records_pass_however_many_one_read_has(make: Any, shard: Shard) -> None:
    log = MemoryLog()
    for at in range(300):
        log.add(f"r{at}")
    for at in range(200):
        log.add(f"take-down {at}", urgent=True)
    follower = make(log, max_batch=64)
    follower.step()
    assert follower.counts.urgent == 200
    ahead = [names for names, cut in shard.commits if cut is None]
    assert sum(map(len, ahead)) == 200


def test_urgent_records_in_a_large_batch_do_not_wait_for_it(make: Any, shard: Shard) -> None:
    log = MemoryLog()
    for at in range(300):
        log.add(f"r{at}")
    log.add("take-down", urgent=True)
    make(log, max_batch=1000).step()
    assert shard.commits[0] == (["take-down"], None)
    assert shard.commits[1][1] == (301,)


def test_gaps_make_a_batch_slower_by_so_much_at_most(make: Any, shard: Shard, clock: Clock) -> None:
    log = MemoryLog()
    for at in range(4000):
        log.add(f"r{at}")

    def gap() -> float:
        clock.now_s += 0.02
        return 0.02

    began_s = clock.now_s
    make(log, max_batch=4000, gap=gap).step()
    assert len(shard.names) == 4000
    assert clock.now_s - began_s <= 0.13


def test_nothing_gives_way_to_queries_where_somebody_waits_for_the_update(
    make: Any, shard: Shard
) -> None:
    log = MemoryLog()
    log.add("r0")
    gaps: list[float] = []

    def gap() -> float:
        gaps.append(0.0)
        return 0.0

    follower = make(log, gap=gap)
    follower.hurry()
    follower.step()
    assert shard.names == ["r0"]
    assert gaps == []
    log.add("r1")
    follower.step()
    assert len(gaps) == 2


def test_a_batch_that_was_broken_off_leaves_nothing_behind(make: Any, shard: Shard) -> None:
    log = MemoryLog(2)
    follower = make(log, max_batch=1)
    log.add("a", partition=1)

    def unplugged() -> None:
        shard.before_commit = lambda: None
        raise LogUnavailable("test://", "unplugged")

    shard.before_commit = unplugged
    with pytest.raises(LogUnavailable):
        follower.step()
    # The other partition takes the next batch.
    log.add("b", partition=0)
    while not shard.commits:
        follower.step()
    first = 0 if shard.names == ["b"] else 1
    assert set(follower._applied._last) == {first}


def test_what_was_refused_is_published_with_its_cut(make: Any, shard: Shard) -> None:
    log = MemoryLog()
    log.add("r0")
    shard.refused = [(-1, "no such table a"), (-1, "no such table b"), (7, "old"), (7, "new")]
    follower = make(log)
    seen: list[Any] = []
    shard.before_commit = lambda: seen.append(follower.lag.refused)
    follower.step()
    assert seen == [()]
    assert follower.lag.refused == ((-1, "no such table a"), (-1, "no such table b"), (7, "new"))


def test_waits_for_gaps_do_not_make_batches_smaller(make: Any, shard: Shard, clock: Clock) -> None:
    log = MemoryLog()
    for at in range(3000):
        log.add(f"r{at}")

    def gap() -> float:
        clock.now_s += 9.0
        return 9.0

    follower = make(log, max_batch=1000, gap=gap)
    while follower.step():
        pass
    assert [len(names) for names, _ in shard.commits] == [1000, 1000, 1000]
    assert clock.now_s >= 100.0 + 3 * 9.0


def test_records_gather_beside_work_but_urgent_ones_and_those_somebody_waits_for(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silvershard.cluster.follower._SHARE", 1e-6)
    monkeypatch.setattr("silvershard.cluster.follower._LONGEST_PAUSE_S", 60.0)
    log = MemoryLog()
    log.add("r0")
    follower = Follower(log, shard, shard.commit, decode)  # type: ignore[arg-type]
    follower.start()
    until(lambda: shard.names == ["r0"])
    log.add("r1")
    log.add("take-down", urgent=True)
    log.add("r2")
    until(lambda: len(shard.commits) == 2)
    assert shard.commits[1] == (["take-down"], None)
    follower.hurry()
    until(lambda: len(shard.commits) == 3)
    assert shard.commits[2] == (["r1", "take-down", "r2"], (4,))
    began_s = time.monotonic()
    follower.stop()
    assert time.monotonic() - began_s < 4


def test_catching_up_waits_for_the_log_and_ends_with_the_follower(make: Any, shard: Shard) -> None:
    log = MemoryLog()
    log.error = LogUnavailable("test://", "unplugged")
    log.add("r0")
    follower = make(log)
    waiting = threading.Thread(target=follower.catch_up)
    waiting.start()
    until(lambda: bool(follower.trouble))
    log.error = None
    waiting.join(10)
    assert shard.names == ["r0"]
    log.error = LogUnavailable("test://", "unplugged")
    other = make(log)
    waiting = threading.Thread(target=other.catch_up)
    waiting.start()
    until(lambda: bool(other.trouble))
    other.stop()
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_idle_follower_notices_every_append(tmp_path: Path, make: Any, shard: Shard) -> None:
    log = open_log(f"sqlite://{tmp_path}/log.db")
    epoch = log.acquire(0)
    follower = make(log, clock=time.monotonic, unix_clock=time.time)
    follower.start()
    until(lambda: follower.lag.current_s > 0)
    for position in range(1, 21):
        log.append(0, epoch, [NewRecord(1, position, False, False, 0, b"r")], 0)
        until(lambda position=position: follower.lag.cut == (position,))  # type: ignore[misc]
    follower.stop()
    log.close()


def test_a_follower_whose_log_is_stalled_stays_at_its_cut(
    make: Any, shard: Shard, suffer: Any
) -> None:
    log = MemoryLog()
    log.add("a")
    follower = make(log, faults=suffer("stall", "shard 0.0"))
    with pytest.raises(LogUnavailable, match="update log test://: stalled by fault a"):
        follower.step()
    assert shard.names == []
    suffer("stall", "shard 0.0", state="cleared")
    follower.step()
    assert shard.names == ["a"]
