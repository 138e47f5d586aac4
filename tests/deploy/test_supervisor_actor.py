from collections.abc import Callable
from typing import Any

import pytest
import ray.util

from silvershard.deploy import supervisor_actor
from silvershard.deploy.supervisor_actor import SupervisorProcess


def test_it_ends_at_once_where_nothing_is_launched(
    make_redis: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    actor = SupervisorProcess(make_redis().url())
    assert actor.stop(30.0)
    actor._thread.join(30)
    assert not actor._thread.is_alive()
    assert actor.describe()["pid"] > 0


def test_an_error_that_nobody_expects_ends_the_process_so_that_ray_starts_the_next(
    make_redis: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def run(self: Any) -> None:
        raise RuntimeError("Ray is broken")

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(supervisor_actor.Supervisor, "run", run)
    monkeypatch.setattr(supervisor_actor.os, "_exit", codes.append)
    actor = SupervisorProcess(make_redis().url())
    actor._thread.join(30)
    assert codes == [1]


@pytest.mark.parametrize(("is_done", "wanted"), [(True, []), (False, [1])])
def test_one_that_leaves_ends_its_process_so_that_ray_starts_the_next(
    make_redis: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    is_done: bool,
    wanted: list[int],
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(supervisor_actor.Supervisor, "run", lambda _: is_done)
    monkeypatch.setattr(supervisor_actor.os, "_exit", codes.append)
    actor = SupervisorProcess(make_redis().url())
    actor._thread.join(30)
    assert codes == wanted
