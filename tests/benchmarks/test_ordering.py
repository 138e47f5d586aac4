import math

import numpy as np
import pytest
import torch

from benchmarks import ordering
from benchmarks.ordering import (
    CANDIDATES,
    QUICK,
    RANKERS,
    RANKS,
    Measured,
    arms,
    compared,
    comparisons,
    measure,
    summary,
    verdicts,
)
from benchmarks.ordering_tasks import PROBE_SHARES, Task, planted_task, train_rankers
from benchmarks.planted import planted_world
from silvershard.model.two_tower import TwoTower

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_task(planted_world(40, 150, 12, seed=0), steps=4, ranker_steps=4)


@pytest.fixture(scope="module")
def models(task: Task) -> dict[str, TwoTower]:
    """Trained for a moment, with rerankers that have an opinion all the same."""
    trained = train_rankers(task, RANKERS, seed=0)
    generator = torch.Generator().manual_seed(0)
    for model in trained.values():
        for weight in model.ranker.parameters():
            weight.data += torch.randn(weight.shape, generator=generator)
    return trained


def measured(seed: int, gain: float, num_users: int = 400) -> Measured:
    """Arms of which rerankers find ``gain`` more, and precision adds nothing."""
    generator = np.random.default_rng(seed)
    base = generator.random(num_users)
    hits = {
        (f"{order}, {probes}", k): (base < 0.3 + (order != "ann") * gain).astype(np.float64)
        for order in ("ann", *RANKERS)
        for probes in PROBE_SHARES
        for k in RANKS
    }
    shares = dict.fromkeys(PROBE_SHARES, 1.0)
    return Measured(seed, hits, {}, shares, shares, {})


def test_the_arms_differ_in_order_and_probes_alone(task: Task, models: dict[str, TwoTower]) -> None:
    found, failures = arms(task, models)
    assert not failures
    assert set(found) == {
        f"{order}, {probes}" for order in ("ann", *RANKERS) for probes in PROBE_SHARES
    }
    exact = found["ann, all"]
    assert exact.shape == (40, CANDIDATES)
    unseen = 150 - np.array([len(one) for one in task.histories])
    assert ((exact >= 0).sum(1) == unseen).all()
    assert ((found["ann, few"] >= 0).sum(1) < unseen).all()
    for user, history in enumerate(task.histories):
        for ranked in found.values():
            assert not np.isin(ranked[user], history).any()
    for ranker in RANKERS:
        # All items are candidates, so both orders are of the same ones.
        assert found[f"{ranker}, all"].shape == (40, 100)
        assert not np.array_equal(found[f"{ranker}, all"], exact[:, :100])


def test_the_gate_sees_another_order_and_other_towers(
    task: Task, models: dict[str, TwoTower], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ordering.brute_force

    def wrong(*given: object) -> object:
        ids = right(*given)
        ids[-1, [98, 99]] = ids[-1, [99, 98]]
        return ids

    monkeypatch.setattr(ordering, "brute_force", wrong)
    first, second = models
    others = train_rankers(task, {second: RANKERS[second]}, seed=1)
    mixed = {first: models[first], second: others[second]}
    found, failures = arms(task, mixed)
    assert failures == [
        "the index over all clusters differs from brute force",
        f"the towers under {second} are others",
    ]
    monkeypatch.setattr(ordering, "train_rankers", lambda *given: mixed)
    assert measure(task, 0) == failures
    assert found


def test_gains_are_of_the_users_of_all_seeds_or_of_their_means() -> None:
    parts = [measured(seed, gain=0.1) for seed in range(3)]
    pair = ("mol, few", "ann, all")
    every = compared(parts, pair, 20, paired=False)
    means = compared(parts, pair, 20, paired=True)
    assert every.mean == pytest.approx(means.mean)
    assert every.mean == pytest.approx(0.1, abs=0.03)
    # As many users in all seeds together as the means of users are averaged over.
    for one in (every, means):
        assert one.low < one.mean < one.high
        assert one.high - one.low == pytest.approx(4 * math.sqrt(0.09 / 1200), rel=0.3)
    assert set(comparisons().values()) >= {("ann, all", "ann, few"), pair}


def test_a_claim_holds_only_if_it_does_in_every_seed() -> None:
    clear = [measured(seed, gain=0.1) for seed in range(3)]
    held = verdicts(summary(clear, paired=False))
    assert set(held) == {
        f"{one} {claim}" for one in RANKERS for claim in ("raises", "beats precision")
    }
    assert all(all(each.values()) for each in held.values())
    weak = [*clear, measured(3, gain=0.0)]
    assert not any(any(each.values()) for each in verdicts(summary(weak, paired=False)).values())


@pytest.mark.timeout(900)
def test_reranking_gains_more_than_precision_where_no_inner_product_tells_the_truth() -> None:
    torch.manual_seed(0)
    task = planted_task(planted_world(*QUICK, seed=0), steps=300, ranker_steps=200)
    found = measure(task, 0)
    assert isinstance(found, Measured)
    for claim, pair in comparisons().items():
        if claim != "more probes":
            for k in RANKS:
                assert compared([found], pair, k, paired=True).low > 0, (claim, k)
