"""The command line: ``silvershard VERB``.

It imports nothing before it has set the environment that libraries read when they are imported.
"""

import os
import sys
from collections.abc import Sequence

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GRPC_VERBOSITY": "ERROR",
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}
"""What every process of silvershard runs with, unless its user says otherwise.

gRPC otherwise reports every connection that a peer closes, in lines of its own form. Threads of
torch that wait for each other spin by default: with one of two cores busy, training with two
threads took more than twice as long as with threads that sleep. The event engine of gRPC hands
every message from thread to thread, although whoever waits for messages can read them as well.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from silvershard.deploy import verbs

    return verbs.run(argv)


if __name__ == "__main__":
    sys.exit(main())
