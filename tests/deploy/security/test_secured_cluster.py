"""A real cluster with TLS, tokens and a secret, on addresses that other machines can reach."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silvershard.cluster import Client, ItemPatch, RequestRefused, shard_pb2, shard_pb2_grpc
from silvershard.cluster.admin_client import AdminClient
from silvershard.cluster.dialer import Dialer
from silvershard.cluster.secret_file import read_secret
from silvershard.cluster.tls import ClientTls
from silvershard.cluster.tokens import TokenFile, make_token
from silvershard.deploy import launch, verbs
from silvershard.deploy.config import load
from silvershard.deploy.state import ClusterRecord, StateDir

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 60.0
ROLES = ("view", "query", "update", "admin")


def until(true: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


class Secured(NamedTuple):
    state: StateDir
    tokens: dict[str, str]
    authority: Any
    tls: dict[str, str]

    @property
    def record(self) -> ClusterRecord:
        found = self.state.read_record()
        assert found is not None
        return found

    @property
    def roots(self) -> bytes:
        content: bytes = self.authority.ca.read_bytes()
        return content

    @property
    def router(self) -> str:
        return at_loopback(self.record.address)

    @property
    def admin(self) -> str:
        return at_loopback(self.record.admin)

    def client(self, role: str) -> Client:
        return Client(self.router, token=self.tokens.get(role, role), root_certificates=self.roots)

    def ports(self) -> dict[str, str]:
        record = self.record
        assert record.sequencer is not None
        shards = {f"shard {one.shard}": one.address for one in record.shards}
        inner = {**shards, "sequencer": record.sequencer.address}
        return {"router": self.router, "admin": self.admin, **inner}


def at_loopback(address: str) -> str:
    host, _, port = address.rpartition(":")
    assert host == "0.0.0.0"
    return f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def secured(
    tmp_path_factory: pytest.TempPathFactory, two_generations: Path, make_authority: Any
) -> Iterator[Secured]:
    state = StateDir(tmp_path_factory.mktemp("state") / "s")
    state.create()
    shutil.copytree(two_generations, state.generations)
    authority = make_authority("authority")
    tls = authority.section("server", "feed.test", "127.0.0.1")
    made = {role: make_token(f"{role}er", [role], now_unix_s=1) for role in ROLES}
    made["expired"] = make_token("late", ["admin"], now_unix_s=1, expires_unix_s=2)
    made["acme"] = make_token("shop", ["query"], tenant="acme", now_unix_s=1)
    path = state.root / "tokens.json"
    TokenFile(tokens=tuple(one.row for one in made.values())).write(path)
    config = load(
        None,
        environ={},
        options={
            **{"listen.host": "0.0.0.0", "listen.port": 0, "admin.host": "0.0.0.0"},
            **{"model.name": "films", "sharding.shards": 2},
            **{f"security.tls.{key}": value for key, value in tls.items()},
            "security.tokens": str(path),
            # One at once, and then one in a quarter of an hour.
            "admission.tenants": {"acme": {"qps": 0.001}},
        },
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SILVERSHARD_TOKEN", made["admin"].text)
        launch.start(state, config, generation=1, detached=False)
    try:
        yield Secured(state, {role: one.text for role, one in made.items()}, authority, tls)
    finally:
        launch.stop(state, timeout_s=20.0)


def test_who_may_ask_is_answered_from_every_document(secured: Secured) -> None:
    for role in ("query", "admin"):
        with secured.client(role) as client:
            found = client.retrieve(k=5)
            assert found.coverage.documents == 1.0
            assert len(found.item_ids) == 5


@pytest.mark.parametrize(
    ("shown", "code", "reason"),
    [
        ("", "UNAUTHENTICATED", "TOKEN_MISSING"),
        ("svt_00000000_wrong", "UNAUTHENTICATED", "TOKEN_UNKNOWN"),
        ("expired", "UNAUTHENTICATED", "TOKEN_EXPIRED"),
        ("update", "PERMISSION_DENIED", "ROLE_MISSING"),
        ("view", "PERMISSION_DENIED", "ROLE_MISSING"),
    ],
)
def test_who_may_not_ask_is_refused(secured: Secured, shown: str, code: str, reason: str) -> None:
    with secured.client(shown) as client, pytest.raises(RequestRefused) as refused:
        client.retrieve(k=5)
    assert (refused.value.code, refused.value.reason) == (code, reason)


def test_items_are_changed_by_who_may_change_them(secured: Secured) -> None:
    patch = ItemPatch(int(first_item(secured)), fields={})
    for role in ("query", "view"):
        with secured.client(role) as client, pytest.raises(RequestRefused) as refused:
            client.apply([patch])
        assert refused.value.code == "PERMISSION_DENIED"
    with secured.client("update") as client:
        assert not client.apply([patch]).rejected


def test_a_token_acts_for_its_tenant_alone_and_within_its_limit(secured: Secured) -> None:
    with secured.client("acme") as client:
        with pytest.raises(RequestRefused) as refused:
            client.retrieve(k=1, tenant="other")
        assert (refused.value.code, refused.value.reason) == (
            "PERMISSION_DENIED",
            "TENANT_MISMATCH",
        )
        assert client.retrieve(k=1).coverage.documents == 1.0
        for tenant in ("", "acme"):
            with pytest.raises(RequestRefused) as refused:
                client.retrieve(k=1, tenant=tenant)
            assert refused.value.code == "RESOURCE_EXHAUSTED"
    with secured.client("query") as client:
        assert client.retrieve(k=1, tenant="other").coverage.documents == 1.0


def first_item(secured: Secured) -> int:
    with secured.client("query") as client:
        return int(client.retrieve(k=1).item_ids[0])


def test_the_admin_plane_shows_to_some_and_obeys_others(secured: Secured) -> None:
    def admin(role: str) -> AdminClient:
        token = secured.tokens.get(role, "")
        return AdminClient(secured.admin, token=token, root_certificates=secured.roots)

    for role in ("view", "admin"):
        with admin(role) as client:
            assert len(client.list_shards().shards) == 2
    for role, code in (("", "UNAUTHENTICATED"), ("query", "PERMISSION_DENIED")):
        with admin(role) as client, pytest.raises(RequestRefused) as refused:
            client.list_shards()
        assert refused.value.code == code
    with admin("view") as client, pytest.raises(RequestRefused) as refused:
        client.plan(1)
    assert refused.value.code == "PERMISSION_DENIED"
    with admin("admin") as client:
        client.plan(1, operation_id="noted")
        (entry,) = client.audit(limit=1)
    lines = [json.loads(one) for one in secured.state.audit_file.read_text().splitlines()]
    assert {"event": "admin", "who": "adminer", "code": "OK"}.items() <= lines[-2].items()
    assert lines[-2]["request"]["operation_id"] == "noted"
    assert lines[-1]["method"] == "/silvershard.v1.Admin/Audit"
    assert (entry.who, json.loads(entry.request)) == ("adminer", lines[-2]["request"])
    with admin("view") as client, pytest.raises(RequestRefused) as refused:
        client.audit()
    assert refused.value.code == "PERMISSION_DENIED"
    refusals = [one for one in lines if one["event"] == "refused"]
    assert ("viewer", "ROLE_MISSING") in {(one["who"], one["reason"]) for one in refusals}


def test_a_generation_is_activated_by_who_may(secured: Secured) -> None:
    admin = AdminClient(
        secured.admin, token=secured.tokens["admin"], root_certificates=secured.roots
    )
    with admin, secured.client("query") as client:
        ended = admin.finish(admin.activate(2, load=False), timeout_s=WAIT_S)
        assert ended.moved.generation == 2
        until(lambda: client.retrieve(k=1).generation == 2, "generation 2 does not answer")


def test_no_port_speaks_plain_text(secured: Secured) -> None:
    for name, address in secured.ports().items():
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.RpcError) as raised:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE, name
        encrypted = Dialer("", ClientTls(secured.authority.ca))
        with encrypted.channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING, name


def test_a_stranger_is_refused_by_the_ports_of_the_cluster(secured: Secured) -> None:
    def inspect(token: str) -> Any:
        dialer = Dialer(token, ClientTls(secured.authority.ca))
        with dialer.channel(secured.ports()["shard 1"]) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            return stub.Inspect(shard_pb2.InspectRequest(), timeout=10)

    for token in ("", secured.tokens["admin"], "svs_wrong"):
        with pytest.raises(grpc.RpcError) as raised:
            inspect(token)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert inspect(read_secret(secured.state.secret_file)).generations
    dialer = Dialer("", ClientTls(secured.authority.ca))
    with dialer.channel(secured.ports()["shard 1"]) as channel:
        stream = shard_pb2_grpc.ShardStub(channel).Execute(iter(()), timeout=10)
        assert stream.code() is grpc.StatusCode.UNAUTHENTICATED


def test_commands_of_the_owner_need_no_token(
    secured: Secured, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SILVERSHARD_TOKEN", raising=False)
    state = ("--state", str(secured.state.root), "--output", "json")
    assert verbs.run(["status", *state]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "up"
    assert verbs.run(["freshness", *state]) == 0
    capsys.readouterr()
    assert verbs.run(["query", "--history", "1", "--fields", "title", *state]) == 0
    assert json.loads(capsys.readouterr().out)["items"]


def test_commands_of_others_show_a_token(
    secured: Secured,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = ("--state", str(tmp_path / "none"), "--output", "json")
    query = ["query", "--history", "1", "--fields", "title", *elsewhere]
    query += ["--address", secured.router]
    ca = ["--ca", str(secured.authority.ca)]
    monkeypatch.delenv("SILVERSHARD_TOKEN", raising=False)
    assert verbs.run([*query, *ca]) == 1
    assert "a token is needed" in capsys.readouterr().err
    path = tmp_path / "token"
    path.write_text(secured.tokens["query"] + "\n")
    path.chmod(0o600)
    assert verbs.run([*query, *ca, "--token-file", str(path)]) == 0
    monkeypatch.setenv("SILVERSHARD_TOKEN", secured.tokens["query"])
    assert verbs.run([*query, *ca]) == 0
    bench = ["bench", "--rate", "20", "--duration", "0.5", "--warmup", "0", "--requests"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"k": 5}\n')
    assert verbs.run([*bench, str(asked), "--address", secured.router, *ca, *elsewhere]) == 0
    capsys.readouterr()
    assert verbs.run(query) == 1
    monkeypatch.setenv("SILVERSHARD_TOKEN", secured.tokens["update"])
    assert verbs.run([*query, *ca]) == 1
    assert "this call needs query" in capsys.readouterr().err


def test_no_secret_is_where_others_look(
    secured: Secured, capsys: pytest.CaptureFixture[str]
) -> None:
    record = secured.record
    hidden = [*secured.tokens.values(), read_secret(secured.state.secret_file)]
    hidden.append(Path(secured.tls["key"]).read_text().splitlines()[1])
    for verb in ("status", "freshness"):
        verbs.run([verb, "--state", str(secured.state.root)])
        verbs.run([verb, "--state", str(secured.state.root), "--output", "json"])
    with urllib.request.urlopen(f"http://{record.http}/metrics", timeout=10) as reply:
        metrics = reply.read().decode()
    assert "silvershard_refused_calls_total" in metrics
    seen = {"output": capsys.readouterr().out, "metrics": metrics}
    for process in (record.guard, record.driver, *record.processes):
        for name in ("cmdline", "environ"):
            try:
                content = Path(f"/proc/{process.pid}/{name}").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            seen[f"{name} of {process.pid}"] = content.decode(errors="replace")
    own = {secured.state.secret_file, secured.state.token_file}
    for root in (secured.state.root, Path(record.ray_dir)):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and path not in own:
                seen[str(path)] = path.read_bytes().decode(errors="replace")
    assert len(seen) > 20
    for place, text in seen.items():
        for one in hidden:
            assert one not in text, place


def test_a_router_that_starts_again_serves_again(secured: Secured) -> None:
    before = secured.record.router
    os.kill(before.pid, 9)
    until(lambda: secured.record.router.restarts > before.restarts, "not started again")
    until(lambda: secured.record.router.state == "serving", "it does not serve")
    with secured.client("query") as client:
        client.wait_until_ready(WAIT_S)
        assert client.retrieve(k=5).coverage.documents == 1.0


def test_a_revoked_token_is_refused_over_an_open_connection(
    secured: Secured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(secured.state.root / "tokens.json")
    options = ["--file", path, "--state", str(secured.state.root), "--output", "json"]
    assert verbs.run(["token", "create", "short", "--role", "query", *options]) == 0
    token = json.loads(capsys.readouterr().out)["token"]

    def refusal(client: Client) -> str:
        try:
            client.retrieve(k=1)
        except RequestRefused as refused:
            return refused.reason
        return ""

    with Client(secured.router, token=token, root_certificates=secured.roots) as client:
        until(lambda: not refusal(client), "a new token is not known")
        assert verbs.run(["token", "revoke", "short", *options]) == 0
        until(lambda: refusal(client) == "TOKEN_UNKNOWN", "a revoked token is served")


def shown_certificate(address: str) -> str:
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def await_another(address: str, before: str) -> None:
    until(lambda: shown_certificate(address) != before, f"{address} shows the old certificate")


def test_a_rotated_certificate_is_served_without_a_failed_request(secured: Secured) -> None:
    ports = secured.ports()
    before = {name: shown_certificate(address) for name, address in ports.items()}
    assert len(set(before.values())) == 1
    failures: list[str] = []
    stopped = threading.Event()

    def ask() -> None:
        with secured.client("query") as client:
            while not stopped.is_set():
                try:
                    client.retrieve(k=1, min_coverage=1.0)
                except RequestRefused as refused:
                    failures.append(str(refused))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        secured.authority.issue("server", "feed.test", "127.0.0.1")
        for name, address in ports.items():
            await_another(address, before[name])
    finally:
        stopped.set()
        thread.join()
    assert failures == []
    with secured.client("query") as client:
        assert client.retrieve(k=1).coverage.documents == 1.0


PROBE = """
import sys
import ray

try:
    ray.init(address=sys.argv[1], namespace="silvershard", log_to_driver=False)
    print("in", len(ray.nodes()))
except BaseException as error:
    print("out", type(error).__name__)
"""


def address_of_ray(record: ClusterRecord) -> str:
    option = b"--gcs-address="
    for process in record.processes:
        for argument in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0"):
            if argument.startswith(option):
                return argument.removeprefix(option).decode()
    raise AssertionError("no process of Ray names its GCS")


def test_a_driver_without_the_token_of_ray_is_kept_out(secured: Secured, tmp_path: Path) -> None:
    address = address_of_ray(secured.record)
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)

    def probe(**token: str) -> str:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE, address],
            env={**environment, "HOME": str(tmp_path), **token},
            capture_output=True,
            text=True,
            timeout=WAIT_S * 2,
            check=False,
        )
        return done.stdout.strip() or f"out {done.returncode}"

    own = str(secured.state.token_file)
    assert probe(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=own) == "in 1"
    assert probe(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong)).startswith("out")
    assert probe(RAY_AUTH_MODE="disabled").startswith("out")
    with secured.client("query") as client:
        assert client.retrieve(k=1).coverage.documents == 1.0
