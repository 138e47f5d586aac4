"""What a person has said of a host: whether its copies answer, and whether new ones come."""

from typing import Literal

HostState = Literal["up", "maintenance", "retired", "down"]
HOST_STATES: tuple[HostState, ...] = ("up", "maintenance", "retired", "down")
