import inspect
import pickle

import pytest

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

EXAMPLES = [
    SnapshotError("gen-000001", "dense.safetensors is missing"),
    RepositoryError("s3://bucket/films", "access denied"),
    MutationError("attributes.year", "must be an int, got str"),
    UpdatesUnsupported("the index was built without room for updates"),
    PoolExhausted(2000, 100, 64),
    GenerationError(3, 2),
    ReplicaStale(1, "position 7 of log partition 0 was not applied within 0.250 s"),
    CandidatesExpired("q-1"),
    ShardUnavailable(4, "connection lost"),
    DeadlineExceeded("the deadline passed"),
    CoverageError(0.5, 0.9),
    Overloaded("the queue is full", 0.25),
    ConfigError("query.min_coverage: must be at most 1, got 2"),
    LogUnavailable("sqlite:///log", "disk full"),
    LogMissing("sqlite:///log", "there is no such file"),
    LogDamaged("sqlite:///log", "the record at position 3 is damaged"),
    LogTrimmed("sqlite:///log", 0, 3, 7),
    Fenced(0, 1, 2),
    StateError("port 8001 is in use"),
    RemoteError("UNAVAILABLE", "draining"),
]


def test_every_error_has_an_example_here() -> None:
    classes = {
        one
        for _, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, RetrievalError) and one is not RetrievalError
    }
    assert classes == {type(one) for one in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_keeps_its_fields_and_message_across_processes(error: RetrievalError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_can_be_caught_at_the_root(error: RetrievalError) -> None:
    with pytest.raises(RetrievalError):
        raise error


def test_errors_are_the_built_in_kind_where_one_fits() -> None:
    assert issubclass(SnapshotError, ValueError)
    assert issubclass(MutationError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)


def test_the_tree_in_the_docstring_names_every_class() -> None:
    assert errors.__doc__ is not None
    assert [
        type(one).__name__ for one in EXAMPLES if type(one).__name__ not in errors.__doc__
    ] == []
