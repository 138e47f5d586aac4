"""The Ray actor of a host's agent: tied to its host, without torch, started again with its node."""

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import ray

from silvershard.cluster.incarnation import Incarnation
from silvershard.deploy.cluster_store import ClusterStore
from silvershard.deploy.host_agent import HostAgent, NotLaunched, end_left
from silvershard.deploy.host_agents import actor_name
from silvershard.deploy.ray_nodes import find
from silvershard.deploy.staging import ReadChunk, read_chunk
from silvershard.shard.errors import RetrievalError

_RETRY_S = 1.0
_READ_S = 60.0


def reach(host: str) -> ReadChunk:
    """Return the way to read generations of another host through its agent."""
    agent = find(actor_name(host))
    if agent is None:
        raise OSError(f"the agent of {host} does not run")

    def read(generation: int, name: str, offset: int) -> bytes:
        found: bytes = ray.get(agent.read.remote(generation, name, offset), timeout=_READ_S)
        return found

    return read


class HostProcess:
    """One incarnation of the agent of a host."""

    def __init__(self, url: str, host: str, root: str) -> None:
        """Begin to work on a thread of its own, as soon as the store can be reached.

        Args:
            url: of the control store.
            host: its name.
            root: state directory on it.
        """
        self._root = root
        self._store = ClusterStore(url)
        self._host = host
        self._stop = threading.Event()
        self._agent: HostAgent | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception:  # noqa: BLE001  # the border of a thread: Ray starts the next process
            traceback.print_exc()
            os._exit(1)

    def _work(self) -> None:
        while self._agent is None:
            try:
                self._agent = HostAgent(self._store, self._host, reach=reach)
            except NotLaunched as error:
                # The cluster was ended while this host was away.
                _say(f"agent of {self._host}: {error}")
                end_left(Path(self._root), self._host)
                Incarnation.current().end_for_good()
                return
            except (RetrievalError, OSError) as error:
                # Ray would not start again what fails while it is made.
                if str(error) != self._error:
                    _say(f"agent of {self._host}: {error}")
                self._error = str(error)
                if self._stop.wait(_RETRY_S):
                    return
        self._error = ""
        self._agent.start()
        self._agent.run(self._stop)

    def describe(self) -> dict[str, object]:
        """Return the process, and why it does not work yet; empty if it does."""
        return {"pid": os.getpid(), "error": self._error}

    def read(self, generation: int, name: str, offset: int) -> bytes:
        """Return a part of a file of a generation; see ``staging.ReadChunk``."""
        assert self._agent is not None
        return read_chunk(self._agent.state.generations, generation, name, offset)

    def stop(self) -> None:
        """End the router in order and remove what described the cluster on this host."""
        self._stop.set()
        self._thread.join()
        if self._agent is not None:
            self._agent.stop()


@ray.remote(num_cpus=0, max_restarts=-1)
class HostActor:
    """A ``HostProcess`` of the release that is installed when Ray starts it; see ``ShardActor``."""

    def __init__(self, *args: Any) -> None:
        """Make the process."""
        self._process = HostProcess(*args)

    def describe(self) -> dict[str, object]:
        """Return the process, and why it does not work yet; empty if it does."""
        return self._process.describe()

    def read(self, generation: int, name: str, offset: int) -> bytes:
        """Return a part of a file of a generation; see ``staging.ReadChunk``."""
        return self._process.read(generation, name, offset)

    def stop(self) -> None:
        """End the router in order and remove what described the cluster on this host."""
        self._process.stop()


def _say(text: str) -> None:
    print(json.dumps({"event": "host", "message": text}), file=sys.stderr, flush=True)
