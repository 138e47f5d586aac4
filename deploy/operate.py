"""The verbs that run a cluster: ``up``, ``down`` and ``status``."""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tqdm import tqdm

from silvershard.cluster import shard_pb2, shard_pb2_grpc, table_pb2, table_pb2_grpc
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy import hosts_launch, launch
from silvershard.deploy.access import dialer_within
from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.log_pins import check_log
from silvershard.deploy.placement import Host
from silvershard.deploy.shard_host import held_from
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.deploy.state_log import check_missing, existing_log
from silvershard.deploy.tables import pairs, table
from silvershard.shard.outline import read_outline

_HEALTH_TIMEOUT_S = 1.0
_COUNTS = ("lookups", "rows", "cached", "fetched", "defaulted")


class PhaseBar:
    """Shows what is being waited for and for how long, after two seconds, on a terminal or not."""

    def __init__(self, title: str) -> None:
        self._bar = tqdm(desc=title, bar_format="{desc} {elapsed}", leave=False, delay=2)
        self._title = title

    def phase(self, text: str) -> None:
        """Say what is being waited for now."""
        self._bar.set_description_str(f"{self._title}: {text}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def verify_snapshot(path: Path, num_shards: int) -> None:
    """Check every byte of a snapshot, and that it can be cut into that many shards.

    Raises:
        SnapshotError: naming the file that is missing or damaged.
        CommandError: if there are fewer partitions than shards.
    """
    from silvershard.shard.snapshot import open_snapshot

    snapshot = open_snapshot(path)
    most = snapshot.spec.num_partitions
    if num_shards > most:
        raise CommandError(
            f"shards: must be at most {most}, the partitions of {path.name}, got {num_shards}; "
            "publish with a larger index.planned_shards",
            ExitCode.USAGE,
        )
    snapshot.verify()


def verify_log(state: StateDir, config: Config, path: Path) -> None:
    """Check that a generation can be brought up to date from the update log, if there is one.

    Raises:
        Refused: if the log is not that of the state directory or of the generation, or is gone, or
            was trimmed beyond its cut.
        LogUnavailable: if the log cannot be reached.
        SnapshotError: if the generation has no manifest.
    """
    log = existing_log(state, config)
    if log is None:
        check_missing(state, config, read_outline(path))
        return
    try:
        check_log(log, read_outline(path))
    finally:
        log.close()


def start(
    state: StateDir,
    config: Config,
    *,
    generation: int | None,
    detached: bool,
    ended: Callable[[int], None] = lambda _: None,
) -> tuple[ClusterRecord, float]:
    """Start a cluster behind a progress bar; return its record and the seconds it took."""
    began_s = time.perf_counter()
    bar = PhaseBar("starting the cluster")

    def admit(path: Path) -> None:
        bar.phase("update log")
        verify_log(state, config, path)

    def verify(path: Path) -> None:
        scaled = state.control.read().scaled
        verify_snapshot(path, in_force(config, scaled).sharding.shards)

    try:
        record = launch.start(
            state,
            config,
            generation=generation,
            detached=detached,
            ended=ended,
            admit=admit,
            verify=verify,
            report=bar.phase,
        )
    finally:
        bar.close()
    return record, time.perf_counter() - began_s


def up(state: StateDir, config: Config, *, generation: int | None) -> dict[str, Any]:
    """Start a cluster that outlives this command; return what runs."""
    record, seconds = start(state, config, generation=generation, detached=True)
    return {**described(record), "seconds": round(seconds, 1)}


def up_hosts(
    state: StateDir,
    config: Config,
    hosts: Sequence[Host],
    *,
    generation: int | None,
    ray: str | None,
    routers: int | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Start a cluster on several hosts, saying the plan before; return what runs."""
    began_s = time.perf_counter()
    bar = PhaseBar("starting the cluster")

    def admit(path: Path) -> None:
        bar.phase("update log")
        verify_log(state, config, path)
        bar.phase("generation")
        verify_snapshot(path, config.sharding.shards)

    def show_plan(document: Mapping[str, Any]) -> None:
        from silvershard.deploy.plan import render

        report(render(document) + "\n")

    try:
        record = hosts_launch.up(
            state,
            config,
            hosts,
            generation=generation,
            ray=ray,
            routers=routers,
            admit=admit,
            show_plan=show_plan,
            report=bar.phase,
        )
    finally:
        bar.close()
    return {**described(record), "seconds": round(time.perf_counter() - began_s, 1)}


def down(state: StateDir, *, timeout_s: float, ray: str | None = None) -> dict[str, Any]:
    """Stop the cluster; return what was there."""
    began_s = time.perf_counter()
    bar = PhaseBar("stopping the cluster")
    try:
        bar.phase("requests in flight are finished")
        found = hosts_launch.launched_on(state)
        unreachable: tuple[str, ...] = ()
        if found is not None:
            unreachable = hosts_launch.down(*found, ray=ray, timeout_s=timeout_s)
            stopped = launch.Stopped(was_running=True, leftovers=0, killed=0)
        else:
            stopped = launch.stop(state, timeout_s=timeout_s)
    finally:
        bar.close()
    return {
        **stopped._asdict(),
        "unreachable": list(unreachable),
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def status(state: StateDir) -> tuple[dict[str, Any], ExitCode]:
    """Return what runs, as its processes themselves say, and the exit code for it."""
    record = hosts_launch.record_of(state)
    if record is None:
        phase = "starting" if state.is_locked() else "down"
        return {"state": phase, "state_dir": str(state.root)}, ExitCode.FAILED
    document = described(record)
    going = state.control.read().current
    if going is not None:
        document["operation"] = {"what": going.what, "progress": going.progress or going.state}
    alive = record.runs
    document["daemon"]["state"] = "running" if alive else "gone"
    dialer = dialer_within(record)
    router_serves = _health(record.address, f"model/{record.model}", dialer)
    if record.router.state == "serving" and not router_serves:
        document["router"] |= {"state": "not serving", "reason": "its health check says no"}
    for shard in document["shards"]:
        name = f"shard/{shard['shard']}"
        if shard["state"] == "serving" and not _health(shard["address"], name, dialer):
            shard |= {"state": "not answering", "reason": "its health check failed"}
    for tables in document["tables"]:
        names = [f"table/{name}/{tables['shard']}" for name in tables["addresses"]]
        places = tables["addresses"].values()
        answered = all(map(_health, places, names, itertools.repeat(dialer)))
        if tables["state"] == "serving" and not answered:
            tables |= {"state": "not answering", "reason": "its health check failed"}
    sequencer = document["sequencer"]
    if sequencer:
        if sequencer["state"] == "serving" and not _health(sequencer["address"], "", dialer):
            sequencer |= {"state": "not answering", "reason": "its health check failed"}
        for shard in document["shards"]:
            shard["behind"] = _behind(shard, record.generation, dialer)
        for tables in document["tables"]:
            if tables["state"] == "serving":
                tables |= _followed(tables["addresses"].values(), dialer)
    if document["tables"]:
        document["lookups"] = _lookups(document["shards"], dialer)
    serving = {
        one["shard"]: one["documents"] for one in document["shards"] if one["state"] == "serving"
    }
    covered = sum(serving.values())
    document["coverage"] = covered / record.documents if record.documents else 1.0
    watched = [
        *(document["routers"] or [document["router"]]),
        *document["shards"],
        *document["tables"],
    ]
    watched += [sequencer] if sequencer else []
    held = [
        one["prepared"] == one["processes"]
        for one in document["generations"]
        if one["role"] == "live"
    ]
    whole = alive and all(one["state"] == "serving" for one in watched) and all(held)
    if record.map_version == 0:
        document["state"] = "starting" if alive else "down"
        return document, ExitCode.FAILED
    document["state"] = "up" if whole else "degraded"
    return document, ExitCode.OK if whole else ExitCode.DEGRADED


def _health(address: str, service: str, dialer: Dialer = PLAIN) -> bool:
    if not address:
        return False
    with dialer.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_HEALTH_TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _behind(shard: dict[str, Any], generation: int, dialer: Dialer) -> int | None:
    """Return how many records of the update log a process has not applied; None if unknown."""
    if shard["state"] != "serving":
        return None
    report = _inspected(shard["address"], dialer)
    held = held_from(report).get(generation) if report is not None else None
    return held.behind if held is not None else None


def _followed(addresses: Iterable[str], dialer: Dialer = PLAIN) -> dict[str, Any]:
    """Return how far behind the update log a table process is, and why if it does not follow."""
    behind, trouble = 0, ""
    for address in addresses:
        with dialer.channel(address) as channel:
            try:
                found = table_pb2_grpc.TableStub(channel).Inspect(
                    table_pb2.TableInspect(), timeout=_HEALTH_TIMEOUT_S
                )
            except grpc.RpcError:
                return {}
        behind = max(behind, found.end - found.position)
        trouble = trouble or found.trouble
    return {"behind": behind, "reason": trouble}


def _inspected(address: str, dialer: Dialer) -> Any:
    """Return what a shard process says of itself, None if it says nothing."""
    with dialer.channel(address) as channel:
        try:
            return shard_pb2_grpc.ShardStub(channel).Inspect(
                shard_pb2.InspectRequest(), timeout=_HEALTH_TIMEOUT_S
            )
        except grpc.RpcError:
            return None


def _lookups(shards: Sequence[dict[str, Any]], dialer: Dialer) -> dict[str, dict[str, int]]:
    """Return what all serving shards looked up in each remote table since they started."""
    found: dict[str, Counter[str]] = {}
    for shard in shards:
        if shard["state"] != "serving":
            continue
        report = _inspected(shard["address"], dialer)
        for one in report.tables if report is not None else ():
            counts = {name: getattr(one, name) for name in _COUNTS}
            found.setdefault(one.table, Counter()).update(counts)
    return {name: dict(counts) for name, counts in found.items()}


def described(record: ClusterRecord) -> dict[str, Any]:
    """Return a running cluster as its launcher wrote it down."""
    return {
        "state": "up" if record.is_whole else "degraded",
        "address": record.address,
        "model": record.model,
        "generation": record.generation,
        "documents": record.documents,
        "coverage": record.coverage,
        "map_version": record.map_version,
        "admin": record.admin,
        "http": record.http,
        "uptime_s": round(time.time() - record.since_unix_s, 1),
        "daemon": {"pid": record.guard.pid, "state": "running"},
        "host": record.host,
        "release": record.release,
        "router": record.router.model_dump(),
        "routers": [one.model_dump() for one in record.routers],
        "shards": [shard.model_dump() for shard in record.shards],
        "tables": [tables.model_dump() for tables in record.tables],
        "sequencer": record.sequencer.model_dump() if record.sequencer else None,
        "generations": [one.model_dump() for one in record.generations],
    }


def render_cluster(document: dict[str, Any]) -> str:
    """Return a described cluster for people."""
    if "shards" not in document:
        said = "is starting" if document["state"] == "starting" else "nothing is running"
        return f"{document['state_dir']}: {said}"
    daemon, host = document["daemon"], document["host"]
    facts = [
        ("cluster", document["state"]),
        ("address", document["address"]),
        ("admin", document["admin"] or "-"),
        ("http", document["http"] or "-"),
        ("model", f"{document['model']}, generation {document['generation']}"),
        ("documents", f"{document['documents']:,}"),
        ("release", _releases(document)),
        ("coverage", f"{document['coverage']:.4f}"),
        (
            "supervisor" if host else "daemon",
            f"pid {daemon['pid']}, {daemon['state']}{f' on {host}' if host else ''}",
        ),
        *(("router", _told(one)) for one in document["routers"] or [document["router"]]),
    ]
    going = document.get("operation")
    if going:
        facts.append(("going on", f"{going['what']}: {going['progress']}"))
    if document["sequencer"]:
        facts.append(("sequencer", _told(document["sequencer"])))
    rows = [
        (
            f"{shard['shard']}.{shard['replica']}",
            *((shard["host"],) if host else ()),
            "standby" if shard["standby"] and shard["state"] == "serving" else shard["state"],
            str(shard["pid"] or "-"),
            shard["documents"],
            shard.get("behind"),
            shard["restarts"],
            shard["address"] or "-",
            str(shard["epoch"] or "-"),
            shard["reason"],
        )
        for shard in document["shards"]
    ]
    headers = (
        *(("shard", "host", "state") if host else ("shard", "state")),
        *("pid", "documents", "behind", "restarts", "address", "epoch"),
        "reason",
    )
    parts = [pairs(facts), table(headers, rows, max_width=100)]
    if len(document["generations"]) > 1:
        parts.append(_generations_table(document["generations"]))
    if document["tables"]:
        parts.append(_tables_table(document["tables"]))
    if document.get("lookups"):
        rows = [(name, *counts.values()) for name, counts in sorted(document["lookups"].items())]
        parts.append(table(("looked up", *_COUNTS), rows))
    return "\n\n".join(parts)


def _releases(document: dict[str, Any]) -> str:
    """Return which release of silvershard processes run, or how many run each."""
    processes = [*(document["routers"] or [document["router"]]), *document["shards"]]
    processes += [document["sequencer"]] if document["sequencer"] else []
    found = Counter(one["release"] for one in [document, *processes] if one["release"])
    if len(found) < 2:
        return next(iter(found), "-")
    return ", ".join(f"{release} ({count} processes)" for release, count in sorted(found.items()))


def _told(process: dict[str, Any]) -> str:
    """Return in a few words where a process is and how it does."""
    parts = [f"pid {process['pid'] or '-'}", process["state"]]
    if process["host"]:
        parts += [f"on {process['host']}", *([process["address"]] if process["address"] else [])]
    return ", ".join(parts) + (f" ({process['reason']})" if process["reason"] else "")


def _generations_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the generations that shards hold for people."""
    rows = [
        (
            str(one["generation"]),
            one["role"],
            f"{one['prepared']} of {one['processes']}",
            one["reason"],
        )
        for one in records
    ]
    return table(("generation", "role", "prepared", "reason"), rows, max_width=100)


def _tables_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the processes of remote tables for people."""
    rows = [
        (
            str(one["shard"]),
            ", ".join(map(str, one["generations"])) or "-",
            one["state"],
            str(one["pid"] or "-"),
            one["rows"],
            one.get("behind"),
            one["restarts"],
            ", ".join(one["addresses"]) or "-",
            one["reason"],
        )
        for one in records
    ]
    headers = (
        *("tables", "generations", "state", "pid", "rows", "behind", "restarts", "of"),
        "reason",
    )
    return table(headers, rows, max_width=100)


def render_down(document: dict[str, Any], state: StateDir) -> str:
    """Return what ``down`` did for people."""
    if document["unreachable"]:
        return (
            f"stopped the cluster on {state.root}; {', '.join(document['unreachable'])} cannot be "
            "reached: what runs there ends when it is back"
        )
    if document["was_running"]:
        killed = document["killed"]
        note = f"; {killed} processes had to be killed" if killed else ""
        return f"stopped the cluster on {state.root} in {document['seconds']} s{note}"
    if document["leftovers"]:
        return (
            f"nothing is running on {state.root}; "
            f"ended {document['leftovers']} processes that a crashed cluster had left behind"
        )
    return f"nothing is running on {state.root}"


def say(text: str) -> None:
    """Print for people, at once even into a pipe."""
    print(text)
    sys.stdout.flush()
