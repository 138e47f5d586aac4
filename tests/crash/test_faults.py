import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from history.checker import check

from silvershard.deploy.processes import identify

pytestmark = pytest.mark.slow

FEW_FAULTS = 10
LONG = 100
"""From so many faults on, unsynced changes must have been lost without a lying disk too."""
WRITERS = 2
RECOVERY_S = 60.0
"""A shard or a router is a process that has to start, and there are several at once."""
LOOKED_AT = (
    "bounded_recovery",
    "coverage_honesty",
    "cut_is_monotone_per_token",
    "no_duplicate",
    "no_ineligible_item",
    "no_mixed_generation",
    "no_resurrected_delete",
    "read_your_writes",
    "seen_whole",
)
PAUSE_S = 0.05
WAIT_S = 0.3
BLOW_S = 3e-3
"""An append takes about so long; the blow falls anywhere in it."""

ROUNDS = {
    "sqlite": (
        ("sequencer", "shard"),
        ("power",),
        ("router", "sequencer"),
        ("shard", "shard"),
        ("sequencer",),
        ("shard", "router", "sequencer"),
        ("sequencer", "shard"),
        ("sequencer", "supervisor"),
        ("router", "shard"),
        ("sequencer",),
    ),
    "redis": (
        ("redis", "shard"),
        ("sequencer", "redis"),
        ("redis",),
        ("router", "redis"),
        ("redis", "sequencer", "shard"),
        ("redis", "supervisor"),
        ("shard", "redis"),
        ("sequencer", "router"),
        ("power",),
        ("redis", "sequencer"),
    ),
}
"""Who is killed at the same time, one round after another."""


@dataclass
class Faults:
    """A cluster, its log and the file layer below that, and how they come to harm."""

    cluster: Any
    unsynced: Any
    server: Any
    """Of Redis; None for SQLite."""
    draw: random.Random
    lost: int = 0
    """Changes that were not synced."""
    is_mild: bool = True
    """Whether some of what was not synced may reach the disk all the same."""

    def strike(self, role: str) -> None:
        """Kill a process while the log is written, and drop of that what was not synced."""
        if role == "power":
            self.cluster.kill_everything(self._wait)
            if self.server is not None:
                self.server.kill()
            self._lose()
        elif role == "redis":
            self._wait()
            self.server.kill()
            self._lose()
        else:
            pid = self.cluster.kill(role, self.draw, self._wait)
            if role == "sequencer" and self.server is None:
                self._lose(pid=pid)

    def _wait(self) -> None:
        """Wait until the log begins to be written, if somebody does, and often a little more."""
        if self.server is not None:
            writing = self.server.process.pid if self.server.process else 0
        else:
            (writing,) = self.cluster.pids("sequencer")
        if identify(writing or 1 << 30) is not None:
            self.unsynced.wait_for_change(writing, WAIT_S)
            time.sleep(self.draw.choice((0.0, self.draw.random() * BLOW_S)))

    def _lose(self, **process: int) -> None:
        self.lost += self.unsynced.lose(self._kept, **process)

    def _kept(self, count: int) -> int:
        is_mild = self.is_mild and self.draw.random() < 0.5
        return self.draw.randrange(count + 1) if is_mild else 0

    def mend(self, roles: tuple[str, ...]) -> None:
        """Start again what nobody else does."""
        if self.server is not None and {"power", "redis"} & {*roles}:
            self.server.start()
        if {"power", "supervisor"} & {*roles}:
            self.cluster.restart()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_what_was_acked_survives_the_death_of_any_process_and_the_loss_of_what_was_not_synced(
    kind: str,
    tmp_path: Path,
    crash: Any,
    marked_generations: list[Path],
    marked_recorder: Any,
    generation: Any,
    unsynced: Any,
    make_redis: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = crash.amount("FAULTS", FEW_FAULTS) // len(ROUNDS)
    recorder = marked_recorder
    server = None
    if kind == "redis":
        server = make_redis(unsynced.environment, directory=unsynced.folder)
        url = server.url()
    else:
        url = f"sqlite://{unsynced.folder}/updates.sqlite"
        for name, value in unsynced.environment.items():
            monkeypatch.setenv(name, value)
    options = {"sharding.shards": 2, "runtime.crash_limit": 10_000, "updates.log": url}
    with crash.running(tmp_path / "s", marked_generations[:1], **options) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        harm = Faults(cluster, unsynced, server, random.Random(7))
        writers = [
            crash.Writer(cluster.address, recorder, seed=number, number=number, pause_s=PAUSE_S)
            for number in range(WRITERS)
        ]
        ledgers = [one.ledger for one in writers]
        liked = generation.catalogue.item_ids[:6].tolist()
        reader = crash.Reader(cluster.address, recorder, liked, ledgers)

        def written(times: int) -> None:
            before = [one.acked for one in ledgers]
            crash.until(
                lambda: all(
                    one.acked >= at + times for one, at in zip(ledgers, before, strict=True)
                ),
                f"no update is acked after {struck} faults",
            )

        struck = turn = 0
        with crash.working(*writers, reader):
            while struck < faults:
                written(10)
                roles = ROUNDS[kind][turn % len(ROUNDS[kind])][: faults - struck]
                turn += 1
                # There is one replica of each shard, and one router.
                limits = {"excuses": True, "recovery_s": RECOVERY_S}
                with recorder.fault("kill", ", ".join(roles), **limits):
                    for role in roles:
                        harm.strike(role)
                        struck += 1
                    harm.mend(roles)
                crash.until(cluster.is_whole, f"not whole after {struck} faults, {roles}")
                crash.look_at_all(cluster, recorder, *ledgers)
            written(1)
            for one in writers:
                one.end()
        assert reader.audits
        assert not [one.rejected for one in writers if one.rejected]
        crash.look_at_all(cluster, recorder, *ledgers)
        crash.assert_right(recorder, *LOOKED_AT)
        assert harm.lost or faults < LONG
        _lie(crash, harm, recorder, ledgers)


def _lie(crash: Any, harm: Faults, recorder: Any, ledgers: list[Any]) -> None:
    """Show that what is not synced is lost, and that it is seen: on a disk that lies."""
    harm.unsynced.lie()
    writer = crash.Writer(harm.cluster.address, recorder, seed=9)
    writer.ledger.items.update(ledgers[0].items)
    with crash.working(writer):
        crash.until(lambda: writer.ledger.acked >= 10, "no update is acked on a disk that lies")
        ledger = writer.end()
    crash.look_at_all(harm.cluster, recorder, ledger)
    crash.assert_right(recorder)
    # By luck all of it could reach the disk.
    harm.is_mild = False
    with recorder.fault("kill", "power", excuses=True, recovery_s=RECOVERY_S):
        harm.strike("power")
        harm.unsynced.be_honest()
        harm.mend(("power",))
    # Its tokens are of positions that the log does not reach any more.
    crash.look_at_all(harm.cluster, recorder, ledger, settled=True)
    wrong = {one.property for one in check(recorder.events()).violations}
    assert wrong
    assert wrong <= {"read_your_writes", "no_resurrected_delete"}
