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
    waited: list[float] = []
    thread = threading.Thread(target=lambda: waited.append(gaps.wait()))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    gaps.end()
    ended_s = time.monotonic()
    thread.join(30)
    assert time.monotonic() - ended_s >= 0.001
    assert 0.04 < waited[0] < 30


def test_queries_that_leave_no_gap_do_not_keep_others_from_their_work() -> None:
    gaps = QueryGaps(longest_s=0.05)
    gaps.begin()
    assert 0.05 <= gaps.wait() < 30
