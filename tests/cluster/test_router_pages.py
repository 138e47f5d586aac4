import importlib.metadata
import json

import pytest

from silvershard.cluster.metrics import TEXT_FORMAT, Counter, Metrics
from silvershard.cluster.router_pages import RouterFacts, router_pages

SERVING = RouterFacts(
    ready=True,
    covered=True,
    coverage=1.0,
    model="films",
    generation=3,
    content_hash="abc",
    map_version=7,
)


@pytest.mark.parametrize(
    ("facts", "state", "ready", "healthy"),
    [
        (RouterFacts(), "starting", False, False),
        (SERVING, "serving", True, True),
        # Latched: with a shard lost it is still the best place to send requests to.
        (SERVING._replace(covered=False, coverage=0.5), "degraded", True, False),
        (SERVING._replace(draining=True), "draining", False, False),
        (RouterFacts(draining=True), "draining", False, False),
    ],
)
def test_readiness_is_about_itself_and_health_about_the_coverage(
    facts: RouterFacts, state: str, ready: bool, healthy: bool
) -> None:
    pages = router_pages(lambda: facts, Metrics())
    readyz, healthz = pages["/readyz"](), pages["/healthz"]()
    assert readyz.status == (200 if ready else 503)
    assert json.loads(readyz.body) == {"ready": ready, "state": state}
    assert healthz.status == (200 if healthy else 503)
    assert json.loads(healthz.body)["state"] == state
    assert pages["/livez"]().status == 200


def test_the_version_names_program_and_generation() -> None:
    page = router_pages(lambda: SERVING, Metrics())["/version"]()
    assert json.loads(page.body) == {
        "version": importlib.metadata.version("silvershard"),
        "model": "films",
        "generation": 3,
        "content_hash": "abc",
        "shard_map_version": 7,
    }


def test_metrics_are_those_of_the_process() -> None:
    metrics = Metrics()
    metrics.add("x_total", "X.", Counter())
    page = router_pages(RouterFacts, metrics)["/metrics"]()
    assert (page.status, page.body, page.content_type) == (200, metrics.text(), TEXT_FORMAT)
