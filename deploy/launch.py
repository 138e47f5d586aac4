"""Starting and stopping the cluster of a state directory from a command."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from silvershard.cluster.config import ListenSection
from silvershard.cluster.http_server import bind_http
from silvershard.cluster.listen import Door, check_host
from silvershard.cluster.secret_file import make_secret
from silvershard.cluster.tls import check_tls
from silvershard.cluster.tokens import TokenFile
from silvershard.deploy.access import TOKEN_VARIABLE, secured
from silvershard.deploy.cli import ENVIRONMENT
from silvershard.deploy.config import Config
from silvershard.deploy.control_place import move_control
from silvershard.deploy.errors import CommandError, ExitCode, NotPublished, Refused, TimedOut
from silvershard.deploy.processes import is_alive, kill_all, send_signal, wait_gone
from silvershard.deploy.progress import Progress
from silvershard.deploy.router_watch import http_wanted
from silvershard.deploy.serve import Launch
from silvershard.deploy.state import RAY_DIR_PREFIX, ClusterRecord, StateDir, remove_ray_dir
from silvershard.shard.errors import ConfigError, StateError
from silvershard.shard.generations import generation_dir, list_generations

_SHORT_TMP = "/tmp"
_MAX_TMP_BYTES = 30
"""Longest parent of Ray's directory: the paths of its sockets have at most 107 bytes."""


class Stopped(NamedTuple):
    """What ``stop`` found and did."""

    was_running: bool
    leftovers: int
    """Processes of a crashed cluster that were ended."""
    killed: int
    """Processes that did not end in time and were killed."""


def check_security(config: Config) -> None:
    """Check that strangers cannot reach what is about to be opened, and that its files fit.

    Raises:
        Refused: if other machines could reach a port that is not protected.
        ConfigError: if certificates or tokens cannot be used.
    """
    security = config.security
    check_tls(security.tls)
    if security.tokens:
        TokenFile.read(Path(security.tokens))
    # The certificate itself is not needed to see who could come in.
    door = Door(security.tls.enabled or None, bool(security.tokens), security.insecure)
    try:
        check_host(config.listen.host, door)
        if config.admin.enabled:
            check_host(config.admin.host, door, "admin.host")
    except ConfigError as error:
        raise Refused(str(error)) from None


def check_listen(listen: ListenSection) -> None:
    """Check that a router can listen there.

    Raises:
        CommandError: if the port is in use or the address is not of this machine.
    """
    if listen.port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
        raise CommandError(
            f"cannot listen on {listen.host}:{listen.port}: {problem}; "
            "choose another with --listen HOST:PORT, or port 0 for any free one"
        ) from None


def check_http(config: Config) -> None:
    """Check that a router may and can answer probes where it shall.

    Raises:
        Refused: if other machines could reach it and ``observability.insecure`` is not set.
        CommandError: if the port is in use or the address is not of this machine.
    """
    wanted = [http_wanted(config, number) for number in range(config.runtime.routers)]
    try:
        for http in filter(None, wanted):
            bind_http(http, insecure=config.observability.insecure).close()
    except ConfigError as error:
        raise Refused(str(error)) from None
    except StateError as error:
        raise CommandError(str(error)) from None


def choose_generation(state: StateDir, wanted: int | None) -> tuple[int, Path]:
    """Return the number and directory of a published generation.

    Args:
        state: where it is published.
        wanted: its number; 0 is the newest; None is the one that was live last, if it is still
            there, else the newest.

    Raises:
        NotPublished: if there is none, saying how to make one.
    """
    published = list_generations(state.generations)
    if not published:
        raise NotPublished(
            f"no generation is published in {state.root}: "
            "run `silvershard train` and then `silvershard publish`"
        )
    if wanted is None:
        live = state.control.read().live
        wanted = live if live in published else 0
    generation = wanted or published[-1]
    if generation not in published:
        raise NotPublished(
            f"generation {generation} is not published in {state.root}; "
            f"there {'is' if len(published) == 1 else 'are'} {', '.join(map(str, published))}"
        )
    return generation, generation_dir(state.generations, generation)


def start(
    state: StateDir,
    config: Config,
    *,
    generation: int | None = None,
    detached: bool = True,
    admit: Callable[[Path], None] = lambda _: None,
    verify: Callable[[Path], None] | None = None,
    report: Callable[[str], None] = lambda _: None,
    ended: Callable[[int], None] = lambda _: None,
) -> ClusterRecord:
    """Start a cluster and wait until it serves every document.

    Args:
        state: the directory to run on.
        config: settings.
        generation: its number, or 0 or None as for ``choose_generation``.
        detached: keep it running after this process; otherwise it ends with this process, however
            that ends.
        admit: checks the snapshot before anything is started, and raises what is against it.
        verify: checks the snapshot while the processes start, and raises what is wrong with it.
        report: hears what is being waited for.
        ended: hears on a thread of its own that a cluster that had started is over, and its exit
            code: 0 if it was told to stop.

    Raises:
        Refused: if a cluster runs there already, or the address is not allowed.
        ConfigError: if a file of security cannot be used.
        CommandError: if it cannot start; nothing is left running.
        TimedOut: if it does not start in time; nothing is left running.
    """
    config = secured(config, state)
    check_security(config)
    check_listen(config.listen)
    check_http(config)
    # Nothing is made where there is nothing to serve.
    choose_generation(state, generation)
    state.create()
    lock = state.lock()
    ray_dir = ""
    try:
        move_control(state.root, config.control.store)
        number, snapshot = choose_generation(state, generation)
        launched = Launch(config=config, generation=number, snapshot=str(snapshot))
        admit(snapshot)
        state.clean_leftovers()
        make_secret(Path(config.security.secret))
        ray_dir = _make_ray_dir()
        guard, progress = _spawn(state, launched, ray_dir, lock, detached=detached)
    except BaseException:
        remove_ray_dir(ray_dir)
        raise
    finally:
        # From here on the guard holds the lock.
        os.close(lock)
    try:
        with os.fdopen(progress, "rb") as stream:
            _wait_ready(stream.fileno(), config.runtime.start_timeout_s, verify, snapshot, report)
        record = state.read_record()
        if record is None:
            raise CommandError(f"the cluster ended as soon as it was ready; see {state.daemon_log}")
    except BaseException:
        _end(guard, config.runtime.stop_timeout_s)
        # A guard that ended before it had begun has not removed it.
        remove_ray_dir(ray_dir)
        raise
    # Somebody must wait for the guard, lest it stay as a zombie while this process lives.
    threading.Thread(target=lambda: ended(guard.wait()), daemon=True, name="guard").start()
    return record


def _make_ray_dir() -> str:
    """Return a new directory whose path leaves room for the names of Ray's sockets."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _MAX_TMP_BYTES:
        parent = _SHORT_TMP
    return tempfile.mkdtemp(prefix=RAY_DIR_PREFIX, dir=parent)


def _spawn(
    state: StateDir, launched: Launch, ray_dir: str, lock: int, *, detached: bool
) -> tuple["subprocess.Popen[bytes]", int]:
    """Start the guard; return it and the descriptor that its driver reports on."""
    readable, writable = os.pipe()
    try:
        with state.daemon_log.open("ab") as log:
            guard = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "silvershard.deploy.guard"),
                    *("--state", str(state.root), "--lock-fd", str(lock)),
                    *("--status-fd", str(writable), "--ray-dir", ray_dir),
                    *("--stop-timeout-s", str(launched.config.runtime.stop_timeout_s)),
                    *("--parent", "0" if detached else str(os.getpid())),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(lock, writable),
                start_new_session=True,
                env={**ENVIRONMENT, **_without_token(os.environ)},
            )
        assert guard.stdin is not None
        with contextlib.suppress(BrokenPipeError), guard.stdin:
            guard.stdin.write(launched.model_dump_json().encode())
    except BaseException:
        os.close(readable)
        raise
    finally:
        os.close(writable)
    return guard, readable


def _without_token(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a cluster, which needs no token of who starts it."""
    return {name: value for name, value in environ.items() if name != TOKEN_VARIABLE}


def _wait_ready(
    progress: int,
    timeout_s: float,
    verify: Callable[[Path], None] | None,
    snapshot: Path,
    report: Callable[[str], None],
) -> None:
    broken: list[BaseException] = []
    if verify is not None:
        threading.Thread(
            target=_verify, args=(verify, snapshot, broken), daemon=True, name="verify"
        ).start()
    # The driver keeps to its own limit; this one is for a driver that hangs.
    give_up_s = time.monotonic() + timeout_s + 10.0
    for line in _lines(progress, give_up_s, broken):
        told = Progress.model_validate_json(line)
        if told.ready:
            return
        if told.error:
            raise CommandError(
                f"the cluster could not start: {told.error}", ExitCode(told.exit_code)
            )
        report(told.phase)
    raise CommandError("the cluster could not start: its driver ended without a word")


def _verify(verify: Callable[[Path], None], snapshot: Path, broken: list[BaseException]) -> None:
    try:
        verify(snapshot)
    except Exception as error:  # noqa: BLE001 - handed to the thread that waits
        broken.append(error)


def _lines(descriptor: int, give_up_s: float, broken: list[BaseException]) -> Iterator[bytes]:
    """Yield lines as they come; raise what ``broken`` receives meanwhile."""
    rest = b""
    while True:
        if broken:
            raise broken[0]
        if time.monotonic() > give_up_s:
            raise TimedOut("the cluster did not start in time")
        if not select.select([descriptor], [], [], 0.05)[0]:
            continue
        content = os.read(descriptor, 65536)
        if not content:
            return
        *lines, rest = (rest + content).split(b"\n")
        yield from lines


def _end(guard: "subprocess.Popen[bytes]", stop_timeout_s: float) -> None:
    """End a guard that this process started, and with it all below it."""
    guard.terminate()
    try:
        guard.wait(stop_timeout_s + 15.0)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


def stop(state: StateDir, *, timeout_s: float) -> Stopped:
    """Stop the cluster of a state directory and wait until its last process is gone.

    Nothing that is not proven to belong to the cluster is signalled. It is no error if none runs.

    Args:
        state: the directory.
        timeout_s: longest orderly end; after it the processes are killed.

    Raises:
        TimedOut: if a process does not even end when killed.
    """
    record = state.read_record() if state.root.is_dir() else None
    if record is None:
        if state.is_locked():
            raise CommandError(
                f"a cluster is starting on {state.root}; wait for it, or interrupt its `up`"
            )
        return Stopped(was_running=False, leftovers=0, killed=0)
    running = is_alive(record.guard) or is_alive(record.driver)
    if not running:
        lock = state.lock()
        try:
            return Stopped(was_running=False, leftovers=state.clean_leftovers(), killed=0)
        finally:
            os.close(lock)
    send_signal(record.guard, signal.SIGTERM) or send_signal(record.driver, signal.SIGTERM)
    wait_gone((record.guard, record.driver), timeout_s)
    latest = state.read_record() or record
    own = (record.guard, record.driver, *record.processes, *latest.processes)
    left = [process for process in dict.fromkeys(own) if is_alive(process)]
    stubborn = kill_all(left)
    if stubborn:
        pids = ", ".join(str(process.pid) for process in stubborn)
        raise TimedOut(f"these processes could not be ended: {pids}")
    remove_ray_dir(record.ray_dir)
    state.clear_record()
    return Stopped(was_running=True, leftovers=0, killed=len(left))
