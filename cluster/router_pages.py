"""What a router says of itself over HTTP: that it lives, if it is ready, and what it serves."""

import json
from collections.abc import Callable
from typing import NamedTuple

from silvershard.cluster.document import RELEASE
from silvershard.cluster.http_server import Page, Pages
from silvershard.cluster.metrics import TEXT_FORMAT, Metrics

OK, UNAVAILABLE = 200, 503


class RouterFacts(NamedTuple):
    """A router at a moment; replaced as a whole, so that any thread may read it."""

    ready: bool = False
    """It reached every shard once; latched, so that less coverage sends users to nobody else."""
    draining: bool = False
    """It was told to stop."""
    covered: bool = False
    """The shards that it reaches now hold enough documents for an answer."""
    coverage: float = 0.0
    """Documents of the shards that it reaches now / documents of the generation."""
    model: str = ""
    generation: int = 0
    """The live one; 0 before the first shard map."""
    content_hash: str = ""
    map_version: int = 0

    @property
    def state(self) -> str:
        """Return in one word how it is."""
        if self.draining:
            return "draining"
        if not self.ready:
            return "starting"
        return "serving" if self.covered else "degraded"


def router_pages(facts: Callable[[], RouterFacts], metrics: Metrics) -> Pages:
    """Return the pages of a router.

    ``/livez`` answers as long as the thread of the server does. ``/readyz`` says whether new
    requests may be sent here, ``/healthz`` whether an answer would cover enough of the catalogue.

    Args:
        facts: the router now; called on the thread of the server.
        metrics: what ``/metrics`` shows.
    """

    def livez() -> Page:
        return Page(OK, "ok\n", "text/plain; charset=utf-8")

    def readyz() -> Page:
        now = facts()
        is_ready = now.ready and not now.draining
        return _json(OK if is_ready else UNAVAILABLE, ready=is_ready, state=now.state)

    def healthz() -> Page:
        now = facts()
        return _json(
            OK if now.state == "serving" else UNAVAILABLE,
            state=now.state,
            coverage=now.coverage,
            generation=now.generation,
        )

    def about() -> Page:
        now = facts()
        return _json(
            OK,
            version=RELEASE,
            model=now.model,
            generation=now.generation,
            content_hash=now.content_hash,
            shard_map_version=now.map_version,
        )

    return {
        "/livez": livez,
        "/readyz": readyz,
        "/healthz": healthz,
        "/version": about,
        "/metrics": lambda: Page(OK, metrics.text(), TEXT_FORMAT),
    }


def _json(status: int, **values: object) -> Page:
    return Page(status, json.dumps(values) + "\n")
