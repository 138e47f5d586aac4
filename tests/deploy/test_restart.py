import threading
import time
from typing import Any

import pytest

from silvershard.deploy.control_store import wanted
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.restart import render, restart
from silvershard.deploy.state import StateDir


def ended_by(state: StateDir, end: Any, reason: str = "") -> threading.Thread:
    """Do in place of a driver what is wanted."""

    def run() -> None:
        give_up_s = time.monotonic() + 60.0
        store = state.control
        while (going := store.read().current) is None:
            assert time.monotonic() < give_up_s
            time.sleep(0.001)
        assert going.kind == "restart"
        ended = going.ended(end, reason)
        store.change(lambda now: now.replaced(ended))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_it_is_wanted_and_waited_for(idle_state: StateDir) -> None:
    thread = ended_by(idle_state, "done")
    found = restart(idle_state, timeout_s=60.0, report=lambda _: None)
    thread.join(60.0)
    assert (found["processes"], found["done"]) == (1, True)
    assert render(found).startswith(
        "restarted 1 shard processes and 1 router one after the other in "
    )


def test_what_could_not_be_done_says_why(idle_state: StateDir) -> None:
    thread = ended_by(idle_state, "failed", "shard 0 could not start again: p-00003 is damaged")
    with pytest.raises(CommandError, match="not every process is restarted: shard 0 could not"):
        restart(idle_state, timeout_s=60.0, report=lambda _: None)
    thread.join(60.0)


def test_a_dry_run_changes_nothing(idle_state: StateDir) -> None:
    before = idle_state.control.read()
    found = restart(idle_state, dry_run=True, timeout_s=1.0, report=lambda _: None)
    assert render(found) == (
        "would restart 1 shard processes and 1 router one after the other, with a further copy of "
        "every shard meanwhile"
    )
    assert idle_state.control.read() == before


def test_one_thing_at_a_time(idle_state: StateDir) -> None:
    operation = wanted("activate", 2, "live")
    idle_state.control.change(lambda now: now.with_operation(operation))
    with pytest.raises(Refused, match="activate of generation 2 is going on"):
        restart(idle_state, timeout_s=1.0, report=lambda _: None)
