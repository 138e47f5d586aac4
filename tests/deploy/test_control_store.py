import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from silvershard.deploy.control_store import (
    Conflict,
    Control,
    FileControlStore,
    Operation,
    opened,
    wanted,
)
from silvershard.shard.errors import StateError


@pytest.fixture
def store(tmp_path: Path) -> FileControlStore:
    return FileControlStore(tmp_path / "control.sqlite")


def test_before_the_first_change_nothing_is_live_and_there_is_no_file(
    store: FileControlStore,
) -> None:
    assert store.read() == Control()
    assert not store.path.exists()


def test_a_change_is_read_back_from_a_file_of_its_owner_only(store: FileControlStore) -> None:
    written = store.write(Control(live=3))
    assert written == Control(version=1, live=3)
    assert FileControlStore(store.path).read() == written
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert store.write(written.pointed("live", 4)) == Control(version=2, live=4, previous=3)


def test_a_change_of_what_somebody_else_changed_is_refused(store: FileControlStore) -> None:
    store.write(Control(live=1))
    with pytest.raises(Conflict, match="after version 0"):
        store.write(Control(live=9))
    second = store.read()
    store.write(second.pointed("live", 2))
    with pytest.raises(Conflict, match="after version 1"):
        store.write(second.pointed("live", 3))
    assert store.read().live == 2


def test_changes_of_many_threads_are_all_taken(store: FileControlStore) -> None:
    def add(number: int) -> None:
        for _ in range(5):
            store.change(lambda now: now.model_copy(update={"canary": now.canary + number}))

    threads = [threading.Thread(target=add, args=(number,)) for number in (1, 10, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read() == Control(version=15, canary=555)


def test_a_reader_leaves_the_lock_of_another_thread_alone(store: FileControlStore) -> None:
    store.write(Control(live=1))
    other = (
        "import sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "database.execute('BEGIN IMMEDIATE')\n"
    )
    with opened(store.path, "control (one)") as database:
        database.execute("BEGIN IMMEDIATE")
        reader = threading.Thread(target=store.read)
        reader.start()
        reader.join()
        locked = subprocess.run(
            [sys.executable, "-S", "-c", other, str(store.path)], capture_output=True, text=True
        )
        database.execute("ROLLBACK")
    assert "database is locked" in locked.stderr


def test_a_change_that_changes_nothing_is_not_written(store: FileControlStore) -> None:
    store.write(Control(live=1))
    assert store.change(lambda now: now.pointed("live", 1)).version == 1


def test_a_damaged_store_is_named(store: FileControlStore) -> None:
    store.path.write_bytes(b"this is no database, and long enough to be taken for one" * 9)
    with pytest.raises(StateError, match=f"control store {store.path}: file is not a database"):
        store.read()
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(StateError, match="control store"):
        store.write(Control())


def test_an_alias_moves_and_the_generation_before_is_remembered() -> None:
    control = Control(live=1).pointed("canary", 2)
    assert (control.live, control.canary, control.previous) == (1, 2, 0)
    control = control.pointed("live", 2)
    assert (control.live, control.canary, control.previous) == (2, 0, 1)
    assert control.pointed("live", 1).previous == 2
    assert control.pointed("live", 2) == control
    assert control.kept == {1, 2}


def test_an_operation_is_current_until_it_ends_and_the_last_ones_are_remembered() -> None:
    control = Control(live=1)
    first = wanted("activate", 2, "live", "abc")
    control = control.with_operation(first)
    assert control.current == first
    assert control.kept == {1, 2}
    running = first.model_copy(update={"state": "running", "progress": "loading"})
    control = control.with_operation(running)
    assert control.operations == (running,)
    control = control.with_operation(running.ended("failed", "no room"))
    assert control.current is None
    assert control.kept == {1}
    ended = control.operation(first.operation_id)
    assert ended is not None
    assert (ended.state, ended.reason) == ("failed", "no room")
    assert ended.ended_unix_s >= ended.began_unix_s
    for _ in range(30):
        control = control.with_operation(wanted("rollback", 1, "live").ended("done"))
    assert len(control.operations) == 20
    assert control.operation(first.operation_id) is None


def test_only_the_current_operation_is_replaced_by_a_newer_state_of_it() -> None:
    first, second = wanted("activate", 2, "live"), wanted("activate", 3, "live")
    running = first.model_copy(update={"state": "running"})
    control = Control(live=1).with_operation(first)
    assert control.replaced(second.ended("done")) is control
    assert control.replaced(running).operations == (running,)
    ended = control.replaced(first.ended("cancelled"))
    assert ended.replaced(running) is ended


def test_what_is_going_on_can_be_called_off_and_what_has_ended_stays(
    store: FileControlStore,
) -> None:
    first = wanted("activate", 2, "live", operation_id="mine")
    assert first.operation_id == "mine"
    store.change(lambda now: now.with_operation(first))
    assert store.call_off("other", "no reason") is None
    assert store.read().current == first
    ended = store.call_off("mine", "not wanted")
    assert ended is not None
    assert (ended.state, ended.reason) == ("cancelled", "not wanted")
    store.change(lambda now: now.with_operation(first.ended("done")))
    kept = store.call_off("mine", "too late")
    assert kept is not None
    assert kept.state == "done"


def test_what_is_warm_has_no_other_role_and_is_kept_until_the_next_swap() -> None:
    control = Control(live=1).pointed("warm", 2)
    assert (control.live, control.warm, control.canary) == (1, 2, 0)
    assert control.kept == {1, 2}
    assert control.pointed("warm", 0).warm == 0
    for number in (2, 3):
        after = control.pointed("live", number)
        assert (after.live, after.previous, after.warm) == (number, 1, 0)


def test_a_document_survives_its_form() -> None:
    control = Control(version=3, live=2, operations=(wanted("activate", 2, "canary"),))
    assert Control.model_validate_json(control.model_dump_json()) == control
    assert isinstance(control.operations[0], Operation)
