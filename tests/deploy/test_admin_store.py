import stat
from pathlib import Path

import pytest

from silvershard.deploy.admin_store import KEPT, AdminOperation, AdminStore, AdminTask, Failure
from silvershard.deploy.control_store import Control, FileControlStore, opened
from silvershard.shard.errors import StateError


@pytest.fixture
def store(tmp_path: Path) -> AdminStore:
    return AdminStore(tmp_path / "control.sqlite")


def operation(name: str, **changes: object) -> AdminOperation:
    made = AdminOperation(
        operation_id=name,
        task=AdminTask(kind="activate", generation=2),
        swap_id="s",
        began_unix_s=1.0,
    )
    return made.model_copy(update=changes)


def test_the_first_operation_of_a_name_stays(store: AdminStore) -> None:
    first = operation("one")
    assert store.add(first) == first
    assert store.add(operation("one", swap_id="other")) == first
    assert store.get("one") == first
    assert store.get("two") is None


def test_an_operation_is_read_back_whole_by_another_process(store: AdminStore) -> None:
    store.add(operation("one"))
    failure = Failure(code="DATA_LOSS", reason="CHECK_FAILED", message="it is damaged")
    changed = operation(
        "one",
        state="failed",
        progress=("loading", "prepared"),
        result={"generation": 2, "checks": [{"name": "recall"}]},
        failure=failure,
        ended_unix_s=2.5,
    )
    assert store.put(changed) is changed
    assert AdminStore(store.path).get("one") == changed
    assert changed.has_ended
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_only_the_newest_that_have_ended_are_remembered(store: AdminStore) -> None:
    store.add(operation("going on"))
    for number in range(KEPT + 5):
        store.add(operation(str(number), state="done"))
    names = [one.operation_id for one in store.all()]
    assert names[0] == str(KEPT + 4)
    assert names[-1] == "going on"
    assert names[1:-1] == [str(number) for number in reversed(range(5, KEPT + 4))]


def test_the_control_document_lies_beside_it_untouched(store: AdminStore) -> None:
    control = FileControlStore(store.path)
    written = control.write(Control(live=3))
    store.add(operation("one"))
    assert control.read() == written
    assert control.change(lambda now: now.pointed("live", 4)).live == 4
    assert [one.operation_id for one in store.all()] == ["one"]


def test_what_cannot_be_understood_is_named(store: AdminStore) -> None:
    store.add(operation("one"))
    with opened(store.path, "admin_operations (operation_id TEXT)") as database:
        database.execute("UPDATE admin_operations SET document = '{\"state\": 3}'")
    with pytest.raises(StateError, match=rf"control store {store.path}: operation: operation_id"):
        store.get("one")
    store.path.write_bytes(b"this is no database, and long enough to be taken for one" * 9)
    with pytest.raises(StateError, match="file is not a database"):
        store.all()
