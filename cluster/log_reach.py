"""The update log as a process that starts finds it: there, or waited for."""

import logging
import time
from collections.abc import Callable

from silvershard.cluster.update_log import UpdateLog, open_log
from silvershard.shard.errors import LogUnavailable

_RETRY_S = 0.5

_log = logging.getLogger(__name__)


def reach_log(url: str, sleep: Callable[[float], None] = time.sleep) -> UpdateLog:
    """Return the log at ``url``; waits for one that is not there yet or cannot be reached.

    Raises:
        ConfigError: if it would not keep what it acknowledges.
        LogDamaged: if what is there is not an update log.
    """
    said = ""
    while True:
        try:
            return open_log(url, None, create=False)
        except LogUnavailable as error:
            if str(error) != said:
                _log.warning("the process waits for its update log: %s", error)
            said = str(error)
            sleep(_RETRY_S)
