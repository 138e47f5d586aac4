"""What is read from files that may be replaced while it is in use."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from silvershard.shard.errors import ConfigError

_log = logging.getLogger(__name__)

_EVERY_S = 0.5

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """A value read from files, and read anew when one of them changes; any thread may ask.

    What cannot be read is logged, and the last good value stays in force: a file that is just
    being replaced must lock nobody out, nor let anybody in.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        every_s: float = _EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the value.

        Args:
            paths: files that it depends on.
            read: reads it; raises ConfigError if it cannot be used.
            every_s: least time between two looks at the files.
            clock: in seconds.

        Raises:
            ConfigError: if it cannot be used.
        """
        self._paths = paths
        self._read = read
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._value = read()
        self._next_s = clock() + every_s

    @property
    def value(self) -> T:
        """Return the newest good value."""
        if self._clock() >= self._next_s:
            with self._lock:
                self._next_s = self._clock() + self._every_s
                stamp = self._look()
                if stamp != self._stamp:
                    self._take(stamp)
        return self._value

    def _take(self, stamp: _Stamp) -> None:
        """Read the value of files that changed; one that is refused is not tried again."""
        self._stamp = stamp
        try:
            self._value = self._read()
        except ConfigError as error:
            _log.error("what was read before stays in force: %s", error)
        else:
            _log.info("read anew: %s", ", ".join(map(str, self._paths)))

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode
