import pickle

import pytest

from silvershard.deploy.errors import (
    CheckFailed,
    CommandError,
    ExitCode,
    NotPublished,
    Refused,
    TimedOut,
)
from silvershard.shard.errors import RetrievalError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError("no"), ExitCode.FAILED),
        (CommandError("no", ExitCode.USAGE), ExitCode.USAGE),
        (Refused("no"), ExitCode.REFUSED),
        (TimedOut("no"), ExitCode.TIMED_OUT),
        (NotPublished("no"), ExitCode.FAILED),
    ],
)
def test_errors_carry_their_exit_code_across_processes(error: CommandError, code: int) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.exit_code) == (type(error), "no", code)
    assert isinstance(copy, RetrievalError)


def test_a_failed_check_names_itself_across_processes() -> None:
    copy = pickle.loads(pickle.dumps(CheckFailed(3, "recall", "too low")))
    assert isinstance(copy, Refused)
    assert (copy.check, copy.exit_code) == ("recall", ExitCode.REFUSED)
    assert str(copy) == "generation 3 does not pass its check of recall: too low"


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "DEGRADED": 3,
        "REFUSED": 4,
        "TIMED_OUT": 5,
    }


def test_a_time_out_can_be_caught_as_the_built_in() -> None:
    with pytest.raises(TimeoutError):
        raise TimedOut("no")
