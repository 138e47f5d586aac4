"""Errors of commands, and the exit codes that scripts rely on."""

from enum import IntEnum

from silvershard.shard.errors import RetrievalError


class ExitCode(IntEnum):
    """What ``silvershard`` returns to the shell."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEGRADED = 3
    REFUSED = 4
    TIMED_OUT = 5


class CommandError(RetrievalError):
    """A command that could not be carried out; ``exit_code`` goes to the shell."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Refused(CommandError):
    """A command that a safety check refused."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.REFUSED)


class NotPublished(CommandError):
    """A generation that a state directory does not hold."""


class CheckFailed(Refused):
    """A generation that does not pass one of its checks."""

    def __init__(self, generation: int, check: str, text: str) -> None:
        super().__init__(f"generation {generation} does not pass its check of {check}: {text}")
        self.check = check


class TimedOut(CommandError, TimeoutError):
    """A command that was not done in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.TIMED_OUT)
