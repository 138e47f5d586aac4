import math
import threading

import pytest

from silvershard.cluster.metrics import TEXT_FORMAT, Counter, Gauge, Histogram, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_a_set_of_metrics_reads_as_prometheus_wants_it(metrics: Metrics) -> None:
    requests, seconds = Counter("code"), Histogram((0.1, 1.0))
    metrics.add("requests_total", "Requests.", requests)
    metrics.add("waiting", "Who waits.", Gauge(lambda: 3))
    metrics.add("seconds", "Time.", seconds)
    requests.add("OK", 2)
    requests.add("ABORTED")
    for value in (0.05, 0.1, 0.7, 7.0):
        seconds.observe(value)
    assert metrics.names() == ["requests_total", "waiting", "seconds"]
    assert metrics.text() == (
        "# HELP requests_total Requests.\n"
        "# TYPE requests_total counter\n"
        'requests_total{code="ABORTED"} 1\n'
        'requests_total{code="OK"} 2\n'
        "# HELP waiting Who waits.\n"
        "# TYPE waiting gauge\n"
        "waiting 3\n"
        "# HELP seconds Time.\n"
        "# TYPE seconds histogram\n"
        'seconds_bucket{le="0.1"} 2\n'
        'seconds_bucket{le="1"} 3\n'
        'seconds_bucket{le="+Inf"} 4\n'
        "seconds_sum 7.85\n"
        "seconds_count 4\n"
    )


def test_the_parser_of_prometheus_reads_the_text_back(metrics: Metrics) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="comes with Ray's dashboard")
    assert "version=0.0.4" in TEXT_FORMAT
    counter = Counter("why")
    metrics.add("refused_total", "Refusals.", counter)
    metrics.add("empty", "Nothing seen.", Histogram((0.5,)))
    counter.add('a "quoted"\\ \n line', 1.5)
    families = {one.name: one for one in parser.text_string_to_metric_families(metrics.text())}
    (sample,) = families["refused"].samples
    assert (sample.labels, sample.value) == ({"why": 'a "quoted"\\ \n line'}, 1.5)
    assert [one.value for one in families["empty"].samples] == [0, 0, 0, 0]


def test_a_counter_without_a_label_is_there_from_the_start() -> None:
    counter = Counter()
    assert counter.samples() == [("", "", 0)]
    counter.add()
    assert counter.samples() == [("", "", 1)]
    assert Counter("code").samples() == []


def test_numbers_that_are_not_finite_have_their_names(metrics: Metrics) -> None:
    metrics.add("far", "Far.", Gauge(lambda: -math.inf))
    assert metrics.text().endswith("far -Inf\n")


def test_what_several_threads_count_is_not_lost() -> None:
    counter, histogram = Counter(), Histogram((1.0,))

    def count() -> None:
        for _ in range(500):
            counter.add()
            histogram.observe(0.5)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert counter.samples() == [("", "", 4000)]
    assert histogram.samples()[-1] == ("_count", "", 4000)


def test_names_are_unique_and_say_which_metric_is_a_counter(metrics: Metrics) -> None:
    metrics.add("a_total", "A.", Counter())
    with pytest.raises(ValueError, match="metric a_total exists already"):
        metrics.add("a_total", "A.", Counter())
    for name, metric in (("b", Counter()), ("c_total", Gauge(lambda: 0))):
        with pytest.raises(ValueError, match=f"must end with _total, got {name}"):
            metrics.add(name, "X.", metric)
    with pytest.raises(ValueError, match=r"bounds must ascend, got \[2, 1\]"):
        Histogram((2, 1))
