import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.codec import Refusal
from silvershard.deploy.admin_runner import MAX_GOING, AdminRunner
from silvershard.deploy.admin_store import AdminOperation, AdminStore, AdminTask
from silvershard.deploy.cluster_size import ClusterSize, Scaled
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control, wanted
from silvershard.deploy.processes import identify, is_alive
from silvershard.deploy.state import StateDir
from silvershard.shard.errors import Overloaded, StateError

WAIT_S = 30.0

# Stands for the process of an operation: it does what the url of its task says. `hold` ends when
# the file of its generation is there.
PROCESS = """
import json, os, pathlib, signal, sys, time
root = pathlib.Path(sys.argv[sys.argv.index("--state") + 1])
errand = json.loads(sys.stdin.read())
task = errand["task"]
say = lambda **said: print(json.dumps(said), flush=True)
name = f"{task['kind']}-{task['generation']}"
if task["url"] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(root / f"began-{name}").write_text(str(os.getpid()))
(root / "swap_id").write_text(errand["swap_id"])
say(progress=f"began {name}")
if task["url"] == "lost":
    os.kill(os.getpid(), signal.SIGKILL)
if task["url"] == "mute":
    sys.exit(3)
if task["url"] in ("hold", "stubborn"):
    while not (root / f"end-{name}").exists():
        time.sleep(0.005)
if task["url"] == "refused":
    say(failure={"code": "DATA_LOSS", "reason": "CHECK_FAILED", "message": "it is damaged"})
else:
    say(result={"generation": task["generation"], "done": True})
"""


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir(tmp_path / "s")
    state.create()
    (state.root / "process.py").write_text(PROCESS)
    state.control.write(Control(live=1))
    return state


def make(state: StateDir, **options: Any) -> AdminRunner:
    command = (sys.executable, "-S", "-P", str(state.root / "process.py"))
    return AdminRunner(state, Config(), **{"command": command, "grace_s": 5.0, **options})


def run(state: StateDir, test: Callable[[AdminRunner], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        runner = make(state)
        try:
            await asyncio.wait_for(test(runner), WAIT_S)
        finally:
            await runner.close()

    asyncio.run(whole())


def task(kind: Any = "verify", generation: int = 2, url: str = "", **more: Any) -> AdminTask:
    return AdminTask(kind=kind, generation=generation, url=url, **more)


async def begun(state: StateDir, name: str) -> int:
    """Wait until the process of an operation runs; return its pid."""
    path = state.root / f"began-{name}"
    while not path.exists() or not path.read_text():
        await asyncio.sleep(0.005)
    return int(path.read_text())


def test_an_operation_is_carried_out_and_says_how_far_it_is(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        taken = runner.submit("one", task())
        assert (taken.state, taken.progress) == ("waiting", ())
        ended = await runner.wait("one", None)
        assert (ended.state, ended.progress) == ("done", ("began verify-2",))
        assert ended.result == {"generation": 2, "done": True}
        assert ended.failure is None
        assert ended.ended_unix_s >= ended.began_unix_s
        assert runner.find("one") == ended
        # To wait for what has ended takes no time.
        assert await asyncio.wait_for(runner.wait("one", 60.0), 1.0) == ended

    run(state, test)


def test_a_call_that_is_repeated_is_the_same_operation(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task(url="hold"))
        pid = await begun(state, "verify-2")
        again = runner.submit("one", task(url="hold"))
        assert again.state == "running"
        assert len(runner.all()) == 1
        for other in (task(url="hold", generation=3), task(url="hold", dry_run=True)):
            with pytest.raises(Refusal, match="operation one is another one, verify") as refused:
                runner.submit("one", other)
            assert (refused.value.code, refused.value.reason) == (
                "FAILED_PRECONDITION",
                "OPERATION_ID_USED",
            )
        (state.root / "end-verify-2").touch()
        ended = await runner.wait("one", None)
        (state.root / "began-verify-2").unlink()
        assert runner.submit("one", task(url="hold")) == ended
        assert not is_running(pid)
        assert not (state.root / "began-verify-2").exists()

    run(state, test)


def test_a_wait_ends_when_its_time_is_up(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task(url="hold"))
        await begun(state, "verify-2")
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert (await runner.wait("one", 0.05)).state == "running"
        assert 0.04 <= loop.time() - began_s < WAIT_S / 2
        waiting = asyncio.create_task(runner.wait("one", None))
        (state.root / "end-verify-2").touch()
        assert (await waiting).state == "done"

    run(state, test)


def test_one_generation_is_loaded_at_a_time_and_a_rollback_does_not_wait(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task(url="hold"))
        runner.submit("two", task(generation=3))
        runner.submit("three", task("activate", generation=4))
        await begun(state, "verify-2")
        runner.submit("back", task("rollback", generation=0))
        assert (await runner.wait("back", None)).state == "done"
        assert [runner.find(name).state for name in ("two", "three")] == ["waiting", "waiting"]
        assert not (state.root / "began-verify-3").exists()
        (state.root / "end-verify-2").touch()
        for name in ("one", "two", "three"):
            assert (await runner.wait(name, None)).state == "done"
        ended = [runner.find(name).ended_unix_s for name in ("one", "two", "three")]
        assert ended == sorted(ended)

    run(state, test)


def test_more_than_a_queue_holds_are_refused_with_a_delay(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        for number in range(MAX_GOING):
            runner.submit(str(number), task(url="hold"))
        with pytest.raises(Overloaded, match=r"16 operations are going on") as refused:
            runner.submit("more", task())
        assert refused.value.retry_after_s > 0
        # One that is known is no further one.
        assert runner.submit("0", task(url="hold")).operation_id == "0"
        with pytest.raises(Refusal, match="no operation more"):
            runner.find("more")

    run(state, test)


def test_what_waits_is_cancelled_at_once_and_what_runs_is_ended(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("fresh", task(url="hold", generation=9))
        # Its task had no moment to run yet.
        runner.cancel("fresh")
        assert (await runner.wait("fresh", None)).state == "cancelled"
        runner.submit("one", task(url="hold"))
        runner.submit("two", task(generation=3))
        pid = await begun(state, "verify-2")
        runner.cancel("two")
        assert (await runner.wait("two", None)).state == "cancelled"
        assert runner.find("one").state == "running"
        runner.cancel("one")
        runner.cancel("one")
        ended = await runner.wait("one", None)
        assert ended.state == "cancelled"
        assert ended.failure is not None
        assert ended.failure.code == "CANCELLED"
        assert not is_running(pid)
        assert not (state.root / "began-verify-3").exists()
        # What has ended stays as it ended.
        assert runner.cancel("one") == ended
        runner.submit("three", task(generation=4))
        done = await runner.wait("three", None)
        assert runner.cancel("three") == done
        assert done.state == "done"
        with pytest.raises(Refusal, match="no operation nobody") as refused:
            runner.cancel("nobody")
        assert refused.value.code == "NOT_FOUND"

    run(state, test)


def test_a_swap_that_was_wanted_is_called_off_with_its_operation(state: StateDir) -> None:
    control = state.control

    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task("activate", url="hold"))
        await begun(state, "activate-2")
        swap_id = AdminStore(state.control_file).get("one")
        assert swap_id is not None
        swap = wanted("activate", 2, "live", operation_id=swap_id.swap_id)
        control.change(lambda now: now.with_operation(swap))
        runner.cancel("one")
        assert (await runner.wait("one", None)).state == "cancelled"

    run(state, test)
    ended = control.read().operations[-1]
    assert (ended.state, control.read().live) == ("cancelled", 1)


def test_a_swap_that_was_quicker_than_its_cancellation_is_done(state: StateDir) -> None:
    async def test(runner: AdminRunner) -> None:
        submitted = runner.submit("one", task("activate", url="hold"))
        await begun(state, "activate-2")
        swap = wanted("activate", 2, "live", operation_id=submitted.swap_id).ended("done")
        state.control.change(lambda now: now.pointed("live", 2).with_operation(swap))
        runner.cancel("one")
        ended = await runner.wait("one", None)
        assert (ended.state, ended.failure) == ("done", None)
        assert ended.result == {"alias": "live", "generation": 2, "done": True}

    run(state, test)


def test_a_scaling_that_was_quicker_than_its_cancellation_is_done(state: StateDir) -> None:
    size = ClusterSize(shards=3, replicas=2)

    async def test(runner: AdminRunner) -> None:
        submitted = runner.submit("one", task("activate", url="hold"))
        await begun(state, "activate-2")
        done = wanted("scale", 0, "live", operation_id=submitted.swap_id).ended("done")
        scaled = Scaled(size=size, instead_of=size)
        done = done.model_copy(update={"scaled": scaled})
        state.control.change(lambda now: now.with_operation(done))
        runner.cancel("one")
        ended = await runner.wait("one", None)
        assert (ended.state, ended.failure) == ("done", None)
        assert ended.result == {"after": size.model_dump(), "done": True}

    run(state, test)


def test_an_end_that_cannot_be_written_is_written_later_and_goes_on_for_who_waits(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failed = AdminStore.put, asyncio.Event()

    def full(store: AdminStore, operation: AdminOperation) -> AdminOperation:
        if operation.has_ended and is_full:
            failed.set()
            raise StateError("control store: database or disk is full")
        return put(store, operation)

    is_full = True
    monkeypatch.setattr(AdminStore, "put", full)

    async def test(runner: AdminRunner) -> None:
        nonlocal is_full
        runner.submit("one", task())
        await failed.wait()
        # A wait waits, for it is not known yet how it has ended.
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert (await runner.wait("one", 0.05)).state == "running"
        assert loop.time() - began_s >= 0.04
        # It has ended already, and as what it did.
        assert runner.cancel("one").state == "running"
        is_full = False
        assert (await runner.wait("one", None)).state == "done"

    run(state, test)


def test_an_end_that_can_never_be_written_does_not_keep_the_cluster_from_stopping(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failed = AdminStore.put, asyncio.Event()

    def full(store: AdminStore, operation: AdminOperation) -> AdminOperation:
        if operation.has_ended:
            failed.set()
            raise StateError("control store: database or disk is full")
        return put(store, operation)

    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task())
        await failed.wait()
        await runner.close()

    with monkeypatch.context() as patched:
        patched.setattr(AdminStore, "put", full)
        run(state, test)
    assert AdminStore(state.control_file).all()[0].state == "running"
    make(state)
    assert AdminStore(state.control_file).all()[0].state == "abandoned"


def test_a_process_that_does_not_end_is_killed(state: StateDir) -> None:
    async def whole() -> None:
        runner = make(state, grace_s=0.05)
        runner.submit("one", task(url="stubborn"))
        pid = await begun(state, "verify-2")
        runner.cancel("one")
        assert (await runner.wait("one", WAIT_S)).state == "cancelled"
        assert not is_running(pid)
        await runner.close()

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("refused", "DATA_LOSS", "it is damaged"),
        ("lost", "ABORTED", "its process is gone: ended by SIGKILL"),
        ("mute", "ABORTED", "its process is gone: exit code 3"),
    ],
)
def test_a_failure_is_said_with_its_status(
    state: StateDir, url: str, code: str, message: str
) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task(url=url))
        ended = await runner.wait("one", None)
        assert (ended.state, ended.result) == ("failed", None)
        assert ended.failure is not None
        assert (ended.failure.code, ended.failure.message) == (code, message)
        assert ended.progress == ("began verify-2",)

    run(state, test)


def test_a_process_that_cannot_be_started_is_a_failure(state: StateDir) -> None:
    async def whole() -> None:
        runner = make(state, command=(str(state.root / "nothing"),))
        runner.submit("one", task())
        ended = await runner.wait("one", WAIT_S)
        assert ended.state == "failed"
        assert ended.failure is not None
        assert ended.failure.reason == "SYSTEM_REFUSED"
        await runner.close()

    asyncio.run(whole())


def test_what_goes_on_when_the_cluster_stops_is_abandoned_and_its_process_ended(
    state: StateDir,
) -> None:
    async def test(runner: AdminRunner) -> None:
        runner.submit("one", task(url="hold"))
        runner.submit("two", task(url="hold", generation=3))
        pid = await begun(state, "verify-2")
        waiting = asyncio.create_task(runner.wait("one", None))
        await runner.close()
        assert (await waiting).state == "abandoned"
        assert runner.find("two").state == "abandoned"
        assert not is_running(pid)
        with pytest.raises(Refusal, match="the cluster is stopping"):
            runner.submit("three", task())

    run(state, test)


def test_the_next_cluster_abandons_what_was_going_on_and_says_why(state: StateDir) -> None:
    store, control = AdminStore(state.control_file), state.control

    def left(name: str, phase: Any) -> None:
        store.add(
            AdminOperation(
                operation_id=name,
                task=task("activate"),
                swap_id=f"swap-{name}",
                state=phase,
                progress=("loading",),
                began_unix_s=1.0,
            )
        )

    left("ended", "cancelled")
    left("waiting", "waiting")
    left("running", "running")
    left("swapped", "running")
    swap = wanted("activate", 2, "live", operation_id="swap-swapped").ended("done")
    control.change(lambda now: now.pointed("live", 2).with_operation(swap))
    kept = store.get("ended")

    async def test(runner: AdminRunner) -> None:
        for name in ("waiting", "running"):
            found = runner.find(name)
            assert (found.state, found.progress) == ("abandoned", ("loading",))
            assert found.failure is not None
            assert (found.failure.code, found.failure.reason) == ("ABORTED", "ABANDONED")
            # The name stays that of the abandoned one.
            assert runner.submit(name, task("activate")) == found
        # Its change was made before the cluster ended.
        assert runner.find("swapped").state == "done"
        assert runner.find("ended") == kept

    run(state, test)


def is_running(pid: int) -> bool:
    found = identify(pid)
    return found is not None and is_alive(found)


def test_a_process_ends_with_the_driver_that_started_it(state: StateDir, tmp_path: Path) -> None:
    # The driver of this test is a process of its own that is killed.
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import asyncio, pathlib, sys\n"
        "from silvershard.deploy.admin_runner import AdminRunner\n"
        "from silvershard.deploy.admin_store import AdminTask\n"
        "from silvershard.deploy.config import Config\n"
        "from silvershard.deploy.state import StateDir\n"
        "async def main():\n"
        "    runner = AdminRunner(StateDir(pathlib.Path(sys.argv[1])), Config(),\n"
        "                         command=(sys.executable, '-P', sys.argv[2]))\n"
        "    runner.submit('one', AdminTask(kind='verify', generation=2, url='hold'))\n"
        "    await runner.wait('one', None)\n"
        "asyncio.run(main())\n"
    )
    process = state.root / "dies.py"
    process.write_text(
        "import os, sys\n"
        "from silvershard.deploy.processes import die_with_parent\n"
        "die_with_parent(int(sys.argv[sys.argv.index('--parent') + 1]))\n" + PROCESS
    )

    async def whole() -> None:
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(driver), str(state.root), str(process)
        )
        pid = await asyncio.wait_for(begun(state, "verify-2"), WAIT_S)
        assert is_running(pid)
        started.kill()
        await started.wait()
        async with asyncio.timeout(WAIT_S):
            while is_running(pid):
                await asyncio.sleep(0.005)

    asyncio.run(whole())
    assert AdminStore(state.control_file).all()[0].state == "running"
    make(state)
    assert AdminStore(state.control_file).all()[0].state == "abandoned"
