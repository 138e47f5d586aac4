"""The Ray actor of the supervisor: on whichever node Ray starts it, again whenever that is lost."""

import os
import threading
import traceback
from typing import Any

import ray
import ray.util

from silvershard.deploy.cluster_store import ClusterStore
from silvershard.deploy.host_actor import reach
from silvershard.deploy.ray_nodes import actors
from silvershard.deploy.supervisor import Supervisor

NAME = "supervisor"


class SupervisorProcess:
    """One incarnation of the supervisor."""

    def __init__(self, url: str) -> None:
        """Begin on a thread of its own.

        Args:
            url: of the control store.
        """
        address: Any = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._supervisor = Supervisor(ClusterStore(url), actors(), str(address), reach=reach)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            is_done = self._supervisor.run()
        except Exception:  # noqa: BLE001  # the border of a thread: Ray starts the next process
            traceback.print_exc()
            is_done = False
        if not is_done:
            os._exit(1)

    def describe(self) -> dict[str, int]:
        """Return the process."""
        return {"pid": os.getpid()}

    def stop(self, timeout_s: float) -> bool:
        """End shards and sequencer; return whether that was done in time."""
        return self._supervisor.stop(timeout_s)


@ray.remote(num_cpus=0, max_restarts=-1)
class SupervisorActor:
    """A ``SupervisorProcess`` of the release that is installed when Ray starts it.

    See ``ShardActor``.
    """

    def __init__(self, *args: Any) -> None:
        """Make the process."""
        self._process = SupervisorProcess(*args)

    def describe(self) -> dict[str, int]:
        """Return the process."""
        return self._process.describe()

    def stop(self, timeout_s: float) -> bool:
        """End shards and sequencer; return whether that was done in time."""
        return self._process.stop(timeout_s)
