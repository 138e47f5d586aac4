import random
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FEW_FAULTS = 8
ROLES = ("shard", "sequencer", "router", "shard", "sequencer", "supervisor")


@pytest.mark.timeout(7200)
def test_what_was_acked_survives_the_death_of_any_process(
    tmp_path: Path, crash: Any, marked_generations: list[Path], generation: Any
) -> None:
    faults = crash.amount("FAULTS", FEW_FAULTS)
    draw = random.Random(7)
    options = {"sharding.shards": 2, "runtime.crash_limit": 10_000}
    with crash.running(tmp_path / "s", marked_generations[:1], **options) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        writer = crash.Writer(cluster.address, seed=2)
        reader = crash.Reader(cluster.address, generation.catalogue.item_ids[:6].tolist())
        writer.start()
        reader.start()
        for fault in range(faults):
            before = writer.ledger.acked
            crash.until(
                lambda before=before: writer.ledger.acked >= before + 10,
                f"no update was acked after {fault} faults",
            )
            role = ROLES[fault % len(ROLES)]
            cluster.kill(role, draw)
            if role == "supervisor":
                cluster.restart()
            crash.until(cluster.is_whole, f"the cluster is not whole after fault {fault}, {role}")
        ledger = writer.end()
        reader.end()
        assert not reader.wrong
        assert not writer.rejected
        crash.assert_kept(cluster, ledger)
        cluster.stop()
        cluster.start()
        crash.assert_kept(cluster, ledger)
