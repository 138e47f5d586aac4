import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from silvershard.cluster import admin_pb2
from silvershard.cluster.audit import AuditLog, AuditTrail
from silvershard.cluster.roles import CALLER, Caller

ACTIVATE = "/silvershard.v1.Admin/Activate"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path, clock: Clock) -> AuditLog:
    return AuditLog(path, clock=clock, wall=lambda: 86400.5)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_change_is_noted_with_who_what_and_how_it_ended(audit: AuditLog, path: Path) -> None:
    request = admin_pb2.ActivateRequest(operation_id="swap", generation=3)
    audit.done("olga", ACTIVATE, request, "OK", peer="ipv4:10.0.0.1:5")
    assert lines(path) == [
        {
            "time": "1970-01-02T00:00:00.500+00:00",
            "event": "admin",
            "who": "olga",
            "peer": "ipv4:10.0.0.1:5",
            "method": ACTIVATE,
            "code": "OK",
            "request": {"operation_id": "swap", "generation": "3"},
        }
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_are_added_also_after_the_file_was_moved_away(audit: AuditLog, path: Path) -> None:
    audit.refused("olga", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    audit.refused("olga", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    assert len(lines(path)) == 2
    path.rename(path.with_suffix(".1"))
    audit.refused("olga", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    assert len(lines(path)) == 1


def test_many_refused_calls_are_counted_instead(audit: AuditLog, path: Path, clock: Clock) -> None:
    for _ in range(200):
        audit.refused("", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    assert len(lines(path)) == 50
    clock.now_s = 1.0
    for _ in range(10):
        audit.refused("", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    assert len(lines(path)) == 51
    assert lines(path)[-1]["suppressed"] == 150
    # Changes are noted all the same.
    audit.done("olga", ACTIVATE, admin_pb2.ActivateRequest(), "OK", peer="p")
    assert len(lines(path)) == 52


def test_what_a_caller_says_cannot_make_a_line_or_a_long_one(audit: AuditLog, path: Path) -> None:
    audit.refused("a\nb", "/x\n" + "y" * 5000, "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    request = admin_pb2.StageSnapshotRequest(url="u" * 100_000)
    audit.done("olga", ACTIVATE, request, "OK", peer="p")
    assert len(lines(path)) == 2
    assert max(map(len, path.read_text().splitlines())) < 4096


def test_a_log_that_cannot_be_written_says_so_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = AuditLog(tmp_path / "no" / "audit.jsonl")
    audit.refused("", "/a/B", "UNAUTHENTICATED", "TOKEN_MISSING", peer="p")
    assert "the audit log lacks a line" in caplog.text


def test_the_newest_lines_are_read_without_damaged_ones(audit: AuditLog, path: Path) -> None:
    assert audit.read(10) == []
    for number in range(5):
        audit.done("olga", ACTIVATE, admin_pb2.ActivateRequest(generation=number), "OK", peer="p")
    with path.open("a") as file:
        file.write("{damaged\n")
    whole = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    assert audit.read(100) == whole
    assert audit.read(3) == whole[-2:]


class Details:
    def __init__(self, method: str) -> None:
        self.method = method


class Context:
    def __init__(self, code: Any = None) -> None:
        self._code = code

    def code(self) -> Any:
        return self._code

    def peer(self) -> str:
        return "ipv4:1.2.3.4:5"


def through(run: Any, trail: AuditTrail, method: str, behaviour: Any, context: Context) -> Any:
    """Make a call of a method through the trail."""
    handler = grpc.unary_unary_rpc_method_handler(behaviour)

    async def continuation(_: Any) -> Any:
        return handler

    async def scene() -> Any:
        CALLER.set(Caller("olga"))
        found = await trail.intercept_service(continuation, Details(method))
        return await found.unary_unary(admin_pb2.RollbackRequest(operation_id="back"), context)

    return run(scene())


def test_only_what_may_change_something_is_noted(run: Any, audit: AuditLog, path: Path) -> None:
    async def answer(request: Any, context: Any) -> str:
        return "done"

    trail = AuditTrail(audit)
    for name in ("ListShards", "WaitOperation", "Freshness"):
        method = f"/silvershard.v1.Admin/{name}"
        assert through(run, trail, method, answer, Context()) == "done"
    assert not path.exists()
    assert through(run, trail, "/silvershard.v1.Admin/Rollback", answer, Context()) == "done"
    (line,) = lines(path)
    assert (line["who"], line["code"], line["request"]) == ("olga", "OK", {"operation_id": "back"})


def test_a_change_that_is_refused_is_noted_with_its_status(
    run: Any, audit: AuditLog, path: Path
) -> None:
    async def refuse(request: Any, context: Any) -> None:
        raise grpc.aio.AbortError("no")

    context = Context(grpc.StatusCode.FAILED_PRECONDITION)
    with pytest.raises(grpc.aio.AbortError):
        through(run, AuditTrail(audit), ACTIVATE, refuse, context)
    assert lines(path)[0]["code"] == "FAILED_PRECONDITION"
    with pytest.raises(grpc.aio.AbortError):
        through(run, AuditTrail(audit), ACTIVATE, refuse, Context())
    assert lines(path)[1]["code"] == "UNKNOWN"
