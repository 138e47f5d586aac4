import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.control_store import ControlStore

pytestmark = pytest.mark.slow

FEW_SWAPS = 4
KILL_EVERY = 5


@contextmanager
def activating(state: Path, generation: int) -> Iterator[subprocess.Popen[str]]:
    words = ["activate", str(generation), "--state", str(state), "--timeout", "120"]
    command = [sys.executable, "-P", "-m", "silvershard.deploy.cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.timeout(3600)
def test_no_answer_mixes_generations_and_no_request_fails_while_they_swap_under_load(
    tmp_path: Path, crash: Any, marked_generations: list[Path], generation: Any
) -> None:
    swaps = crash.amount("SWAPS", FEW_SWAPS)
    draw = random.Random(5)
    with crash.running(
        tmp_path / "s", marked_generations, **{"sharding.shards": 3, "sharding.replicas": 2}
    ) as cluster:
        crash.until(cluster.is_whole, "the cluster did not become whole")
        writer = crash.Writer(cluster.address, seed=1)
        history = generation.catalogue.item_ids[:6].tolist()
        readers = [crash.Reader(cluster.address, history) for _ in range(2)]
        for one in (writer, *readers):
            one.start()
        killed = done = 0
        store = ControlStore(cluster.state.control_file)

        def operations() -> float:
            """When the newest operation began."""
            return max((one.began_unix_s for one in store.read().operations), default=0.0)

        for swap in range(swaps):
            wanted = 2 if cluster.record.generation == 1 else 1
            seen = operations()
            with activating(cluster.state.root, wanted) as process:
                if swap % KILL_EVERY == 1:
                    # In the middle of the swap; there is a second copy of every shard.
                    crash.until(lambda seen=seen: operations() > seen, "no swap began")
                    cluster.kill("shard", draw)
                    killed += 1
                _, said = process.communicate(timeout=150)
            # A process that dies may end the swap, which leaves the map as it was.
            assert process.returncode == 0 or swap % KILL_EVERY == 1, said
            done += process.returncode == 0
            crash.until(cluster.is_whole, "the cluster did not become whole")
        for one in readers:
            one.end()
        ledger = writer.end()
        assert killed
        assert done >= 0.8 * swaps - 1
        assert [one.wrong for one in readers] == [[], []]
        assert [one.failed for one in readers] == [[], []]
        assert all(one.generations == {1, 2} for one in readers)
        assert all(one.marked > swaps for one in readers)
        assert not writer.rejected
        crash.assert_kept(cluster, ledger)
