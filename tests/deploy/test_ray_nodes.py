from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from silvershard.deploy import ray_nodes
from silvershard.deploy.cluster_store import Launched
from silvershard.deploy.errors import CommandError, Refused


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found = [
        {"NodeManagerAddress": "10.0.0.1", "Alive": True},
        {"NodeManagerAddress": "10.0.0.2", "Alive": False},
        {"NodeManagerAddress": "10.0.0.9", "Alive": True},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    return found


def test_hosts_that_are_no_living_nodes_are_named(
    nodes: list[dict[str, Any]], launched: Callable[..., Launched]
) -> None:
    assert ray_nodes.living_addresses() == ["10.0.0.1", "10.0.0.9"]
    hosts = launched().hosts
    with pytest.raises(Refused, match=r"1 of 2 hosts .* at r:1: b \(10.0.0.2\); .* 10.0.0.9: "):
        ray_nodes.check_nodes("r:1", hosts)
    nodes[1]["Alive"] = True
    ray_nodes.check_nodes("r:1", hosts)


def test_an_actor_is_looked_for_in_our_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> str:
        if (name, namespace) != ("sequencer", "silvershard"):
            raise ValueError(f"Failed to look up actor {name}")
        return "the actor"

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "nodes", list)
    found = ray_nodes.actors()
    assert (found.find("sequencer"), found.find("shard-0-0")) == ("the actor", None)
    assert list(found.addresses()) == []


def test_a_ray_that_cannot_be_used_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: Any) -> None:
        assert settings["address"] == "10.0.0.9:6379"
        raise RuntimeError("\n  no token was given\nTraceback\n")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with (
        pytest.raises(
            CommandError, match=r"^Ray at 10.0.0.9:6379 cannot be used: no token was given$"
        ),
        ray_nodes.connected("10.0.0.9:6379", tmp_path),
    ):
        raise AssertionError("it is not connected")


def test_the_connection_ends_with_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **_: did.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: did.append("shutdown"))
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    (tmp_path / "state").mkdir()
    with ray_nodes.connected("10.0.0.9:6379", tmp_path / "state"):
        # Ray puts the working directory on the path of its workers.
        assert Path.cwd() == tmp_path / "state"
        did.append("work")
    assert did == ["init", "work", "shutdown"]
