import argparse

import pytest

from benchmarks import kernels, peers
from benchmarks.rows import Case, Gate


def plan(**options: object) -> kernels.Plan:
    given = {
        "quick": True,
        "items": 50_000,
        "page_slots": 64,
        "threads": [1],
        "rounds": 3,
        "implementation": "reference",
        **options,
    }
    return kernels.make_plan(argparse.Namespace(**given))


def case(gate: Gate, calls: list[str]) -> Case:
    return Case(
        name="a case",
        threads=1,
        ours=lambda _: calls.append("ours"),
        gate=lambda: gate,
        peers={"k100": {"mode 0": lambda _: calls.append("peer")}},
        absolute={"streaming": lambda seconds: 1e3 * seconds},
    )


@pytest.fixture(autouse=True)
def _without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "use_threads", lambda _: None)


def test_a_red_gate_measures_nothing_and_prints_no_number() -> None:
    calls: list[str] = []
    gate, cells = kernels.run_case(case(Gate(("ids differ",)), calls), plan())
    assert gate.failures
    assert cells == []
    assert calls == []


def test_a_green_gate_gives_one_cell_per_row_with_both_recalls() -> None:
    calls: list[str] = []
    _, cells = kernels.run_case(case(Gate((), 0.9, 0.8), calls), plan())
    assert [cell.row for cell in cells] == ["k100", "streaming"]
    assert [(cell.recall, cell.peer_recall) for cell in cells] == [(0.9, 0.8)] * 2
    assert cells[0].peer_us is not None
    assert cells[1].peer_us is None
    assert {"ours", "peer"} == set(calls)


def test_a_smaller_set_probes_the_same_share_of_lists() -> None:
    small = plan()
    assert small.lists(1024) == 51
    assert small.scaled(64, 1024) == 3
    assert small.scaled(1, 1024) == 1
    assert small.length(100_000) == 50_000
    full = plan(items=1_000_000)
    assert (full.lists(4096), full.scaled(64, 4096), full.length(100_000)) == (4096, 64, 100_000)


def test_a_missing_peer_says_how_to_install_it() -> None:
    with pytest.raises(peers.MissingPeerError, match="pip install"):
        peers.require("no_such_module_of_a_peer")
