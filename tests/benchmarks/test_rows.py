import pytest

from benchmarks.rows import Cell, Row, not_below, reached, summary

RATIO = Row("k100", "k 100", "x", at_least=1.7, goal=3, stretch=4)
TIME = Row("streaming", "updates", "ms", at_least=20, goal=8, stretch=4, lower_is_better=True)


def cell(value: float, recall: float | None = None) -> Cell:
    return Cell("row", f"case {value}", value, recall, recall, 1.0, None, 0.25, 1)


def test_recall_may_lack_only_what_the_queries_cannot_tell() -> None:
    assert not_below([0.9, 0.8], [0.9, 0.8])
    assert not_below([0.95, 0.8], [0.9, 0.8])
    assert not_below([0.900, 0.801, 0.8], [0.901, 0.800, 0.801])
    assert not not_below([0.899, 0.799], [0.9, 0.8])
    assert not not_below([0.7, 0.9, 0.8], [0.8, 0.81, 0.9])
    assert not not_below([0.5], [0.6])


def test_the_worst_cell_and_the_mean_decide_what_a_row_reached() -> None:
    found = summary(RATIO, [cell(2.0, 0.9), cell(8.0, 0.8)], [])
    assert (found["worst"], found["geometric_mean"]) == (2.0, 4.0)
    assert found["worst_case"] == "case 2.0"
    assert found["recall"] == [0.8, 0.9]
    assert found["reached"] == ["at_least", "goal", "stretch"]
    assert (found["disturbed"], found["unsettled"]) == (0.25, 2)


def test_the_worst_time_is_the_longest() -> None:
    found = summary(TIME, [cell(4.0), cell(16.0)], [])
    assert (found["worst"], found["geometric_mean"]) == (16.0, 8.0)
    assert found["reached"] == ["at_least", "goal"]
    assert found["recall"] is None


def test_a_row_without_a_green_cell_has_no_number() -> None:
    found = summary(RATIO, [], ["a case"])
    assert found["red"] == ["a case"]
    assert "worst" not in found
    assert "geometric_mean" not in found


@pytest.mark.parametrize(
    ("worst", "mean", "names"), [(1.6, 3.5, ["goal"]), (1.7, 2.9, ["at_least"])]
)
def test_figures_are_reached_one_by_one(worst: float, mean: float, names: list[str]) -> None:
    assert reached(RATIO, worst, mean) == names
