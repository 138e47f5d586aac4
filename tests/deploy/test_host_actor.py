import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from silvershard.deploy import host_actor
from silvershard.deploy.cluster_store import ClusterStore, Launched
from silvershard.deploy.host_actor import HostProcess, reach
from silvershard.deploy.host_agents import actor_name
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir


def until(true: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


@pytest.fixture
def store(make_redis: Callable[..., Any]) -> Iterator[ClusterStore]:
    made = ClusterStore(make_redis().url())
    yield made
    made.close()


def without_routers(made: Launched) -> Launched:
    hosts = tuple(one.model_copy(update={"router": False}) for one in made.hosts)
    return made.model_copy(update={"hosts": hosts})


def test_an_agent_works_until_it_is_told_to_stop_and_lets_others_read(
    store: ClusterStore, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    state = StateDir(tmp_path / "state")
    directory = generation_dir(state.generations, 3)
    directory.mkdir(parents=True)
    (directory / "one").write_bytes(b"content")
    state.root.chmod(0o700)
    store.begin(without_routers(launched(state.root)))
    actor = HostProcess(store.url, "a", str(state.root))
    until(lambda: store.reports())
    assert store.reports()["a"].generations == (3,)
    assert actor.describe()["error"] == ""
    assert actor.read(3, "one", 3) == b"tent"
    beat = store.reports()["a"].beat
    until(lambda: store.reports()["a"].beat > beat)
    actor.stop()
    assert not actor._thread.is_alive()


def test_a_store_that_is_away_is_waited_for(
    make_redis: Callable[..., Any],
    launched: Callable[..., Launched],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_actor, "_RETRY_S", 0.01)
    server = make_redis()
    store = ClusterStore(server.url())
    store.begin(without_routers(launched(tmp_path / "state")))
    server.kill()
    actor = HostProcess(server.url(), "a", str(tmp_path / "state"))
    until(lambda: "cannot be reached" in str(actor.describe()["error"]))
    server.start()
    until(lambda: store.reports())
    assert actor.describe()["error"] == ""
    actor.stop()
    store.close()


def test_an_agent_whose_cluster_was_ended_ends_what_is_left_and_itself(
    store: ClusterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class Mine:
        @staticmethod
        def current() -> Any:
            return Mine

        @staticmethod
        def end_for_good() -> None:
            did.append("end for good")

    monkeypatch.setattr(host_actor, "Incarnation", Mine)
    monkeypatch.setattr(host_actor, "end_left", lambda root, host: did.append(f"{root} {host}"))
    actor = HostProcess(store.url, "a", str(tmp_path))
    actor._thread.join(30)
    assert did == [f"{tmp_path} a", "end for good"]


def test_a_generation_is_read_from_the_agent_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Method:
        @staticmethod
        def remote(*arguments: object) -> object:
            return arguments

    class Agent:
        read = Method

    found: dict[str, Any] = {"host-b": Agent}
    monkeypatch.setattr(host_actor, "find", found.get)
    monkeypatch.setattr(ray, "get", lambda ref, timeout: repr(ref).encode())
    assert reach("b")(3, "one", 5) == b"(3, 'one', 5)"
    with pytest.raises(OSError, match="the agent of c does not run"):
        reach("c")
    assert actor_name("c") == "host-c"


def test_an_error_that_nobody_expects_ends_the_process_so_that_ray_starts_the_next(
    store: ClusterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(host_actor, "HostAgent", broken)
    monkeypatch.setattr(host_actor.os, "_exit", codes.append)
    actor = HostProcess(store.url, "a", str(tmp_path))
    actor._thread.join(30)
    assert codes == [1]
