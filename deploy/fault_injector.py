"""Injects faults into a running cluster, tells which ones there are, and ends them.

Processes suffer most faults by themselves, as their file says; for what a victim cannot undo there
is a keeper process. A call returns when the fault is there.
"""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from silvershard.cluster.codec import Refusal
from silvershard.cluster.faults import (
    FaultRecord,
    FaultState,
    forget_said,
    read_faults,
    suffering,
    write_faults,
)
from silvershard.deploy.config import Config
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.fault_keeper import repair
from silvershard.deploy.fault_plan import FaultRequest, check_request, numbers_of, plan_fault
from silvershard.deploy.processes import Process, descendants, identify, send_signal
from silvershard.deploy.state import ClusterRecord, StateDir
from silvershard.model.request import RequestError
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.repository import Repository
from silvershard.shard.snapshot import open_snapshot

_KEPT = 100
"""Faults that are remembered."""
_TAKEN_S = 10.0
"""Longest wait until a process suffers what it shall; a keeper takes a second to start."""
_CLEARED_S = 5.0
_POLL_S = 0.01
_ANSWER_S = 0.5
"""Time that the supervisor has to answer before a fault of its own begins."""

_log = logging.getLogger(__name__)


class FaultInjector:
    """The faults of one cluster; any thread may use it, on the machine of its processes."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        unix_clock: Callable[[], float] = time.time,
        taken_s: float = _TAKEN_S,
    ) -> None:
        """Take over what an earlier supervisor left: what it had not ended is ended.

        Args:
            state: of the cluster.
            config: its settings.
            unix_clock: tells when faults are over, for those who list them.
            taken_s: longest wait until a fault is there.

        Raises:
            StateError: if the file of faults cannot be read.
        """
        self._state = state
        self._directory = state.faults_dir
        self._enabled = config.chaos.enabled
        self._unix_clock = unix_clock
        self._taken_s = taken_s
        self._lock = threading.Lock()
        if self._enabled:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            forget_said(self._directory, _is_there)
            self.close()

    def inject(self, request: FaultRequest) -> FaultRecord:
        """Return a fault once it is there; of a name that was used, as it is now.

        Raises:
            Refusal: if faults are not allowed, the name is that of another fault, or the fault did
                not come about in time, which undoes it.
            RequestError: naming the field that makes no sense.
            CommandError: if it is not safe, or not possible now, in words.
            RepositoryError: if the other copy of a generation cannot be looked at.
        """
        self._check_enabled()
        with self._lock:
            faults = self._settled()
            for known in faults:
                if known.name == request.name:
                    return _same(known, request)
            planned, victims = self._planned(request, faults)
            if request.dry_run:
                return planned
            self._write((*faults, planned))
            try:
                done = self._done(planned, victims)
            except BaseException:
                self._write((*faults, self._ended(planned, "cleared")))
                self._undo(planned)
                raise
            self._write((*faults, done))
        _log.warning("chaos: fault %s begins: %s, pids %s", done.name, done, list(done.pids))
        return done

    def all(self) -> tuple[FaultRecord, ...]:
        """Return the faults that are remembered, the oldest first.

        Raises:
            Refusal: if faults are not allowed.
        """
        self._check_enabled()
        with self._lock:
            return self._settled()

    def clear(self, names: Sequence[str] = ()) -> tuple[FaultRecord, ...]:
        """End faults before their time, by default all; return all that are remembered.

        Raises:
            Refusal: if faults are not allowed, a name is unknown, or a process does not recover.
        """
        self._check_enabled()
        with self._lock:
            faults = self._settled()
            for name in names:
                if name not in {one.name for one in faults}:
                    raise Refusal("NOT_FOUND", f"no fault {name[:80]}", "FAULT_NOT_FOUND")
            doomed = [
                one for one in faults if one.state == "active" and one.name in (names or [one.name])
            ]
            left = tuple(self._ended(one, "cleared") if one in doomed else one for one in faults)
            self._write(left)
            for one in doomed:
                self._undo(one)
            return left

    def close(self) -> None:
        """End all faults; what cannot be ended is logged."""
        if self._enabled:
            try:
                self.clear()
            except Refusal as error:
                _log.error("chaos: %s", error.message)

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise Refusal(
                "FAILED_PRECONDITION",
                "faults are not allowed in this cluster: set chaos.enabled to true and start it "
                "again, where nobody relies on it",
                "CHAOS_DISABLED",
            )

    def _write(self, faults: tuple[FaultRecord, ...]) -> None:
        write_faults(self._directory, faults[-_KEPT:])

    def _settled(self) -> tuple[FaultRecord, ...]:
        """Return what is written down, once what has ended by itself says so."""
        faults = read_faults(self._directory)
        found = tuple(self._ended(one, "over") if self._is_over(one) else one for one in faults)
        if found != faults:
            self._write(found)
        return found

    def _is_over(self, fault: FaultRecord) -> bool:
        due = self._unix_clock() >= fault.began_unix_s + fault.seconds
        return fault.state == "active" and due and not self._is_suffered(fault)

    def _ended(self, fault: FaultRecord, state: FaultState) -> FaultRecord:
        _log.warning("chaos: fault %s is %s: %s", fault.name, state, fault)
        return fault.model_copy(update={"state": state, "ended_unix_s": self._unix_clock()})

    def _is_suffered(self, fault: FaultRecord) -> bool:
        pids = (fault.keeper,) if fault.keeper else fault.pids
        return any(_is_there(pid) and fault.name in suffering(self._directory, pid) for pid in pids)

    def _planned(
        self, request: FaultRequest, faults: Sequence[FaultRecord]
    ) -> tuple[FaultRecord, list[Process]]:
        """Return a fault as it is written down, and the processes of it."""
        form = check_request(request)
        planned = request.record(self._unix_clock())
        if form == "generation":
            return self._damage(planned), []
        record = self._state.read_record()
        if record is None or record.map_version == 0:
            raise CommandError("the cluster is still starting: wait for it")
        active = [one for one in faults if one.state == "active"]
        pids = plan_fault(request, record, active)
        return planned.model_copy(update={"pids": pids}), _own(record, pids)

    def _damage(self, planned: FaultRecord) -> FaultRecord:
        """Return which byte of a generation is damaged.

        Raises:
            RequestError: if there is no such generation.
            Refused: if it is in use, or the only copy.
            RepositoryError: if the other copy cannot be looked at.
            SnapshotError: if it is damaged already.
        """
        (number,) = map(int, numbers_of("generation", planned.target))
        published = list_generations(self._state.generations)
        if number not in published:
            known = ", ".join(map(str, published)) or "none"
            raise RequestError("target", f"there is no generation {number}; there is {known}")
        control, record = self._state.control.read(), self._state.read_record()
        held = {control.live, control.previous, control.canary, control.warm}
        held |= {one.generation for one in (record.generations if record else ())}
        if control.current is not None and not control.current.has_ended:
            held.add(control.current.generation)
        if number in held:
            raise Refused(f"generation {number} is in use: only a staged one may be damaged")
        manifest = open_snapshot(generation_dir(self._state.generations, number)).manifest
        there = Repository(planned.copy_url).manifest(number)
        if there.content_hash != manifest.content_hash:
            raise Refused(
                f"{planned.copy_url} holds other content as generation {number}: what is here is "
                "the only copy"
            )
        name = max(manifest.files, key=lambda one: (manifest.files[one].size, one))
        path = generation_dir(self._state.generations, number) / name
        offset = manifest.files[name].size // 2
        with path.open("rb") as file:
            file.seek(offset)
            byte = file.read(1)[0]
        return planned.model_copy(update={"path": str(path), "offset": offset, "byte": byte})

    def _done(self, planned: FaultRecord, victims: Sequence[Process]) -> FaultRecord:
        """Let a fault come about; return it as it is then."""
        # It must answer before it is gone or stands still.
        after_s = _ANSWER_S if planned.target == "supervisor" else 0.0
        if planned.kind == "kill":
            threading.Timer(after_s, send_signal, (victims[0], signal.SIGKILL)).start()
            return self._ended(planned, "over")
        if planned.kind in ("hang", "corrupt"):
            pid = self._start_keeper(planned, victims, after_s)
            planned = planned.model_copy(update={"keeper": pid})
        if not after_s and not self._wait(lambda: self._is_suffered(planned), self._taken_s):
            raise Refusal(
                "UNAVAILABLE",
                f"{planned.target} did not take the fault within {self._taken_s:g} s; it was "
                "taken back",
                "FAULT_NOT_TAKEN",
            )
        return planned

    def _start_keeper(
        self, planned: FaultRecord, victims: Sequence[Process], after_s: float
    ) -> int:
        command = [sys.executable, "-P", "-m", "silvershard.deploy.fault_keeper"]
        command += ["--directory", str(self._directory), "--fault", planned.name]
        command += ["--after-s", str(after_s)]
        command += ["--victim", victims[0].model_dump_json()] if victims else []
        keeper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # Somebody must wait for it, lest it stay as a zombie.
        threading.Thread(target=keeper.wait, daemon=True, name="keeper").start()
        return keeper.pid

    def _undo(self, fault: FaultRecord) -> None:
        """Make sure that a fault which is written down no more has ended.

        Raises:
            Refusal: if a process says that it still suffers it.
        """
        gone = self._wait(lambda: not self._is_suffered(fault), _CLEARED_S)
        # The keeper may have been killed.
        if fault.kind == "hang":
            for process in filter(None, map(identify, fault.pids)):
                send_signal(process, signal.SIGCONT)
        if fault.kind == "corrupt":
            repair(fault)
        if not gone:
            raise Refusal(
                "UNAVAILABLE",
                f"fault {fault.name} is cleared, and {fault.target} still suffers it",
                "FAULT_NOT_CLEARED",
            )

    def _wait(self, true: Callable[[], bool], timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() >= until_s:
                return False
            time.sleep(_POLL_S)
        return True


def _is_there(pid: int) -> bool:
    return identify(pid) is not None


def _own(record: ClusterRecord, pids: Sequence[int]) -> list[Process]:
    """Return processes of a cluster, told apart from others that may have their pids.

    Raises:
        Refused: if one is not on this machine.
    """
    known = {one.pid: one for one in (record.driver, *descendants(record.driver.pid))}
    for pid in pids:
        if pid not in known:
            raise Refused(f"process {pid} is none of this cluster on this machine any more")
    return [known[pid] for pid in pids]


def _same(known: FaultRecord, request: FaultRequest) -> FaultRecord:
    """Return a fault that is there, if it is the one that is wanted.

    Raises:
        Refusal: if it is another one.
    """
    wanted = request.record(known.began_unix_s)
    fields = ("kind", "target", "seconds", "delay_ms", "share", "copy_url")
    if any(getattr(known, name) != getattr(wanted, name) for name in fields):
        raise Refusal(
            "FAILED_PRECONDITION",
            f"fault {known.name} is another one, {known}: choose a new operation_id for {wanted}",
            "OPERATION_ID_USED",
        )
    return known
