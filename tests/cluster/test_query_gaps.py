import threading
import time

from silvershard.cluster.query_gaps import QueryGaps


def test_there_is_a_gap_while_nobody_asks() -> None:
    gaps = QueryGaps(longest_s=60)
    assert gaps.wait() < 30


def test_a_gap_begins_a_moment_after_the_last_call() -> None:
    gaps = QueryGaps(longest_s=60)
    gaps.begin()
    gaps.begin()
    gaps.end()
    ended_s: list[float] = []
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        gaps.wait()
        ended_s.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(30)
    # Whether it waits already or not: one call is still there.
    assert not ended_s
    before_s = time.monotonic()
    gaps.end()
    thread.join(30)
    assert ended_s[0] - before_s >= 0.002


def test_queries_that_leave_no_gap_do_not_keep_others_from_their_work() -> None:
    gaps = QueryGaps(longest_s=0.05)
    gaps.begin()
    assert 0.05 <= gaps.wait() < 30
