"""Which role a call needs, and what is known of who makes it."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from silvershard.cluster import admin_pb2, retrieval_pb2

Role = Literal["view", "query", "update", "admin"]

ROLES: tuple[Role, ...] = get_args(Role)

ANYBODY = "anybody"
"""No token is asked for."""
KNOWN = "known"
"""Any token will do."""

_READS = (
    "GetOperation",
    "WaitOperation",
    "ListOperations",
    "ListShards",
    "Freshness",
    "ListFaults",
)
"""Methods of the admin plane that change nothing and start nothing."""


class Caller(NamedTuple):
    """Who makes a call."""

    name: str
    roles: frozenset[str] = frozenset()
    tenant: str = ""
    """The only one that it may act for; empty: any."""

    def may(self, need: str) -> bool:
        """Return whether it may make calls that need a role; ``admin`` may make all."""
        return need in (ANYBODY, KNOWN) or need in self.roles or "admin" in self.roles


NOBODY = Caller("anonymous")
"""Who is asked nothing, where no tokens are set up."""

PEER = Caller("cluster", frozenset(ROLES))
"""A process of the cluster, or a command of who owns its state directory."""

CALLER: ContextVar[Caller] = ContextVar("silvershard_caller", default=NOBODY)
"""Who makes the call that this task serves."""


def _full_name(descriptor: object, service: str) -> str:
    services: Mapping[str, object] = descriptor.services_by_name  # type: ignore[attr-defined]
    return str(services[service].full_name)  # type: ignore[attr-defined]


_HEALTH = _full_name(health_pb2.DESCRIPTOR, "Health")
_RETRIEVAL = _full_name(retrieval_pb2.DESCRIPTOR, "Retrieval")
_UPDATES = _full_name(retrieval_pb2.DESCRIPTOR, "Updates")
_ADMIN = _full_name(admin_pb2.DESCRIPTOR, "Admin")


def needed(method: str) -> str:
    """Return the role that a call from outside needs, or ``ANYBODY`` or ``KNOWN``.

    Args:
        method: ``/package.Service/Method``; one that is not known here needs ``admin``.
    """
    service, _, name = method.removeprefix("/").partition("/")
    if service == _HEALTH:
        return ANYBODY
    if service == reflection.SERVICE_NAME:
        return KNOWN
    if service == _ADMIN:
        return "view" if name in _READS else "admin"
    return {_RETRIEVAL: "query", _UPDATES: "update"}.get(service, "admin")


def needed_within(method: str) -> str:
    """Return what a call between the processes of a cluster needs: health is for anybody."""
    return ANYBODY if method.startswith(f"/{_HEALTH}/") else "admin"
