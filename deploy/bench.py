"""The verb ``bench``: puts an open-loop load on a running cluster and says how it fared."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silvershard.cluster.arrivals import Stretch
from silvershard.cluster.load_outcome import Outcome
from silvershard.cluster.load_peak import PeakSearch
from silvershard.cluster.load_report import LoadReport
from silvershard.deploy.access import access_options, dialer_of
from silvershard.deploy.arguments import AddVerb, Parents, positive, show, state_of
from silvershard.deploy.ask import address_of
from silvershard.deploy.bench_requests import Requests, of_file, of_golden, of_users
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.generators import Generators, Load, Target
from silvershard.deploy.operate import PhaseBar
from silvershard.deploy.state import StateDir
from silvershard.deploy.tables import Cell, pairs, table

INTERRUPTED = 130
_FIRST_RATE = 50.0
_PEAK_P99_MS = 100.0
_SHOWN_SECONDS = 30
_COLUMNS = {
    "rate": "rate",
    "goodput": "goodput",
    "failed_share": "failed",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "p999_ms": "p99.9 ms",
    "max_ms": "max ms",
    "coverage": "coverage",
}


def add_verbs(verb: AddVerb, shared: Parents) -> None:
    """Declare the verb.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    text = (
        "put an open-loop load on a running cluster: requests go out when they are due, and their "
        "latencies count from then; exit code 3 if answers were degraded or partial, 1 if requests "
        "failed"
    )
    bench = verb("bench", text, _bench, shared.state, shared.timeout)
    bench.add_argument(
        "--address",
        type=lambda given: given.split(","),
        default=[],
        metavar="HOST:PORT,...",
        help="routers to ask, in turn (default that of the state directory)",
    )
    access_options(bench)
    load = bench.add_mutually_exclusive_group(required=True)
    load.add_argument(
        "--rate",
        type=rates,
        metavar="R",
        help="requests per second: 200, in steps 100,200,400, or growing evenly 100..400",
    )
    load.add_argument(
        "--find-peak",
        type=positive_rate,
        nargs="?",
        const=_FIRST_RATE,
        metavar="R",
        help="look for the highest rate at which --max-p99 and --max-errors hold, from R upwards "
        f"(default {_FIRST_RATE:g}); each try takes --warmup and --duration",
    )
    bench.add_argument(
        "--duration",
        type=positive,
        default=10.0,
        metavar="S",
        help="seconds that count (default 10)",
    )
    bench.add_argument(
        "--warmup",
        type=seconds,
        default=1.0,
        metavar="S",
        help="seconds of load before that (default 1)",
    )
    bench.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="times between requests: drawn (default), or even",
    )
    bench.add_argument(
        "--deadline",
        type=positive,
        default=2.0,
        metavar="S",
        help="of a request, from when it was due (default 2)",
    )
    bench.add_argument(
        "-k", type=count, default=10, metavar="K", help="results wanted (default 10)"
    )
    bench.add_argument("--filter", default="", metavar="TEXT", help="what to let through")
    bench.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help='JSON lines of requests, keys as the fields of a query; {"features": {"history": '
        '[1, 2]}, "k": 5} (default: users of the data set, else golden requests)',
    )
    bench.add_argument(
        "--users", type=count, default=256, metavar="N", help="users to draw (default 256)"
    )
    bench.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of users and arrivals (default 0)"
    )
    bench.add_argument(
        "--processes", type=count, default=1, metavar="N", help="that send the load (default 1)"
    )
    bench.add_argument(
        "--pin",
        type=processors,
        default=[],
        metavar="CPU,...",
        help="processors that these are pinned to, in turn",
    )
    bench.add_argument(
        "--max-in-flight",
        type=count,
        default=1000,
        metavar="N",
        help="requests without an answer at a time; more are not sent and count as failed "
        "(default 1000)",
    )
    bench.add_argument(
        "--max-p99", type=positive, metavar="MS", help="a larger 99th percentile is exit code 1"
    )
    bench.add_argument(
        "--max-errors",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="a larger share of requests without an answer in time is exit code 1 (default 0)",
    )
    bench.add_argument(
        "--record", type=Path, metavar="FILE", help="write one JSON line per answer, warm-up too"
    )


def rates(text: str) -> list[tuple[float, float]]:
    """Return the rates at the begin and the end of each stretch of a load."""
    parts = text.split(",")
    found = []
    for part in parts:
        first, dots, last = part.partition("..")
        found.append((_rate(text, first), _rate(text, last if dots else first)))
        if not sum(found[-1]):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return found


def _rate(text: str, part: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be requests per second as 200, 100,200 or 100..400, got {text!r}"
        )
    return value


def positive_rate(text: str) -> float:
    """Return one rate above 0."""
    value = _rate(text, text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Return a time in seconds that may be 0."""
    return 0.0 if text.strip() == "0" else positive(text)


def count(text: str) -> int:
    """Return a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1, got {text}")
    return value


def processors(text: str) -> list[int]:
    """Return the numbers of processors."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be numbers of processors as 0,1, got {text!r}")
    return [int(part) for part in parts]


def requests_of(options: argparse.Namespace, state: StateDir) -> Requests:
    """Return what is asked: of a file, else of users of the data set, else the golden requests.

    Raises:
        CommandError: if there is nothing to ask, or it cannot be read.
    """
    if options.requests is not None:
        return of_file(options.requests, k=options.k, filter_text=options.filter)
    if state.users_file.is_file():
        return of_users(
            state, count=options.users, seed=options.seed, k=options.k, filter_text=options.filter
        )
    return of_golden(state, k=options.k, filter_text=options.filter)


def violations(report: LoadReport, max_p99_ms: float | None, max_errors: float) -> list[str]:
    """Return what does not hold of a load, for people.

    Args:
        report: what was found.
        max_p99_ms: bound of the 99th percentile of the answers; None: there is none.
        max_errors: bound of the share of requests without an answer in time.
    """
    found, total = [], report.total
    if total.failed_share > max_errors:
        causes = ", ".join(f"{times} {code}" for code, times in total.codes.most_common())
        found.append(
            f"{total.failed_share:.4%} of the requests failed, at most {max_errors:.4%} may: "
            f"{causes}"
        )
    p99_ms = total.quantile_ms(0.99)
    if not total.count():
        found.append("no request was due")
    elif max_p99_ms is not None and (p99_ms is None or p99_ms > max_p99_ms):
        got = "there was no answer" if p99_ms is None else f"it was {p99_ms:.1f} ms"
        found.append(f"the 99th percentile may be {max_p99_ms:g} ms, {got}")
    return found


def _bench(options: argparse.Namespace) -> int:
    if options.find_peak and options.record:
        raise CommandError("--record goes with --rate, not with --find-peak", ExitCode.USAGE)
    state = state_of(options)
    addresses = options.address or [address_of(state, "")]
    asked = requests_of(options, state)
    target = Target(tuple(addresses), asked.messages, asked.described, dialer_of(options, state))
    document: dict[str, Any] = {
        "addresses": list(addresses),
        "source": asked.source,
        "distinct_requests": len(asked.messages),
        "arrivals": options.arrivals,
        "seed": options.seed,
        "warmup_s": options.warmup,
        "deadline_s": options.deadline,
        "max_in_flight": options.max_in_flight,
        "pinned": options.pin,
    }
    bar = PhaseBar("bench")
    try:
        bar.phase("connecting")
        with Generators(
            target,
            processes=options.processes,
            cpus=options.pin,
            connect_s=options.timeout or 10.0,
        ) as generators:
            generators.connect()
            if options.rate:
                bar.phase("measuring")
                code = _measure(options, generators, document)
            else:
                code = _find_peak(options, generators, document, bar)
    finally:
        bar.close()
    show(options, document, lambda: render(document))
    return code


def load_of(options: argparse.Namespace, rate: Sequence[tuple[float, float]]) -> Load:
    """Return the load that the options describe; its stretches are equally long."""
    each_s = options.duration / len(rate)
    return Load(
        stretches=tuple(Stretch(each_s, first, last) for first, last in rate),
        warmup_s=options.warmup,
        poisson=options.arrivals == "poisson",
        seed=options.seed,
        deadline_s=options.deadline,
        max_in_flight=options.max_in_flight,
        record=options.record,
    )


def _measure(options: argparse.Namespace, generators: Generators, document: dict[str, Any]) -> int:
    """Put one load and describe it; return the exit code."""
    report, interrupted = generators.run(load_of(options, options.rate))
    document |= report.as_json()
    document["violations"] = violations(report, options.max_p99, options.max_errors)
    document["interrupted"] = interrupted
    document["record"] = str(options.record) if options.record else None
    if interrupted:
        return INTERRUPTED
    if document["violations"]:
        return ExitCode.FAILED
    lacking = report.total.count(Outcome.DEGRADED, Outcome.PARTIAL)
    return ExitCode.DEGRADED if lacking else ExitCode.OK


def _find_peak(
    options: argparse.Namespace,
    generators: Generators,
    document: dict[str, Any],
    bar: PhaseBar,
) -> int:
    """Put loads at several rates and describe them; return the exit code."""
    max_p99_ms = options.max_p99 or _PEAK_P99_MS
    trials: list[dict[str, Any]] = []
    search = PeakSearch(options.find_peak)
    interrupted = False

    def holds(rate: float) -> bool:
        nonlocal interrupted
        bar.phase(f"{rate:.0f} requests per second")
        report, interrupted = generators.run(load_of(options, [(rate, rate)]))
        if interrupted:
            raise KeyboardInterrupt
        wrong = violations(report, max_p99_ms, options.max_errors)
        if partial := report.total.count(Outcome.PARTIAL):
            wrong.append(f"{partial} answers were partial")
        found = report.as_json()
        trials.append(
            {
                "wanted_rate": rate,
                "held": not wrong,
                **{name: found[name] for name in (*_COLUMNS, "degraded", "warnings")},
                "violations": wrong,
                "limited_by_generator": report.limited_by_generator,
            }
        )
        return not wrong

    try:
        search.run(holds)
    except KeyboardInterrupt:
        # What was tried before is worth telling.
        interrupted = True
    document |= {
        "max_p99_ms": max_p99_ms,
        "max_errors": options.max_errors,
        "peak_rate": search.peak,
        "trials": trials,
        "interrupted": interrupted,
        "warnings": sorted({one for trial in trials for one in _doubts(trial)}),
    }
    if interrupted:
        return INTERRUPTED
    if search.peak is None:
        return ExitCode.FAILED
    degraded = any(one["degraded"] for one in trials if one["wanted_rate"] == search.peak)
    return ExitCode.DEGRADED if degraded else ExitCode.OK


def _doubts(trial: Mapping[str, Any]) -> list[str]:
    """Return what makes the verdict on a rate doubtful: that it is one on the generator."""
    if not trial["limited_by_generator"]:
        return []
    return [f"at {trial['wanted_rate']:.1f} per second: {one}" for one in trial["warnings"]]


def render(document: Mapping[str, Any]) -> str:
    """Return what was found for people."""
    text = _peak_text(document) if "trials" in document else _load_text(document)
    warnings = [f"WARNING: {one}" for one in document["warnings"]]
    if document["interrupted"]:
        warnings.append("interrupted: these are the figures until then")
    return "\n\n".join([text, *(["\n".join(warnings)] if warnings else [])])


def _row(one: Mapping[str, Any]) -> list[Cell]:
    return [_shown(name, one[name]) for name in _COLUMNS]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "coverage":
        return f"{value:.4f}"
    return f"{value:.3%}" if name == "failed_share" else f"{value:,.1f}"


def _load_text(document: Mapping[str, Any]) -> str:
    stretches = document["stretches"]
    rows: list[list[Cell]] = [["all", *_row(document)]]
    if len(stretches) > 1:
        rows += [[f"{one['wanted_rate']:g}/s", *_row(one)] for one in stretches]
    lines = [table(["", *_COLUMNS.values()], rows)]
    series = document["series"]
    if len(stretches) == 1 and 1 < len(series) <= _SHOWN_SECONDS:
        lines.append(
            table(
                ["second", *_COLUMNS.values()],
                [[one["second"], *_row(one)] for one in series],
            )
        )
    generator = document["generator"]
    facts = [
        ("requests", f"{document['requests']:,} in {document['seconds']:g} s: {_named(document)}"),
        ("asked", f"{document['distinct_requests']} of {document['source']}"),
        (
            "generator",
            f"{generator['processes']} process(es), {generator['cores']:.2f} cores, sent "
            f"{_ms(generator['lag_p99_ms'])} late at p99, {_ms(generator['lag_max_ms'])} at most",
        ),
    ]
    for name in ("errors", "reasons", "generations"):
        found = document[name]
        if found and (name != "generations" or len(found) > 1):
            facts.append((name, ", ".join(f"{times} {one}" for one, times in found.items())))
    if document["record"]:
        facts.append(("record", document["record"]))
    facts += [("violated", one) for one in document["violations"]]
    return "\n\n".join([*lines, pairs(facts)])


def _named(document: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{document[one.value]:,} {one.value}" for one in Outcome if document[one.value]
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"


def _peak_text(document: Mapping[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [f"{one['wanted_rate']:,.1f}", *_row(one), "yes" if one["held"] else "no"]
        for one in document["trials"]
    ]
    peak = document["peak_rate"]
    found = "none of the rates held" if peak is None else f"{peak:,.1f} requests per second"
    facts = [
        ("peak", found),
        (
            "held",
            f"p99 at most {document['max_p99_ms']:g} ms, "
            f"at most {document['max_errors']:.3%} failed, full coverage",
        ),
        ("asked", f"{document['distinct_requests']} of {document['source']}"),
    ]
    return "\n\n".join([table(["wanted", *_COLUMNS.values(), "held"], rows), pairs(facts)])
