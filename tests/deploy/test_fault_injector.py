import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import Client, ItemDelete, ItemUpsert, Query, RequestRefused, Result
from silvershard.cluster.admin_client import AdminClient
from silvershard.cluster.codec import Refusal
from silvershard.cluster.faults import FaultRecord, read_faults, write_faults
from silvershard.deploy import launch, verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.fault_injector import FaultInjector
from silvershard.deploy.fault_plan import FaultRequest
from silvershard.deploy.freshness import freshness
from silvershard.deploy.state import ClusterRecord, ShardRecord, StateDir
from silvershard.model.request import RequestError
from silvershard.shard.errors import RepositoryError, SnapshotError
from silvershard.shard.generations import generation_dir
from silvershard.shard.repository import Repository
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 120.0
CHAOS = load(None, environ={}, options={"chaos.enabled": True})
OWN = 1 << 41


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def test_faults_are_refused_unless_the_settings_allow_them(idle_state: StateDir) -> None:
    injector = FaultInjector(idle_state, Config())
    calls: list[Callable[[], Any]] = [
        injector.all,
        injector.clear,
        lambda: injector.inject(FaultRequest("a", "slow", "shard 0.0", 1.0, 5)),
    ]
    for call in calls:
        with pytest.raises(Refusal, match=r"set chaos\.enabled to true") as refused:
            call()
        assert (refused.value.code, refused.value.reason) == (
            "FAILED_PRECONDITION",
            "CHAOS_DISABLED",
        )
    injector.close()
    assert not idle_state.faults_dir.exists()


def test_a_fault_that_nobody_takes_is_taken_back(idle_state: StateDir) -> None:
    injector = FaultInjector(idle_state, CHAOS, taken_s=0.05)
    # This process is the shard of the idle cluster, and follows no faults.
    with pytest.raises(Refusal, match=r"shard 0\.0 did not take the fault") as refused:
        injector.inject(FaultRequest("a", "slow", "shard 0.0", 5.0, 5))
    assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "FAULT_NOT_TAKEN")
    assert [one.state for one in injector.all()] == ["cleared"]


def test_processes_of_others_are_never_hit(idle_state: StateDir) -> None:
    record = latest(idle_state)
    shard = record.shards[0].model_copy(update={"pid": 1})
    idle_state.write_record(record.model_copy(update={"shards": (shard,)}))
    injector = FaultInjector(idle_state, CHAOS)
    with pytest.raises(Refused, match="process 1 is none of this cluster on this machine"):
        injector.inject(FaultRequest("a", "kill", "shard 0.0", allow_outage=True))
    assert injector.all() == ()


@pytest.fixture
def two_copies(idle_state: StateDir, tmp_path: Path) -> StateDir:
    """The idle cluster, whose generation 2 is staged and has a copy elsewhere."""
    copies = str(tmp_path / "copies")
    for number in (1, 2):
        Repository(copies).push(open_snapshot(generation_dir(idle_state.generations, number)))
    return idle_state


def corrupt(generation: int, copies: Path, name: str = "c", seconds: float = 60.0) -> FaultRequest:
    return FaultRequest(
        name, "corrupt", f"generation {generation}", seconds, copy_url=str(copies / "copies")
    )


def verifies(state: StateDir, generation: int) -> bool:
    try:
        open_snapshot(generation_dir(state.generations, generation)).verify()
    except SnapshotError:
        return False
    return True


def test_a_staged_copy_is_damaged_and_repaired(two_copies: StateDir, tmp_path: Path) -> None:
    # As where several generations share their files.
    other = two_copies.root / "linked"
    shutil.copytree(
        generation_dir(two_copies.generations, 2), other, copy_function=os.link, dirs_exist_ok=True
    )
    injector = FaultInjector(two_copies, CHAOS)
    found = injector.inject(corrupt(2, tmp_path))
    assert not verifies(two_copies, 2)
    open_snapshot(other).verify()
    # The same call under the same name is the same fault.
    assert injector.inject(corrupt(2, tmp_path)) == found
    with pytest.raises(Refusal, match="fault c is another one") as refused:
        injector.inject(corrupt(2, tmp_path, seconds=7.0))
    assert refused.value.reason == "OPERATION_ID_USED"
    (left,) = injector.clear(["c"])
    assert left.state == "cleared"
    assert verifies(two_copies, 2)
    with pytest.raises(Refusal, match="no fault d"):
        injector.clear(["d"])


def test_damage_ends_by_itself_and_with_the_cluster(two_copies: StateDir, tmp_path: Path) -> None:
    injector = FaultInjector(two_copies, CHAOS)
    injector.inject(corrupt(2, tmp_path, seconds=1.0))
    until(lambda: verifies(two_copies, 2), "it stays damaged")
    until(lambda: injector.all()[0].state == "over", "it is not over")
    injector.inject(corrupt(2, tmp_path, "d"))
    assert not verifies(two_copies, 2)
    injector.close()
    assert verifies(two_copies, 2)


def test_what_a_killed_keeper_left_is_repaired_at_the_next_start(
    two_copies: StateDir, tmp_path: Path
) -> None:
    injector = FaultInjector(two_copies, CHAOS)
    found = injector.inject(corrupt(2, tmp_path))
    os.kill(found.keeper, 9)
    until(lambda: not Path(f"/proc/{found.keeper}").exists(), "the keeper lives")
    assert not verifies(two_copies, 2)
    (left,) = FaultInjector(two_copies, CHAOS).all()
    assert left.state == "cleared"
    assert verifies(two_copies, 2)


def test_the_only_copy_and_what_is_in_use_are_never_damaged(
    two_copies: StateDir, tmp_path: Path
) -> None:
    injector = FaultInjector(two_copies, CHAOS)
    for role in ("live", "previous", "canary", "warm"):
        two_copies.control.write(
            two_copies.control.read().model_copy(
                update={"live": 1, "previous": 0, "canary": 0, "warm": 0, role: 2}
            )
        )
        with pytest.raises(Refused, match="generation 2 is in use"):
            injector.inject(corrupt(2, tmp_path))
    two_copies.control.write(two_copies.control.read().model_copy(update={"live": 1, "warm": 0}))
    with pytest.raises(RepositoryError, match="must hold generation 2, it holds none"):
        injector.inject(corrupt(2, tmp_path)._replace(copy_url=str(tmp_path / "nothing")))
    shutil.rmtree(generation_dir(two_copies.generations, 2))
    with pytest.raises(RequestError, match="there is no generation 2; there is 1"):
        injector.inject(corrupt(2, tmp_path))
    # Under the same number there may be something else.
    shutil.copytree(
        generation_dir(two_copies.generations, 1), generation_dir(two_copies.generations, 2)
    )
    with pytest.raises(Refused, match=r"other content .* the only copy"):
        injector.inject(corrupt(2, tmp_path))
    assert read_faults(two_copies.faults_dir) == ()


def test_a_cluster_that_starts_has_no_process_to_hit(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "s")
    state.create()
    with pytest.raises(CommandError, match="still starting"):
        FaultInjector(state, CHAOS).inject(FaultRequest("a", "kill", "router", allow_outage=True))


def test_the_oldest_faults_are_forgotten(idle_state: StateDir) -> None:
    injector = FaultInjector(idle_state, CHAOS)
    many = tuple(
        FaultRecord(name=str(at), kind="kill", target="router", state="over", began_unix_s=at)
        for at in range(150)
    )
    write_faults(idle_state.faults_dir, many)
    assert injector.clear()[-1].name == "149"
    assert read_faults(idle_state.faults_dir)[0].name == "50"


# What follows happens to a cluster that serves.


@pytest.fixture(scope="module")
def chaotic(tmp_path_factory: pytest.TempPathFactory, two_generations: Path) -> Iterator[StateDir]:
    """A running cluster of two shards, each in two replicas."""
    state = StateDir(tmp_path_factory.mktemp("chaos") / "s")
    state.create()
    shutil.copytree(two_generations, state.generations)
    config = load(
        None,
        environ={},
        options={
            "listen.port": 0,
            "model.name": "films",
            "sharding.threads": 1,
            "sharding.shards": 2,
            "sharding.replicas": 2,
            "chaos.enabled": True,
            "runtime.start_timeout_s": 240,
        },
    )
    launch.start(state, config, generation=1, detached=False)
    try:
        yield state
    finally:
        launch.stop(state, timeout_s=20.0)


@pytest.fixture
def admin(chaotic: StateDir) -> Iterator[AdminClient]:
    with AdminClient(latest(chaotic).admin) as client:
        yield client
        client.clear_faults()
    until(lambda: latest(chaotic).is_whole and coverage(chaotic) == 1.0, "it does not recover")


def latest(state: StateDir) -> ClusterRecord:
    record = state.read_record()
    assert record is not None
    return record


def copy_of(state: StateDir, shard: int, replica: int) -> ShardRecord:
    (found,) = [one for one in latest(state).shards if (one.shard, one.replica) == (shard, replica)]
    return found


def ask(state: StateDir, timeout_s: float = 10.0) -> Result:
    with Client(latest(state).address, timeout_s=timeout_s) as client:
        return client.retrieve(Query(features={}, k=5, min_coverage=0.0))


def own_item(item: int) -> ItemUpsert:
    return ItemUpsert(
        item,
        attributes={"year": 7, "genre": ["own"]},
        signals={"popularity": 1.0, "freshness": 1.0},
        fields={"title": "own", "year": 0},
        features={"movie": [item], "genres": ["drama"]},
    )


def coverage(state: StateDir) -> float:
    try:
        return ask(state, 1.0).coverage.documents
    except Exception:  # noqa: BLE001 - it says that there is no answer
        return 0.0


pytestmark_cluster = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def on_a_cluster(test: Any) -> Any:
    for mark in pytestmark_cluster:
        test = mark(test)
    return test


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@on_a_cluster
def test_a_slow_shard_is_slow_as_long_as_the_fault_lasts(
    chaotic: StateDir, admin: AdminClient
) -> None:
    def seconds() -> float:
        began_s = time.perf_counter()
        assert ask(chaotic).coverage.documents == 1.0
        return time.perf_counter() - began_s

    for replica in range(2):
        admin.inject_fault("slow", f"shard 0.{replica}", 60.0, delay_ms=200)
    assert seconds() > 0.2
    assert {one.state for one in admin.clear_faults()[-2:]} == {3}
    until(lambda: seconds() < 0.2, "it stays slow")


@on_a_cluster
def test_one_partitioned_copy_costs_nothing_and_the_last_one_its_documents(
    chaotic: StateDir, admin: AdminClient
) -> None:
    admin.inject_fault("partition", "shard 0.0", 60.0)
    assert ask(chaotic).coverage.documents == 1.0
    with pytest.raises(RequestRefused, match=r"shard 0 would lose .* suffers a fault") as refused:
        admin.inject_fault("partition", "shard 0.1", 60.0)
    assert refused.value.code == "FAILED_PRECONDITION"
    admin.inject_fault("partition", "shard 0.1", 60.0, allow_outage=True)
    answer = ask(chaotic, 1.0)
    documents = {one.shard: one.documents for one in latest(chaotic).shards}
    assert answer.coverage.documents == pytest.approx(documents[1] / sum(documents.values()))
    assert {str(one) for one in answer.coverage.reasons} <= {"SHARD_UNAVAILABLE", "SHARD_TIMEOUT"}
    assert answer.coverage.reasons
    # Nobody else noticed: no process is started again for it.
    assert [one.restarts for one in latest(chaotic).shards] == [0] * 4
    admin.clear_faults()
    until(lambda: coverage(chaotic) == 1.0, "the links do not heal")


@on_a_cluster
def test_a_host_is_cut_off_at_the_links(chaotic: StateDir, admin: AdminClient) -> None:
    with pytest.raises(RequestRefused, match=r"there is no host 10\.0\.0\.9"):
        admin.inject_fault("partition", "host 10.0.0.9", 5.0)
    with pytest.raises(RequestRefused, match="shard 0 would lose its last copy"):
        admin.inject_fault("partition", "host 127.0.0.1", 5.0)
    admin.inject_fault("drop", "host 127.0.0.1", 60.0, share=1.0, allow_outage=True)
    until(lambda: coverage(chaotic) == 0.0, "it is still reached")
    admin.clear_faults()


@on_a_cluster
def test_a_hung_process_stands_still_and_goes_on_by_itself(
    chaotic: StateDir, admin: AdminClient
) -> None:
    pid = copy_of(chaotic, 1, 0).pid
    fault = admin.inject_fault("hang", "shard 1.0", 2.0)
    assert list(fault.pids) == [pid]
    assert is_stopped(pid)
    assert ask(chaotic).coverage.documents == 1.0
    until(lambda: not is_stopped(pid), "it stands still")
    until(lambda: admin.list_faults()[-1].state == 2, "the fault is not over")
    admin.inject_fault("hang", "shard 1.0", 60.0)
    assert is_stopped(pid)
    admin.clear_faults()
    assert not is_stopped(pid)
    assert copy_of(chaotic, 1, 0).pid == pid


@on_a_cluster
def test_a_killed_process_is_replaced(chaotic: StateDir, admin: AdminClient) -> None:
    before = copy_of(chaotic, 1, 1)
    planned = admin.inject_fault("kill", "shard 1.1", dry_run=True)
    assert (planned.dry_run, list(planned.pids), planned.state) == (True, [before.pid], 0)
    assert copy_of(chaotic, 1, 1).pid == before.pid
    assert admin.inject_fault("kill", "shard 1.1").state == 2
    until(lambda: copy_of(chaotic, 1, 1).restarts == before.restarts + 1, "nobody noticed")
    assert ask(chaotic).coverage.documents == 1.0
    until(lambda: copy_of(chaotic, 1, 1).state == "serving", "it does not come back")


@on_a_cluster
def test_a_shard_that_cannot_reach_the_log_grows_stale_and_says_why(
    chaotic: StateDir, admin: AdminClient
) -> None:
    admin.inject_fault("stall", "shard 1.0", 60.0, operation_id="stalled-1")

    def held_up() -> list[tuple[int, int]]:
        document, code = freshness(chaotic)
        troubled = [
            one for one in document["shards"] if "fault stalled-1" in one.get("trouble", "")
        ]
        assert not troubled or code == ExitCode.DEGRADED
        return [(one["shard"], one["replica"]) for one in troubled if one["staleness_s"] > 1.0]

    until(lambda: held_up() == [(1, 0)], "it does not grow stale")
    with Client(latest(chaotic).address, timeout_s=10.0) as client:
        # What was written is read from the copy that can reach the log.
        tokens = client.apply([own_item(item) for item in range(OWN, OWN + 8)]).tokens
        found = client.retrieve(Query(k=20, filter="genre:own", exact=True, after=tokens))
        assert sorted(found.item_ids.tolist()) == list(range(OWN, OWN + 8))
        client.apply([ItemDelete(item) for item in range(OWN, OWN + 8)])
    admin.clear_faults("stalled-1")
    until(lambda: not held_up(), "it stays behind")


@on_a_cluster
def test_writers_are_refused_while_the_sequencer_cannot_reach_the_log(
    chaotic: StateDir, admin: AdminClient
) -> None:
    with Client(latest(chaotic).address, timeout_s=10.0) as client:
        admin.inject_fault("stall", "sequencer", 60.0)
        with pytest.raises(RequestRefused, match="stalled by fault") as refused:
            client.apply([own_item(OWN)])
        assert refused.value.code == "UNAVAILABLE"
        assert ask(chaotic).coverage.documents == 1.0
        admin.clear_faults()
        assert not client.apply([own_item(OWN), ItemDelete(OWN)]).rejected


@on_a_cluster
def test_upserts_are_refused_while_a_shard_is_full_and_deletes_pass(
    chaotic: StateDir, admin: AdminClient
) -> None:
    def upserted(item: int) -> str:
        rejected = client.apply([own_item(item)]).rejected
        return f"{rejected[0].code}: {rejected[0].reason}" if rejected else "OK"

    with Client(latest(chaotic).address, timeout_s=10.0) as client:
        until(lambda: upserted(OWN) == "OK", "there is no room before")
        for shard in range(2):
            admin.inject_fault("fill", f"shard {shard}.0", 60.0)
        until(lambda: upserted(OWN + 1) != "OK", "there is room")
        assert "RESOURCE_EXHAUSTED: shard" in upserted(OWN + 1)
        assert not client.apply([ItemDelete(OWN, urgent=True)]).rejected
        admin.clear_faults()
        until(lambda: upserted(OWN + 1) == "OK", "there is no room after")
        client.apply([ItemDelete(OWN + 1)])


@on_a_cluster
def test_a_hung_router_answers_late(chaotic: StateDir, admin: AdminClient) -> None:
    with pytest.raises(RequestRefused, match="no other router"):
        admin.inject_fault("hang", "router", 1.0)
    pid = latest(chaotic).router.pid
    admin.inject_fault("hang", "router", 1.0, allow_outage=True)
    assert is_stopped(pid)
    assert ask(chaotic).coverage.documents == 1.0
    assert not is_stopped(pid)


@on_a_cluster
def test_faults_end_while_the_supervisor_stands_still(
    chaotic: StateDir, admin: AdminClient
) -> None:
    driver = latest(chaotic).driver.pid
    slow = [copy_of(chaotic, 0, replica).pid for replica in range(2)]
    for replica in range(2):
        name = f"slow-{replica}"
        admin.inject_fault("slow", f"shard 0.{replica}", 2.0, delay_ms=300, operation_id=name)
    admin.inject_fault("hang", "supervisor", 8.0)
    until(lambda: is_stopped(driver), "the supervisor goes on")

    def suffered() -> set[str]:
        said = [chaotic.faults_dir / f"said-{pid}.json" for pid in slow]
        return {one.read_text() for one in said}

    until(lambda: suffered() == {"[]"}, "the shards stay slow")
    began_s = time.perf_counter()
    assert ask(chaotic).coverage.documents == 1.0
    assert time.perf_counter() - began_s < 0.3
    assert is_stopped(driver)
    until(lambda: not is_stopped(driver), "the supervisor stands still")
    assert {one.operation_id: one.state for one in admin.list_faults()}["slow-0"] == 2


@on_a_cluster
def test_what_makes_no_sense_is_refused_in_words(chaotic: StateDir, admin: AdminClient) -> None:
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: admin.inject_fault("slow", "shard 7.0", 1.0, delay_ms=5), "there is no shard 7.0"),
        (
            lambda: admin.inject_fault("slow", "router", 1.0, delay_ms=5),
            "of slow must be shard S.R",
        ),
        (lambda: admin.inject_fault("hang", "shard 0.0", -1.0), "must be above 0 s"),
        (lambda: admin.inject_fault("hang", "shard 0.0", 3601.0), "at most 3600 s"),
        (lambda: admin.inject_fault("kill", "tables 0"), "there is no tables 0"),
        (lambda: admin.inject_fault("kill", "supervisor"), "the cluster ends with its supervisor"),
    ]
    before = admin.list_faults()
    for call, text in refusals:
        with pytest.raises(RequestRefused, match=text):
            call()
    assert admin.list_faults() == before


@on_a_cluster
def test_what_happened_is_in_the_log_of_the_cluster(chaotic: StateDir, admin: AdminClient) -> None:
    admin.inject_fault("slow", "shard 0.0", 60.0, delay_ms=7, operation_id="audited")
    admin.clear_faults("audited")
    log = chaotic.daemon_log.read_text()
    assert "fault audited begins: slow shard 0.0 by 7 ms for 60 s" in log
    assert "fault audited is cleared" in log


@on_a_cluster
def test_a_game_day_tells_what_users_noticed(
    chaotic: StateDir, admin: AdminClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"features": {"history": [1, 2]}}\n{"features": {}}\n')
    words = ["chaos", "run", "--for", "15s", "--seed", "4", "--plan", "reads", "--rate", "10"]
    words += ["--requests", str(requests), "--state", str(chaotic.root), "--output", "json"]
    code = verbs.run(words)
    document = json.loads(capsys.readouterr().out)
    # How long a busy machine takes is nobody's promise, what it answers is.
    assert document["wrong"] == document["partial"] == 0
    assert code == (ExitCode.FAILED if document["failed"] else ExitCode.OK)
    assert set(document["errors"]) <= {"LATE", "DEADLINE_EXCEEDED", "OK"}
    assert document["requests"] > 100
    assert document["faults"]
    assert document["refused"] == []
    assert all(one.state != 1 for one in admin.list_faults())
