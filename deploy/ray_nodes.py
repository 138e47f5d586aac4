"""A Ray that runs already: connected to, and its nodes and our actors on them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silvershard.deploy.cluster_store import PlacedHost
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.host_site import NAMESPACE, Actors

ADDRESS_VARIABLE = "RAY_ADDRESS"


@contextmanager
def connected(address: str, root: Path) -> Iterator[None]:
    """Be a driver of the Ray at ``address`` while the context lasts.

    Args:
        address: ``host:port`` of its head.
        root: existing directory without modules: Ray puts the working directory on the path of its
            workers.

    Raises:
        CommandError: if it cannot be reached, or does not admit this process.
    """
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_COLOR_PREFIX="0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.chdir(root)
    import ray

    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:  # noqa: BLE001  # Ray raises many kinds; all mean the same here
        said = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise CommandError(f"Ray at {address} cannot be used: {said.strip()[:300]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def living_addresses() -> list[str]:
    """Return the IP addresses of the nodes that Ray thinks alive."""
    import ray

    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return [str(node["NodeManagerAddress"]) for node in nodes if node["Alive"]]


def check_nodes(address: str, hosts: Sequence[PlacedHost]) -> None:
    """Check that every host is a node of the Ray that this process is connected to.

    Raises:
        Refused: naming the hosts that are not, and the nodes that are no hosts.
    """
    living = set(living_addresses())
    missing = [f"{one.name} ({one.address})" for one in hosts if one.address not in living]
    if missing:
        others = sorted(living - {one.address for one in hosts})
        more = f"; Ray also has {', '.join(others)}" if others else ""
        raise Refused(
            f"{len(missing)} of {len(hosts)} hosts are no nodes of the Ray at {address}: "
            f"{', '.join(missing)}{more}: give the address of a host as Ray knows it, or start Ray "
            "there"
        )


def find(name: str) -> Any:
    """Return the actor of ours that has a name; None if there is none."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _end(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)


def _restart(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=False)


def actors() -> Actors:
    """Return what the Ray knows that this process is connected to."""
    return Actors(find, living_addresses, _end, _restart)
