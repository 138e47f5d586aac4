"""How the errors of commands look in the admin plane: a status, a reason and words, no trace."""

import errno

from google.rpc import error_details_pb2

from silvershard.cluster.codec import Refusal, code_name
from silvershard.cluster.service import logged_status
from silvershard.deploy.admin_store import Failure
from silvershard.deploy.errors import (
    CheckFailed,
    CommandError,
    ExitCode,
    NotPublished,
    Refused,
    TimedOut,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def public(error: Exception) -> Exception:
    """Return an error as one that has a status, where it has none of its own."""
    if isinstance(error, CommandError):
        code, reason = _status(error)
        return Refusal(code, str(error), reason)
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        name = f"{error.filename}: " if error.filename else ""
        code = "RESOURCE_EXHAUSTED" if error.errno in _FULL else "FAILED_PRECONDITION"
        return Refusal(code, f"{name}{(error.strerror or str(error)).lower()}", "SYSTEM_REFUSED")
    return error


def _status(error: CommandError) -> tuple[str, str]:
    """Return the code and the reason of what a command could not do."""
    if isinstance(error, NotPublished):
        return "NOT_FOUND", "GENERATION_NOT_FOUND"
    if isinstance(error, CheckFailed):
        is_damaged = error.check == "checksums"
        return "DATA_LOSS" if is_damaged else "FAILED_PRECONDITION", "CHECK_FAILED"
    if isinstance(error, Refused):
        return "FAILED_PRECONDITION", "REFUSED"
    if isinstance(error, TimedOut):
        return "DEADLINE_EXCEEDED", "TIMED_OUT"
    if error.exit_code == ExitCode.USAGE:
        return "INVALID_ARGUMENT", "WRONG_USAGE"
    return "FAILED_PRECONDITION", "NOT_POSSIBLE"


def failure_of(error: Exception) -> Failure:
    """Return why an operation failed; a bug is logged under the id that the text carries."""
    status = logged_status(public(error))
    info = error_details_pb2.ErrorInfo()
    reasons = [info.reason for detail in status.details if detail.Unpack(info)]
    return Failure(
        code=code_name(status.code),
        reason=reasons[0] if reasons else "INTERNAL",
        message=status.message,
    )
