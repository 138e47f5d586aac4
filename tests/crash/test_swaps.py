import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from history.checker import PROPERTIES

from silvershard.deploy.activate import activate, rollback
from silvershard.deploy.config import load
from silvershard.deploy.control_store import Control

pytestmark = pytest.mark.slow

FEW_SWAPS = 6
ROUND = 10
STRUCK = (1, 3, 7)
ROLLED_BACK = 5
"""Which swaps of a round are struck, and which one is a rollback."""
READER_TIMEOUT_S = 5.0
# Longer than a reader waits for an answer.
DRAIN_MS = 5500
TIMEOUT_S = 150.0

MOMENTS = ("not begun", "loading", "partly prepared", "committed")
MIDDLE = ("loading", "partly prepared")
BLOWS = (
    ("shard", "loading"),
    ("shard", "partly prepared"),
    ("sequencer", "loading"),
    ("shard", "committed"),
    ("shard", "partly prepared"),
    ("sequencer", "partly prepared"),
)
"""Who is killed when in a swap, one blow after another."""


def moment_of(control: Control, wanted: int) -> str:
    """Return how far a swap to a generation is, as the control store says it."""
    if control.live == wanted:
        return "committed"
    going = control.current
    if going is None or going.state != "running":
        return "not begun"
    words = going.progress.split()
    if words[:1] == ["prepared"] and words[1] != "0":
        return "partly prepared"
    return "loading"


class Swaps:
    """Swaps of a cluster, and the blows that fall in the middle of them."""

    def __init__(self, cluster: Any, until: Any, recorder: Any) -> None:
        self.moments: Counter[tuple[str, str]] = Counter()
        """How often who was dead at which moment of a swap."""
        self._cluster = cluster
        self._until = until
        self._recorder = recorder
        self._store = cluster.state.control
        self._config = load(None, environ={}, options=cluster.options)
        self._draw = random.Random(5)
        self._commands = ThreadPoolExecutor(1)

    def __enter__(self) -> "Swaps":
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.shutdown()

    def activate(self, wanted: int, *, checks: bool) -> "Future[Any]":
        return self._commands.submit(
            activate,
            self._cluster.state,
            self._config,
            wanted,
            load=checks,
            timeout_s=TIMEOUT_S,
            report=lambda _: None,
        )

    def rollback(self) -> "Future[Any]":
        return self._commands.submit(
            rollback, self._cluster.state, timeout_s=TIMEOUT_S, report=lambda _: None
        )

    def strike(self, role: str, moment: str, wanted: int) -> None:
        """Kill somebody at a moment of a swap, and note at which one that was."""
        reached = MOMENTS[MOMENTS.index(moment) :]
        self._until(
            lambda: moment_of(self._store.read(), wanted) in reached, f"the swap is not {moment}"
        )
        with self._recorder.fault("kill", role):
            self._cluster.kill(role, self._draw)
        self.moments[role, moment_of(self._store.read(), wanted)] += 1


@pytest.mark.timeout(3600)
def test_no_answer_mixes_generations_and_no_request_fails_while_they_swap_under_load(
    tmp_path: Path,
    crash: Any,
    marked_generations: list[Path],
    marked_recorder: Any,
    generation: Any,
) -> None:
    recorder = marked_recorder
    swaps = crash.amount("SWAPS", FEW_SWAPS)
    options = {
        "sharding.shards": 3,
        "sharding.replicas": 2,
        "swap.drain_ms": DRAIN_MS,
        "runtime.crash_limit": 10_000,
        # Eight processes that load on two cores are late to answer, which is no sign of a hang.
        "ping.eject_after": 100,
    }
    with crash.running(tmp_path / "s", marked_generations, **options) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        writer = crash.Writer(cluster.address, recorder, seed=1)
        liked = generation.catalogue.item_ids[:6].tolist()
        readers = [
            crash.Reader(
                cluster.address, recorder, liked, [writer.ledger], timeout_s=READER_TIMEOUT_S
            )
            for _ in range(2)
        ]
        struck, previous = 0, 0
        with crash.working(writer, *readers), Swaps(cluster, crash.until, recorder) as swapping:
            for swap in range(swaps):
                live, answered = cluster.record.generation, [one.marked for one in readers]
                is_rollback = swap % ROUND == ROLLED_BACK
                # Else the one that no process holds, so that each of them has to load it.
                wanted = previous if is_rollback else min({1, 2, 3} - {live, previous})
                with recorder.activation(wanted):
                    if is_rollback:
                        done = swapping.rollback()
                    else:
                        done = swapping.activate(wanted, checks=swap == 0)
                        if swap % ROUND in STRUCK:
                            swapping.strike(*BLOWS[struck % len(BLOWS)], wanted)
                            struck += 1
                    assert done.result(TIMEOUT_S)["done"]
                crash.until(
                    lambda wanted=wanted: cluster.record.generation == wanted,
                    "the record does not name what is live",
                )
                previous = live
                crash.until(cluster.is_whole, "the cluster did not become whole")
                crash.look_at_all(cluster, recorder, writer.ledger)
                crash.until(
                    lambda answered=answered: all(
                        one.marked > before + 1
                        for one, before in zip(readers, answered, strict=True)
                    ),
                    "nobody reads",
                )
            ledger = writer.end()
        assert all(one.generations == {1, 2, 3} for one in readers)
        assert all(one.audits for one in readers)
        assert not writer.rejected
        # A blow that falls when all is done proves nothing: of fifty swaps, ten were in the middle.
        early = sum(n for (_, at), n in swapping.moments.items() if at in MIDDLE)
        assert early >= struck * 2 // 3, swapping.moments
        crash.look_at_all(cluster, recorder, ledger)
    crash.assert_right(recorder, *set(PROPERTIES) - {"bounded_recovery"})
