import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from silvershard.deploy.processes import (
    Process,
    Processes,
    descendants,
    identify,
    is_alive,
    kill_all,
    myself,
    send_signal,
    wait_gone,
)

Spawn = Callable[..., "subprocess.Popen[str]"]

WAIT_FOR_INPUT = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a Python program and wait for its first line; it ends with the test."""
    with ExitStack() as stack:

        def start(code: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        yield start


def until(true: Callable[[], bool]) -> bool:
    give_up_s = time.monotonic() + 20
    while not true():
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.005)
    return True


def known(pid: int) -> Process:
    process = identify(pid)
    assert process is not None
    return process


def test_a_process_is_alive_until_it_ends(spawn: Spawn) -> None:
    child = spawn(WAIT_FOR_INPUT)
    process = known(child.pid)
    assert is_alive(process)
    assert wait_gone([process], 0.02) == [process]
    child.kill()
    child.wait()
    assert wait_gone([process], 5.0) == []


def test_a_zombie_is_gone(spawn: Spawn) -> None:
    child = spawn(WAIT_FOR_INPUT)
    process = known(child.pid)
    child.kill()
    assert until(lambda: not is_alive(process))
    # Nobody has waited for it yet, so its entry is still there.
    os.kill(child.pid, 0)


def test_a_reused_pid_is_never_signalled(spawn: Spawn) -> None:
    child = spawn(WAIT_FOR_INPUT)
    process = known(child.pid)
    earlier = process.model_copy(update={"started": process.started - 1})
    other_boot = process.model_copy(update={"boot": "another"})
    for impostor in (earlier, other_boot):
        assert not is_alive(impostor)
        assert not send_signal(impostor, signal.SIGKILL)
        assert kill_all([impostor]) == []
    assert child.poll() is None
    assert kill_all([process]) == []
    assert child.wait() == -signal.SIGKILL


def test_a_signal_to_a_process_that_is_gone_is_not_sent(spawn: Spawn) -> None:
    child = spawn(WAIT_FOR_INPUT)
    process = known(child.pid)
    child.kill()
    child.wait()
    assert not send_signal(process, signal.SIGTERM)


def test_descendants_are_children_and_their_children_but_nobody_else(spawn: Spawn) -> None:
    inner = "import sys; sys.stdin.read()"
    child = spawn(
        "import subprocess, sys\n"
        f"inner = subprocess.Popen([sys.executable, '-c', {inner!r}], stdin=subprocess.PIPE)\n"
        "print(inner.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    stranger = spawn(WAIT_FOR_INPUT)
    found = descendants(child.pid)
    assert len(found) == 1
    mine = [one.pid for one in descendants(os.getpid())]
    assert mine.index(child.pid) < mine.index(found[0].pid)
    assert stranger.pid in mine
    assert os.getpid() not in mine
    kill_all(found)


def test_a_program_ends_with_its_parent(spawn: Spawn) -> None:
    inner = (
        "import os, sys\n"
        "from silvershard.deploy.processes import die_with_parent\n"
        "die_with_parent(int(sys.argv[1]))\n"
        "print('up', flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    outer = spawn(
        "import os, subprocess, sys\n"
        f"inner = subprocess.Popen([sys.executable, '-P', '-c', {inner!r}, str(os.getpid())],"
        " stdout=subprocess.PIPE)\n"
        "inner.stdout.readline()\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (child,) = descendants(outer.pid)
    outer.kill()
    outer.wait()
    assert wait_gone([child], 5.0) == []


def test_a_program_whose_parent_is_gone_already_ends_at_once() -> None:
    code = (
        "from silvershard.deploy.processes import die_with_parent\n"
        "die_with_parent(1 << 22)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"")


def test_an_orphan_becomes_a_child_of_its_adopter(spawn: Spawn) -> None:
    middle = (
        "import subprocess, sys\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    adopter = spawn(
        "import subprocess, sys\n"
        "from silvershard.deploy.processes import adopt_orphans\n"
        "adopt_orphans()\n"
        f"subprocess.run([sys.executable, '-c', {middle!r}], stdout=subprocess.DEVNULL)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (orphan,) = descendants(adopter.pid)
    assert kill_all([orphan]) == []


def test_this_process_knows_itself() -> None:
    assert myself().pid == os.getpid()
    assert is_alive(myself())


def test_a_process_that_steps_back_gets_what_others_leave(spawn: Spawn) -> None:
    stepped = spawn(
        "import os, sys\n"
        "os.setsid()\n"
        "from silvershard.deploy.processes import step_back\n"
        "step_back()\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, stepped.pid) == min(mine + 10, 19)
    autogroup = Path(f"/proc/{stepped.pid}/autogroup")
    if autogroup.exists() and autogroup.read_text().strip():
        assert autogroup.read_text().split()[-1] == "10"


def test_those_who_watch_see_a_process_and_may_kill_it(spawn: Spawn) -> None:
    processes, child = Processes(), spawn(WAIT_FOR_INPUT)
    known = processes.identify(child.pid)
    assert known is not None
    assert known == identify(child.pid)
    assert processes.is_alive(known)
    assert processes.kill(known)
    child.wait()
    assert not processes.is_alive(known)
    assert not processes.kill(known)
    assert processes.identify(child.pid) is None
