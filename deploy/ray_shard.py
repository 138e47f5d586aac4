"""An actor as Ray sees it: how often it was started again, and what it says of itself."""

from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
from pydantic import BaseModel
from ray._private.state import state as ray_state

from silvershard.deploy.shard_watch import ShardDead

E = TypeVar("E", bound=BaseModel)


class RayShard(Generic[E]):
    """One actor of a shard; nothing here waits."""

    def __init__(self, actor: Any, kind: type[E]) -> None:
        """Watch an actor whose ``describe`` gives at least the fields of ``kind``."""
        self._actor = actor
        self._kind = kind
        self._described = actor.describe.remote()

    def restarts(self) -> int:
        """Return how often Ray started the actor again, counting starts that are under way."""
        table = ray_state.actor_table(self._actor._actor_id.hex()) or {}
        return int(table.get("NumRestarts", 0))

    def entry(self) -> E | None:
        """Return where the actor serves, or None while it is loading.

        Raises:
            ShardDead: if Ray will not start it again, with the reason.
        """
        done, _ = ray.wait([self._described], timeout=0)
        if not done:
            return None
        try:
            found = ray.get(self._described)
        except ray.exceptions.ActorDiedError as error:
            raise ShardDead(innermost(str(error))) from None
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
            self.ask_again()
            return None
        known = self._kind.model_fields.keys() & found.keys()
        return self._kind(**{name: found[name] for name in known})

    def ask_again(self) -> None:
        """Forget what the actor said, because its process ended."""
        self._described = self._actor.describe.remote()

    def end(self) -> None:
        """End the actor for good."""
        ray.kill(self._actor, no_restart=True)


def innermost(text: str) -> str:
    """Return the error at the bottom of a remote traceback as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, colon, message = line.partition(": ")
        if colon and name.startswith("silvershard.") and name.rpartition(".")[2].isidentifier():
            return message
    return lines[-1] if lines else "no reason was given"
