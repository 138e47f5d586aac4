import pytest

from silvershard.cluster.feed_block import FeedBlock, RoomReport


def report(taken: int, *cut: int, shard: int = 0, replica: int = 0, slots: int = 100) -> RoomReport:
    return RoomReport(shard, replica, slots, taken, cut)


@pytest.fixture
def feed() -> FeedBlock:
    return FeedBlock(0.9, 0.1)


def accept(feed: FeedBlock, count: int, partition: int = 0) -> None:
    for _ in range(count):
        assert feed.reserve(0, partition) == ""


def test_until_a_shard_has_reported_there_is_no_room(feed: FeedBlock) -> None:
    assert feed.reserve(0, 0) == "shard 0 has not said yet how much room it has"
    feed.report([report(10, 0)])
    assert feed.reserve(0, 0) == ""
    assert feed.refusal(1) == "shard 1 has not said yet how much room it has"


def test_a_shard_that_has_reported_once_stays_known(feed: FeedBlock) -> None:
    assert feed.unknown(3) == {0, 1, 2}
    feed.report([report(10, 0), report(10, 0, shard=2)])
    feed.reserve(1, 0)
    assert feed.unknown(3) == {1}
    feed.report([report(10, 0, shard=1)])
    assert feed.unknown(3) == set()
    assert feed.unknown(4) == {3}


def test_accepted_items_take_room_until_they_are_reported(feed: FeedBlock) -> None:
    feed.report([report(80, 0)])
    accept(feed, 10)
    assert "holds 90.0%" in feed.reserve(0, 0)
    feed.settle(0, 10)
    feed.report([report(80, 0)])
    assert "holds 90.0%" in feed.reserve(0, 0)
    feed.report([report(79, 10)])
    accept(feed, 11)
    assert "holds 90.0%" in feed.refusal(0)


def test_what_failed_keeps_its_room_until_the_log_has_gone_beyond_it(feed: FeedBlock) -> None:
    feed.report([report(80, 0)])
    accept(feed, 6)
    accept(feed, 2)
    feed.settle(0, 2)
    feed.report([report(82, 1)])
    assert "holds 90.0%" in feed.refusal(0)
    feed.report([report(79, 2)])
    assert feed.refusal(0) == ""


def test_refusals_last_until_the_use_is_well_below_the_limit(feed: FeedBlock) -> None:
    feed.report([report(90, 0)])
    assert feed.blocked() == [(0, 0.9, 0.9)]
    feed.report([report(80, 0)])
    assert "holds 80.0%" in feed.refusal(0)
    feed.report([report(79, 0)])
    assert feed.refusal(0) == ""
    feed.report([report(89, 0)])
    assert feed.blocked() == []


def test_the_fullest_replica_decides(feed: FeedBlock) -> None:
    feed.report([report(50, 9), report(88, 5, replica=1)])
    accept(feed, 2)
    assert "holds 90.0%" in feed.refusal(0)
    feed.settle(0, 11)
    # The replica that lags still has to apply them.
    feed.report([report(52, 11), report(88, 10, replica=1)])
    assert "holds 90.0%" in feed.refusal(0)
    feed.report([report(52, 11)])
    assert feed.refusal(0) == ""


def test_the_last_word_of_a_shard_stands_while_none_of_its_replicas_speaks(
    feed: FeedBlock,
) -> None:
    feed.report([report(80, 0), report(20, 0, replica=1)])
    accept(feed, 5)
    feed.settle(0, 5)
    feed.report([])
    accept(feed, 5)
    assert "holds 90.0%" in feed.refusal(0)
    # A replica that is missing beside another one is gone.
    feed.report([report(20, 0, replica=1)])
    assert feed.refusal(0) == ""


def test_log_partitions_are_counted_apart(feed: FeedBlock) -> None:
    feed.report([report(80, 0, 0)])
    accept(feed, 5, partition=0)
    feed.settle(0, 5)
    accept(feed, 5, partition=1)
    feed.settle(1, 5)
    feed.report([report(85, 5, 0)])
    assert "holds 90.0%" in feed.refusal(0)
    feed.report([report(79, 5, 5)])
    assert feed.refusal(0) == ""


def test_what_an_earlier_sequencer_accepted_takes_room(feed: FeedBlock) -> None:
    feed.resume(0, 100)
    feed.report([report(80, 90)])
    assert "holds 90.0%" in feed.refusal(0)
    feed.report([report(70, 99)])
    accept(feed, 19)
    assert "holds 90.0%" in feed.refusal(0)


def test_other_shards_are_unknown_and_what_was_accepted_before_takes_room(feed: FeedBlock) -> None:
    feed.resume(0, 100)
    feed.report([report(10, 100), report(10, 100, shard=1)])
    accept(feed, 5)
    feed.settle(0, 105)
    accept(feed, 3)
    feed.forget()
    assert feed.unknown(3) == {0, 1, 2}
    assert "has not said yet" in feed.reserve(0, 0)
    feed.report([report(81, 100)])
    # Five were in the log and three on their way into it.
    assert feed.reserve(0, 0) == ""
    assert "holds 90.0%" in feed.reserve(0, 0)
    feed.settle(0, 108)
    feed.report([report(89, 108)])
    assert feed.refusal(0).startswith("shard 0 holds 89.0%")
    feed.report([report(79, 108)])
    assert feed.refusal(0) == ""


def test_a_shard_without_slots_has_no_room(feed: FeedBlock) -> None:
    feed.report([report(0, 0, slots=0)])
    assert "holds 100.0%" in feed.refusal(0)
