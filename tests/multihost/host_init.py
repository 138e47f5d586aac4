"""The first process of a host of the tests: it starts Ray again whenever that ends, like systemd.

Run it as the first process of new namespaces for processes, mounts and the network, with the name
of the host, its folder, and what is to be seen elsewhere of it: ``FROM:TO`` pairs. What follows
``--`` is kept running. Every process of the host ends with it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PAUSE_S = 1.0


def main() -> None:
    split = sys.argv.index("--")
    name, folder, *mounts = sys.argv[1:split]
    command = sys.argv[split + 1 :]
    for pair in mounts:
        source, target = pair.split(":")
        subprocess.run(["mount", "--bind", source, target], check=True)
    subprocess.run(["hostname", name], check=True)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ready = Path(folder, "ready")
    service = 0
    next_s = 0.0
    while True:
        is_due = not service and time.monotonic() >= next_s
        if command and is_due and Path(folder, "go").exists():
            service = os.fork()
            if service == 0:
                log = os.open(f"{folder}/service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.setsid()
                os.execvp(command[0], command)
        ready.touch()
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == service:
                service, next_s = 0, time.monotonic() + PAUSE_S
        signal.sigtimedwait([signal.SIGCHLD], 0.1)


if __name__ == "__main__":
    main()
