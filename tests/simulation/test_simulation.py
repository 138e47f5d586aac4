"""The whole cluster in virtual time, a seed at a time; see docs/simulation.md.

A seed that fails is printed with the command that replays it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.conftest import RUN
from simulation.world import Outcome, Plan, World

ROOT = Path(__file__).resolve().parents[2]


def simulated(plan: Plan, root: Path) -> Outcome:
    return World(plan, root).run()


@pytest.mark.timeout(600)
def test_no_fault_breaks_a_promise(seed: int, tmp_path: Path) -> None:
    outcome = simulated(Plan(seed, RUN), tmp_path)
    assert not outcome.violations, str(outcome)
    # It was no easy time, and no hopeless one.
    assert outcome.requests >= RUN, str(outcome)
    assert sum(outcome.faults.values()) >= RUN // 10, str(outcome)
    assert len(outcome.faults) >= 12, str(outcome)
    assert outcome.judged >= RUN // 10, str(outcome)
    assert outcome.unverified <= RUN // 100, str(outcome)


@pytest.mark.timeout(400)
def test_a_seed_does_the_same_in_every_process(tmp_path: Path) -> None:
    command = [sys.executable, "-P", ROOT / "tests/simulation/run.py"]
    done = subprocess.run(
        [*command, "--seed", "5", "--requests", "700"],
        env={**os.environ, "PYTHONHASHSEED": "3"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trace = done.stdout.split("trace ")[1].split()[0]
    assert trace == simulated(Plan(5, 700), tmp_path).trace


def test_seeds_differ_and_steps_end_the_faults(tmp_path: Path) -> None:
    one = simulated(Plan(1, 1000, steps=3), tmp_path / "one")
    other = simulated(Plan(2, 1000, steps=3), tmp_path / "other")
    assert one.trace != other.trace
    clients = {"cancelled request", "expired request"}
    assert sum(n for name, n in one.faults.items() if name not in clients) == 3


def test_a_failure_names_its_seed_and_how_to_replay_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An oracle that forgets an item finds fault with what is right.
    world = World(Plan(7, 100), tmp_path)
    answer = world.catalogue.answer
    monkeypatch.setattr(world.catalogue, "answer", lambda *told: answer(*told)[:-1])
    text = str(world.run())
    assert "exact_answer" in text
    assert "seed 7:" in text
    assert "replay: python -P tests/simulation/run.py --seed 7 --requests 100" in text
    assert " ask " in text
