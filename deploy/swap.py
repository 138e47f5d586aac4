"""How far the swap of two generations is."""

from typing import NamedTuple

from silvershard.deploy.control_store import Operation
from silvershard.deploy.memory_plan import Mode


class Swap(NamedTuple):
    """A swap that is going on."""

    operation: Operation
    mode: Mode
    give_up_s: float
    load_s: float
    """When the processes that are taken out of service may begin to load."""
    commit_s: float | None = None
    """When routers have met the processes that were out of service; None: they are still out."""
