"""Measures what a cluster adds to its shards, and what users notice when parts of it fail.

Usage: ``python -P benchmarks/cluster.py [--quick]``. A router of the product and shard processes
that sleep instead of computing (``sleeping_shard.py``) run on this machine, and beside the first
row what gRPC alone takes for the same messages (``echo_cluster.py``). An open-loop generator asks
them from a process of its own, pinned to the last core where its own core matters, with the cluster
on the others. The gate: every full answer, also those during faults, holds exactly the items that
the merge of all shards must give. A request counts as failed if it has no answer within 2 s of when
it was due, or less than full coverage while a replica of every shard lives. Last, a cluster of the
product with a model is scaled (``cluster_scaling.py``), and one over hosts loses one of them and
the head of Ray (``cluster_hosts.py``). The last line printed is one JSON object.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from silvershard.deploy.cli import ENVIRONMENT  # noqa: E402

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from benchmarks.cluster_hosts import measure_hosts  # noqa: E402
from benchmarks.cluster_scaling import FEWER, SIZES, measure_scaling  # noqa: E402
from benchmarks.cluster_standby import measure_standby  # noqa: E402
from benchmarks.mixture import progress  # noqa: E402
from silvershard.cluster.arrivals import Stretch  # noqa: E402
from silvershard.cluster.client import Client, Query  # noqa: E402
from silvershard.cluster.config import ListenSection, RouterConfig  # noqa: E402
from silvershard.cluster.load_outcome import FAILED, Outcome  # noqa: E402
from silvershard.cluster.load_peak import PeakSearch  # noqa: E402
from silvershard.cluster.load_report import LoadReport  # noqa: E402
from silvershard.cluster.shard_map import ShardEntry, ShardMap  # noqa: E402
from silvershard.deploy.bench_requests import prepare  # noqa: E402
from silvershard.deploy.generators import Generators, Load, Target  # noqa: E402

K = 100
REQUESTS = 200
DEADLINE_S = 2.0
NORMAL = 1.5
"""Times the 99th percentile before a fault that one after it may be to be normal again."""
WINDOW_S = 1.0
"""Over which that percentile is taken."""
OVERLOAD = 3.0
_PATIENCE_S = 60.0
_BUSY_CORES = 0.2
"""That others may take of the processors before figures are doubted."""
_STEP_S = 0.02

_NOT_ANSWERED = {one.value for one in FAILED}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    unit: str
    goal: float | None
    """None: it is there to be compared with."""
    at_least: bool = False
    """Whether the goal is a lower bound."""

    def holds(self, value: float | None) -> bool | None:
        """Return whether a figure reaches the goal; None if it has none."""
        if self.goal is None:
            return None
        if value is None:
            return False
        return value >= self.goal if self.at_least else value <= self.goal


ROWS = (
    Row("overhead_p50_ms", "overhead of all rounds, 4 shards, 100 items, p50", "ms", 2.0),
    Row("echo_p50_ms", "the same messages through gRPC alone, p50", "ms", None),
    Row("killed_failed", "shard killed, 2 replicas: failed requests", "", 0),
    Row("killed_recovery_s", "the same: until p99 is normal", "s", 1.0),
    Row("hung_ratio", "shard hangs, 2 replicas: p99 of the first second / normal", "x", 3.0),
    Row("hung_recovery_s", "the same: until p99 is normal", "s", 1.0),
    Row("overload_goodput", "3x overload: goodput / peak", "", 0.95, at_least=True),
    Row("overload_late", "the same: requests answered or given up past their deadline", "", 0),
    Row("standby_full_s", "shard killed, 1 replica, warm standby: until full coverage", "s", 5.0),
    Row("hosts_cut_failed", "host cut off and healed, 2 replicas: failed requests", "", 0),
    Row("hosts_cut_whole_s", "the same: until all copies are back after it heals", "s", 20.0),
    Row("hosts_head_failed", "head of Ray gone for 120 s: failed requests", "", 0),
    Row("scale_failed", "scaled 4 -> 6 -> 3 shards (QUICK: 2 -> 3 -> 1): failed requests", "", 0),
)


@dataclass(frozen=True)
class Service:
    """Microseconds that a request takes of each shard."""

    encode_us: int
    open_us: int
    close_us: int

    @property
    def total_s(self) -> float:
        """Return the seconds of all stages."""
        return (self.encode_us + self.open_us + self.close_us) / 1e6


def expected_answers(ann_k: int) -> list[list[int]]:
    """Return what each request must be answered with."""
    from benchmarks.sleeping_shard import expected

    return [expected(number, ann_k, K) for number in range(REQUESTS)]


class Running:
    """A cluster of sleeping shards behind a router."""

    def __init__(
        self,
        address: str,
        shards: dict[tuple[int, int], "subprocess.Popen[str]"],
        pids: Sequence[int],
    ) -> None:
        self.address = address
        self.shards = shards
        """By shard and replica."""
        self.pids = pids
        """Of all processes."""

    def target(self, service: Service, ann_k: int) -> tuple[Target, list[list[int]]]:
        """Return requests of that service time, and what each must be answered with."""
        from benchmarks.sleeping_shard import request_features

        def queries() -> Iterator[tuple[Query, dict[str, Any]]]:
            for number in range(REQUESTS):
                times = (service.encode_us, service.open_us, service.close_us)
                features = request_features(number, *times)
                yield Query(features=features, k=K, ann_k=ann_k, return_task_scores=False), {}

        made = prepare("sleeping shards", queries())
        return Target((self.address,), made.messages, made.described), expected_answers(ann_k)


@contextlib.contextmanager
def confined(cpus: set[int]) -> Iterator[None]:
    """Let what the body starts run on these processors only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Processes:
    """Processes of ours, which have one thread for tensors."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    @property
    def pids(self) -> list[int]:
        """Return the numbers of all that were started."""
        return [one.pid for one in self.all]

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start one, whose output can be read."""
        self.all.append(
            subprocess.Popen(
                [sys.executable, "-P", *command],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        return self.all[-1]


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Yield what starts processes, and end them all."""
    running = Processes()
    try:
        yield running
    finally:
        for process in running.all:
            # One that was stopped does not end otherwise.
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in running.all:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def first_line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return what a process says of itself when it serves.

    Raises:
        RuntimeError: if it ended before.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


@contextlib.contextmanager
def cluster(
    folder: Path, snapshot: Path, num_shards: int, replicas: int, cpus: set[int]
) -> Iterator[Running]:
    """Run shard processes and a router on some processors."""
    places = [(shard, replica) for shard in range(num_shards) for replica in range(replicas)]
    script = str(_HERE / "sleeping_shard.py")
    parent = str(os.getpid())
    with processes() as running:
        with confined(cpus):
            shards = {
                (shard, replica): running.start(
                    script, str(snapshot), str(shard), str(num_shards), str(replica), parent
                )
                for shard, replica in places
            }
            entries = [ShardEntry(**first_line(process)) for process in shards.values()]
            map_path = folder / f"map-{num_shards}-{replicas}.json"
            ShardMap(
                version=1,
                generation=1,
                snapshot=str(snapshot),
                num_shards=num_shards,
                entries=tuple(entries),
            ).write_atomic(map_path)
            config = folder / f"router-{num_shards}-{replicas}.json"
            listen = ListenSection(port=0)
            router = RouterConfig(map_path=str(map_path), listen=listen, drain_s=0)
            config.write_text(router.model_dump_json())
            module = "silvershard.deploy.router_process"
            process = running.start("-m", module, "--config", str(config), "--parent", parent)
            address = str(first_line(process)["address"])
        with Client(address) as client:
            client.wait_until_ready(_PATIENCE_S)
        yield Running(address, shards, running.pids)


@contextlib.contextmanager
def echo(folder: Path, num_shards: int, ann_k: int, cpus: set[int]) -> Iterator[Running]:
    """Run processes that send the messages of a cluster through gRPC, and do nothing else."""
    script, parent = str(_HERE / "echo_cluster.py"), str(os.getpid())
    answers = folder / "answers.json"
    answers.write_text(json.dumps(expected_answers(ann_k)))
    with processes() as running, confined(cpus):
        shards = [running.start(script, "shard", parent) for _ in range(num_shards)]
        addresses = [first_line(process)["address"] for process in shards]
        front = running.start(script, "front", parent, str(answers), *addresses)
        yield Running(str(first_line(front)["address"]), {}, running.pids)


def busy_s() -> float:
    """Return the seconds that the processors have been busy, all together, since the boot."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields)
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def taken_s(pids: Sequence[int]) -> float:
    """Return the seconds that processes have taken of the processors; one that ended took none."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Point:
    """One request of a record."""

    at_s: float
    latency_s: float
    """Infinite if it failed."""


def failed(line: dict[str, Any]) -> bool:
    """Return whether a line of a record is of a request that a user would complain about."""
    return line["outcome"] in _NOT_ANSWERED or line["outcome"] == Outcome.PARTIAL.value


def read_record(path: Path, answers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the lines of a record that count, without those of the warm-up.

    Args:
        path: of the record.
        answers: what each request must be answered with.

    Raises:
        RuntimeError: if an answer of full coverage holds other items.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        index = line["request"]["index"]
        whole = line["code"] == "OK" and line["coverage"] == 1 and not line["reasons"]
        if whole and line["ids"] != answers[index]:
            raise RuntimeError(
                f"request {index} was answered with {line['ids'][:5]}..., "
                f"the merge of all shards is {answers[index][:5]}..."
            )
    return [line for line in lines if line["at_s"] >= 0]


def points_of(lines: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the requests of a record with their latencies."""
    return [
        Point(one["at_s"], math.inf if failed(one) else one["done_s"] - one["at_s"])
        for one in lines
    ]


def percentile(points: Sequence[Point], share: float, begin_s: float, end_s: float) -> float:
    """Return a percentile of the latencies of requests due in a span of time; 0 without any."""
    found = sorted(one.latency_s for one in points if begin_s <= one.at_s < end_s)
    return found[max(math.ceil(share * len(found) - 1e-9), 1) - 1] if found else 0.0


def recovery(points: Sequence[Point], fault_s: float, normal_s: float) -> float | None:
    """Return the seconds from a fault until the 99th percentile is normal; None if it never is.

    It is normal from the first moment on from which that of the next second is.
    """
    end_s = max(one.at_s for one in points) - WINDOW_S
    for step in range(math.ceil(max(end_s - fault_s, 0.0) / _STEP_S)):
        after_s = step * _STEP_S
        begin_s = fault_s + after_s
        if percentile(points, 0.99, begin_s, begin_s + WINDOW_S) <= NORMAL * normal_s:
            return after_s
    return None


class Bench:
    """Puts loads on a running cluster and reads what they recorded."""

    def __init__(self, folder: Path, running: Running, ann_k: int, pin: int | None) -> None:
        self.running = running
        self._record = folder / "record.jsonl"
        self._ann_k = ann_k
        self._cpus = () if pin is None else (pin,)
        self.other_cores = 0.0
        """That processes of nobody here took during the last load."""

    def doubts(self, report: LoadReport) -> list[str]:
        """Return what makes the figures of the last load doubtful."""
        said = report.warnings()
        if self.other_cores > _BUSY_CORES:
            said.append(f"other processes took {self.other_cores:.2f} cores meanwhile")
        return said

    @contextlib.contextmanager
    def asking(self, service: Service) -> Iterator[Callable[..., Any]]:
        """Yield a function that puts a load and returns report and lines of its record."""
        target, answers = self.running.target(service, self._ann_k)
        with Generators(target, cpus=self._cpus) as generators:
            generators.connect()

            def put(
                rate: float, seconds: float, *, warmup_s: float = 1.0, poisson: bool = False
            ) -> tuple[LoadReport, list[dict[str, Any]]]:
                began_s, pids = time.monotonic(), self.running.pids
                others_s = busy_s() - taken_s(pids)
                report, interrupted = generators.run(
                    Load(
                        stretches=(Stretch(seconds, rate, rate),),
                        warmup_s=warmup_s,
                        poisson=poisson,
                        deadline_s=DEADLINE_S,
                        max_in_flight=5000,
                        record=self._record,
                    )
                )
                others_s = busy_s() - taken_s(pids) - others_s
                others_s -= sum(one.cpu_s for one in report.generators)
                self.other_cores = max(others_s / (time.monotonic() - began_s), 0.0)
                if interrupted:
                    raise KeyboardInterrupt
                return report, read_record(self._record, answers)

            yield put


def measure_overhead(bench: Bench, service: Service, rate: float, seconds: float) -> dict[str, Any]:
    """Return what a request takes beyond the service time of its shards.

    Raises:
        RuntimeError: if one failed.
    """
    with bench.asking(service) as put:
        report, lines = put(rate, seconds, warmup_s=3.0)
    points = points_of(lines)
    if any(map(failed, lines)):
        raise RuntimeError(f"{sum(map(failed, lines))} of {len(lines)} requests failed")
    over = {
        name: (percentile(points, share, 0, seconds) - service.total_s) * 1e3
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))
    }
    return {
        **over,
        "service_ms": service.total_s * 1e3,
        "rate": rate,
        "other_cores": round(bench.other_cores, 2),
        "lag_p50_ms": (report.total.lag.quantile(0.5) or 0.0) * 1e3,
        "warnings": bench.doubts(report),
    }


def measure_fault(
    bench: Bench,
    service: Service,
    rate: float,
    before_s: float,
    after_s: float,
    inject: Callable[[], None],
) -> dict[str, Any]:
    """Return what requests at a constant rate notice of a fault in the middle of a load."""
    moments: list[float] = []

    def strike() -> None:
        inject()
        moments.append(time.time())

    warmup_s = 1.0
    with bench.asking(service) as put:
        timer = threading.Timer(warmup_s + before_s, strike)
        timer.start()
        report, lines = put(rate, before_s + after_s, warmup_s=warmup_s)
        timer.join()
    points = points_of(lines)
    fault_s = moments[0] - (lines[0]["unix_s"] - lines[0]["at_s"])
    normal_s = percentile(points, 0.99, 0, fault_s)
    first_s = percentile(points, 0.99, fault_s, fault_s + 1.0)
    codes = report.total.codes + report.total.reasons
    return {
        "failed": sum(map(failed, lines)),
        "requests": len(lines),
        "normal_p99_ms": normal_s * 1e3,
        "first_p99_ms": None if math.isinf(first_s) else first_s * 1e3,
        "ratio": None if math.isinf(first_s) else first_s / normal_s,
        "recovery_s": recovery(points, fault_s, normal_s),
        "causes": dict(codes),
        "other_cores": round(bench.other_cores, 2),
        "warnings": bench.doubts(report),
    }


def measure_overload(
    bench: Bench, service: Service, seconds: float, precision: float
) -> dict[str, Any]:
    """Return how much is answered in time at three times the rate that is served well."""
    goodputs: list[float] = []

    with bench.asking(service) as put:

        def holds(rate: float) -> bool:
            report, lines = put(rate, seconds / 2)
            tally = report.total
            p99_ms = tally.quantile_ms(0.99)
            held = not any(map(failed, lines)) and p99_ms is not None
            held = held and p99_ms <= DEADLINE_S * 1e3 / 4
            if held:
                goodputs.append(tally.count(Outcome.OK, Outcome.DEGRADED) / report.whole_s)
            return held

        search = PeakSearch(0.5 / service.total_s, precision=precision, least=1.0)
        peak = search.run(holds)
        if peak is None:
            raise RuntimeError("no rate was served well")
        report, _ = put(OVERLOAD * peak, seconds, warmup_s=2.0)
    tally = report.total
    goodput = tally.count(Outcome.OK, Outcome.DEGRADED) / report.whole_s
    late = tally.codes["LATE"] + tally.codes["DEADLINE_EXCEEDED"]
    return {
        "overload_goodput": goodput / max(goodputs),
        "overload_late": late,
        "overload_peak_rate": peak,
        "overload_rate": OVERLOAD * peak,
        "overload_goodput_rate": goodput,
        "overload_requests": tally.count(),
        "overload_p99_ms": tally.quantile_ms(0.99),
        "overload_codes": dict(tally.codes),
        "overload_other_cores": round(bench.other_cores, 2),
        "overload_reasons": dict(tally.reasons),
        "warnings": bench.doubts(report),
    }


def run(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Measure everything and return the figures.

    Raises:
        RuntimeError: if the gate is red.
    """
    from benchmarks import live_catalogue as live
    from benchmarks.sleeping_shard import CANDIDATES

    progress("publishing")
    snapshot = live.publish(folder, 2000, 16)
    ann_k = CANDIDATES // 2
    everywhere = os.sched_getaffinity(0)
    pin = max(everywhere)
    elsewhere = everywhere - {pin} or everywhere
    found: dict[str, Any] = {"k": K, "cpus": sorted(everywhere), "generator_cpu": pin}
    warnings: dict[str, list[str]] = {}

    def note(row: str, figures: dict[str, Any]) -> None:
        warnings[row] = figures.pop("warnings")
        found.update(figures)

    def note_all(row: str, figures: dict[str, Any]) -> None:
        warnings[row] = figures.pop("warnings")
        found.update({f"{row}_{name}": value for name, value in figures.items()})

    with cluster(folder, snapshot, 4, 1, everywhere) as running:
        progress("overhead")
        bench = Bench(folder, running, ann_k, None)
        service = Service(encode_us=1000, open_us=3000, close_us=3000)
        note_all("overhead", measure_overhead(bench, service, 20, 10 if quick else 30))
    with echo(folder, 4, ann_k, everywhere) as running:
        progress("the same messages alone")
        bench = Bench(folder, running, ann_k, None)
        note_all("echo", measure_overhead(bench, Service(0, 0, 0), 20, 10 if quick else 30))
    service = Service(encode_us=0, open_us=2000, close_us=2000)
    before_s, after_s = (5.0, 5.0) if quick else (10.0, 10.0)
    with cluster(folder, snapshot, 2, 2, everywhere) as running:
        bench = Bench(folder, running, ann_k, None)
        progress("a shard hangs")
        hung = running.shards[1, 0]
        figures = measure_fault(
            bench, service, 40, before_s, after_s, lambda: hung.send_signal(signal.SIGSTOP)
        )
        note_all("hung", figures)
        hung.send_signal(signal.SIGCONT)
        progress("a shard is killed")
        killed = running.shards[0, 0]
        note_all("killed", measure_fault(bench, service, 40, before_s, after_s, killed.kill))
    with cluster(folder, snapshot, 2, 1, elsewhere) as running:
        progress("overload")
        bench = Bench(folder, running, ann_k, pin)
        service = Service(encode_us=0, open_us=8000, close_us=8000)
        note(
            "overload",
            measure_overload(bench, service, 6 if quick else 15, 0.15 if quick else 0.05),
        )
    progress("a standby takes over")
    note_all("standby", measure_standby(folder, read_record, failed))
    progress("hosts")
    note_all("hosts", measure_hosts(read_record, failed, head=not quick))
    progress("scaling")
    sizes, most_s = (FEWER, 60.0) if quick else (SIZES, 180.0)
    note_all("scale", measure_scaling(folder, read_record, failed, sizes, most_s))
    found["warnings"] = warnings
    return found


def report_rows(found: dict[str, Any], emit: Callable[[str], None] = print) -> None:
    """Print the figures beside their goals."""
    for row in ROWS:
        if row.key not in found:
            emit(f"{row.title:64} not run")
            continue
        value = found[row.key]
        shown = "none" if value is None else f"{value:.3f}"
        line = f"{row.title:64} {shown:>9} {row.unit:2}"
        if row.goal is not None:
            bound = "at least" if row.at_least else "at most"
            held = "held" if row.holds(value) else "missed"
            line += f" goal {bound} {row.goal:g}: {held}"
        emit(line.rstrip())
    for row_name, said in found["warnings"].items():
        for one in said:
            emit(f"WARNING: {row_name}: {one}")


def main() -> int:
    """Run the measurement and the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="within five minutes")
    given = parser.parse_args()
    from benchmarks.run import ROOT, machine

    about = {**machine(), "unix_s": str(int(time.time()))}
    print(f"{about['cpu']}, {about['cores']} cores, commit {about['commit']}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
            found = run(Path(folder), quick=given.quick)
    except RuntimeError as error:
        print(f"gate is red: {error}: no number is printed", file=sys.stderr)
        return 1
    report_rows(found)
    goals = {
        row.key: {"goal": row.goal, "held": row.holds(found[row.key]) if row.key in found else None}
        for row in ROWS
    }
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"case": "cluster", **found, **about}) + "\n")
    print(json.dumps({"machine": about, "quick": given.quick, "goals": goals, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
