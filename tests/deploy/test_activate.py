import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from history.checker import PROPERTIES, check
from history.recorder import Recorder, RecordingClient

from silvershard.cluster import Client, Query, Result, retrieval_pb2, retrieval_pb2_grpc
from silvershard.cluster.update_log import open_log
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert
from silvershard.deploy import activate, freshness, launch, operate, recluster, snapshots, verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.control_store import Control, ControlStore
from silvershard.deploy.errors import CommandError, ExitCode, Refused, TimedOut
from silvershard.deploy.processes import myself
from silvershard.deploy.state import ClusterRecord, RouterRecord, ShardRecord, StateDir
from silvershard.deploy.state_log import adopt_log, log_url
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import RetrievalError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import open_snapshot

WAIT_S = 60.0
OWN = 1 << 41


def until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def republished(repository: Path, source: Any, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "name": "films",
        "model": source.model,
        "builder": "two_tower",
        "config": source.model.config.model_dump(mode="json"),
        "catalogue": source.catalogue,
        "schema": source.schema,
        "defaults": SearchDefaults(probes=4, ann_k=40),
        "num_clusters": 16,
        "false_positive_rate": 0.1,
        "max_exact_planes": 6,
        **changes,
    }
    return publish_generation(repository, **options).path


def directory(root: Path, generation: Any) -> StateDir:
    """Return a state directory with the generation of the fixture and a second one."""
    state = StateDir(root)
    state.create()
    state.generations.mkdir()
    generation_dir(state.generations, 1).symlink_to(generation.path)
    republished(state.generations, generation, seed=18, generation=2)
    return state


def settings(**options: Any) -> Config:
    # With random embeddings the lists of two clusterings find more or less by chance.
    fixed = {
        "listen.port": 0,
        "model.name": "films",
        "sharding.threads": 1,
        "swap.max_recall_loss": 0.3,
        "runtime.start_timeout_s": 300.0,
    }
    return load(None, environ={}, options={**fixed, **options})


@contextmanager
def running(state: StateDir, config: Config) -> Iterator[None]:
    launch.start(state, config, generation=1, detached=False)
    try:
        yield
    finally:
        launch.stop(state, timeout_s=20.0)


def latest(state: StateDir) -> ClusterRecord:
    record = state.read_record()
    assert record is not None
    return record


class Cluster:
    """A running cluster; what its clients do and see is a history."""

    def __init__(self, state: StateDir, config: Config) -> None:
        self.state, self.config = state, config
        self.said: list[str] = []
        self.recorder = Recorder(state.root.with_name("history.jsonl"))
        self._versions = itertools.count(1)

    def client(self) -> RecordingClient:
        address = latest(self.state).address
        return RecordingClient(Client(address, timeout_s=10.0), self.recorder)

    def assert_right(self) -> None:
        """Check all that was seen; who asked while a process was dead may have been refused."""
        names = PROPERTIES.keys() - {"no_failed_request", "bounded_recovery"}
        check(self.recorder.events(), names=names).require("no_duplicate", "read_your_writes")

    def ask(self, **changes: Any) -> Result:
        """Ask for the items of this test, which all of the documents must answer."""
        query: dict[str, Any] = {
            "features": {},
            "k": 100,
            "filter": "genre:own",
            "exact": True,
            "return_fields": ["title"],
            "min_coverage": 1.0,
            **changes,
        }
        with self.client() as client:
            return client.retrieve(Query(**query))

    def titles(self, **changes: Any) -> dict[int, str]:
        found = self.ask(**changes)
        return dict(zip(found.item_ids.tolist(), map(str, found.fields["title"]), strict=True))

    def apply(self, *updates: Any) -> Any:
        give_up_s = time.monotonic() + WAIT_S
        numbered = [replace(one, version=next(self._versions)) for one in updates]
        with self.client() as client:
            while True:
                result = client.apply(numbered)
                if not result.rejected:
                    return result.tokens
                # For a moment nobody knows how much room a shard has that has just come.
                assert {one.code for one in result.rejected} == {"RESOURCE_EXHAUSTED"}
                assert time.monotonic() < give_up_s
                time.sleep(0.01)

    def activate(self, generation: int, **options: Any) -> dict[str, Any]:
        return activate.activate(
            self.state,
            self.config,
            generation,
            timeout_s=WAIT_S,
            report=self.said.append,
            **options,
        )

    def follows(self, generation: int) -> None:
        until(lambda: self.ask().generation == generation, f"{generation} does not answer")

    def until_whole(self) -> None:
        until(
            lambda: latest(self.state).is_whole
            and operate.status(self.state)[1] == ExitCode.OK
            and self.answers(),
            "the cluster did not become whole",
        )

    def answers(self) -> bool:
        try:
            return self.ask().coverage.documents == 1.0
        except RetrievalError:
            return False


def own(item: int, title: str) -> ItemUpsert:
    return ItemUpsert(
        OWN + item,
        attributes={"genre": ["own"], "year": 2000 + item},
        fields={"title": title},
        features={"movie": [OWN + item], "genres": ["Drama"]},
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, generation: Any) -> Iterator[Cluster]:
    state = directory(tmp_path_factory.mktemp("activate") / "s", generation)
    config = settings(**{"sharding.shards": 2})
    with running(state, config):
        made = Cluster(state, config)
        for number in (1, 2):
            partitions = open_snapshot(generation.path).spec.num_partitions
            made.recorder.catalogue(number, generation.catalogue, num_partitions=partitions)
        with made.recorder:
            yield made
    made.assert_right()


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_acked_is_there_in_every_generation_and_after_a_rollback(
    cluster: Cluster,
) -> None:
    tokens = cluster.apply(own(0, "first"), own(1, "second"), own(2, "third"))
    tokens = cluster.apply(ItemPatch(OWN + 1, fields={"title": "patched"}), ItemDelete(OWN + 2))
    expected = {OWN: "first", OWN + 1: "patched"}
    assert cluster.titles(after=tokens) == expected
    done = cluster.activate(2)
    assert (done["generation"], done["before"], done["done"], done["mode"]) == (
        2,
        1,
        True,
        "beside",
    )
    assert [one for one in cluster.said if one.startswith("recall: the index finds")]
    cluster.follows(2)
    assert cluster.titles(after=tokens) == expected
    tokens = cluster.apply(own(3, "later"))
    expected[OWN + 3] = "later"
    # The generation that is parked follows the log, so that nothing is lost by going back.
    back = activate.rollback(cluster.state, timeout_s=WAIT_S, report=cluster.said.append)
    assert back["generation"] == 1
    cluster.follows(1)
    assert cluster.titles(after=tokens) == expected
    published = recluster.republish(cluster.state, cluster.config, cluster.said.append)
    manifest = open_snapshot(published.path).manifest
    assert (published.generation, published.documents) == (3, 603)
    assert manifest.cut == (tokens[0].position,)
    assert manifest.log_id == tokens[0].log_id
    cluster.activate(3)
    cluster.follows(3)
    assert cluster.titles(after=tokens) == expected
    tokens = cluster.apply(ItemDelete(OWN), own(4, "last"))
    del expected[OWN]
    expected[OWN + 4] = "last"
    assert cluster.titles(after=tokens) == expected
    activate.rollback(cluster.state, timeout_s=WAIT_S, report=cluster.said.append)
    cluster.follows(1)
    assert cluster.titles(after=tokens) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_canary_answers_those_who_name_it(cluster: Cluster) -> None:
    before = latest(cluster.state).generation
    other = 2 if before != 2 else 1
    cluster.activate(other, alias="canary")

    def asked(alias: str) -> int:
        with grpc.insecure_channel(latest(cluster.state).address) as channel:
            stub = retrieval_pb2_grpc.RetrievalStub(channel)
            request = retrieval_pb2.RetrieveRequest(k=1, alias=alias)
            try:
                return int(stub.Retrieve(request, timeout=10.0).version.generation)
            except grpc.RpcError:
                return 0

    until(lambda: asked("canary") == other, "the canary does not answer")
    assert asked("live") == before
    document, code = operate.status(cluster.state)
    assert code == ExitCode.OK
    assert {one["role"]: one["generation"] for one in document["generations"]}["canary"] == other
    assert "canary" in operate.render_cluster(document)
    cluster.activate(0, alias="canary")
    until(lambda: asked("canary") == 0, "the canary still answers")


@pytest.mark.ray
@pytest.mark.slow
def test_no_answer_fails_or_mixes_generations_while_they_swap(cluster: Cluster) -> None:
    start = cluster.state.control.read()
    answers: list[tuple[int, str]] = []
    failed: list[str] = []
    stop = threading.Event()

    def read() -> None:
        with cluster.client() as client:
            query = Query(features={}, k=5, min_coverage=1.0)
            while not stop.is_set():
                try:
                    result = client.retrieve(query)
                    answers.append((result.generation, result.content_hash))
                except RetrievalError as error:
                    failed.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for wanted_generation in (start.previous, start.live) * 2:
            # The fixture was published with fewer planes than the generation that followed it.
            cluster.activate(wanted_generation, allow_schema=True)
            cluster.follows(wanted_generation)
    finally:
        stop.set()
        reader.join()
    assert failed == []
    hashes = {
        number: open_snapshot(generation_dir(cluster.state.generations, number)).manifest
        for number in (start.live, start.previous)
    }
    assert {number for number, _ in answers} == hashes.keys()
    assert all(content == hashes[number].content_hash for number, content in answers)


@pytest.mark.ray
@pytest.mark.slow
def test_a_dry_run_changes_nothing(cluster: Cluster) -> None:
    before = cluster.state.control.read()
    cluster.said.clear()
    done = cluster.activate(before.previous, dry_run=True, allow_schema=True)
    assert done["done"] is False
    assert "would make generation" in activate.render_done(done)
    assert cluster.state.control.read() == before
    assert any(one.startswith("memory plan: ") for one in cluster.said)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_shard_serves_the_live_generation_with_every_update_again(
    cluster: Cluster,
) -> None:
    expected = cluster.titles()
    tokens = cluster.apply(own(7, "before the kill"))
    expected[OWN + 7] = "before the kill"
    live = latest(cluster.state).generation
    before = latest(cluster.state).shards[0]
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: not latest(cluster.state).is_whole, "the loss was not noticed")
    cluster.until_whole()
    assert latest(cluster.state).shards[0].pid != before.pid
    found = cluster.ask(after=tokens)
    assert found.generation == live
    assert cluster.titles(after=tokens) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sequencer_has_lost_nothing_that_it_acked(cluster: Cluster) -> None:
    expected = cluster.titles()
    tokens = cluster.apply(own(8, "before the kill"))
    expected[OWN + 8] = "before the kill"
    sequencer = latest(cluster.state).sequencer
    assert sequencer is not None
    os.kill(sequencer.pid, signal.SIGKILL)
    assert cluster.titles(after=tokens) == expected

    def writes() -> bool:
        try:
            cluster.apply(own(9, "after the kill"))
        except RetrievalError:
            return False
        return True

    until(writes, "no update is taken")
    expected[OWN + 9] = "after the kill"
    until(lambda: cluster.titles() == expected, "the update is not there")
    cluster.until_whole()
    restarted = latest(cluster.state).sequencer
    assert restarted is not None
    assert restarted.restarts == sequencer.restarts + 1


@pytest.mark.ray
@pytest.mark.slow
def test_freshness_says_how_far_everything_is(cluster: Cluster) -> None:
    cluster.until_whole()
    until(
        lambda: freshness.freshness(cluster.state)[0]["lag"] == 0, "the shards are behind the log"
    )
    document, code = freshness.freshness(cluster.state)
    assert code == ExitCode.OK
    (partition,) = document["sequencer"]["partitions"]
    live = [one for one in document["shards"] if one["generation"] == document["generation"]]
    assert [one["cut"] for one in live] == [[partition["end"]]] * 2
    assert all(0 < one["free_pages"] < one["pages"] for one in live)
    assert sum(one["documents"] for one in live) == 600 + len(cluster.titles())
    shown = freshness.render(document)
    assert "upserts          pass" in shown
    assert "prepared" in shown


@pytest.mark.ray
@pytest.mark.slow
def test_everything_is_as_before_when_the_cluster_was_down(cluster: Cluster) -> None:
    expected, live = cluster.titles(), latest(cluster.state).generation
    other = max(list_generations(cluster.state.generations))
    assert live != other
    pruned = snapshots.prune(cluster.state, cluster.config, 1, dry_run=False)
    assert live in pruned["kept"]
    launch.stop(cluster.state, timeout_s=20.0)
    launch.start(cluster.state, cluster.config, detached=False)
    assert latest(cluster.state).generation == live
    until(lambda: cluster.titles() == expected, "not all updates came back")


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_change_one_after_the_other_where_both_generations_do_not_fit(
    tmp_path: Path, generation: Any
) -> None:
    state = directory(tmp_path / "s", generation)
    config = settings(
        **{
            "sharding.shards": 1,
            "sharding.replicas": 2,
            "swap.memory_mib": 1,
            "query.deadline_max_ms": 4000,
            "query.default_deadline_ms": 4000,
        }
    )
    with running(state, config):
        one = Cluster(state, config)
        tokens = one.apply(own(0, "first"))
        with pytest.raises(Refused, match="cannot be loaded to be checked"):
            one.activate(2)
        with pytest.raises(Refused, match="cannot be held beside the live one"):
            one.activate(2, alias="canary", load=False)
        failed: list[str] = []
        held: set[tuple[int, ...]] = set()
        stop = threading.Event()

        def read() -> None:
            with one.client() as client:
                while not stop.is_set():
                    try:
                        client.retrieve(Query(features={}, k=5, min_coverage=1.0))
                    except RetrievalError as error:
                        failed.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            done = one.activate(2, load=False)
            assert (done["done"], done["mode"]) == (True, "wave")
            one.follows(2)
            one.until_whole()
            until(
                lambda: [row.prepared for row in latest(state).generations] == [2],
                "a replica did not change",
            )
        finally:
            stop.set()
            reader.join()
        held.add(tuple(row.generation for row in latest(state).generations))
        assert failed == []
        assert held == {(2,)}
        with one.recorder:
            assert one.titles(after=tokens) == {OWN: "first"}
        one.assert_right()


@pytest.fixture
def idle(tmp_path: Path, generation: Any) -> StateDir:
    """A state directory whose cluster, which is this process, does nothing."""
    state = directory(tmp_path / "idle", generation)
    shard = ShardRecord(shard=0, state="serving", pid=os.getpid(), documents=600)
    record = ClusterRecord(
        guard=myself(),
        driver=myself(),
        address="127.0.0.1:9",
        model="films",
        generation=1,
        documents=600,
        map_version=1,
        router=RouterRecord(state="serving"),
        shards=(shard,),
        ray_dir="",
        since_unix_s=0.0,
    )
    state.write_record(record)
    state.control.write(Control(live=1))
    return state


def asked(state: StateDir, generation: int, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"timeout_s": 0.2, "report": lambda _: None, **options}
    config = given.pop("config", None) or settings()
    return activate.activate(state, config, generation, **given)


def test_without_a_cluster_nothing_is_activated(tmp_path: Path, generation: Any) -> None:
    state = directory(tmp_path / "s", generation)
    with pytest.raises(CommandError, match=r"no cluster runs on .*silvershard up"):
        asked(state, 2)
    with pytest.raises(CommandError, match="no cluster runs on"):
        activate.rollback(state, timeout_s=1.0, report=print)


def test_a_cluster_that_does_not_answer_times_out_and_the_operation_goes_on(
    idle: StateDir,
) -> None:
    with pytest.raises(TimedOut, match=r"generation 2 is not live yet: it goes on"):
        asked(idle, 2)
    going = idle.control.read().current
    assert going is not None
    assert (going.generation, going.state) == (2, "waiting")
    assert (
        going.content_hash == open_snapshot(idle.generations / "gen-000002").manifest.content_hash
    )
    with pytest.raises(Refused, match="activate of generation 2 is going on"):
        asked(idle, 2)


def test_nothing_is_activated_while_the_log_is_another_one_or_gone(idle: StateDir) -> None:
    log = open_log(log_url(idle, settings()))
    adopt_log(idle, log)
    log.close()
    idle.updates_file.rename(idle.root / "kept.sqlite")
    with pytest.raises(Refused, match=f"update log {log.log_id} of .* is gone"):
        asked(idle, 2)
    other = open_log(log_url(idle, settings()))
    other.close()
    with pytest.raises(Refused, match=rf"has update log {log.log_id}, .* is log {other.log_id}"):
        asked(idle, 2)
    assert idle.control.read().current is None
    (idle.root / "kept.sqlite").rename(idle.updates_file)
    with pytest.raises(TimedOut):
        asked(idle, 2)


def test_an_interrupted_command_cancels_what_it_wanted(
    idle: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(activate.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked(idle, 2, timeout_s=60.0)
    (ended,) = idle.control.read().operations
    assert (ended.state, ended.reason) == ("cancelled", "its command was interrupted")


def test_what_does_not_fit_is_refused_with_numbers_before_anything_is_wanted(
    idle: StateDir,
) -> None:
    said: list[str] = []
    tight = settings(**{"swap.memory_mib": 1})
    with pytest.raises(Refused, match=r"generation 2 is not loaded: .* MiB are free") as refused:
        asked(idle, 2, config=tight, report=said.append)
    assert refused.value.exit_code == ExitCode.REFUSED
    assert [line for line in said if line.startswith("memory of the new generation at most")]
    assert idle.control.read() == Control(version=1, live=1)


def test_what_fails_a_check_is_refused_before_anything_is_wanted(idle: StateDir) -> None:
    os.truncate(idle.generations / "gen-000002" / "dense.safetensors", 100)
    with pytest.raises(Refused, match=r"check of checksums: .*dense.safetensors is damaged"):
        asked(idle, 2)
    with pytest.raises(CommandError, match="generation 7 is not published"):
        asked(idle, 7)
    assert idle.control.read() == Control(version=1, live=1)


def test_nothing_to_return_to_is_said(idle: StateDir) -> None:
    with pytest.raises(CommandError, match="nothing was live before"):
        activate.rollback(idle, timeout_s=1.0, report=print)
    idle.control.change(lambda now: now.pointed("live", 9).pointed("live", 1))
    with pytest.raises(CommandError, match="generation 9, which was live before, is not published"):
        activate.rollback(idle, timeout_s=1.0, report=print)


def test_a_rollback_calls_off_what_is_being_activated(idle: StateDir) -> None:
    store = idle.control
    store.change(lambda now: now.pointed("live", 2).pointed("live", 1))
    with pytest.raises(TimedOut):
        asked(idle, 2)
    said: list[str] = []
    with pytest.raises(TimedOut):
        activate.rollback(idle, timeout_s=0.1, report=said.append)
    activation, back = store.read().operations
    assert (activation.state, activation.reason) == ("cancelled", "a rollback called it off")
    assert (back.kind, back.generation, back.state) == ("rollback", 2, "waiting")
    assert said == ["activate of generation 2 is called off"]
    with pytest.raises(Refused, match="rollback of generation 2 is going on"):
        activate.rollback(idle, timeout_s=0.1, report=print)
    assert store.read().current == back


def test_a_rollback_goes_to_nothing_else_than_it_was_asked_for(
    idle: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = idle.control
    store.change(lambda now: now.pointed("live", 2).pointed("live", 1))
    change = ControlStore.change

    def beaten(self: ControlStore, make: Callable[[Control], Control]) -> Control:
        change(self, lambda now: now.pointed("live", 3))
        return change(self, make)

    monkeypatch.setattr(ControlStore, "change", beaten)
    with pytest.raises(Refused, match="generation 3 has just become live, so generation 2 is not"):
        activate.rollback(idle, timeout_s=0.1, report=print)
    assert store.read().operations == ()


def test_checks_against_a_generation_that_is_live_no_more_do_not_count(
    idle: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = idle.control
    run_checks = activate.run_checks

    def slow(*words: Any, **options: Any) -> Any:
        yield from run_checks(*words, **options)
        # Somebody rolls back meanwhile.
        store.change(lambda now: now.pointed("live", 3))

    monkeypatch.setattr(activate, "run_checks", slow)
    with pytest.raises(Refused, match="generation 3 has become live meanwhile, and generation 2 "):
        asked(idle, 2, load=False)
    assert store.read().operations == ()


def test_the_live_alias_cannot_be_taken_away(idle: StateDir) -> None:
    with pytest.raises(CommandError, match="the live generation must be one that is published"):
        asked(idle, 0)


def test_the_verbs_give_exit_codes_and_json(
    idle: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--state", str(idle.root), "--output", "json")
    assert verbs.run(["activate", "2", "--dry-run", *words]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert json.loads(out)["done"] is False
    assert "memory plan: both generations are held" in err
    assert verbs.run(["activate", "2", "--timeout", "0.1", *words]) == ExitCode.TIMED_OUT
    assert verbs.run(["activate", "2", "--timeout", "0.1", *words]) == ExitCode.REFUSED
    assert verbs.run(["activate", "x", *words]) == ExitCode.USAGE
    assert verbs.run(["rollback", *words]) == ExitCode.FAILED
