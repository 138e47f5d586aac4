"""The Ray that a cluster on one machine brings along."""

import os
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silvershard.deploy.config_sections import ShardingSection

_STARTS = 3
_TOO_SLOW = "timed out during startup"


def threads_per_shard(sharding: ShardingSection) -> int:
    """Return the threads of each shard process: as configured, or its share of the cores."""
    processes = sharding.shards * sharding.replicas
    return sharding.threads or max(len(os.sched_getaffinity(0)) // processes, 1)


def prepare_ray(token_file: Path, *, threads: int) -> None:
    """Set the environment that Ray reads when it is imported; its processes inherit it.

    Args:
        token_file: the secret that processes of this Ray show each other; made with mode 0600.
        threads: of tensor operations in each worker.
    """
    token_file.unlink(missing_ok=True)
    descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token_file),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        # What Ray says of a lost worker goes to a log file.
        RAY_COLOR_PREFIX="0",
        # Ray would kill the largest worker on a full machine; here every worker is a shard.
        RAY_memory_monitor_refresh_ms="0",
        # Ray runs workers at nice 15 by default, so that any other process would starve the shards.
        RAY_worker_niceness="0",
        RAY_timeout_ms_task_wait_for_death_info="50",
        OMP_NUM_THREADS=str(threads),
    )


def start_ray(**settings: Any) -> None:
    """Start a Ray of this process by ``ray.init``, once more where a busy machine was too slow.

    Ray gives its node 30 s to appear and has no setting for that. No process of a node that did not
    start is left.

    Args:
        settings: arguments of ``ray.init``.
    """
    import ray

    for attempt in range(1, _STARTS + 1):
        try:
            ray.init(**settings)
        except Exception as error:
            _end_node(error)
            ray.shutdown()
            if _TOO_SLOW not in str(error) or attempt == _STARTS:
                raise
        else:
            return


def _end_node(error: BaseException) -> None:
    """End the processes of a node that did not start, which Ray keeps until this process ends."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


@contextmanager
def ray_runtime(ray_dir: Path, *, num_workers: int, object_store_bytes: int) -> Iterator[None]:
    """Run a local Ray of this process; it ends with the context, or with the process.

    ``prepare_ray`` comes first.

    Args:
        ray_dir: existing directory with a short path, removed by the caller afterwards.
        num_workers: worker processes to start in advance, one per actor.
        object_store_bytes: shared memory, at least 75 MiB.
    """
    import ray

    start_ray(
        address="local",
        include_dashboard=False,
        # Ray starts one idle worker per CPU in advance, which makes the actors start at once.
        num_cpus=num_workers,
        object_store_memory=object_store_bytes,
        _temp_dir=str(ray_dir),
        log_to_driver=False,
        configure_logging=False,
        namespace="silvershard",
    )
    try:
        yield
    finally:
        ray.shutdown()
