import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from silvershard.deploy.config_sections import ShardingSection
from silvershard.deploy.runtime import prepare_ray, start_ray, threads_per_shard


def test_shards_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    shards = (1, 2, 3, 8, 9)
    assert [threads_per_shard(ShardingSection(shards=one)) for one in shards] == [8, 4, 2, 1, 1]
    assert threads_per_shard(ShardingSection(shards=2, threads=7)) == 7
    assert threads_per_shard(ShardingSection(shards=2, replicas=2)) == 2


def test_the_secret_of_ray_is_new_and_for_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    secrets = []
    for _ in range(2):
        prepare_ray(tmp_path / "token", threads=3)
        assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
        secrets.append((tmp_path / "token").read_text())
    assert secrets[0] != secrets[1]
    assert min(map(len, secrets)) >= 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_shards_get_as_much_of_a_busy_machine_as_any_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    prepare_ray(tmp_path / "token", threads=1)
    assert environment["RAY_worker_niceness"] == "0"


def test_a_ray_whose_node_comes_too_late_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    starts: list[dict[str, object]] = []
    ends: list[int] = []

    def init(**settings: object) -> None:
        starts.append(settings)
        if len(starts) < 3:
            raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ends.append(len(starts)))
    start_ray(num_cpus=4)
    assert starts == [{"num_cpus": 4}] * 3
    assert ends == [1, 2]


def test_a_ray_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init() -> None:
        raise Exception("no space left")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Exception, match="no space left"):
        start_ray()


SLOW_ONCE = """
import gc, sys
from pathlib import Path
from silvershard.deploy.runtime import prepare_ray, start_ray

home = Path(sys.argv[1])
prepare_ray(home / "token", threads=1)
import ray
from ray._private import services

started, find = [], services.get_node

def get_node(*words):
    if not started:
        node = sys._getframe(1).f_locals["self"]
        started.extend(one.process.pid for all in node.all_processes.values() for one in all)
        raise Exception("The current node timed out during startup.")
    return find(*words)

services.get_node = get_node
start_ray(
    address="local", include_dashboard=False, num_cpus=1, object_store_memory=80 << 20,
    _temp_dir=str(home), log_to_driver=False, configure_logging=False,
)
gc.collect()
print(len(started), sum(Path(f"/proc/{one}").exists() for one in started))
ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_came_too_late_leaves_no_process() -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as home:
        command = [sys.executable, "-P", "-W", "always::ResourceWarning", "-c", SLOW_ONCE, home]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    num_started, num_left = map(int, done.stdout.split())
    assert num_started >= 2
    assert num_left == 0
    assert "ResourceWarning" not in done.stderr
