"""The verb ``freshness``: how far the update log is, and how far every shard process."""

from collections.abc import Mapping
from typing import Any

import grpc

from silvershard.cluster import shard_pb2, shard_pb2_grpc, update_pb2, update_pb2_grpc
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.processes import is_alive
from silvershard.deploy.shard_host import Held, held_from
from silvershard.deploy.state import SequencerRecord, ShardRecord, StateDir
from silvershard.deploy.tables import pairs, table

_TIMEOUT_S = 2.0


def freshness(state: StateDir) -> tuple[dict[str, Any], ExitCode]:
    """Return what the sequencer and the shard processes say of updates, and the exit code for it.

    It is degraded while a process or the sequencer does not answer, or upserts are refused.

    Raises:
        CommandError: if no cluster runs, or it takes no updates.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None or not is_alive(record.driver):
        raise CommandError(f"no cluster runs on {state.root}: start one with `silvershard up`")
    if record.sequencer is None:
        raise CommandError(f"the cluster on {state.root} takes no updates: set updates.enabled")
    sequencer = _sequencer(record.sequencer)
    shards = [one for shard in record.shards for one in _shard(shard, record.generation)]
    document = {
        "generation": record.generation,
        "sequencer": sequencer,
        "shards": shards,
        "lag": max((one["lag"] for one in shards if "lag" in one), default=0),
    }
    whole = "error" not in sequencer and not sequencer["blocked"]
    whole = whole and all("error" not in one for one in shards)
    return document, ExitCode.OK if whole else ExitCode.DEGRADED


def _sequencer(record: SequencerRecord) -> dict[str, Any]:
    if not record.address:
        return {"error": record.reason or record.state}
    with grpc.insecure_channel(record.address) as channel:
        stub = update_pb2_grpc.SequencerStub(channel)
        try:
            report = stub.Report(update_pb2.SequencerReportRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return {"error": f"no answer: {error.details() or error.code().name}"}
    return {
        "log_id": report.log_id,
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


def _shard(record: ShardRecord, live: int) -> list[dict[str, Any]]:
    place = {"shard": record.shard, "replica": record.replica}
    if not record.address:
        return [{**place, "generation": live, "error": record.reason or record.state}]
    with grpc.insecure_channel(record.address) as channel:
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
    }
    if held.state == "failed":
        document["error"] = held.reason
    elif held.reason:
        document["trouble"] = held.reason
    return document


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
            one.get("error") or one.get("trouble") or "",
        )
        for one in document["shards"]
    ]
    headers = (
        *("shard", "generation", "state", "documents", "cut", "behind", "staleness s"),
        *("free pages", "reason"),
    )
    return "\n\n".join([pairs(facts), table(headers, rows, max_width=100)])
