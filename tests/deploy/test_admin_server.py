import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import (
    Client,
    Query,
    RequestRefused,
    admin_pb2,
    retrieval_pb2,
    retrieval_pb2_grpc,
)
from silvershard.cluster.admin_client import AdminClient
from silvershard.deploy import launch, operate
from silvershard.deploy.admin_runner import AdminRunner
from silvershard.deploy.admin_server import SERVICE, AdminServer
from silvershard.deploy.config import Config, load
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.errors import RetrievalError, StateError
from silvershard.shard.generations import list_generations
from silvershard.shard.repository import Repository
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 120.0
WAITING, RUNNING, DONE, CANCELLED, ABANDONED = (
    admin_pb2.OPERATION_STATE_WAITING,
    admin_pb2.OPERATION_STATE_RUNNING,
    admin_pb2.OPERATION_STATE_DONE,
    admin_pb2.OPERATION_STATE_CANCELLED,
    admin_pb2.OPERATION_STATE_ABANDONED,
)

# Stands for the process of an operation: it ends when it is told to, or with a result at once.
PROCESS = """
import json, sys, time
task = json.loads(sys.stdin.read())["task"]
print(json.dumps({"progress": "loading"}), flush=True)
while task["generation"] == 7:
    time.sleep(0.005)
print(json.dumps({"result": {"generation": task["generation"], "done": True}}), flush=True)
"""


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir(tmp_path / "s")
    state.create()
    (state.root / "process.py").write_text(PROCESS)
    return state


def make_runner(state: StateDir, config: Config) -> AdminRunner:
    process = str(state.root / "process.py")
    return AdminRunner(state, config, command=(sys.executable, "-S", "-P", process))


@pytest.fixture
def client(state: StateDir) -> Iterator[AdminClient]:
    with (
        AdminServer(state, Config(), make_runner=make_runner) as server,
        AdminClient(server.address) as connected,
    ):
        yield connected


def test_an_operation_is_begun_waited_for_and_remembered(client: AdminClient) -> None:
    begun = client.activate(2, operation_id="one")
    assert (begun.operation_id, begun.state) == ("one", WAITING)
    ended = client.finish(begun, timeout_s=WAIT_S)
    assert (ended.state, list(ended.progress)) == (DONE, ["loading"])
    assert (ended.moved.generation, ended.moved.done) == (2, True)
    assert client.activate(2, operation_id="one") == ended
    assert client.get_operation("one") == ended
    assert client.list_operations() == [ended]
    assert client.list_operations(going_on=True) == []
    with pytest.raises(RequestRefused, match="operation one is another one") as refused:
        client.activate(3, operation_id="one")
    assert (refused.value.code, refused.value.reason) == (
        "FAILED_PRECONDITION",
        "OPERATION_ID_USED",
    )


def test_a_wait_ends_with_its_time_or_with_that_of_its_call(
    state: StateDir, client: AdminClient
) -> None:
    client.verify_snapshot(7, operation_id="long")
    assert client.wait_operation("long", 0.05).state in (WAITING, RUNNING)
    with grpc.insecure_channel(client.address) as channel:
        stub = channel.unary_unary(
            f"/{SERVICE}/WaitOperation",
            request_serializer=admin_pb2.WaitOperationRequest.SerializeToString,
            response_deserializer=admin_pb2.Operation.FromString,
        )
        # Its deadline leaves time for the answer.
        answer = stub(admin_pb2.WaitOperationRequest(operation_id="long"), timeout=1.0)
        assert answer.state == RUNNING
    client.cancel_operation("long")
    assert client.wait_operation("long", WAIT_S).state == CANCELLED
    with pytest.raises(RequestRefused, match="it was cancelled") as refused:
        client.finish(client.get_operation("long"), timeout_s=1.0)
    assert (refused.value.code, refused.value.reason) == ("CANCELLED", "CANCELLED")


def test_bad_input_names_the_field_and_begins_nothing(client: AdminClient) -> None:
    refusals: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: client.activate(0), "INVALID_ARGUMENT", "generation"),
        (lambda: client.activate(2, operation_id="a b"), "INVALID_ARGUMENT", "operation_id"),
        (lambda: client.set_alias("warm", 2), "INVALID_ARGUMENT", "alias"),
        (lambda: client.stage_snapshot("", 2), "INVALID_ARGUMENT", "url"),
        (lambda: client.get_operation(""), "INVALID_ARGUMENT", "operation_id"),
        (lambda: client.get_operation("nobody"), "NOT_FOUND", ""),
        (lambda: client.wait_operation("nobody", 1.0), "NOT_FOUND", ""),
        (lambda: client.cancel_operation("nobody"), "NOT_FOUND", ""),
    ]
    for call, code, field in refusals:
        with pytest.raises(RequestRefused) as refused:
            call()
        assert refused.value.code == code
        assert [one.field for one in refused.value.violations] == ([field] if field else [])
    with grpc.insecure_channel(client.address) as channel:
        with pytest.raises(grpc.RpcError) as broken:
            channel.unary_unary(f"/{SERVICE}/Activate")(b"\xff\xff", timeout=5.0)
        assert broken.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert client.list_operations() == []


def test_nothing_is_in_an_audit_log_that_is_not_kept(client: AdminClient) -> None:
    assert client.audit() == []
    with pytest.raises(RequestRefused, match="at most 1000") as refused:
        client.audit(limit=1001)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_reads_without_a_cluster_are_refused_in_words(client: AdminClient) -> None:
    for read in (client.list_shards, client.freshness):
        with pytest.raises(RequestRefused, match="cluster") as refused:
            read()
        assert refused.value.code == "FAILED_PRECONDITION"


def test_it_says_that_it_is_healthy(client: AdminClient) -> None:
    with grpc.insecure_channel(client.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5.0)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_end_of_the_cluster_ends_waits_and_operations(state: StateDir) -> None:
    with AdminServer(state, Config(), make_runner=make_runner) as server:
        client = AdminClient(server.address)
        client.verify_snapshot(7, operation_id="long")
        found: list[Any] = []
        waiter = threading.Thread(
            target=lambda: found.append(client.wait_operation("long", WAIT_S))
        )
        waiter.start()
        until(lambda: client.get_operation("long").state == RUNNING, "it does not run")
    waiter.join(WAIT_S)
    client.close()
    assert [one.state for one in found] == [ABANDONED]


def test_a_port_that_is_in_use_is_said_at_once(state: StateDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = load(None, environ={}, options={"admin.port": port})
        with pytest.raises(StateError, match=f"cannot listen on 127.0.0.1:{port}"):
            AdminServer(state, config).__enter__()


def settings(**options: Any) -> Config:
    # With random embeddings the lists of two clusterings find more or less by chance.
    fixed = {
        "listen.port": 0,
        "model.name": "films",
        "sharding.threads": 1,
        "sharding.shards": 2,
        "swap.max_recall_loss": 0.3,
        "swap.drain_ms": 500,
        # On a machine that has little time for it, a process that is slow is not lost.
        "ping.eject_after": 100,
        "runtime.start_timeout_s": 240,
    }
    return load(None, environ={}, options={**fixed, **options})


@contextmanager
def running(state: StateDir) -> Iterator[None]:
    launch.start(state, settings(), generation=1, detached=False)
    try:
        yield
    finally:
        launch.stop(state, timeout_s=20.0)


def latest(state: StateDir) -> ClusterRecord:
    record = state.read_record()
    assert record is not None
    return record


class Reader(threading.Thread):
    """Asks one question after another, and notes what fails."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.generations: list[int] = []
        self.failed: list[str] = []
        self.address = address
        self.ended = threading.Event()

    def run(self) -> None:
        with Client(self.address, timeout_s=10.0) as client:
            while not self.ended.wait(0.005):
                try:
                    result = client.retrieve(Query(features={}, k=5, min_coverage=1.0))
                    self.generations.append(result.generation)
                except RetrievalError as error:
                    self.failed.append(str(error))


def served_by(address: str, alias: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = retrieval_pb2_grpc.RetrievalStub(channel)
        try:
            request = retrieval_pb2.RetrieveRequest(k=1, alias=alias)
            return int(stub.Retrieve(request, timeout=10.0).version.generation)
        except grpc.RpcError:
            return 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_is_run_by_its_admin_plane_under_load(
    tmp_path: Path, two_generations: Path
) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    state.generations.mkdir()
    url = str(two_generations)
    copies = str(tmp_path / "copies")
    for number in list_generations(two_generations):
        Repository(copies).push(open_snapshot(Path(url) / f"gen-{number:06d}"))
    Repository(copies).fetch(1, state.generations)
    store = state.control
    with running(state):
        document, _ = operate.status(state)
        assert document["admin"] == latest(state).admin
        reader = Reader(latest(state).address)
        reader.start()
        with AdminClient(latest(state).admin) as client:
            run_by(client, state, copies)
        until(lambda: reader.generations[-1:] == [1], "the rollback does not answer")
        reader.ended.set()
        reader.join(WAIT_S)
        assert not reader.failed
        assert set(reader.generations) == {1, 2}
        lose_the_driver(state)
    with running(state), AdminClient(latest(state).admin) as client:
        found = client.get_operation("interrupted")
        assert found.state == ABANDONED
        assert found.error.message == "the cluster ended before it was done"
        assert client.activate(2, operation_id="interrupted") == found
        assert client.get_operation("activated").state == DONE
        assert store.read().live == 1


def run_by(client: AdminClient, state: StateDir, copies: str) -> None:
    """Bring a generation in, make it live and go back, all through the admin plane."""
    store = state.control

    def done(operation: Any) -> Any:
        return client.finish(operation, timeout_s=WAIT_S)

    assert not done(client.stage_snapshot(copies, 2, dry_run=True)).staged.done
    with pytest.raises(RequestRefused, match="generation 2 is not published") as refused:
        done(client.activate(2))
    assert refused.value.code == "NOT_FOUND"
    staged = done(client.stage_snapshot(copies, 2))
    assert staged.staged.done
    assert list_generations(state.generations) == [1, 2]
    assert done(client.plan(2)).plan.mode == "beside"
    before = store.read()
    dry = done(client.activate(2, dry_run=True))
    assert (dry.moved.generation, dry.moved.before, dry.moved.done) == (2, 1, False)
    assert any(line.startswith("recall: ") for line in dry.progress)
    assert store.read() == before
    # It is loaded where nobody can name it, so that it becomes live quickly.
    assert done(client.warm_snapshot(2, load=False)).moved.alias == "warm"
    roles = {one.generation: one.role for one in client.list_shards().generations}
    assert roles == {1: "live", 2: "staged"}
    assert served_by(latest(state).address, "canary") == 0
    assert done(client.set_alias("canary", 2, load=False)).moved.generation == 2
    until(lambda: served_by(latest(state).address, "canary") == 2, "no canary answers")
    done(client.set_alias("canary", 0))
    moved = done(client.activate(2, operation_id="activated", load=False)).moved
    assert (moved.alias, moved.generation, moved.before, moved.done) == ("live", 2, 1, True)
    assert (store.read().live, store.read().warm) == (2, 0)
    shards = client.list_shards()
    assert [one.state for one in shards.shards] == ["serving", "serving"]
    freshness = client.freshness()
    assert (freshness.generation, freshness.degraded) == (2, False)
    assert freshness.sequencer.log_id
    assert len({(one.shard, one.generation) for one in freshness.shards}) == 4
    assert done(client.rollback()).moved.generation == 1
    # A swap that is called off before its change leaves what is live; on a busy machine it may be
    # done before it is called off, and is asked for again.
    for number in range(5):
        before, name = store.read(), f"called-off-{number}"
        client.activate(2, operation_id=name)
        until(lambda: client.get_operation(name).progress, "it does not begin")  # noqa: B023
        ended = client.cancel_operation(name)
        try:
            done(ended)
        except RequestRefused as error:
            assert "cancelled" in str(error)  # noqa: PT017
            break
        assert done(client.rollback()).moved.generation == 1
    else:
        raise AssertionError("it could not be called off")
    after = store.read()
    assert (after.live, after.current) == (before.live, None)


def lose_the_driver(state: StateDir) -> None:
    """Kill the driver while an operation goes on."""
    record = latest(state)
    with AdminClient(record.admin) as client:
        client.activate(2, operation_id="interrupted")
        until(lambda: client.get_operation("interrupted").state == RUNNING, "it does not run")
        os.kill(record.driver.pid, signal.SIGKILL)
    until(lambda: not state.is_locked(), "the guard does not end")
