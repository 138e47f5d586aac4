import math
import pickle
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2

from silvershard.cluster import codec, retrieval_pb2
from silvershard.cluster.outcome import (
    Coverage,
    CoverageLost,
    CoverageTimedOut,
    DegradeReason,
    ShardOutcome,
)
from silvershard.model.request import FilterMode, Request, RequestError, WeightedIds
from silvershard.shard import errors
from silvershard.shard.errors import (
    CandidatesExpired,
    ConfigError,
    CoverageError,
    DeadlineExceeded,
    Fenced,
    GenerationError,
    LogDamaged,
    LogMissing,
    LogTrimmed,
    LogUnavailable,
    MutationError,
    Overloaded,
    PoolExhausted,
    RemoteError,
    ReplicaStale,
    RepositoryError,
    RetrievalError,
    ShardUnavailable,
    SnapshotError,
    StateError,
    UpdatesUnsupported,
)

PARTIAL = Coverage(
    documents=1 / 3,
    shards_total=3,
    shards_full=1,
    shards_failed=2,
    reasons=("SHARD_TIMEOUT", "VERSION_MISMATCH_DROPPED"),
    shards=(
        ShardOutcome(1, "0", "DEADLINE_EXCEEDED", ("SHARD_TIMEOUT",), 75, 1000, 1),
        ShardOutcome(2, "", "FAILED_PRECONDITION", ("VERSION_MISMATCH_DROPPED",), 80, 5, 2, True),
    ),
)

EXAMPLES: list[tuple[Exception, str, str]] = [
    (RequestError("k", "must be in 1..9, got 0"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    (SnapshotError("/s", "damaged"), "DATA_LOSS", "SNAPSHOT_DAMAGED"),
    (GenerationError(1, 2), "FAILED_PRECONDITION", "VERSION_MISMATCH"),
    (CandidatesExpired("key"), "ABORTED", "CANDIDATES_EXPIRED"),
    (ShardUnavailable(1, "gone"), "UNAVAILABLE", "SHARD_UNAVAILABLE"),
    (DeadlineExceeded("late"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    (CoverageTimedOut(PARTIAL, 0.9), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    (CoverageError(0.5, 0.9), "UNAVAILABLE", "COVERAGE_TOO_LOW"),
    (CoverageLost(PARTIAL, 0.9), "UNAVAILABLE", "COVERAGE_TOO_LOW"),
    (Overloaded("full", 0.25), "RESOURCE_EXHAUSTED", "OVERLOADED"),
    (ConfigError("bad"), "FAILED_PRECONDITION", "CONFIG_REFUSED"),
    (StateError("in use"), "FAILED_PRECONDITION", "STATE_REFUSED"),
    (codec.Refusal("NOT_FOUND", "no model", "MODEL_NOT_FOUND"), "NOT_FOUND", "MODEL_NOT_FOUND"),
    (RemoteError("ABORTED", "no"), "ABORTED", "REFUSED"),
    (MutationError("ttl", "must be above 0"), "INVALID_ARGUMENT", "INVALID_UPDATE"),
    (LogMissing("sqlite:///l", "is not there"), "UNAVAILABLE", "LOG_MISSING"),
    (LogUnavailable("sqlite:///l", "is full"), "UNAVAILABLE", "LOG_UNAVAILABLE"),
    (LogDamaged("sqlite:///l", "is damaged"), "DATA_LOSS", "LOG_DAMAGED"),
    (LogTrimmed("sqlite:///l", 0, 1, 2), "FAILED_PRECONDITION", "LOG_TRIMMED"),
    (Fenced(0, 1, 2), "UNAVAILABLE", "FENCED"),
    (ReplicaStale(1, "is behind"), "FAILED_PRECONDITION", "REPLICA_STALE"),
    (RepositoryError("s3://bucket", "is away"), "UNAVAILABLE", "REPOSITORY_UNAVAILABLE"),
    (PoolExhausted(3, 2, 1), "RESOURCE_EXHAUSTED", "POOL_EXHAUSTED"),
    (UpdatesUnsupported("semantic ids"), "FAILED_PRECONDITION", "UPDATES_UNSUPPORTED"),
]


def crossed(request: Request) -> Request:
    data = codec.request_to(request).SerializeToString()
    return codec.request_from(retrieval_pb2.RetrieveRequest.FromString(data))


def test_every_error_class_has_a_row_of_the_table() -> None:
    classes = {
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, RetrievalError)
    }
    assert len(classes) >= 11
    assert classes <= set(codec.STATUSES)
    assert classes - {RetrievalError} <= {type(error) for error, _, _ in EXAMPLES}


def test_every_code_of_the_table_exists() -> None:
    for row in codec.STATUSES.values():
        assert codec.code_name(codec.code_number(row.code)) == row.code
    assert codec.code_name(77) == "UNKNOWN"


@pytest.mark.parametrize(
    ("error", "code", "reason"), EXAMPLES, ids=[type(one[0]).__name__ for one in EXAMPLES]
)
def test_an_error_crosses_as_its_status(error: Exception, code: str, reason: str) -> None:
    status = codec.status_of(error)
    assert code_pb2.Code.Name(status.code) == code
    refused = codec.refused(code, status.message, status.details)
    assert isinstance(refused, RemoteError)
    assert refused.code == code
    assert refused.reason == reason
    expected = error.message if isinstance(error, RemoteError) else str(error)
    assert refused.message == expected
    assert refused.coverage == getattr(error, "coverage", None)
    # Whoever is refused for want of room learns when to come again.
    default_s = 1.0 if code == "RESOURCE_EXHAUSTED" else None
    assert refused.retry_after_s == getattr(error, "retry_after_s", default_s)
    violations = ()
    if isinstance(error, RequestError):
        violations = ((error.field, error.message),)
    assert refused.violations == violations


def test_the_domain_of_an_error_is_named() -> None:
    info = error_details_pb2.ErrorInfo()
    assert codec.status_of(StateError("x")).details[0].Unpack(info)
    assert info.domain == "silvershard"


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), RetrievalError("secret")])
def test_what_only_a_bug_causes_is_internal_and_tells_nothing_but_its_id(error: Exception) -> None:
    status = codec.status_of(error, "abc123")
    assert code_pb2.Code.Name(status.code) == "INTERNAL"
    assert status.message == "internal error abc123"
    assert len(status.details) == 0


def test_a_status_stays_small_whatever_the_request_held() -> None:
    error = RequestError("features." + "x" * 100_000, "must not be " + "y" * 100_000)
    status = codec.status_of(error)
    assert len(status.SerializeToString()) < 4000
    assert status.message.startswith("features.xxx")
    assert status.message.endswith("...")


def test_a_refusal_survives_pickling() -> None:
    refused = codec.RequestRefused(
        "UNAVAILABLE", "gone", reason="R", coverage=PARTIAL, retry_after_s=0.5
    )
    again = pickle.loads(pickle.dumps(refused))
    assert (again.code, again.reason, again.coverage, again.retry_after_s) == (
        *("UNAVAILABLE", "R", PARTIAL, 0.5),
    )


def test_a_coverage_crosses_whole() -> None:
    data = codec.coverage_to(PARTIAL).SerializeToString()
    assert codec.coverage_from(retrieval_pb2.Coverage.FromString(data)) == PARTIAL
    assert retrieval_pb2.Coverage.FromString(data).degraded


def test_every_reason_has_a_number_on_the_wire() -> None:
    for reason in DegradeReason:
        coverage = Coverage(0.5, 2, 1, 1, (reason.value,))
        assert codec.coverage_from(codec.coverage_to(coverage)) == coverage


def test_every_filter_mode_has_its_number_on_the_wire() -> None:
    assert sorted(retrieval_pb2.FilterMode.values()) == sorted(mode.value for mode in FilterMode)
    for mode in FilterMode:
        assert crossed(Request(filter_mode=mode)).filter_mode is mode


def test_a_request_crosses_whole() -> None:
    request = Request(
        features={"history": (1, -(2**63), 2**63 - 1), "words": ("a", "é"), "none": ()},
        k=17,
        filter="year > $y",
        params={"y": (0.1,), "list": (1, 2), "name": ("x",), "empty": ()},
        exclude_ids=(0, 2**63 - 1, 2**64 - 1),
        nprobe=3,
        ann_k=400,
        plan="probe(probes=3,ann_k=400)",
        exact=True,
        filter_mode=FilterMode.BLOOM,
        task_weights={"like": 0.5},
        value="score + $like",
        return_fields=("title",),
    )
    assert crossed(request) == request


@pytest.mark.parametrize("semantic_k", [None, 0, 7])
def test_no_semantic_candidates_differ_from_the_default_number(semantic_k: int | None) -> None:
    message = codec.request_to(Request(semantic_k=semantic_k))
    assert codec.request_from(message).semantic_k == semantic_k


def test_the_default_request_crosses_whole() -> None:
    assert crossed(Request()) == Request()


def test_one_value_arrives_as_a_list_of_one() -> None:
    got = crossed(Request(params={"a": 3, "b": 0.1, "c": "x", "d": np.int64(4)}))
    assert got.params == {"a": (3,), "b": (0.1,), "c": ("x",), "d": (4,)}


def test_arrays_and_numpy_values_cross_as_numbers() -> None:
    got = crossed(Request(features={"a": np.array([1, 2])}, params={"b": np.array([0.5, 1.5])}))
    assert got.features == {"a": (1, 2)}
    assert got.params == {"b": (0.5, 1.5)}
    assert all(type(one) is int for one in got.features["a"])


def test_ints_among_floats_are_floats() -> None:
    assert crossed(Request(params={"a": [1, 0.5]})).params == {"a": (1.0, 0.5)}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Request(features={"a": [1, "x"]}), "features.a: must be ints, floats or strings of one"),
        (Request(features={"a": [True]}), "got bool"),
        (Request(params={"p": object()}), "params.p: must be ints"),
        (Request(features={"a": [2**63]}), "features.a: must be 64-bit signed ints"),
        (Request(features={"a": [10**5000]}), "must be 64-bit signed ints, got an int of 16610 b"),
        (Request(features={"a": [1.5, 10**400]}), "a: must be numbers that fit float64, got an in"),
        (Request(features={"a": b"abc"}), "features.a: must be ints, floats or strings of one"),
        (Request(features={"a": WeightedIds([1], None)}), "weights must be a list, got NoneType"),  # type: ignore[arg-type]
        (Request(features={"a": WeightedIds(5, [1])}), "features.a: ids must be a list, got int"),  # type: ignore[arg-type]
        (Request(features={"a": WeightedIds(b"a", [1])}), "a: ids must be a list, got bytes"),
        (Request(k=-1), "k: must be in 0..4294967295, got -1"),
        (Request(nprobe=2**32), "nprobe: must be in"),
        (Request(ann_k=-5), "ann_k: must be in"),
        (Request(semantic_k=-1), "semantic_k: must be in"),
        (Request(exclude_ids=[-1]), "exclude_ids: must be in 0..18446744073709551615, got -1"),
    ],
)
def test_a_request_without_a_form_is_refused_before_it_is_sent(
    request_: Request, complaint: str
) -> None:
    with pytest.raises(ValueError, match="must be") as raised:
        codec.request_to(request_)
    assert complaint in str(raised.value)


def test_values_of_mixed_kinds_are_refused_naming_the_field() -> None:
    message = retrieval_pb2.RetrieveRequest(k=1)
    message.params["p"].CopyFrom(retrieval_pb2.Values(ints=[1], doubles=[0.5]))
    with pytest.raises(RequestError) as raised:
        codec.request_from(message)
    assert raised.value.field == "params.p"
    assert raised.value.message == "must be values of one kind, got ints and doubles"


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(weight: float) -> None:
    message = retrieval_pb2.RetrieveRequest(k=1, task_weights={"like": weight})
    with pytest.raises(RequestError) as raised:
        codec.request_from(message)
    assert raised.value.field == "task_weights.like"


def test_an_unknown_filter_mode_is_refused() -> None:
    message = retrieval_pb2.RetrieveRequest.FromString(bytes([0xCA, 0x01, 2, 0x28, 9]))
    with pytest.raises(RequestError) as raised:
        codec.request_from(message)
    assert raised.value.field == "search.filter_mode"


def test_every_grpc_status_is_known_by_name() -> None:
    for code in grpc.StatusCode:
        assert codec.code_number(code.name) == code.value[0]


@pytest.mark.parametrize("ids", [(5, -7), ("heist", "ü")])
def test_weights_cross_with_their_ids(ids: Any) -> None:
    weights = (float(np.float32(0.1)), -3.0)
    features = {"tags": WeightedIds(ids, weights), "history": (1, 2), "empty": WeightedIds((), ())}
    found = crossed(Request(features=features)).features
    assert found == {"tags": WeightedIds(ids, weights), "history": (1, 2), "empty": ()}


def test_weights_are_little_endian_float32() -> None:
    message = codec.values_to("x", WeightedIds([9], np.array([1.5])))  # type: ignore[arg-type]
    assert message.ints == [9]
    assert message.weights == b"\x00\x00\xc0\x3f"


def test_numbers_cross_exactly() -> None:
    numbers = (float(np.float32(0.1)), -2.0, 3)
    assert crossed(Request(features={"x": numbers})).features == {"x": numbers}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "f: must have as many weights as ids, 2, got 1"),
        ((1.0, 1e39), r"f: weight 1 must be a number that fits float32, got 1e\+39"),
        ((1.0, "2"), "f: weight 1 must be a number that fits float32, got '2'"),
    ],
)
def test_weights_without_a_form_on_the_wire_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.values_to("f", WeightedIds((1, 2), weights))


def test_weights_of_another_number_are_refused() -> None:
    message = retrieval_pb2.RetrieveRequest()
    message.named.features["tags"].ints.extend([1, 2])
    message.named.features["tags"].weights = b"\0" * 7
    with pytest.raises(RequestError, match=r"features\.tags: weights must have 8 bytes, got 7"):
        codec.request_from(message)


def test_a_parameter_of_a_filter_has_no_weights() -> None:
    message = retrieval_pb2.RetrieveRequest()
    message.params["p"].CopyFrom(codec.values_to("p", WeightedIds((1,), (2.0,))))
    with pytest.raises(RequestError, match=r"params\.p: must have no weights"):
        codec.request_from(message)
