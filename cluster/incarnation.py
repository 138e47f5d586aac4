"""One process of a Ray actor, told apart from those before and after it."""

import logging
import os
import threading
import time
from typing import Any, NamedTuple, Self

import ray
from ray._private.state import state as ray_state

_RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Incarnation(NamedTuple):
    """One process of an actor."""

    actor: Any
    actor_id: str
    node_id: str
    pid: int

    @classmethod
    def current(cls) -> Self:
        """Return that of the actor which calls it."""
        context = ray.get_runtime_context()
        return cls(
            context.current_actor, context.get_actor_id() or "", context.get_node_id(), os.getpid()
        )

    def end_for_good(self) -> None:
        """End this process on a thread of its own, and let Ray not start it again.

        Where Ray has started the next one meanwhile, as in the place of a process that hung, that
        one lives on: the handle of an actor means whichever is the newest.
        """
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def _end(self) -> None:
        while True:
            try:
                if not self._is_newest():
                    break
                # Returns before it is done, so that to exit at once would be a crash to Ray.
                ray.kill(self.actor, no_restart=True)
            except Exception:  # noqa: BLE001  # whatever Ray has; the process must end
                _log.exception("Ray cannot be told that the actor has ended")
            time.sleep(_RETRY_S)
        os._exit(1)

    def _is_newest(self) -> bool:
        found = ray_state.actor_table(self.actor_id)
        where = (found["Address"]["NodeID"], found["Pid"])
        return found["State"] != "DEAD" and where == (self.node_id, self.pid)
