import errno

import pytest

from silvershard.cluster.codec import Refusal
from silvershard.deploy.admin_errors import failure_of, public
from silvershard.deploy.errors import (
    CheckFailed,
    CommandError,
    ExitCode,
    NotPublished,
    Refused,
    TimedOut,
)
from silvershard.shard.errors import (
    LogTrimmed,
    Overloaded,
    RepositoryError,
    SnapshotError,
    StateError,
)

CASES: list[tuple[Exception, str, str]] = [
    (NotPublished("generation 7 is not there"), "NOT_FOUND", "GENERATION_NOT_FOUND"),
    (CheckFailed(2, "checksums", "a is damaged"), "DATA_LOSS", "CHECK_FAILED"),
    (CheckFailed(2, "recall", "too low"), "FAILED_PRECONDITION", "CHECK_FAILED"),
    (Refused("there is no room"), "FAILED_PRECONDITION", "REFUSED"),
    (TimedOut("too late"), "DEADLINE_EXCEEDED", "TIMED_OUT"),
    (CommandError("no", ExitCode.USAGE), "INVALID_ARGUMENT", "WRONG_USAGE"),
    (CommandError("nothing was live before"), "FAILED_PRECONDITION", "NOT_POSSIBLE"),
    (SnapshotError("/s", "is damaged"), "DATA_LOSS", "SNAPSHOT_DAMAGED"),
    (RepositoryError("s3://b", "is away"), "UNAVAILABLE", "REPOSITORY_UNAVAILABLE"),
    (StateError("in use"), "FAILED_PRECONDITION", "STATE_REFUSED"),
    (LogTrimmed("sqlite:///l", 0, 1, 2), "FAILED_PRECONDITION", "LOG_TRIMMED"),
    (Overloaded("full", 1.0), "RESOURCE_EXHAUSTED", "OVERLOADED"),
    (OSError(errno.ENOSPC, "No space", "/s/x"), "RESOURCE_EXHAUSTED", "SYSTEM_REFUSED"),
    (PermissionError(errno.EACCES, "Denied", "/s/x"), "FAILED_PRECONDITION", "SYSTEM_REFUSED"),
]


@pytest.mark.parametrize(("error", "code", "reason"), CASES, ids=lambda one: str(one)[:40])
def test_every_failure_has_a_status_a_reason_and_words(
    error: Exception, code: str, reason: str
) -> None:
    failure = failure_of(error)
    assert (failure.code, failure.reason) == (code, reason)
    assert failure.message
    if not isinstance(error, OSError):
        assert failure.message == str(error)


def test_an_error_of_the_system_names_the_file() -> None:
    assert str(public(OSError(errno.ENOSPC, "No space", "/s/x"))).endswith("/s/x: no space")


def test_a_bug_is_logged_and_tells_nothing_but_an_id(caplog: pytest.LogCaptureFixture) -> None:
    failure = failure_of(ZeroDivisionError("a secret"))
    assert (failure.code, failure.reason) == ("INTERNAL", "INTERNAL")
    assert "secret" not in failure.message
    assert failure.message.split()[-1] in caplog.text


def test_what_has_a_status_of_its_own_keeps_it() -> None:
    error = Refusal("NOT_FOUND", "no operation", "OPERATION_NOT_FOUND")
    assert public(error) is error
    assert failure_of(error).reason == "OPERATION_NOT_FOUND"
