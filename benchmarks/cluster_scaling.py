"""What requests notice of a cluster that is given another number of shards.

A cluster of the product on one machine, whose requests search exactly; every full answer must be
the one that the unsharded module gives.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import live_catalogue as live
from silvershard.cluster.arrivals import Stretch
from silvershard.cluster.client import Query
from silvershard.deploy.bench_requests import prepare
from silvershard.deploy.generators import Generators, Load, Target
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.model.request import Request
from silvershard.shard.load import load_retriever

Read = Callable[[Path, Sequence[Sequence[int]]], list[dict[str, Any]]]

SIZES, FEWER = (4, 6, 3), (2, 3, 1)
"""Numbers of shards, one after the other; fewer of them where time is short."""
K = 50
_REQUESTS = 50
_ITEMS = 3000
_CLUSTERS = 32
_RATE = 10.0
_DEADLINE_S = 2.0
_SETTLED_S = 2.0
"""Of load before and after."""


def command(state: Path, *words: str, shards: int = 1, standby: int = 0) -> None:
    """Run our command on a state directory.

    Raises:
        RuntimeError: if it fails.
    """
    environment = {
        **os.environ,
        "SILVERSHARD__SHARDING__SHARDS": str(shards),
        "SILVERSHARD__SHARDING__STANDBY": str(standby),
        "SILVERSHARD__LISTEN__PORT": "0",
        "SILVERSHARD__SWAP__DRAIN_MS": "1000",
    }
    module = "silvershard.deploy.cli"
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *words, "--state", str(state)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"silvershard {' '.join(words)}: {done.stderr.strip()[-1000:]}")


@contextlib.contextmanager
def cluster(root: Path, shards: int, standby: int = 0) -> Iterator[tuple[StateDir, Path]]:
    """Serve a generation; yield the state directory and where the generation is."""
    state = StateDir(root)
    state.create()
    snapshot = live.publish(state.generations, _ITEMS, _CLUSTERS)
    command(state.root, "up", shards=shards, standby=standby)
    try:
        yield state, snapshot
    finally:
        command(state.root, "down")


def recorded(state: StateDir) -> ClusterRecord:
    """Return what runs.

    Raises:
        RuntimeError: if nothing does.
    """
    record = state.read_record()
    if record is None:
        raise RuntimeError("the cluster left no record")
    return record


def questions() -> list[dict[str, Any]]:
    """Return the features of users who have visited some cells."""
    draw = np.random.default_rng(0)
    return [{"visited": draw.integers(0, live.CELLS, 8).tolist()} for _ in range(_REQUESTS)]


def asked(state: StateDir, snapshot: Path) -> tuple[Target, list[list[int]]]:
    """Return requests for a cluster, and what the unsharded module answers each with."""
    retriever, _ = load_retriever(snapshot)
    features = questions()
    requests = [Request(features=one, k=K, exact=True) for one in features]
    answers = [retriever([one])[0].item_ids.tolist() for one in requests]
    made = prepare("a catalogue", [(Query(features=one, k=K, exact=True), {}) for one in features])
    return Target((recorded(state).address,), made.messages, made.described), answers


def measure_scaling(
    folder: Path,
    read: Read,
    failed: Callable[[dict[str, Any]], bool],
    sizes: Sequence[int],
    most_s: float,
) -> dict[str, Any]:
    """Return how many requests failed while a cluster was scaled up and down.

    Args:
        folder: for what is written.
        read: reads a record, and raises RuntimeError if a full answer is not as expected.
        failed: tells whether a line of a record is of a request that failed.
        sizes: numbers of shards, one after the other.
        most_s: length of the load, in which the cluster must have been scaled.

    Raises:
        RuntimeError: if it was not, or if an answer is not that of the unsharded module.
    """
    with cluster(folder / "scaling", sizes[0]) as (state, snapshot):
        target, answers = asked(state, snapshot)
        spans: list[float] = []
        problems: list[str] = []
        began_s = time.monotonic()

        def scale() -> None:
            time.sleep(_SETTLED_S)
            try:
                for size in sizes[1:]:
                    since_s = time.monotonic()
                    command(state.root, "scale", "--shards", str(size))
                    spans.append(time.monotonic() - since_s)
            except RuntimeError as error:
                problems.append(str(error))
            finally:
                ended.append(time.monotonic() - began_s)

        ended: list[float] = []
        record = folder / "scaling.jsonl"
        with Generators(target) as generators:
            generators.connect()
            began_s = time.monotonic()
            thread = threading.Thread(target=scale)
            thread.start()
            load = Load((Stretch(most_s, _RATE, _RATE),), deadline_s=_DEADLINE_S, record=record)
            report, interrupted = generators.run(load)
            thread.join()
        if interrupted:
            raise KeyboardInterrupt
        if problems:
            raise RuntimeError(problems[0])
        if ended[0] + _SETTLED_S > most_s:
            raise RuntimeError(f"scaling took {ended[0]:.0f} s, longer than the load")
        lines = read(record, answers)
        return {
            "failed": sum(map(failed, lines)),
            "requests": len(lines),
            "sizes": sizes,
            "spans_s": spans,
            "p99_ms": report.total.quantile_ms(0.99),
            "causes": dict(report.total.codes + report.total.reasons),
            "warnings": report.warnings(),
        }
