"""Errors raised on purpose from the shard layer upward.

RetrievalError
├── SnapshotError (ValueError)     a snapshot is missing, damaged or of another format
├── GenerationError                a shard does not hold the generation it was asked for
├── CandidatesExpired              round two came after the candidates of round one were given up
├── ShardUnavailable               a shard did not answer: connection lost, or told it cannot serve
├── DeadlineExceeded (TimeoutError) the time of the request ran out
├── CoverageError                  too few documents answered, and no replica is left to ask
├── Overloaded                     refused before any work; carries the delay to wait
├── ConfigError (ValueError)       a configuration cannot be used as written
├── StateError                     the state directory or a port is in use, or nothing is there
└── RemoteError                    the cluster refused a request of a client; carries the status
"""

from typing import Any


class RetrievalError(Exception):
    """Root of every error that silvershard raises on purpose above the model."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the fields, because errors cross processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[RetrievalError], args: tuple[object, ...], fields: dict[str, object]
) -> RetrievalError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class SnapshotError(RetrievalError, ValueError):
    """A snapshot that is missing, damaged or of another format."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"snapshot {path}: {message}")
        self.path = path


class GenerationError(RetrievalError):
    """A shard that does not hold the generation it was asked for."""

    def __init__(self, wanted: int, held: int) -> None:
        super().__init__(f"generation {wanted} was asked for, this shard holds {held}")
        self.wanted = wanted
        self.held = held


class CandidatesExpired(RetrievalError):
    """Round two for a query whose candidates are no longer open."""

    def __init__(self, key: str) -> None:
        super().__init__(f"query {key} has no open candidates: it ended or its time ran out")
        self.key = key


class ShardUnavailable(RetrievalError):
    """A shard that did not answer."""

    def __init__(self, shard: int, message: str) -> None:
        super().__init__(f"shard {shard}: {message}")
        self.shard = shard


class DeadlineExceeded(RetrievalError, TimeoutError):
    """A request whose time ran out."""


class CoverageError(RetrievalError):
    """Fewer documents answered than the request demands."""

    def __init__(self, documents: float, minimum: float) -> None:
        super().__init__(
            f"{documents:.4f} of the documents answered, at least {minimum:.4f} are required"
        )
        self.documents = documents
        self.minimum = minimum


class Overloaded(RetrievalError):
    """A request refused before any work was done."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message}; retry in {retry_after_s:.3f} s")
        self.retry_after_s = retry_after_s


class ConfigError(RetrievalError, ValueError):
    """A configuration that cannot be used as written."""


class StateError(RetrievalError):
    """A state directory or port that is in use, or holds nothing to work on."""


class RemoteError(RetrievalError):
    """A request that the cluster refused; ``code`` is the name of the gRPC status."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
