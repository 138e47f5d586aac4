import threading
import time

import pytest

from silvershard.deploy import carry_out
from silvershard.deploy.carry_out import awaited, refuse_if_busy
from silvershard.deploy.control_store import Operation, wanted
from silvershard.deploy.errors import CommandError, Refused, TimedOut
from silvershard.deploy.state import StateDir


def asked(state: StateDir) -> Operation:
    operation = wanted("activate", 2, "live")
    state.control.change(lambda now: now.with_operation(operation))
    return operation


def wait(state: StateDir, operation: Operation, until_s: float, lines: list[str]) -> Operation:
    return awaited(
        state,
        state.control,
        operation,
        until_s=until_s,
        report=lines.append,
        unless="it is not done",
    )


def test_what_ends_is_returned_with_its_progress_on_the_way(idle_state: StateDir) -> None:
    operation, lines = asked(idle_state), []
    store = idle_state.control
    running = operation.model_copy(update={"state": "running", "progress": "loading"})
    store.change(lambda now: now.replaced(running))

    def end() -> None:
        give_up_s = time.monotonic() + 60.0
        while not lines and time.monotonic() < give_up_s:
            time.sleep(0.001)
        store.change(lambda now: now.replaced(running.ended("done")))

    thread = threading.Thread(target=end)
    thread.start()
    found = wait(idle_state, operation, time.monotonic() + 60.0, lines)
    thread.join()
    assert (found.state, lines) == ("done", ["loading"])


def test_what_takes_too_long_goes_on(idle_state: StateDir) -> None:
    operation = asked(idle_state)
    with pytest.raises(TimedOut, match=r"^it is not done yet: it goes on, see `silvershard"):
        wait(idle_state, operation, time.monotonic() - 1.0, [])
    assert idle_state.control.read().current == operation
    with pytest.raises(Refused, match="activate of generation 2 is going on since 0 s: wait"):
        refuse_if_busy(idle_state.control.read())


def test_what_is_interrupted_is_called_off(
    idle_state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = asked(idle_state)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(carry_out.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wait(idle_state, operation, time.monotonic() + 60.0, [])
    ended = idle_state.control.read().operation(operation.operation_id)
    assert ended is not None
    assert (ended.state, ended.reason) == ("cancelled", "its command was interrupted")
    refuse_if_busy(idle_state.control.read())


def test_a_cluster_that_ends_meanwhile_does_nothing_more(idle_state: StateDir) -> None:
    operation = asked(idle_state)
    idle_state.record_file.unlink()
    with pytest.raises(CommandError, match="the cluster ended before it was done"):
        wait(idle_state, operation, time.monotonic() + 60.0, [])


def test_what_was_forgotten_counts_as_abandoned(idle_state: StateDir) -> None:
    operation = wanted("activate", 2, "live")
    found = wait(idle_state, operation, time.monotonic() + 60.0, [])
    assert (found.state, found.reason) == ("abandoned", "it was forgotten")
