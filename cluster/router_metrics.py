"""What a router shows of its queue, budgets and replicas: counts that are kept elsewhere."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from silvershard.cluster.batcher import Batcher
from silvershard.cluster.extra_calls import ExtraCalls
from silvershard.cluster.metrics import Gauge, Gauges, Metrics, Tally
from silvershard.cluster.recall_audit import RecallAudit
from silvershard.cluster.shard_link import LinkState, ShardLink


def add_router_metrics(
    metrics: Metrics,
    batcher: Batcher,
    extra: ExtraCalls,
    level: Callable[[], int],
    links: Callable[[], Iterable[ShardLink]],
) -> None:
    """Take in what the parts of a router count.

    Args:
        metrics: where they are added.
        batcher: its queue and what it dropped.
        extra: hedges, retries, and the calls to shards.
        level: returns the steps down the ladder; called on any thread, as ``links`` is.
        links: returns the replicas of the live generation.
    """
    dropped, counts = batcher.dropped, extra.counts

    def states() -> dict[tuple[str, ...], float]:
        now = Counter(link.state for link in links())
        return {(state.value,): now[state] for state in LinkState}

    metrics.add(
        "silvershard_queue_depth",
        "Requests that wait for a batch.",
        Gauge(lambda: batcher.num_waiting),
    )
    metrics.add("silvershard_batch_size", "Requests of each batch.", batcher.sizes)
    metrics.add(
        "silvershard_batch_size_limit",
        "Requests that a batch may have now.",
        Gauge(lambda: batcher.largest),
    )
    metrics.add(
        "silvershard_concurrency_limit",
        "Batches that may run at a time now.",
        Gauge(lambda: batcher.limit),
    )
    metrics.add(
        "silvershard_degrade_level",
        "Steps down the ladder: 0 is the whole work.",
        Gauge(level),
    )
    metrics.add(
        "silvershard_shed_total",
        "Requests that were refused unexecuted, by cause: queue, displaced, deadline, tenant.",
        Tally(
            lambda: {(*key,): count for key, count in dict(dropped.shed).items()}, "cause", "tenant"
        ),
    )
    metrics.add(
        "silvershard_shed_by_priority_total",
        "The same by priority: low is below 0, high above 0.",
        Tally(lambda: _single(dropped.shed_by_priority), "priority"),
    )
    metrics.add(
        "silvershard_expired_before_execution_total",
        "Requests whose time ran out, by the stage that did not run.",
        Tally(lambda: _single(dropped.expired), "stage"),
    )
    metrics.add(
        "silvershard_cancelled_total",
        "Requests whose callers went away, by where they were: queue, run.",
        Tally(lambda: _single(dropped.cancelled), "stage"),
    )
    metrics.add(
        "silvershard_below_min_coverage_total",
        "Requests without an answer because too few documents answered.",
        Tally(lambda: {(): dropped.uncovered}),
    )
    metrics.add(
        "silvershard_shard_requests_total",
        "Calls to shards that ended, by gRPC status; CANCELLED: another replica was faster.",
        Tally(lambda: _single(counts.ended), "code"),
    )
    metrics.add(
        "silvershard_shard_duration_seconds",
        "Time of calls to shards that were answered.",
        counts.seconds,
    )
    metrics.add(
        "silvershard_hedges_total",
        "Calls that were hedged, by outcome: won or lost; suppressed: not sent.",
        Tally(
            lambda: {
                ("won",): counts.hedges_won,
                ("lost",): counts.hedges_lost,
                ("suppressed",): counts.hedges_suppressed,
            },
            "outcome",
        ),
    )
    metrics.add(
        "silvershard_retries_total",
        "Calls that were sent to another replica after a failure; suppressed: not sent.",
        Tally(
            lambda: {
                ("sent",): counts.retries,
                ("suppressed",): counts.retries_suppressed,
            },
            "outcome",
        ),
    )
    metrics.add(
        "silvershard_ejections_total",
        "Replicas that were set aside, by cause: failure, silence, slowness.",
        Tally(lambda: _single(counts.set_aside), "cause"),
    )
    metrics.add(
        "silvershard_replica_state",
        "Replicas of the live generation by what this router believes of them.",
        Gauges(states, "state"),
    )


def add_recall_metrics(metrics: Metrics, audit: RecallAudit) -> None:
    """Take in what an audit of recall has found."""
    metrics.add(
        "silvershard_recall_audits_total",
        "Answers that were searched again in all clusters, by what their filter lets through.",
        Tally(lambda: {(band,): one.audits for band, one in dict(audit.found).items()}, "band"),
    )
    metrics.add(
        "silvershard_recall_ratio",
        "Share of the best that those answers held, of all audits so far.",
        Gauges(
            lambda: {(band,): one.recalls / one.audits for band, one in dict(audit.found).items()},
            "band",
        ),
    )
    metrics.add(
        "silvershard_recall_audits_given_up_total",
        "Audits that had no full answer.",
        Tally(lambda: {(): audit.given_up}),
    )


def _single(counts: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    return {(str(name),): count for name, count in dict(counts).items()}
