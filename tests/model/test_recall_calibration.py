from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from silvershard.model.plan import Plan
from silvershard.model.quality import overlap_at_k
from silvershard.model.recall_calibration import RecallCalibration, calibrate
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.shard.load import load_retriever

INTERPOLATION = 0.03
"""What a plan between two that were measured may be off, beside the chance of who asks."""

MADE = RecallCalibration(
    requests=5,
    semantic=False,
    ks=(10, 100),
    ann_ks=(50, 200),
    probes=(4, 16, 64),
    recall=(((0.4, 0.8, 1.0), (0.5, 0.9, 1.0)), ((0.2, 0.4, 0.6), (0.3, 0.6, 0.9))),
)


def plan(probes: int, ann_k: int = 200, kind: str = "probe", **more: Any) -> Plan:
    return Plan(kind, probes, ann_k, **more)


def estimate(one: Plan, k: int = 10, **more: Any) -> float | None:
    return MADE.estimate(one, **{"k": k, "documents": 10_000, **more})


def test_what_was_measured_is_found_again() -> None:
    assert estimate(plan(16)) == pytest.approx(0.9)
    assert estimate(plan(4, 50)) == pytest.approx(0.4)
    assert estimate(plan(64, 200, "all_pages"), 100) == pytest.approx(0.9)


def test_what_lies_between_is_interpolated() -> None:
    assert estimate(plan(8)) == pytest.approx(0.7)
    assert estimate(plan(16, 100)) == pytest.approx(0.85)
    assert estimate(plan(8, 100)) == pytest.approx(0.65)
    # Depths are not: the next larger one promises no more than there is.
    assert estimate(plan(16), 1) == pytest.approx(0.9)
    assert estimate(plan(16), 11) == pytest.approx(0.6)
    # More candidates than were measured find no less.
    assert estimate(plan(16, 5000)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("one", "more"),
    [
        (plan(16), {"k": 101}),
        (plan(3), {}),
        (plan(16, 49), {}),
        (plan(16, semantic_k=9), {}),
        (plan(16), {"eligible": 9000}),
        (plan(64, kind="probe_wide"), {"eligible": 500}),
        (plan(64, kind="all_pages"), {"eligible": 201}),
    ],
)
def test_there_is_no_guess_outside_of_what_was_measured(one: Plan, more: dict[str, Any]) -> None:
    assert estimate(one, **more) is None


def test_whoever_ranks_every_eligible_item_finds_all() -> None:
    exact = plan(64, 10_000, "all_pages")
    assert estimate(exact, 5000) == 1.0
    assert estimate(plan(64, 200, "all_pages"), eligible=200) == 1.0
    assert estimate(plan(16, 10_000, "probe"), 5000) is None


@pytest.mark.parametrize(
    "change",
    [
        {"ks": (100, 10)},
        {"probes": (0, 16, 64)},
        {"ann_ks": (50,)},
        {"recall": (((0.4, 0.8, 1.1), (0.5, 0.9, 1.0)), ((0.2, 0.4, 0.6), (0.3, 0.6, 0.9)))},
        {"recall": (((0.4, 0.8),), ((0.2, 0.4),))},
    ],
)
def test_a_table_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RecallCalibration.model_validate({**MADE.model_dump(), **change})


def users(generation: Any, count: int, seed: int) -> list[Request]:
    draw = np.random.default_rng(seed)
    ids = generation.catalogue.item_ids
    return [
        Request(features={"history": draw.choice(ids, draw.integers(2, 12)).tolist()})
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def retriever(generation: Any) -> Retriever:
    return load_retriever(generation.path)[0]


@pytest.fixture(scope="module")
def measured(generation: Any, retriever: Retriever) -> RecallCalibration:
    found = calibrate(retriever, users(generation, 150, seed=1))
    assert found is not None
    return found


def test_the_axes_span_what_plans_and_overload_ask_for(
    retriever: Retriever, measured: RecallCalibration
) -> None:
    defaults = retriever.spec.defaults
    assert (measured.probes[0], measured.probes[-1]) == (2, retriever.spec.num_clusters)
    assert {defaults.probes, 2 * defaults.probes} <= set(measured.probes)
    assert {10, 20, defaults.ann_k} <= set(measured.ann_ks)
    assert measured.ks == (10, 100)
    assert measured.requests == 150
    # More probes and more candidates find more.
    assert measured.recall[0][0][0] < measured.recall[0][-1][0] < measured.recall[0][-1][-1]


@pytest.fixture(scope="module")
def others(generation: Any) -> list[Request]:
    """Users beside those it was measured on."""
    return [replace(one, k=100) for one in users(generation, 150, seed=2)]


def ids(retriever: Retriever, asked: list[Request], **changes: Any) -> NDArray[np.int64]:
    found = np.full((len(asked), 100), -1)
    for row, answer in enumerate(retriever([replace(one, **changes) for one in asked])):
        found[row, : len(answer.item_ids)] = answer.item_ids
    return found


@pytest.fixture(scope="module")
def exact(retriever: Retriever, others: list[Request]) -> NDArray[np.int64]:
    return ids(retriever, others, exact=True)


@pytest.mark.parametrize("probes", [2, 3, 6, 16])
@pytest.mark.parametrize("ann_k", [20, 30, 150])
def test_others_find_what_is_expected(
    retriever: Retriever,
    measured: RecallCalibration,
    others: list[Request],
    exact: NDArray[np.int64],
    probes: int,
    ann_k: int,
) -> None:
    run = Plan("all_pages" if probes == 16 else "probe", probes, ann_k)
    found = ids(retriever, others, plan=str(run))
    for k in (10, 100):
        expected = measured.estimate(run, k=k, documents=retriever.documents)
        assert expected is not None
        shares = overlap_at_k(found, exact, k)
        # Of the difference between two means of as many users.
        standard_error = shares.std() * (2 / len(shares)) ** 0.5
        tolerance = 4 * standard_error + INTERPOLATION
        assert shares.mean() == pytest.approx(expected, abs=tolerance), k


def test_nothing_is_measured_without_items_or_users(retriever: Retriever) -> None:
    assert calibrate(retriever, []) is None
