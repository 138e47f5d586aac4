import threading
import time
from typing import Any

import pytest

from silvershard.deploy.errors import CommandError, Refused, TimedOut
from silvershard.deploy.scale_routers import render, scale_routers
from silvershard.deploy.state import RouterRecord, StateDir


def running_routers(state: StateDir, *states: Any) -> None:
    record = state.read_record()
    assert record is not None
    routers = tuple(RouterRecord(state=one) for one in states)
    state.write_record(record.model_copy(update={"routers": routers}))


def test_it_is_wanted_and_waited_for_until_all_of_them_serve(idle_state: StateDir) -> None:
    seen: list[int] = []

    def obey() -> None:
        give_up_s = time.monotonic() + 60.0
        while not (wanted := idle_state.control.read().routers):
            assert time.monotonic() < give_up_s
            time.sleep(0.001)
        seen.append(wanted)
        running_routers(idle_state, "serving", "starting")
        running_routers(idle_state, "serving", "starting", "serving")
        seen.append(0)
        running_routers(idle_state, "serving", "serving", "serving")

    thread = threading.Thread(target=obey, daemon=True)
    thread.start()
    found = scale_routers(idle_state, 3, timeout_s=60.0)
    assert seen == [3, 0]
    thread.join(60.0)
    assert (found["before"], found["after"], found["done"]) == (1, 3, True)
    assert render(found).startswith("scaled from 1 to 3 routers in ")


def test_a_dry_run_changes_nothing(idle_state: StateDir) -> None:
    running_routers(idle_state, "serving", "serving")
    before = idle_state.control.read()
    found = scale_routers(idle_state, 5, dry_run=True, timeout_s=1.0)
    assert render(found) == "would go from 2 to 5 routers"
    assert idle_state.control.read() == before


@pytest.mark.parametrize("number", [0, 65])
def test_a_number_out_of_bounds_is_refused(idle_state: StateDir, number: int) -> None:
    with pytest.raises(CommandError, match=rf"routers must be in 1\.\.64, got {number}"):
        scale_routers(idle_state, number, timeout_s=1.0)


def test_what_takes_too_long_goes_on(idle_state: StateDir) -> None:
    running_routers(idle_state, "serving", "starting")
    with pytest.raises(TimedOut, match=r"not 2 routers serve after 0\.2 s: it goes on"):
        scale_routers(idle_state, 2, timeout_s=0.2)
    assert idle_state.control.read().routers == 2


def test_several_hosts_have_the_routers_that_up_gave_them(idle_state: StateDir) -> None:
    record = idle_state.read_record()
    assert record is not None
    idle_state.write_record(record.model_copy(update={"ray": "10.0.0.9:6379"}))
    with pytest.raises(Refused, match="by `up --routers`"):
        scale_routers(idle_state, 2, timeout_s=1.0)
