"""The verb ``freshness``: how far the update log is, and how far every shard process."""

from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from silvershard.cluster import shard_pb2, shard_pb2_grpc, update_pb2, update_pb2_grpc
from silvershard.cluster.dialer import Dialer
from silvershard.deploy.access import dialer_within
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.shard_host import Held, held_from
from silvershard.deploy.state import SequencerRecord, ShardRecord, StateDir
from silvershard.deploy.tables import pairs, table

_TIMEOUT_S = 2.0
# Publishing makes no list longer than four times the mean and leaves hardly an item elsewhere.
_MAX_SKEW = 8.0
_MAX_ASSIGNMENT_ERROR = 0.05


def freshness(state: StateDir) -> tuple[dict[str, Any], ExitCode]:
    """Return what the sequencer and the shard processes say of updates, and the exit code for it.

    It is degraded while a process or the sequencer does not answer, upserts are refused, or a
    process cannot follow the log.

    Raises:
        CommandError: if no cluster runs, or it takes no updates.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None or not record.runs:
        raise CommandError(f"no cluster runs on {state.root}: start one with `silvershard up`")
    if record.sequencer is None:
        raise CommandError(f"the cluster on {state.root} takes no updates: set updates.enabled")
    dialer = dialer_within(record)
    sequencer = _sequencer(record.sequencer, dialer)
    shards = [one for shard in record.shards for one in _shard(shard, record.generation, dialer)]
    document = {
        "generation": record.generation,
        "sequencer": sequencer,
        "shards": shards,
        "lag": max((one["lag"] for one in shards if "lag" in one), default=0),
        "hints": _hints(shards, record.generation),
    }
    whole = "error" not in sequencer and not sequencer["blocked"]
    whole = whole and all("error" not in one and "trouble" not in one for one in shards)
    return document, ExitCode.OK if whole else ExitCode.DEGRADED


def _sequencer(record: SequencerRecord, dialer: Dialer) -> dict[str, Any]:
    if not record.address:
        return {"error": record.reason or record.state}
    with dialer.channel(record.address) as channel:
        stub = update_pb2_grpc.SequencerStub(channel)
        try:
            report = stub.Report(update_pb2.SequencerReportRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return {"error": f"no answer: {error.details() or error.code().name}"}
    return {
        "log_id": report.log_id,
        "data_as_of": f"{report.log_id}:{','.join(str(one.end) for one in report.partitions)}",
        "generation": report.generation,
        "queued": report.queued,
        "partitions": [
            {"partition": one.partition, "start": one.start, "end": one.end, "epoch": one.epoch}
            for one in report.partitions
        ],
        "blocked": [
            {"shard": one.shard, "use": round(one.use, 4), "limit": one.limit}
            for one in report.blocked
        ],
        "counts": [{"op": one.op, "code": one.code, "count": one.count} for one in report.counts],
    }


def _shard(record: ShardRecord, live: int, dialer: Dialer) -> list[dict[str, Any]]:
    place = {"shard": record.shard, "replica": record.replica}
    if not record.address:
        return [{**place, "generation": live, "error": record.reason or record.state}]
    with dialer.channel(record.address) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)
        try:
            report = stub.Inspect(shard_pb2.InspectRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            words = f"no answer: {error.details() or error.code().name}"
            return [{**place, "generation": live, "error": words}]
    return [
        {**place, "generation": number, **_held(held)}
        for number, held in sorted(held_from(report).items())
    ]


def _held(held: Held) -> dict[str, Any]:
    document: dict[str, Any] = {
        "state": held.state,
        "documents": held.documents,
        "cut": list(held.cut),
        "lag": held.behind,
        "staleness_s": round(held.staleness_s, 3),
        "pages": held.pages,
        "free_pages": held.free_pages,
        "rejected": held.rejected,
        "list_skew": round(held.list_skew, 2),
        "assignment_error": round(held.assignment_error, 4),
    }
    if held.state == "failed":
        document["error"] = held.reason
    elif held.reason:
        document["trouble"] = held.reason
    return document


def _hints(shards: Sequence[Mapping[str, Any]], live: int) -> list[str]:
    """Return what an operator should do about clusters that no longer fit the live items."""
    mine = [one for one in shards if one["generation"] == live and "list_skew" in one]
    skew = max((one["list_skew"] for one in mine), default=0.0)
    error = max((one["assignment_error"] for one in mine), default=0.0)
    found = []
    if skew > _MAX_SKEW:
        found.append(f"the longest list is {skew:.1f} times the mean, more than {_MAX_SKEW:g}")
    if error > _MAX_ASSIGNMENT_ERROR:
        found.append(
            f"{error:.1%} of the items stand in another cluster than the nearest, more than "
            f"{_MAX_ASSIGNMENT_ERROR:.0%}"
        )
    advice = "`silvershard publish --recluster --activate` clusters the live items anew"
    return [f"{one}: {advice}" for one in found]


def render(document: Mapping[str, Any]) -> str:
    """Return what was found for people."""
    sequencer = document["sequencer"]
    if "error" in sequencer:
        facts = [("sequencer", sequencer["error"])]
    else:
        ends = ", ".join(f"{one['start']} to {one['end']}" for one in sequencer["partitions"])
        blocked = [
            f"shard {one['shard']} is {one['use']:.1%} full, limit {one['limit']:.1%}"
            for one in sequencer["blocked"]
        ]
        facts = [
            ("log", f"{sequencer['log_id']}, positions {ends}"),
            ("data as of now", f"publish --data-as-of {sequencer['data_as_of']}"),
            ("checked against", f"generation {sequencer['generation']}"),
            ("waiting", f"{sequencer['queued']:,}"),
            ("upserts", f"refused: {'; '.join(blocked)}" if blocked else "pass"),
        ]
    rows = [
        (
            f"{one['shard']}.{one['replica']}",
            str(one["generation"]),
            one.get("state", "-"),
            one.get("documents", 0),
            ", ".join(map(str, one.get("cut", ()))) or "-",
            one.get("lag", 0),
            f"{one['staleness_s']:.3f}" if "staleness_s" in one else "-",
            f"{one['free_pages']:,} of {one['pages']:,}" if one.get("pages") else "-",
            f"{one['list_skew']:.1f}" if one.get("pages") else "-",
            f"{one['assignment_error']:.1%}" if one.get("pages") else "-",
            one.get("error") or one.get("trouble") or "",
        )
        for one in document["shards"]
    ]
    headers = (
        *("shard", "generation", "state", "documents", "cut", "behind", "staleness s"),
        *("free pages", "list skew", "assignment error", "reason"),
    )
    shown = [pairs(facts), table(headers, rows, max_width=100)]
    if document["hints"]:
        shown.append("\n".join(f"hint: {one}" for one in document["hints"]))
    return "\n\n".join(shown)
