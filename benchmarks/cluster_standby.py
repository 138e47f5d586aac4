"""How long answers lack a shard whose only copy is killed, where a warm standby waits."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster_scaling import asked, cluster, recorded
from silvershard.cluster.arrivals import Stretch
from silvershard.deploy.generators import Generators, Load

Read = Callable[[Path, Sequence[Sequence[int]]], list[dict[str, Any]]]

SHARDS = 2
_RATE = 20.0
_DEADLINE_S = 2.0
_BEFORE_S, _AFTER_S = 2.0, 9.0


def measure_standby(
    folder: Path, read: Read, failed: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the seconds from a kill until every request has full coverage again.

    Args:
        folder: for what is written.
        read: reads a record, and raises RuntimeError if a full answer is not as expected.
        failed: tells whether a line of a record is of a request without a full answer.

    Raises:
        RuntimeError: if the cluster does not start, an answer is wrong, or none of full coverage
            comes after the kill.
    """
    with cluster(folder / "standby", SHARDS, standby=1) as (state, snapshot):
        target, answers = asked(state, snapshot)
        first = next(one for one in recorded(state).shards if not one.standby)
        record = folder / "standby.jsonl"
        load = Load(
            (Stretch(_BEFORE_S + _AFTER_S, _RATE, _RATE),), deadline_s=_DEADLINE_S, record=record
        )
        killed: list[float] = []

        def kill() -> None:
            time.sleep(_BEFORE_S)
            killed.append(time.time())
            os.kill(first.pid, signal.SIGKILL)

        with Generators(target) as generators:
            generators.connect()
            thread = threading.Thread(target=kill)
            thread.start()
            report, interrupted = generators.run(load)
            thread.join()
        if interrupted:
            raise KeyboardInterrupt
        lines = read(record, answers)
        lacking = [one for one in lines if failed(one)]
        if not lacking or failed(lines[-1]):
            raise RuntimeError(f"{len(lacking)} of {len(lines)} requests lacked the killed shard")
        return {
            # The next request, after the last one that lacked it, was the first one in full.
            "full_s": lacking[-1]["unix_s"] + 1 / _RATE - killed[0],
            "requests": len(lines),
            "lacking": len(lacking),
            "causes": dict(report.total.codes + report.total.reasons),
            "warnings": report.warnings(),
        }
