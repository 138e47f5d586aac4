"""The head of a Ray cluster as another machine reaches it: how far it is, and what it runs."""

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from silvershard.cluster.http_address import split_address

_TRIES = 5
_CONNECT_TIMEOUT_S = 3.0
_ASK_TIMEOUT_S = 20.0
_ROUTER_HTTP_PORT = 8002

# The client of the GCS ends its process when it cannot connect, hence one of its own.
_ASK = """
import json, sys
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
found = client.internal_kv_get(CLUSTER_METADATA_KEY, namespace=b"cluster", timeout=10)
print(json.dumps(json.loads(found.decode()) if found else {}))
"""


class Head(NamedTuple):
    """What was found out about a head."""

    address: str
    round_trip_s: float = 0.0
    """Median time of opening a connection."""
    problem: str = ""
    """Why no connection can be opened; empty if one can."""
    ray: str = ""
    python: str = ""
    refused: str = ""
    """Why the GCS did not say its versions; empty if it did."""
    silvershard: str = ""
    """Version of the router there; empty if none can be reached."""


def read_head(
    address: str,
    *,
    ask: Callable[[str], dict[str, str]] | None = None,
    version: Callable[[str], str] | None = None,
) -> Head:
    """Return what an address says that a Ray head should have.

    Args:
        address: ``host:port`` of its GCS.
        ask: returns the metadata that the GCS holds; raises OSError with what went wrong.
        version: returns the version of the router on a host, empty if none answers.

    Raises:
        ValueError: if it is no such address.
    """
    host, port = split_address(address)
    spent: list[float] = []
    try:
        for _ in range(_TRIES):
            began_s = time.perf_counter()
            with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
                spent.append(time.perf_counter() - began_s)
    except OSError as error:
        return Head(address, problem=(error.strerror or str(error)).lower())
    found = Head(address, statistics.median(spent), silvershard=(version or router_version)(host))
    try:
        metadata = (ask or ask_gcs)(address)
    except OSError as error:
        return found._replace(refused=str(error))
    if not metadata.get("ray_version"):
        return found._replace(refused="the GCS does not know its own version")
    return found._replace(ray=metadata["ray_version"], python=metadata.get("python_version", ""))


def ask_gcs(address: str) -> dict[str, str]:
    """Return what the GCS of a cluster keeps about it, asked with the token in the environment.

    Raises:
        OSError: saying why it did not answer.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK, address],
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_TIMEOUT_S,
            env={**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {_ASK_TIMEOUT_S:g} s") from None
    if done.returncode == 0:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise OSError(said[-1][:200] if said else f"exit code {done.returncode}")


def router_version(host: str, port: int = _ROUTER_HTTP_PORT) -> str:
    """Return the version of silvershard that a router on a host runs; empty if none answers."""
    connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_TIMEOUT_S)
    try:
        connection.request("GET", "/version")
        found = json.loads(connection.getresponse().read(4096))
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
    return str(found.get("version", "")) if isinstance(found, dict) else ""
