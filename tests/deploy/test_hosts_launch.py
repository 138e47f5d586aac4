from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.tokens import TokenFile, make_token
from silvershard.deploy import hosts_launch
from silvershard.deploy.cluster_store import ClusterStore, Launched
from silvershard.deploy.config import load
from silvershard.deploy.errors import Refused
from silvershard.deploy.hosts_launch import (
    check_settings,
    launched_on,
    placed_hosts,
    record_of,
    resolved,
)
from silvershard.deploy.placement import Copy, Host, Placement
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.shard.errors import ConfigError

SERVER = "redis://10.0.0.9:6379/0"
SETTINGS = {"control.store": SERVER, "updates.log": SERVER, "security.insecure": True}


def test_what_several_hosts_need_is_refused_by_name() -> None:
    check_settings(load(None, environ={}, options=SETTINGS))
    check_settings(
        load(None, environ={}, options={**SETTINGS, "updates.log": "", "updates.enabled": False})
    )
    for key, value, message in (
        ("control.store", "", "control.store must be redis://.*, got nothing"),
        ("updates.log", "", "updates.log must be redis://.*, got nothing"),
        ("updates.log", "sqlite:////x/log", "updates.log must be redis://.*, got sqlite:////x/log"),
        ("security.insecure", False, "--insecure"),
    ):
        with pytest.raises(Refused, match=message):
            check_settings(load(None, environ={}, options={**SETTINGS, key: value}))


def test_several_hosts_are_open_or_have_certificates_tokens_and_a_secret(
    tmp_path: Path, authority: Any
) -> None:
    for name in ("tokens", "secret"):
        (tmp_path / name).touch(mode=0o600)
    TokenFile(tokens=(make_token("me", ["query"], now_unix_s=1).row,)).write(tmp_path / "tokens")
    (tmp_path / "secret").write_text("s" * 40)
    files = {
        **{f"security.tls.{key}": value for key, value in authority.section().items()},
        **{f"security.{key}": str(tmp_path / key) for key in ("tokens", "secret")},
    }
    protected = {**SETTINGS, "security.insecure": False, **files}
    check_settings(load(None, environ={}, options=protected))
    with pytest.raises(Refused, match=r"set security.tls, security.tokens, security.secret to"):
        check_settings(load(None, environ={}, options={**SETTINGS, "security.insecure": False}))
    for key in ("tokens", "secret"):
        with pytest.raises(Refused, match=rf"set security.{key} to files .* or --insecure"):
            check_settings(load(None, environ={}, options={**protected, f"security.{key}": ""}))
        lost = {f"security.{key}": str(tmp_path / "nowhere")}
        with pytest.raises(ConfigError, match="nowhere"):
            check_settings(load(None, environ={}, options={**protected, **lost}))
    expired = {
        f"security.tls.{key}": value for key, value in authority.section("old", days=-2).items()
    }
    with pytest.raises(ConfigError, match="would not believe each other"):
        check_settings(load(None, environ={}, options={**protected, **expired}))


def placement(at: dict[Copy, str]) -> Placement:
    return Placement(at=at, moves=(), shared=(), staying=())


def test_every_host_gets_its_copies_and_the_first_ones_routers() -> None:
    hosts = [
        Host("b", 2.0, 1 << 30, address="10.0.0.2"),
        Host("a", 4.0, 2 << 30, address="10.0.0.1", zone="east"),
        Host("c", 2.0, 1 << 30, address="10.0.0.3", state="maintenance"),
    ]
    at = {Copy(0, 0): "a", Copy(0, 1): "b", Copy(0, 0, standby=True): "b"}
    found = placed_hosts(hosts, placement(at), 2, 1)
    # Standbys are numbered after the replicas. Who gets nothing now may get something later.
    assert [(one.name, one.router, one.copies) for one in found] == [
        ("b", False, ((0, 1), (0, 2))),
        ("a", True, ((0, 0),)),
        ("c", False, ()),
    ]
    with_router = [one.router for one in placed_hosts(hosts, placement(at), 2, None)]
    assert with_router == [True, True, False]
    hosts[2] = hosts[2]._replace(state="down")
    assert len(placed_hosts(hosts, placement(at), 2, None)) == 2
    assert (found[1].address, found[1].zone, found[1].cpus) == ("10.0.0.1", "east", 4.0)
    for routers in (0, 3):
        with pytest.raises(Refused, match=rf"from 1 to 2, .* up, got {routers}"):
            placed_hosts(hosts, placement(at), 2, routers)


def test_an_address_must_be_one_that_other_hosts_reach() -> None:
    assert resolved("10.0.0.1") == "10.0.0.1"
    with pytest.raises(Refused, match=r"127.0.0.1, which other hosts cannot reach"):
        resolved("127.0.0.1")
    with pytest.raises(Refused, match=r"host nobody.invalid has no address"):
        resolved("nobody.invalid")


def test_a_ray_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Refused, match=r"--ray HOST:PORT or \$RAY_ADDRESS"):
        hosts_launch.up(
            StateDir(tmp_path),
            load(None, environ={}, options=SETTINGS),
            [Host("a", address="10.0.0.1")],
            generation=None,
            ray=None,
            routers=None,
            admit=lambda path: None,
            show_plan=lambda plan: None,
            report=lambda text: None,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_state_directory_knows_its_cluster_of_several_hosts(
    tmp_path: Path,
    make_redis: Callable[..., Any],
    launched: Callable[..., Launched],
    idle_state: StateDir,
) -> None:
    state = StateDir(tmp_path / "state")
    assert launched_on(state) is None
    assert record_of(state) is None
    state.create()
    url = make_redis().url()
    state.control_url_file.write_text(url)
    assert launched_on(state) is None
    assert record_of(state) is None
    store = ClusterStore(url)
    store.begin(launched(state.root))
    found = launched_on(state)
    assert found is not None
    assert found[1] == launched(state.root)
    # A machine that is none of the hosts has no record of its own.
    record = idle_state.read_record()
    assert record is not None
    assert launched_on(idle_state) is None
    there = record.model_copy(update={"ray": "10.0.0.9:6379", "host": "a"})
    store.write(store.take_over(), "record", there.model_dump_json())
    assert record_of(state) == there
    assert ClusterRecord.model_validate(there.model_dump()).runs
    store.close()


def test_a_single_machine_with_its_control_store_on_a_server_asks_nobody(
    idle_state: StateDir,
) -> None:
    idle_state.control_url_file.write_text("redis://127.0.0.1:1/0")
    assert launched_on(idle_state) is None
