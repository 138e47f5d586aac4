"""How fast this machine runs the rounds of one shard, and what that lets a cluster expect.

Processes of the kind that serve a shard each load a part of the generation that is as large as a
shard, and run real batches at the same time, as many processes as this machine would serve with.
What a batch waits for in a router or on the network is not measured.

Shapes: B requests, S shards, R replicas.
"""

import gc
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from silvershard.deploy.cli import ENVIRONMENT
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.memory_plan import held_by
from silvershard.deploy.placement import Copy, Host
from silvershard.deploy.processes import die_with_parent

_K = 100
"""Results of a request that is measured."""
_PAUSES_S = 0.2
_START_S = 120.0
"""Longest time until a process has loaded its part."""


class SpeedTask(BaseModel):
    """What one process shall measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot: str = Field(description="directory of the generation")
    num_shards: int = Field(ge=1, description="parts that it is cut into; the process loads one")
    shard: int = Field(ge=0, description="which of them")
    share: int = Field(ge=1, description="shards S of the plan: a shard keeps 1/S of what is kept")
    devices: tuple[str, ...] = Field(description="local devices of the shard")
    headroom: float = Field(ge=0, description="free pages for updates")
    batches: tuple[int, ...] = Field(description="batch sizes, measured one after the other")
    seconds: float = Field(gt=0, description="time for all of them")


class BatchTimes(BaseModel):
    """Medians of one batch size, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(description="requests B")
    runs: int = Field(description="batches that were run")
    encode_s: float = Field(description="the user tower, once for all shards")
    rounds_s: float = Field(description="both rounds, on every shard")


class Measured(BaseModel):
    """What one process found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    process_bytes: int = Field(description="its own memory before it had loaded anything")
    loaded_bytes: int = Field(description="its own memory with its part loaded")
    documents: int = Field(description="items of its part")
    times: tuple[BatchTimes, ...] = Field(description="of each batch size")


class Speed(NamedTuple):
    """What all processes found together, which ran at the same time."""

    processes: int
    threads: int
    """Of each process."""
    documents: int
    """Of the part that each held."""
    process_bytes: int
    loaded_bytes: int
    times: tuple[BatchTimes, ...]
    """Of the slowest process."""


class Expected(NamedTuple):
    """How many queries a second a cluster is expected to answer, one batch size throughout."""

    batch: int
    qps: float
    bound: str
    """In words, what gives out first."""


def measure(task: SpeedTask, *, processes: int, threads: int, timeout_s: float = _START_S) -> Speed:
    """Return how fast so many processes run the rounds of a shard at the same time.

    Args:
        task: what each of them measures.
        processes: how many run at once.
        threads: of each of them.
        timeout_s: longest time until all have loaded their part.

    Raises:
        CommandError: if a process could not load or run its part, with its reason.
        TimedOut: if one was not done in time.
    """
    environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", "-m", "silvershard.deploy.plan_speed", str(os.getpid())]
    started = []
    try:
        for _ in range(processes):
            started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
            )
        until_s = time.monotonic() + timeout_s
        for one in started:
            _tell(one, task.model_dump_json())
        for one in started:
            _hear(one, until_s)
        for one in started:
            _tell(one, "go")
        until_s = time.monotonic() + task.seconds * 10 + timeout_s
        found = [Measured.model_validate_json(_hear(one, until_s)) for one in started]
    finally:
        for one in started:
            one.kill()
            one.communicate()
    slowest = max(found, key=lambda one: one.times[-1].rounds_s)
    return Speed(
        processes=processes,
        threads=threads,
        documents=slowest.documents,
        process_bytes=max(one.process_bytes for one in found),
        loaded_bytes=max(one.loaded_bytes for one in found),
        times=slowest.times,
    )


def _tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:
        # It has ended, which whoever hears it finds out.
        return


def _hear(process: "subprocess.Popen[str]", until_s: float) -> str:
    """Return the next line of a process."""
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], _PAUSES_S)[0]:
        if time.monotonic() > until_s:
            raise TimedOut("the speed of this machine was not measured in time: use --no-measure")
    line = process.stdout.readline()
    if not line:
        _, said = process.communicate()
        reason = said.strip().splitlines()[-1] if said.strip() else "it ended without a word"
        raise CommandError(f"the speed of this machine cannot be measured: {reason}")
    return line


def expected(
    speed: Speed,
    hosts: Sequence[Host],
    at: Mapping[Copy, str],
    documents: Sequence[int],
) -> list[Expected]:
    """Return the expected queries a second of a placement, for each batch size that was measured.

    The scan of a shard is taken to cost in proportion to its documents, and a core of every host to
    be as fast as one of this machine, with as many processes at once. Copies of a shard share its
    queries evenly, all copies share the encoding.

    Args:
        speed: of this machine.
        hosts: of the placement.
        at: the host of each copy; standbys answer nothing.
        documents: ``(S,)`` of each shard.
    """
    serving = [copy for copy in at if not copy.standby]
    replicas = Counter(copy.shard for copy in serving)
    cores = {host.name: host.cpus for host in hosts}
    found = []
    for times in speed.times:
        # Seconds of one process for one query that the whole cluster gets.
        of_copy = {
            copy: times.rounds_s
            / times.batch
            * documents[copy.shard]
            / max(speed.documents, 1)
            / replicas[copy.shard]
            + times.encode_s / times.batch / len(serving)
            for copy in serving
        }
        slowest = max(serving, key=lambda copy: (of_copy[copy], copy))
        limits = [(1 / of_copy[slowest], f"{slowest}, which runs one batch at a time")]
        for name in sorted(set(at.values())):
            busy_s = sum(of_copy[copy] for copy in serving if at[copy] == name) * speed.threads
            if busy_s:
                limits.append((cores[name] / busy_s, f"the {cores[name]:g} cores of {name}"))
        qps, bound = min(limits)
        found.append(Expected(times.batch, qps, bound))
    return found


def run(task: SpeedTask, process_bytes: int, wait: Callable[[], object] = lambda: None) -> Measured:
    """Load a part of a generation, and measure its rounds.

    Args:
        task: what to measure.
        process_bytes: memory of this process before.
        wait: returns when the measurement shall begin, after all is loaded.
    """
    from silvershard.shard.load import load_executor

    executor = load_executor(
        Path(task.snapshot),
        task.shard,
        task.num_shards,
        devices=task.devices,
        headroom=task.headroom,
    )
    gc.collect()
    loaded_bytes = held_by([os.getpid()])
    requests = _requests(Path(task.snapshot))
    wait()
    times = tuple(
        _timed(executor, requests, batch, task.share, task.seconds / len(task.batches))
        for batch in task.batches
    )
    return Measured(
        process_bytes=process_bytes,
        loaded_bytes=loaded_bytes,
        documents=executor.documents,
        times=times,
    )


def _requests(path: Path) -> list[Any]:
    """Return real users: those of the golden requests of the generation, else one without any."""
    from silvershard.model.request import Request
    from silvershard.shard.golden import read_golden
    from silvershard.shard.snapshot import GOLDEN, open_snapshot

    snapshot = open_snapshot(path)
    cases = read_golden(snapshot).cases if GOLDEN in snapshot.manifest.files else ()
    k = min(_K, snapshot.spec.defaults.k_max)
    features = [case.to_request().features for case in cases] or [{}]
    return [Request(features=one, k=k) for one in features]


def _timed(
    executor: Any, requests: Sequence[Any], batch: int, share: int, seconds: float
) -> BatchTimes:
    """Return the medians of so many seconds of batches, three at least."""
    from silvershard.model.compiled_request import compile_request
    from silvershard.model.merge import Merge
    from silvershard.model.retriever import assemble

    merge, spec = Merge(), executor.spec
    encode_s: list[float] = []
    rounds_s: list[float] = []
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s or len(rounds_s) < 3:
        first = batch * len(rounds_s)
        chosen = [requests[(first + at) % len(requests)] for at in range(batch)]
        compiled = [compile_request(one, spec) for one in chosen]
        plans = [one.plan(spec, None) for one in compiled]
        begun_s = time.perf_counter()
        encoded = executor.encode([one.features for one in compiled])
        encoded_s = time.perf_counter()
        work = assemble(compiled, plans, encoded.embedding, encoded.user_state)
        # Of what all shards keep together, one of S keeps an S-th, as items are spread by hash.
        kept = -(-work.ann_k // share)
        generated = -(-work.semantic_k // share)
        opened_s = time.perf_counter()
        round_one = executor.open("plan", work, float("inf"))
        found_s = time.perf_counter()
        cutoffs = merge.cutoffs([round_one], kept, generated)
        cut_s = time.perf_counter()
        executor.close("plan", cutoffs)
        closed_s = time.perf_counter()
        executor.release("plan")
        encode_s.append(encoded_s - begun_s)
        rounds_s.append(found_s - opened_s + closed_s - cut_s)
    return BatchTimes(
        batch=batch,
        runs=len(rounds_s),
        encode_s=statistics.median(encode_s),
        rounds_s=statistics.median(rounds_s),
    )


def main() -> int:
    """Measure what standard input asks for: a ``SpeedTask``, and ``go`` when all are ready."""
    die_with_parent(int(sys.argv[1]))
    # What a shard process has loaded before its shard.
    import torch

    from silvershard.cluster import shard_actor, shard_server
    from silvershard.shard import load

    for module in (shard_actor, shard_server, load):
        assert module.__name__ in sys.modules
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    process_bytes = held_by([os.getpid()])
    task = SpeedTask.model_validate_json(sys.stdin.readline())

    def wait() -> None:
        print(json.dumps("ready"), flush=True)
        sys.stdin.readline()

    print(run(task, process_bytes, wait).model_dump_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
