from typing import Any

import pytest

from silvershard.cluster.config import HedgingSection, RetriesSection
from silvershard.cluster.extra_calls import ExtraCalls, TokenBucket


@pytest.mark.parametrize(("share", "burst"), [(0.05, 0), (0.05, 16), (0.1, 7), (0.0, 3), (1.0, 0)])
def test_a_bucket_grants_its_share_and_its_burst_and_no_more(share: float, burst: int) -> None:
    bucket = TokenBucket(share, burst)
    granted = sum(bucket.take() for _ in range(100))
    assert granted == burst
    for calls in range(1, 10_001):
        bucket.deposit()
        # Whoever wants a token after every call gets exactly the share.
        granted += bucket.take()
        assert granted == burst + calls * round(share * 1000) // 1000


def test_a_bucket_holds_its_burst_and_no_more() -> None:
    bucket = TokenBucket(0.5, 3)
    for _ in range(1000):
        bucket.deposit()
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]


def make(hot: list[bool], **sections: Any) -> ExtraCalls:
    return ExtraCalls(
        sections.get("hedging", HedgingSection(budget=0.0)),
        sections.get("retries", RetriesSection(budget=0.0)),
        retry_burst=2,
        is_hot=lambda: hot[0],
    )


def hedge(extra: ExtraCalls, *, suspect: bool = False, silent: bool = False) -> bool:
    return extra.may_hedge(suspect=suspect, silent=silent)


def test_a_replica_without_a_sign_of_life_is_hedged_beyond_the_budget() -> None:
    hot = [False]
    extra = make(hot)
    assert sum(hedge(extra) for _ in range(100)) == 16
    assert hedge(extra, silent=True)
    assert hedge(extra, suspect=True)
    assert extra.counts.hedges_free == 2


def test_a_busy_cluster_hedges_only_what_misses_pings_and_repeats_no_refusal() -> None:
    hot = [True]
    extra = make(hot)
    assert not hedge(extra)
    assert not hedge(extra, silent=True)
    # It works on nothing of what it was asked, so that the hedge is no further work.
    assert hedge(extra, suspect=True)
    assert not extra.may_retry(refused=True)
    assert extra.may_retry(refused=False)
    hot[0] = False
    assert hedge(extra)
    assert extra.may_retry(refused=True)
    assert not extra.may_retry(refused=False)
    assert (extra.counts.retries, extra.counts.retries_suppressed) == (2, 2)


def test_hedging_can_be_switched_off() -> None:
    extra = make([False], hedging=HedgingSection(enabled=False, budget=1.0))
    assert not hedge(extra, suspect=True, silent=True)


def test_budgets_grow_with_first_calls() -> None:
    extra = make([False], retries=RetriesSection(budget=0.5), hedging=HedgingSection(budget=0.5))
    assert [extra.may_retry(refused=False) for _ in range(3)] == [True, True, False]
    for _ in range(4):
        extra.count_call()
    assert [extra.may_retry(refused=False) for _ in range(3)] == [True, True, False]
    assert extra.counts.calls == 4


@pytest.mark.parametrize("calls", [100, 10_000])
def test_hedges_and_retries_stay_within_their_shares_however_many_are_wanted(calls: int) -> None:
    extra = ExtraCalls(HedgingSection(), RetriesSection(), retry_burst=64)
    hedged = retried = 0
    for _ in range(calls):
        extra.count_call()
        hedged += hedge(extra)
        retried += extra.may_retry(refused=False)
    assert hedged <= 16 + 0.05 * calls < hedged + 1.001
    assert retried <= 64 + 0.1 * calls < retried + 1.001
    assert extra.counts.retries == retried
