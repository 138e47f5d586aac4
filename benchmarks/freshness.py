"""Measures a cluster whose items change while it answers: updates, their lag, swaps.

Usage: ``python -P benchmarks/freshness.py [--quick] [--items N] [--rate N] [--seconds N]``. One
shard, one replica, started by ``silvershard up``; updates come from a process of their own, 70 %
signal patches, 20 % upserts, 10 % deletes; queries come from another one at 30 % of the peak that
was measured just before, each timed from the moment at which it was due. The processors' time that
each process took beside the updates is printed with the ratio that it explains. The gate: what was
acked is there, what was deleted is gone, and every answer is of one generation. The last line
printed is one JSON object.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

# Threads that spin while they wait take the cores from the processes that are measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import live_catalogue as live  # noqa: E402
from benchmarks.mixture import progress  # noqa: E402
from silvershard.cluster import retrieval_pb2  # noqa: E402
from silvershard.cluster.client import Client, Query  # noqa: E402
from silvershard.cluster.update_message import mutation_to  # noqa: E402
from silvershard.cluster.updates import ItemDelete, Update, result_from  # noqa: E402
from silvershard.deploy.state import ClusterRecord, StateDir  # noqa: E402

GOALS = {
    "lag_p99_s": 1.0,
    "takedown_p99_s": 0.2,
    "updates_ratio": 1.25,
    "swap_ratio": 1.5,
}
LOAD = 0.3
"""Of the peak of queries per second."""
CALL = 250
"""Updates of one call."""
_MOST = 20_000
"""Updates per second that are made ready where as many are sent as are acked."""
K = 50
SENDERS = 8
CANARY_EVERY_S = 0.25
_TIMEOUT_S = 10.0
_PATIENCE_S = 120.0
_SIGNS = {"shard": "ShardActor", "sequencer": "SequencerActor", "router": "router"}


@dataclass
class Stream:
    """What queries at a fixed rate found."""

    due_s: list[float] = field(default_factory=list)
    """Monotonic time at which each query was to be sent."""
    done_s: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of the cut of each answer, summed over the partitions of the log."""
    generations: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    cpu_s: float = 0.0
    """What the process that asked took of the processors."""

    def percentile(self, share: float, begin_s: float = 0.0, end_s: float = np.inf) -> float:
        """Return a percentile of the milliseconds of queries due in a span of time."""
        due, done = np.array(self.due_s), np.array(self.done_s)
        chosen = (due >= begin_s) & (due < end_s)
        return float(np.percentile((done - due)[chosen], share) * 1e3)

    def add(self, due_s: float, done_s: float, answer: bytes) -> None:
        """Note an answer."""
        reply = retrieval_pb2.RetrieveResponse.FromString(answer)
        self.due_s.append(due_s)
        self.done_s.append(done_s)
        self.positions.append(sum(one.position for one in reply.version.cut))
        self.generations.add(reply.version.generation)
        if reply.coverage.documents < 1:
            self.errors.append(f"coverage {reply.coverage.documents}")


def requests(count: int) -> list[bytes]:
    """Return questions of users who have visited some cells, as they go over the wire."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        message = retrieval_pb2.RetrieveRequest(k=K)
        message.named.features["visited"].ints.extend(draw.integers(0, live.CELLS, 12).tolist())
        made.append(message.SerializeToString())
    return made


def query(address: str, per_second: float, started: Any, ended: Any, found: Any) -> None:
    """Ask until ``ended`` is set, in a process of its own; put a ``Stream``.

    Answers are kept as they came and read at the end: what this process computes meanwhile, it
    takes from those that are measured.

    Args:
        address: of the router.
        per_second: queries per second; 0 as many as are answered one after the other by each of
            ``SENDERS``.
        started: event that is set with the first answer.
        ended: event.
        found: queue that gets the outcome.
    """
    stream = Stream()
    answers: list[tuple[float, float, bytes]] = []
    questions = requests(256)
    before_s = 0.0

    async def ask(call: Any, place: int, due_s: float) -> None:
        try:
            answer = await call(questions[place % len(questions)], timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            stream.errors.append(str(error))
        else:
            answers.append((due_s, time.monotonic(), answer))

    async def send_without_end(call: Any, first: int) -> None:
        while not ended.is_set():
            await ask(call, first + len(answers), time.monotonic())

    async def send_all() -> None:
        nonlocal before_s
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary("/silvershard.v1.Retrieval/Retrieve")
            await ask(call, 0, time.monotonic())
            answers.clear()
            before_s = time.process_time()
            started.set()
            if not per_second:
                await asyncio.gather(*(send_without_end(call, 7 * at) for at in range(SENDERS)))
                return
            begin_s, place, running = time.monotonic(), 0, set()
            while not ended.is_set():
                due_s = begin_s + place / per_second
                await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
                task = asyncio.create_task(ask(call, place, due_s))
                running.add(task)
                task.add_done_callback(running.discard)
                place += 1
            await asyncio.gather(*running)

    asyncio.run(send_all())
    stream.cpu_s = time.process_time() - before_s
    for answer in answers:
        stream.add(*answer)
    found.put(stream)


@contextmanager
def queries(address: str, per_second: float) -> Iterator[Stream]:
    """Ask beside the body; what was found is in the stream when the body is left."""
    context = multiprocessing.get_context("spawn")
    started, ended, found, stream = context.Event(), context.Event(), context.Queue(), Stream()
    process = context.Process(
        target=query, args=(address, per_second, started, ended, found), daemon=True
    )
    process.start()
    try:
        started.wait(_PATIENCE_S)
        yield stream
        ended.set()
        vars(stream).update(vars(found.get(timeout=_PATIENCE_S)))
    finally:
        ended.set()
        process.join(10)
        if process.is_alive():
            process.kill()


def measure_peak(address: str, seconds: float) -> float:
    """Return the queries per second of as many senders as keep the router busy."""
    with queries(address, 0) as stream:
        time.sleep(seconds)
    if not stream.done_s:
        raise RuntimeError("no query was answered")
    span_s = max(stream.done_s) - min(stream.due_s)
    return len(stream.done_s) / span_s


def processor_times(record: ClusterRecord) -> dict[str, float]:
    """Return the seconds that each kind of process of a cluster has taken of the processors."""
    ticks = os.sysconf("SC_CLK_TCK")
    times: dict[str, float] = defaultdict(float)
    for process in {record.driver, record.guard, *record.processes}:
        folder = Path("/proc") / str(process.pid)
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kind = next((kind for kind, sign in _SIGNS.items() if sign in command), "control")
        times[kind] += (int(stat[11]) + int(stat[12])) / ticks
    return times


def calls_of(source: Iterator[Update], count: int) -> deque[bytes]:
    """Return calls of ``CALL`` updates each, as they go over the wire."""
    made: deque[bytes] = deque()
    for _ in range(count):
        mutations = [mutation_to(one) for one in islice(source, CALL)]
        made.append(retrieval_pb2.ApplyRequest(mutations=mutations).SerializeToString())
    return made


def update(
    address: str, num_items: int, rate: float, seconds: float, seed: int, started: Any, found: Any
) -> None:
    """Send updates, in a process of its own; put acks ``(time, position)`` and rejections.

    They are made before: what this process computes meanwhile, it takes from those that are
    measured.

    Args:
        address: of the router.
        num_items: of generation 1.
        rate: updates per second; 0 as many as are acked.
        seconds: for how long.
        seed: of the updates.
        started: event that is set when it begins.
        found: queue that gets the outcome.
    """
    calls = calls_of(live.updates(num_items, seed), math.ceil((rate or _MOST) * seconds / CALL))
    acks: list[tuple[float, int]] = []
    rejected: list[str] = []
    sent = 0
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/silvershard.v1.Updates/Apply")
        grpc.channel_ready_future(channel).result(_PATIENCE_S)
        started.set()
        begin_s, before_s = time.monotonic(), time.process_time()
        while (now_s := time.monotonic()) < begin_s + seconds and calls:
            due_s = begin_s + sent / rate if rate else now_s
            time.sleep(max(due_s - now_s, 0.0))
            answer = call(calls.popleft(), timeout=_TIMEOUT_S)
            result = result_from(retrieval_pb2.ApplyResponse.FromString(answer))
            acks.append((time.monotonic(), sum(one.position for one in result.tokens)))
            sent += CALL
            rejected += [one.reason for one in result.rejected]
        spent_s = time.monotonic() - begin_s
    cpu_s = time.process_time() - before_s
    found.put(
        {"acks": acks, "sent": sent, "rejected": rejected, "seconds": spent_s, "cpu_s": cpu_s}
    )


@contextmanager
def updates(address: str, num_items: int, rate: float, seconds: float, seed: int) -> Iterator[Any]:
    """Send updates beside the body; yields a function that waits for their outcome."""
    context = multiprocessing.get_context("spawn")
    started, found = context.Event(), context.Queue()
    process = context.Process(
        target=update, args=(address, num_items, rate, seconds, seed, started, found), daemon=True
    )
    process.start()
    try:
        started.wait(_PATIENCE_S)
        yield lambda: found.get(timeout=seconds + 60)
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def lags(acks: list[tuple[float, int]], stream: Stream) -> np.ndarray:
    """Return for every ack the seconds until an answer came that reflects it, ``(n,)``.

    Acks after the last answers are left out: nobody looked whether they were visible.
    """
    order = np.argsort(stream.done_s)
    done = np.array(stream.done_s)[order]
    reached = np.maximum.accumulate(np.array(stream.positions)[order])
    acked = np.array([one[0] for one in acks])
    at = np.searchsorted(reached, np.array([one[1] for one in acks]))
    seen = at < len(done)
    lag: np.ndarray = np.maximum(done[at[seen]] - acked[seen], 0.0)
    return lag


def is_there(client: Client, canary: int) -> bool:
    """Return whether a canary can be found."""
    year = live.CANARY_YEAR + canary
    text = f"year >= {year} AND year <= {year}"
    return len(client.retrieve(Query(features={}, k=1, filter=text, exact=True)).item_ids) > 0


def take_down(client: Client, count: int) -> list[float]:
    """Delete canaries urgently, one at a time; return the seconds from ack to absence of each."""
    spans = []
    for canary in range(count):
        if not is_there(client, canary):
            raise RuntimeError(f"canary {canary} was not there")
        client.apply([ItemDelete(live.CANARIES + canary, urgent=True)])
        acked_s = time.monotonic()
        while is_there(client, canary):
            if time.monotonic() > acked_s + _TIMEOUT_S:
                raise RuntimeError(f"canary {canary} was still there after {_TIMEOUT_S} s")
        spans.append(time.monotonic() - acked_s)
        time.sleep(CANARY_EVERY_S)
    return spans


def silvershard(state: Path, *words: str) -> str:
    """Run a command on a state directory and return what it prints."""
    command = [sys.executable, "-P", "-m", "silvershard.deploy.cli", *words, "--state", str(state)]
    environment = {
        **os.environ,
        "SILVERSHARD__SHARDING__SHARDS": "1",
        "SILVERSHARD__LISTEN__PORT": "0",
        "SILVERSHARD__UPDATES__HEADROOM": "0.3",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"silvershard {words[0]}: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def cluster(num_items: int, num_clusters: int) -> Iterator[tuple[Path, ClusterRecord]]:
    """Serve a generation of that many items; yields the state directory and what runs."""
    with tempfile.TemporaryDirectory(prefix="freshness-") as directory:
        state = StateDir(Path(directory) / "state")
        state.create()
        progress("publishing")
        live.publish(state.generations, num_items, num_clusters)
        progress("starting")
        silvershard(state.root, "up")
        try:
            record = state.read_record()
            if record is None:
                raise RuntimeError("the cluster left no record")
            yield state.root, record
        finally:
            silvershard(state.root, "down")
            shutil.rmtree(state.root, ignore_errors=True)


def run(num_items: int, num_clusters: int, rate: float, seconds: float) -> dict[str, Any]:
    """Measure everything on one cluster and return the figures.

    Raises:
        RuntimeError: if the gate is red.
    """
    with (
        cluster(num_items, num_clusters) as (state, record),
        Client(record.address, timeout_s=_TIMEOUT_S) as client,
    ):
        address = record.address
        num_canaries = max(int(seconds / (2 * CANARY_EVERY_S)), 4)
        progress("updates off")
        added = client.apply(live.canaries(num_canaries))
        client.retrieve(Query(features={}, k=1, after=added.tokens))
        peak = measure_peak(address, seconds / 2)
        load = LOAD * peak
        with queries(address, load) as quiet:
            time.sleep(seconds)
        progress("updates on")
        with (
            queries(address, load) as busy,
            updates(address, num_items, rate, seconds, 0) as outcome,
        ):
            before, began_s = processor_times(record), time.monotonic()
            spans = take_down(client, num_canaries)
            after, busy_s = processor_times(record), time.monotonic() - began_s
            paced = outcome()
            # The last acks are to be seen, too.
            time.sleep(2 * GOALS["lag_p99_s"])
        progress("as many updates as are acked")
        with updates(address, num_items, 0, seconds, 1) as outcome:
            free = outcome()
        progress("publishing the next generation")
        silvershard(state, "publish", "--recluster")
        progress("swapping")
        with queries(address, load) as swapping:
            time.sleep(seconds)
            begin_s = time.monotonic()
            silvershard(state, "activate", "2")
            end_s = time.monotonic()
            time.sleep(seconds / 2)
        check(client, (quiet, busy, swapping), [paced, free])
        lag = lags(paced["acks"], busy)
        shares = {kind: (after[kind] - before[kind]) / busy_s for kind in after}
        shares["queries"] = busy.cpu_s / (busy.done_s[-1] - busy.due_s[0])
        shares["updates"] = paced["cpu_s"] / paced["seconds"]
        return {
            "items": num_items,
            "peak_qps": peak,
            "load_qps": load,
            "query_p50_ms": quiet.percentile(50),
            "query_p99_ms": quiet.percentile(99),
            "busy_p50_ms": busy.percentile(50),
            "busy_p99_ms": busy.percentile(99),
            "updates_ratio": busy.percentile(99) / quiet.percentile(99),
            "updates_per_s": paced["sent"] / paced["seconds"],
            "most_updates_per_s": free["sent"] / free["seconds"],
            "lag_p50_s": float(np.percentile(lag, 50)),
            "lag_p99_s": float(np.percentile(lag, 99)),
            "takedown_p50_s": float(np.percentile(spans, 50)),
            "takedown_p99_s": float(np.percentile(spans, 99)),
            "busy_cores": shares,
            "swap_s": end_s - begin_s,
            "swap_before_p99_ms": swapping.percentile(99, end_s=begin_s),
            "swap_p99_ms": swapping.percentile(99, begin_s, end_s),
            "swap_ratio": swapping.percentile(99, begin_s, end_s)
            / swapping.percentile(99, end_s=begin_s),
        }


def check(client: Client, streams: tuple[Stream, ...], outcomes: list[dict[str, Any]]) -> None:
    """Return if nothing failed, nothing was rejected, and what went is gone.

    Raises:
        RuntimeError: naming what did not hold.
    """
    for name, stream in zip(("quiet", "updates", "swap"), streams, strict=True):
        if stream.errors:
            raise RuntimeError(f"{name}: {len(stream.errors)} queries failed: {stream.errors[0]}")
    if streams[2].generations != {1, 2}:
        raise RuntimeError(f"swap: answers came of generations {streams[2].generations}")
    for outcome in outcomes:
        if outcome["rejected"]:
            first = outcome["rejected"][0]
            raise RuntimeError(
                f"{len(outcome['rejected'])} of {outcome['sent']} updates were rejected: {first}"
            )
    if is_there(client, 0):
        raise RuntimeError("a deleted item came back with the new generation")


def report(found: dict[str, Any], emit: Callable[[str], None] = print) -> None:
    """Print the figures beside their goals."""
    emit(f"{'peak':28} {found['peak_qps']:10.0f} queries/s")
    for name, label in (
        ("updates_per_s", "updates sent"),
        ("most_updates_per_s", "updates, as many as are acked"),
    ):
        emit(f"{label:28} {found[name]:10.0f} /s")
    for kind, share in sorted(found["busy_cores"].items()):
        emit(f"{'processor, ' + kind:28} {share:10.2f} cores, beside the updates")
    for name, label, unit in (
        ("lag_p99_s", "ack to visible, p99", "s"),
        ("takedown_p99_s", "urgent delete, p99", "s"),
        ("updates_ratio", "query p99, updates on / off", "x"),
        ("swap_ratio", "query p99, swap / before", "x"),
    ):
        goal = GOALS[name]
        held = "held" if found[name] <= goal else "missed"
        emit(f"{label:28} {found[name]:10.3f} {unit:2} goal {goal:g}: {held}")


def main() -> int:
    """Run the measurement and the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100,000 items, within three minutes")
    parser.add_argument("--items", type=int, default=0, help="items of the catalogue")
    parser.add_argument("--rate", type=float, default=5000, help="updates per second")
    parser.add_argument("--seconds", type=float, default=0, help="length of each stretch")
    given = parser.parse_args()
    from benchmarks.run import ROOT, machine

    num_items = given.items or (100_000 if given.quick else 1_000_000)
    seconds = given.seconds or (6.0 if given.quick else 30.0)
    about = {**machine(), "unix_s": str(int(time.time()))}
    print(f"{about['cpu']}, {about['cores']} cores, {num_items:,} items", flush=True)
    try:
        found = run(num_items, 256 if given.quick else 1024, given.rate, seconds)
    except RuntimeError as error:
        print(f"gate is red: {error}: no number is printed", file=sys.stderr)
        return 1
    report(found)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"case": "freshness", **found, **about}) + "\n")
    print(json.dumps({"machine": about, "goals": GOALS, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
