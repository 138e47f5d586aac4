"""The driver of a cluster: the process that owns the embedded Ray; the guard starts it."""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict, Field

from silvershard.deploy.cluster_size import in_force
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.processes import die_with_parent, identify
from silvershard.deploy.progress import Progress
from silvershard.deploy.runtime import prepare_ray, ray_runtime, threads_per_shard
from silvershard.deploy.state import StateDir, remove_ray_dir
from silvershard.shard.errors import RetrievalError, SnapshotError
from silvershard.shard.table_files import row_files


class Launch(BaseModel):
    """What to serve; the driver reads it from its standard input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Config = Field(description="settings")
    generation: int = Field(ge=1, description="number of the generation")
    snapshot: str = Field(description="its directory")


class _Teller:
    """Writes progress to a pipe whose reader may leave at any time."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor: int | None = descriptor
        self._last = Progress()

    def tell(self, progress: Progress) -> None:
        """Write one line, if it says something new."""
        if self._descriptor is None or progress == self._last:
            return
        self._last = progress
        try:
            os.write(self._descriptor, progress.model_dump_json().encode() + b"\n")
        except OSError:
            self.close()

    def close(self) -> None:
        """End the pipe."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="silvershard.deploy.serve", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--lock-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--ray-dir", required=True)
    parser.add_argument("--guard", type=int, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit code."""
    options = _parse(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_now)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    die_with_parent(options.guard)
    # The lock lives as long as a process holds it: it must not pass to Ray.
    os.set_inheritable(options.lock_fd, False)
    teller = _Teller(options.status_fd)
    state = StateDir(options.state)
    try:
        launch = Launch.model_validate_json(sys.stdin.buffer.read())
        # Ray puts the working directory on the path of its workers: it must hold no modules.
        os.chdir(state.root)
        _serve(state, launch, options.guard, options.ray_dir, teller)
    except SystemExit:
        teller.tell(Progress(error="it was told to stop", exit_code=ExitCode.FAILED))
    except RetrievalError as error:
        code = error.exit_code if isinstance(error, CommandError) else ExitCode.FAILED
        print(json.dumps({"event": "failed", "message": str(error)}), file=sys.stderr)
        teller.tell(Progress(error=str(error), exit_code=code))
        return code
    except Exception as error:  # noqa: BLE001 - the border of the process: log it and say so
        traceback.print_exc()
        teller.tell(
            Progress(
                error=f"internal error: {type(error).__name__}: {error}; see {state.daemon_log}",
                exit_code=ExitCode.FAILED,
            )
        )
        return ExitCode.FAILED
    finally:
        teller.close()
        if os.getppid() != options.guard:
            # The guard was killed, so its last duties fall to this process.
            remove_ray_dir(options.ray_dir)
            state.clear_record()
    return ExitCode.OK


def _exit_now(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _model_of(snapshot: Path) -> str:
    """Return the model name that a snapshot was published under; `up` verifies the rest of it."""
    try:
        document = json.loads((snapshot / "manifest.json").read_bytes())
        return str(document["spec"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(str(snapshot), f"manifest.json cannot be read: {error}") from None


def _serve(state: StateDir, launch: Launch, guard_pid: int, ray_dir: str, teller: _Teller) -> None:
    # How many routers there were is over with them.
    control = state.control.change(lambda now: now.model_copy(update={"routers": 0}))
    config = in_force(launch.config, control.scaled)
    teller.tell(Progress(phase="starting Ray"))
    prepare_ray(state.token_file, threads=threads_per_shard(config.sharding))
    # It imports ray, which reads the environment that was just set.
    from silvershard.deploy.admin_server import AdminServer
    from silvershard.deploy.launcher import LocalCluster

    tables = row_files(Path(launch.snapshot))
    sharding = config.sharding
    actors = sharding.shards * sharding.copies
    actors += (config.tables.shards if tables else 0) + config.updates.enabled
    cluster = LocalCluster(
        state,
        config,
        generation=launch.generation,
        snapshot=Path(launch.snapshot),
        model=_model_of(Path(launch.snapshot)),
        guard=identify(guard_pid),
        ray_dir=ray_dir,
        report=lambda phase: teller.tell(Progress(phase=phase)),
    )
    cluster.announce()
    with ExitStack() as stack:
        stack.callback(cluster.kill_leftovers)
        stack.callback(cluster.stop)
        cluster.start_router()
        stack.enter_context(
            ray_runtime(
                Path(ray_dir),
                num_workers=actors,
                object_store_bytes=config.runtime.object_store_bytes,
            )
        )
        # Ray has put a handler of its own in place.
        signal.signal(signal.SIGTERM, _exit_now)
        stack.callback(cluster.stop)
        if config.admin.enabled:
            cluster.admin = stack.enter_context(AdminServer(state, launch.config)).address
        cluster.start_shards()
        cluster.wait_until_ready(config.runtime.start_timeout_s)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
        teller.tell(Progress(ready=True))
        teller.close()
        cluster.run(stop)
        # A second signal must not interrupt the orderly end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
