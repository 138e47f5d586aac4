import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.config import (
    AdmissionSection,
    HedgingSection,
    RetriesSection,
    RouterConfig,
)
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.metrics import Metrics
from silvershard.cluster.recall_audit import Audited
from silvershard.cluster.router import Router
from silvershard.cluster.router_metrics import add_recall_metrics, add_router_metrics
from silvershard.cluster.shard_link import LinkState

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels."""
    parser = pytest.importorskip("prometheus_client.parser", reason="comes with Ray's dashboard")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }


@pytest.fixture
def parts() -> SimpleNamespace:
    batcher = Batcher(
        AdmissionSection(), max_batch=8, max_delay_s=0, target_delay_s=1, clock=lambda: 0.0
    )
    extra = ExtraCalls(HedgingSection(), RetriesSection(), retry_burst=1)
    metrics, links = Metrics(), [SimpleNamespace(state=LinkState.UP)] * 2
    add_router_metrics(metrics, batcher, extra, lambda: 3, lambda: links)  # type: ignore[arg-type]
    return SimpleNamespace(metrics=metrics, batcher=batcher, extra=extra)


def test_every_count_is_shown_under_its_labels(parts: Any) -> None:
    dropped, counts = parts.batcher.dropped, parts.extra.counts
    dropped.shed.update({("queue", "a"): 2, ("tenant", "other"): 3})
    dropped.shed_by_priority["low"] = 5
    dropped.expired["rounds"] = 7
    dropped.cancelled["run"] = 11
    dropped.uncovered = 13
    counts.hedges_won, counts.hedges_lost, counts.hedges_suppressed = 17, 19, 23
    counts.retries, counts.retries_suppressed = 29, 31
    counts.set_aside["silence"] = 37
    counts.ended["OK"] = 41
    counts.seconds.observe(0.25)
    parts.batcher.sizes.observe(3)
    found = read(parts.metrics)
    wanted = {
        ("shed_total", "queue", "a"): 2,
        ("shed_total", "tenant", "other"): 3,
        ("shed_by_priority_total", "low"): 5,
        ("expired_before_execution_total", "rounds"): 7,
        ("cancelled_total", "run"): 11,
        ("below_min_coverage_total",): 13,
        ("hedges_total", "won"): 17,
        ("hedges_total", "lost"): 19,
        ("hedges_total", "suppressed"): 23,
        ("retries_total", "sent"): 29,
        ("retries_total", "suppressed"): 31,
        ("ejections_total", "silence"): 37,
        ("shard_requests_total", "OK"): 41,
        ("shard_duration_seconds_sum",): 0.25,
        ("batch_size_sum",): 3,
        ("batch_size_limit",): 8,
        ("concurrency_limit",): 4,
        ("degrade_level",): 3,
        ("queue_depth",): 0,
        ("replica_state", "up"): 2,
        ("replica_state", "down"): 0,
    }
    assert {(f"silvershard_{name}", *rest): value for (name, *rest), value in wanted.items()} == {
        key: value
        for key, value in found.items()
        if (key[0].removeprefix("silvershard_"), *key[1:]) in wanted
    }


def test_the_table_of_metrics_is_that_of_the_router(tmp_path: Path) -> None:
    router = Router(RouterConfig(map_path=str(tmp_path / "map.json")))
    section = DOCS.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    told = Counter(re.findall(r"^\| `(silvershard_[a-z_]+)", section, re.MULTILINE))
    assert told == Counter(router._metrics.names())


def test_the_recall_of_each_band_is_shown() -> None:
    metrics = Metrics()
    found = {"unfiltered": Audited(4, 3.0), "above": Audited(1, 1.0)}
    add_recall_metrics(metrics, SimpleNamespace(found=found, given_up=2))  # type: ignore[arg-type]
    assert read(metrics) == {
        ("silvershard_recall_audits_total", "unfiltered"): 4,
        ("silvershard_recall_audits_total", "above"): 1,
        ("silvershard_recall_ratio", "unfiltered"): 0.75,
        ("silvershard_recall_ratio", "above"): 1.0,
        ("silvershard_recall_audits_given_up_total",): 2,
    }
