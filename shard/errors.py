"""Errors raised on purpose from the shard layer upward.

RetrievalError
├── SnapshotError (ValueError)     a snapshot is missing, damaged or of another format
├── RepositoryError                copies of generations at a URL cannot be read or written
├── MutationError (ValueError)     an update that no shard of the generation could take
├── UpdatesUnsupported             an index that was loaded to stay as it is
├── PoolExhausted                  an index has no room for the items of a commit
├── GenerationError                a shard does not hold the generation it was asked for
├── ReplicaStale                   a shard has not applied the updates that a request demands
├── CandidatesExpired              round two came after the candidates of round one were given up
├── ShardUnavailable               a shard did not answer: connection lost, or told it cannot serve
├── DeadlineExceeded (TimeoutError) the time of the request ran out
├── CoverageError                  too few documents answered, and no replica is left to ask
├── Overloaded                     refused before any work; carries the delay to wait
├── ConfigError (ValueError)       a configuration cannot be used as written
├── LogUnavailable                 the update log cannot be reached, or refuses
│   └── LogMissing                 it was not made yet
├── LogDamaged (ValueError)        the update log does not hold what was written to it
├── LogTrimmed                     the update log no longer holds what was asked for
├── Fenced                         another writer of a log partition has taken over
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


class RepositoryError(RetrievalError):
    """Copies of generations at a URL that cannot be read or written."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(f"repository {url}: {message}")
        self.url = url


class MutationError(RetrievalError, ValueError):
    """An update that no shard of the generation could take; names the field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class UpdatesUnsupported(RetrievalError):
    """An index that was loaded to stay as it is."""


class PoolExhausted(RetrievalError):
    """A commit that an index has no room for; nothing of it was applied."""

    def __init__(self, needed: int, free: int, retired: int) -> None:
        super().__init__(
            f"{needed} slots are needed, {free} are free and {retired} wait for open queries; "
            "raise updates.headroom and load the generation again"
        )
        self.needed = needed
        self.free = free
        self.retired = retired


class GenerationError(RetrievalError):
    """A shard that does not hold the generation it was asked for."""

    def __init__(self, wanted: int, held: int) -> None:
        super().__init__(f"generation {wanted} was asked for, this shard holds {held}")
        self.wanted = wanted
        self.held = held


class ReplicaStale(RetrievalError):
    """A shard that has not applied the updates that a request demands, and did not in time."""

    def __init__(self, shard: int, message: str) -> None:
        super().__init__(f"shard {shard}: {message}")
        self.shard = shard


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


class LogUnavailable(RetrievalError):
    """An update log that cannot be reached in time, or refuses for a reason of its own."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(f"update log {url}: {message}")
        self.url = url


class LogMissing(LogUnavailable):
    """An update log that was not made yet."""


class LogDamaged(RetrievalError, ValueError):
    """An update log that does not hold what was written to it."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(f"update log {url}: {message}")
        self.url = url


class LogTrimmed(RetrievalError):
    """Records that an update log no longer holds."""

    def __init__(self, url: str, partition: int, after: int, start: int) -> None:
        super().__init__(
            f"update log {url}: what lies beyond position {after} of partition {partition} is "
            f"wanted, but it is trimmed up to {start}: start from a newer snapshot"
        )
        self.url = url
        self.partition = partition
        self.after = after
        self.start = start


class Fenced(RetrievalError):
    """A writer of a log partition after which another one has taken over."""

    def __init__(self, partition: int, epoch: int, current: int) -> None:
        super().__init__(
            f"epoch {epoch} of log partition {partition} is over, epoch {current} writes it now"
        )
        self.partition = partition
        self.epoch = epoch
        self.current = current


class StateError(RetrievalError):
    """A state directory or port that is in use, or holds nothing to work on."""


class RemoteError(RetrievalError):
    """A request that the cluster refused; ``code`` is the name of the gRPC status."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
