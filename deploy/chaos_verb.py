"""The verb ``chaos``: faults on purpose, in a cluster that serves."""

import argparse
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

from google.protobuf.json_format import MessageToDict

from silvershard.cluster import RequestRefused, admin_pb2
from silvershard.cluster.admin_client import AdminClient
from silvershard.cluster.faults import FaultKind
from silvershard.deploy.access import access_options, dialer_of
from silvershard.deploy.arguments import AddVerb, Parents, positive, reporter, show, state_of
from silvershard.deploy.ask import address_of
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.state import StateDir
from silvershard.deploy.tables import table

_KINDS: Final = get_args(FaultKind)
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DEFAULT_S: Final = 30.0
_RUN_S: Final = 60.0
_DEADLINE_S: Final = 2.0
"""Of the queries of a game day."""


def add_verb(verb: AddVerb, shared: Parents) -> None:
    """Declare the verb ``chaos``.

    Args:
        verb: adds one.
        shared: options that several verbs have.
    """
    text = "inject a fault into a running cluster whose settings allow it, list faults, end them"
    chaos = verb("chaos", text, _chaos, shared.state)
    chaos.set_defaults(wrong_usage=chaos.error)
    access_options(chaos)
    chaos.add_argument(
        "what",
        choices=(*_KINDS, "list", "stop", "run"),
        metavar="WHAT",
        help=f"{', '.join(_KINDS)}; list; stop; run: one drawn fault after another, under load",
    )
    chaos.add_argument(
        "target",
        nargs="*",
        metavar="TARGET",
        help="shard S.R, router, sequencer, supervisor, tables N, host ADDRESS or generation N; "
        "of stop: names of faults, by default all",
    )
    chaos.add_argument(
        "--for",
        dest="seconds",
        type=duration,
        metavar="TIME",
        help=f"how long it lasts: 10s, 5m (default {_DEFAULT_S:g}s, of run {_RUN_S:g}s)",
    )
    chaos.add_argument(
        "--ms", type=int, metavar="N", help="of slow: added to every call (default 100)"
    )
    chaos.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of drop: of the messages; of fill: of the free slots (default 1)",
    )
    chaos.add_argument(
        "--copy",
        default="",
        metavar="URL",
        help="of corrupt: where `snapshots --push` put another copy of the generation",
    )
    chaos.add_argument("--name", default="", metavar="NAME", help="of the fault; default: random")
    chaos.add_argument(
        "--allow-outage", action="store_true", help="also where no other copy of a shard answers"
    )
    chaos.add_argument("--dry-run", action="store_true", help="say what would be done only")
    chaos.add_argument("--plan", default="standard", help="of run: standard or reads")
    chaos.add_argument("--seed", type=int, default=0, metavar="N", help="of run (default 0)")
    chaos.add_argument(
        "--rate", type=positive, default=20.0, metavar="R", help="of run: queries a second"
    )
    chaos.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="of run: queries as JSON lines, as of bench (default: the golden requests)",
    )


def duration(text: str) -> float:
    """Return a time in seconds: ``10``, ``10s``, ``5m`` or ``1h``."""
    unit = _UNITS.get(text[-1:], 0.0)
    try:
        return positive(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a positive number with s, m or h, got {text!r}"
        ) from None


def admin_address(state: StateDir) -> str:
    """Return where the admin plane of the cluster that runs is.

    Raises:
        CommandError: if nothing runs, or it has none.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None:
        raise CommandError(f"no cluster runs on {state.root}: start one with `silvershard up`")
    if not record.admin:
        raise CommandError(
            f"the cluster on {state.root} has no admin plane: set admin.enabled and start it again"
        )
    return record.admin


def _chaos(options: argparse.Namespace) -> int:
    if options.what in ("list", "run") and options.target:
        options.wrong_usage(f"{options.what} takes no target")
    state = state_of(options)
    dialer = dialer_of(options, state)
    with AdminClient(admin_address(state), dialer=dialer) as client:
        try:
            return _carried_out(options, client)
        except RequestRefused as error:
            if error.code == "FAILED_PRECONDITION":
                raise Refused(error.message) from None
            raise


def _carried_out(options: argparse.Namespace, client: AdminClient) -> int:
    if options.what == "run":
        return _run(options, client)
    if options.what in ("list", "stop"):
        stops = options.what == "stop"
        faults = client.clear_faults(*options.target) if stops else client.list_faults()
        documents = [document_of(one) for one in faults]
        show(options, {"faults": documents}, lambda: render(documents))
        return ExitCode.OK
    fault = client.inject_fault(
        options.what,
        " ".join(options.target),
        _seconds(options),
        delay_ms=options.ms or (100 if options.what == "slow" and options.ms is None else 0),
        share=options.share,
        copy_url=options.copy,
        allow_outage=options.allow_outage,
        operation_id=options.name,
        dry_run=options.dry_run,
    )
    document = document_of(fault)
    show(options, document, lambda: _said(document))
    return ExitCode.OK


def _run(options: argparse.Namespace, client: AdminClient) -> int:
    from silvershard.cluster.arrivals import Stretch
    from silvershard.deploy import game_day
    from silvershard.deploy.bench_requests import of_file, of_golden
    from silvershard.deploy.generators import Generators, Load, Target

    if options.plan not in game_day.PLANS:
        options.wrong_usage(f"--plan must be {' or '.join(game_day.PLANS)}, got {options.plan!r}")
    state, seconds = state_of(options), options.seconds or _RUN_S
    # What is not allowed is said before anything is sent.
    client.list_faults()
    asked = (
        of_golden(state, k=10, filter_text="")
        if options.requests is None
        else of_file(options.requests, k=10, filter_text="")
    )
    target = Target(
        (address_of(state, ""),), asked.messages, asked.described, dialer_of(options, state)
    )
    stop, report = threading.Event(), reporter(options)
    day = game_day.GameDay(
        client,
        state.read_record,
        plan=options.plan,
        seed=options.seed,
        allow_outage=options.allow_outage,
        report=report,
    )
    thread = threading.Thread(target=day.run, args=(seconds, stop), name="game-day")
    with tempfile.TemporaryDirectory() as folder, Generators(target) as generators:
        generators.connect()
        record = Path(folder) / "record.jsonl"
        load = Load(
            (Stretch(seconds, options.rate, options.rate),),
            deadline_s=_DEADLINE_S,
            seed=options.seed,
            record=record,
        )
        try:
            thread.start()
            generators.run(load)
        finally:
            stop.set()
            thread.join()
            client.clear_faults()
        if day.failure is not None:
            raise day.failure
        document = {
            "seed": options.seed,
            "plan": options.plan,
            **game_day.account(day.happened, game_day.read_lines(record)),
        }
    show(options, document, lambda: game_day.render(document))
    if document["failed"] or document["wrong"]:
        return ExitCode.FAILED
    return ExitCode.DEGRADED if document["partial"] else ExitCode.OK


def _seconds(options: argparse.Namespace) -> float:
    if options.seconds is not None:
        return float(options.seconds)
    return 0.0 if options.what == "kill" else _DEFAULT_S


def document_of(fault: admin_pb2.Fault) -> dict[str, Any]:
    """Return a fault as JSON values."""
    plain = MessageToDict(fault, preserving_proto_field_name=True)
    return {
        "name": fault.operation_id,
        "kind": admin_pb2.FaultKind.Name(fault.kind).removeprefix("FAULT_KIND_").lower(),
        "target": fault.target,
        "state": admin_pb2.FaultState.Name(fault.state).removeprefix("FAULT_STATE_").lower()
        if fault.state
        else "planned",
        "seconds": fault.duration.ToNanoseconds() / 1e9,
        "delay_ms": fault.delay_ms,
        "share": fault.share,
        "pids": list(fault.pids),
        "began": plain.get("began", ""),
        "ended": plain.get("ended", ""),
    }


def _said(document: dict[str, Any]) -> str:
    what = f"{document['kind']} {document['target']}"
    if document["state"] == "planned":
        return f"would {what}, processes {document['pids']}"
    if not document["seconds"]:
        return f"{what} is done; fault {document['name']}"
    return (
        f"{what} for {document['seconds']:g} s; "
        f"`silvershard chaos stop {document['name']}` ends it before"
    )


def render(documents: Sequence[dict[str, Any]]) -> str:
    """Return faults for people."""
    if not documents:
        return "no fault was injected"
    rows = [
        (one["name"], one["kind"], one["target"], one["state"], f"{one['seconds']:g}", one["began"])
        for one in documents
    ]
    return table(("name", "fault", "target", "state", "seconds", "began"), rows)
