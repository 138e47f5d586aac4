"""A generation that somebody else brings to this host, waited for."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

_RETRY_S = 0.2

_log = logging.getLogger(__name__)


def await_staged(wanted: Callable[[], str], sleep: Callable[[float], None] = time.sleep) -> str:
    """Return the directory of a generation once it is there.

    A directory of generations holds whole ones only, so its name says enough.

    Args:
        wanted: returns the directory that is wanted by now, which may change meanwhile.
        sleep: waits for so many seconds.
    """
    said = ""
    while not Path(found := wanted()).is_dir():
        if found != said:
            _log.warning("the process waits for %s, which is not on this host yet", found)
        said = found
        sleep(_RETRY_S)
    return found
