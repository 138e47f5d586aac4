"""What carries out the operations of the admin plane: one process after another, off the driver."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from silvershard.cluster.codec import Refusal
from silvershard.deploy.admin_errors import failure_of
from silvershard.deploy.admin_process import Errand, Said
from silvershard.deploy.admin_store import AdminOperation, AdminStore, AdminTask, Failure
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Operation, OperationState
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import Overloaded, RetrievalError, StateError

COMMAND = (sys.executable, "-P", "-m", "silvershard.deploy.admin_process")
MAX_GOING = 16
"""Operations that wait or run; more are refused."""

_QUICK = ("plan", "rollback")
"""They load nothing, so they do not wait behind what does; a rollback is for emergencies."""
_KEPT_LINES = 100
_MAX_LINE_BYTES = 4 << 20
_RETRY_AFTER_S = 5.0
_WRITE_AGAIN_S = 1.0
"""Time between two tries to write an end."""

_log = logging.getLogger(__name__)


@dataclass
class _Going:
    """An operation that waits or runs."""

    operation: AdminOperation
    said: Said = field(default_factory=Said)
    """What its process said last of its outcome."""
    called_off: OperationState | None = None
    """What it shall end as, where somebody wants its end."""
    exit_code: int = 0
    task: "asyncio.Task[None] | None" = None
    """Carries it out."""
    end: "asyncio.Task[None] | None" = None
    """Writes what it has ended as, when it has."""


class AdminRunner:
    """Takes operations and carries them out; use it on one event loop."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        command: Sequence[str] = COMMAND,
        grace_s: float = 5.0,
    ) -> None:
        """Take over what an earlier cluster has left: what it had not ended is abandoned.

        Args:
            state: of the cluster.
            config: its settings.
            command: starts the process of an operation.
            grace_s: time that a process which is called off has to end by itself.

        Raises:
            StateError: if the control store cannot be used.
        """
        self._state = state
        self._config = config
        self._command = tuple(command)
        self._grace_s = grace_s
        self._store = AdminStore(state.control_file)
        self._control = state.control
        self._going: dict[str, _Going] = {}
        self._lanes = {is_quick: asyncio.Lock() for is_quick in (False, True)}
        self._is_closed = False
        for operation in self._store.all():
            if not operation.has_ended:
                self._end(_Going(operation, called_off="abandoned"))

    def submit(self, operation_id: str, task: AdminTask) -> AdminOperation:
        """Return the operation of a name, which is begun unless it was begun before.

        Raises:
            Refusal: if the name is that of another task, or the cluster is stopping.
            Overloaded: if too many operations are going on.
            StateError: if the control store cannot be used.
        """
        found = self._store.get(operation_id)
        if found is None:
            return self._begin(operation_id, task)
        if found.task != task:
            raise Refusal(
                "FAILED_PRECONDITION",
                f"operation {operation_id} is another one, {_words(found.task)}: "
                f"choose a new operation_id for {_words(task)}",
                "OPERATION_ID_USED",
            )
        return found

    def _begin(self, operation_id: str, task: AdminTask) -> AdminOperation:
        if self._is_closed:
            raise Refusal("UNAVAILABLE", "the cluster is stopping", "STOPPING")
        if len(self._going) >= MAX_GOING:
            raise Overloaded(
                f"{len(self._going)} operations are going on, at most {MAX_GOING} may",
                _RETRY_AFTER_S,
            )
        operation = self._store.add(
            AdminOperation(
                operation_id=operation_id,
                task=task,
                swap_id=secrets.token_hex(8),
                began_unix_s=time.time(),
            )
        )
        going = self._going[operation_id] = _Going(operation)
        going.task = asyncio.create_task(self._carry_out(going))
        # A task of its own, for the one that is called off may never get to run.
        going.end = asyncio.create_task(self._finish(going, going.task))
        return operation

    def find(self, operation_id: str) -> AdminOperation:
        """Return an operation.

        Raises:
            Refusal: if it is unknown.
            StateError: if the control store cannot be used.
        """
        found = self._store.get(operation_id)
        if found is None:
            raise Refusal("NOT_FOUND", f"no operation {operation_id}", "OPERATION_NOT_FOUND")
        return found

    def all(self) -> list[AdminOperation]:
        """Return every operation that is remembered, the newest first.

        Raises:
            StateError: if the control store cannot be used.
        """
        return self._store.all()

    async def wait(self, operation_id: str, timeout_s: float | None) -> AdminOperation:
        """Return an operation when it has ended, or as it is when the time is up.

        Raises:
            Refusal: if it is unknown.
            StateError: if the control store cannot be used.
        """
        going = self._going.get(operation_id)
        if going is not None and going.end is not None:
            await asyncio.wait({going.end}, timeout=timeout_s)
        return self.find(operation_id)

    def cancel(self, operation_id: str) -> AdminOperation:
        """Ask for the end of an operation and return it; one that has ended stays as it is.

        Raises:
            Refusal: if it is unknown.
            StateError: if the control store cannot be used.
        """
        self._call_off(operation_id, "cancelled")
        return self.find(operation_id)

    def _call_off(self, operation_id: str, ends_as: OperationState) -> None:
        going = self._going.get(operation_id)
        if going is None or going.task is None or going.task.done():
            return
        # A second one would interrupt what the first one does.
        if going.called_off is None:
            going.called_off = ends_as
            going.task.cancel()

    async def close(self) -> None:
        """End everything; what is going on is abandoned."""
        self._is_closed = True
        ends = [one.end for one in self._going.values() if one.end is not None]
        for operation_id in list(self._going):
            self._call_off(operation_id, "abandoned")
        await asyncio.gather(*ends, return_exceptions=True)

    async def _carry_out(self, going: _Going) -> None:
        operation = going.operation
        try:
            async with self._lanes[operation.task.kind in _QUICK]:
                self._put(going, state="running")
                await self._run(going)
        except asyncio.CancelledError:
            # Only this class cancels it, and says what it ends as.
            pass
        except Exception as error:  # noqa: BLE001 - the border of a task: it is said what failed
            going.said = Said(failure=failure_of(error))

    async def _finish(self, going: _Going, task: "asyncio.Task[None]") -> None:
        """Write what an operation has ended as; while that fails, it goes on for its callers.

        A cluster that stops leaves it to the next one.
        """
        await asyncio.wait({task})
        name, said = going.operation.operation_id, ""
        while True:
            try:
                self._end(going)
                break
            except RetrievalError as error:
                if said != str(error):
                    said = str(error)
                    _log.error("the end of operation %s is not recorded: %s", name, said)
            if self._is_closed:
                break
            await asyncio.sleep(_WRITE_AGAIN_S)
        del self._going[name]

    async def _run(self, going: _Going) -> None:
        """Run the process of an operation to its end, however that comes."""
        operation = going.operation
        errand = Errand(config=self._config, task=operation.task, swap_id=operation.swap_id)
        # The kernel ends it with the thread that started it, which is that of this loop.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *("--state", str(self._state.root), "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        listener = asyncio.create_task(self._listen(going, process))
        try:
            assert process.stdin is not None
            process.stdin.write(errand.model_dump_json().encode())
            process.stdin.close()
            await process.wait()
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), self._grace_s)
                except TimeoutError:
                    process.kill()
                    await process.wait()
            going.exit_code = process.returncode or 0
            await listener

    async def _listen(self, going: _Going, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            said = Said.model_validate_json(line)
            if said.progress:
                lines = (*going.operation.progress, said.progress)[-_KEPT_LINES:]
                with contextlib.suppress(StateError):
                    self._put(going, progress=lines)
            else:
                going.said = said

    def _put(self, going: _Going, **changes: object) -> None:
        going.operation = self._store.put(going.operation.model_copy(update=changes))

    def _end(self, going: _Going) -> None:
        """Write what an operation has ended as."""
        result, failure = going.said.result, going.said.failure
        state: OperationState = "done" if failure is None else "failed"
        if result is None:
            # The driver may have been quicker than whoever wanted its end, or what it was told by.
            name, swap_id = going.operation.operation_id, going.operation.swap_id
            swap = self._control.call_off(swap_id, "its operation was called off")
            if swap is not None and swap.state == "done":
                if failure is not None:
                    _log.warning("operation %s is done, its process: %s", name, failure.message)
                state, failure = "done", None
                result = _done(swap)
            elif failure is None:
                state = going.called_off or "failed"
                failure = _lost(state, going.exit_code)
        self._put(going, state=state, result=result, failure=failure, ended_unix_s=time.time())


def _done(swap: Operation) -> dict[str, Any]:
    """Return what the driver has done, as far as the control store says it."""
    if swap.scaled is not None:
        return {"after": swap.scaled.size.model_dump(), "done": True}
    return {"alias": swap.alias, "generation": swap.generation, "done": True}


def _lost(state: OperationState, exit_code: int) -> Failure:
    """Return why an operation is not done whose process has not said it."""
    if state == "cancelled":
        return Failure(code="CANCELLED", reason="CANCELLED", message="it was cancelled")
    if state == "abandoned":
        message = "the cluster ended before it was done"
        return Failure(code="ABORTED", reason="ABANDONED", message=message)
    how = f"exit code {exit_code}"
    if exit_code < 0:
        how = f"ended by {signal.Signals(-exit_code).name}"
    return Failure(code="ABORTED", reason="PROCESS_LOST", message=f"its process is gone: {how}")


def _words(task: AdminTask) -> str:
    """Return a task for people: what is not as by default."""
    given = task.model_dump(exclude_defaults=True)
    rest = ", ".join(f"{name} {value}" for name, value in given.items() if name != "kind")
    return f"{task.kind}({rest})"
