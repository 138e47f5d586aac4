import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.redis_log import RedisLog
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.update_log import NewRecord
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemUpsert, Update
from silvershard.shard.errors import ConfigError, Fenced, LogDamaged, LogUnavailable

NOW_MS = 1_700_000_000_000


def record(item_id: int, version: int = 1, payload: bytes = b"payload") -> NewRecord:
    return NewRecord(item_id, version, False, False, 0, payload)


@pytest.fixture
def open_at() -> Iterator[Callable[..., RedisLog]]:
    logs: list[RedisLog] = []

    def opened(url: str, num_partitions: int | None = 1, **options: Any) -> RedisLog:
        settings = {"create": True, "timeout_s": 5.0, **options}
        logs.append(RedisLog(url, num_partitions, **settings))
        return logs[-1]

    yield opened
    for one in logs:
        one.close()


@pytest.fixture(scope="module")
def shared_server(make_redis: Callable[..., Any]) -> Any:
    return make_redis()


@pytest.fixture
def server(make_redis: Callable[..., Any]) -> Iterator[Any]:
    """A server of this test alone, which it may kill."""
    one = make_redis()
    yield one
    one.kill()


@pytest.fixture
def raw(server: Any) -> Iterator[Any]:
    """A plain connection to ``server``, for what a log never does."""
    with redis.Redis(port=server.port, protocol=2) as client:
        yield client


@pytest.fixture
def log(open_at: Callable[..., RedisLog], server: Any) -> RedisLog:
    return open_at(server.url())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"appendonly": "no"}, "appendonly .* must be yes, got no: .* CONFIG SET appendonly yes"),
        ({"appendfsync": "everysec"}, "appendfsync .* must be always, got everysec: .* CONFIG SET"),
        ({"no_appendfsync_on_rewrite": "yes"}, "no-appendfsync-on-rewrite .* must be no, got yes"),
        (
            {"maxmemory": "100mb", "maxmemory_policy": "allkeys-lru"},
            "maxmemory-policy .* must be noeviction, got allkeys-lru",
        ),
    ],
)
def test_a_server_that_could_lose_what_it_acknowledged_is_refused(
    make_redis: Callable[..., Any],
    open_at: Callable[..., RedisLog],
    settings: dict[str, str],
    said: str,
) -> None:
    server = make_redis(**settings)
    for url in (server.url(), server.url(trust_durability="1")):
        with pytest.raises(ConfigError, match=said):
            open_at(url)
    server.kill()


def test_a_limit_of_memory_without_eviction_is_fine(
    make_redis: Callable[..., Any], open_at: Callable[..., RedisLog]
) -> None:
    server = make_redis(maxmemory="100mb", maxmemory_policy="noeviction")
    assert open_at(server.url()).end(0) == 0
    server.kill()


def test_settings_that_cannot_be_read_are_refused_unless_trusted(
    raw: Any, open_at: Callable[..., RedisLog], server: Any
) -> None:
    raw.execute_command("ACL", "SETUSER", "default", "-config")
    with pytest.raises(ConfigError, match=r"cannot be read .* trust_durability=1"):
        open_at(server.url())
    assert open_at(server.url(trust_durability="1")).end(0) == 0


def test_a_server_that_stops_being_durable_is_refused_on_the_next_connection(
    raw: Any, log: RedisLog
) -> None:
    epoch = log.acquire(0)
    raw.config_set("appendfsync", "everysec")
    raw.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(LogUnavailable, match="appendfsync of the server must be always"):
        log.append(0, epoch, [record(1)], NOW_MS)
    raw.config_set("appendfsync", "always")
    assert log.append(0, epoch, [record(1)], NOW_MS) == 1


def test_the_prefix_tells_logs_apart(open_at: Callable[..., RedisLog], shared_server: Any) -> None:
    one, other = (open_at(shared_server.url(prefix)) for prefix in ("one", "other"))
    assert one.log_id != other.log_id
    one.append(0, one.acquire(0), [record(1)], NOW_MS)
    assert (one.end(0), other.end(0)) == (1, 0)


def test_a_password_is_used_and_never_shown(
    make_redis: Callable[..., Any], open_at: Callable[..., RedisLog]
) -> None:
    server = make_redis(requirepass="secret")
    url = server.url().replace("//", "//:secret@")
    log = open_at(url)
    assert log.url == f"redis://127.0.0.1:{server.port}/0?prefix=silvershard"
    for wrong in (server.url(), url.replace("secret", "guessed")):
        with pytest.raises(LogUnavailable, match="access was refused") as caught:
            open_at(wrong)
        assert "guessed" not in str(caught.value)
    server.kill()


def test_calls_go_on_after_the_server_was_killed_and_started(server: Any, log: RedisLog) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    server.kill()
    starting = threading.Thread(target=server.start)
    starting.start()
    assert log.append(0, epoch, [record(2)], NOW_MS) == 2
    starting.join()
    assert [one.item_id for one in log.read(0, 0, 9)] == [1, 2]
    assert log.wait(0, 1, 5)


def test_a_wait_outlives_a_restart_of_the_server(
    server: Any, log: RedisLog, open_at: Callable[..., RedisLog]
) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(log.wait(0, 0, 60)))
    thread.start()
    server.kill()
    server.start()
    other = open_at(server.url())
    other.append(0, other.acquire(0), [record(1)], NOW_MS)
    thread.join(30)
    assert found == [True]


def test_a_server_that_is_gone_is_told_within_the_time_of_a_call(
    server: Any, open_at: Callable[..., RedisLog]
) -> None:
    log = open_at(server.url(), timeout_s=0.2)
    epoch = log.acquire(0)
    server.kill()
    began_s = time.monotonic()
    for call in (
        lambda: log.append(0, epoch, [record(1)], NOW_MS),
        lambda: log.read(0, 0, 9),
        lambda: log.wait(0, 0, 5),
        lambda: open_at(server.url(), timeout_s=0.1),
    ):
        with pytest.raises(LogUnavailable, match=r"cannot be reached: .*refused"):
            call()
    assert time.monotonic() - began_s < 5


def test_a_server_that_hangs_is_told_and_what_it_did_is_found_later(
    server: Any, open_at: Callable[..., RedisLog]
) -> None:
    log = open_at(server.url(), timeout_s=0.2)
    epoch = log.acquire(0)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LogUnavailable, match="cannot be reached"):
            log.append(0, epoch, [record(1, 7)], NOW_MS)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    first = log.append(0, log.acquire(0, epoch), [record(2)], NOW_MS)
    found = log.read(0, 0, 9)
    # Nobody was told that the first is stored; it may be, once.
    assert [one.item_id for one in found] in ([2], [1, 2])
    assert first == len(found)


class Slow:
    """A way to a server on which what is sent from some moment on can arrive late."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._gate = threading.Event()
        self._gate.set()
        self._shut: list[threading.Event] = []
        self._late: list[threading.Event] = []
        """Of connections on which something was held: whether the server is done with them."""
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        """Let nothing pass that is sent from now on."""
        self._gate = threading.Event()
        self._shut.append(self._gate)

    def pass_on(self) -> None:
        """Let pass what is sent from now on; what is held stays."""
        self._gate = threading.Event()
        self._gate.set()

    def arrive(self) -> None:
        """Let pass what is held, and return when the server has done all of it."""
        assert self._late
        self.release()
        assert all(done.wait(10) for done in self._late)

    def release(self) -> None:
        for gate in self._shut:
            gate.set()

    def close(self) -> None:
        self.release()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                ways = (client, server, threading.Event())
                for run in (self._forward, self._back):
                    threading.Thread(target=run, args=ways, daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket, done: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                gate = self._gate
                if not gate.is_set():
                    self._late.append(done)
                gate.wait()
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _back(self, client: socket.socket, server: socket.socket, done: threading.Event) -> None:
        with contextlib.suppress(OSError), client, server:
            while data := server.recv(1 << 16):
                # Maybe nobody waits for an answer any more.
                with contextlib.suppress(OSError):
                    client.sendall(data)
        done.set()


@pytest.fixture
def slow(server: Any) -> Iterator[Slow]:
    one = Slow(server.port)
    yield one
    one.close()


@pytest.fixture
def slow_log(slow: Slow, server: Any, open_at: Callable[..., RedisLog]) -> RedisLog:
    return open_at(server.url().replace(str(server.port), str(slow.port)), timeout_s=1.0)


def append_late(slow: Slow, log: RedisLog, epoch: int, records: list[NewRecord]) -> None:
    slow.hold()
    with pytest.raises(LogUnavailable, match="cannot be reached"):
        log.append(0, epoch, records, NOW_MS)
    slow.pass_on()


def test_an_append_that_arrives_after_the_next_acquire_stores_nothing(
    slow: Slow, slow_log: RedisLog
) -> None:
    epoch = slow_log.acquire(0)
    slow_log.append(0, epoch, [record(1)], NOW_MS)
    append_late(slow, slow_log, epoch, [record(2)])
    renewed = slow_log.acquire(0, epoch)
    assert slow_log.end(0) == 1
    slow.arrive()
    assert (slow_log.end(0), slow_log.heads(0, [2])) == (1, {})
    assert slow_log.append(0, renewed, [record(3)], NOW_MS) == 2


def test_behind_an_append_that_arrived_late_nothing_is_stored_before_an_acquire(
    slow: Slow, slow_log: RedisLog
) -> None:
    epoch = slow_log.acquire(0)
    slow_log.append(0, epoch, [record(1)], NOW_MS)
    append_late(slow, slow_log, epoch, [record(2)])
    slow.arrive()
    with pytest.raises(LogUnavailable, match="ends at 2 and not at 1"):
        slow_log.append(0, epoch, [record(3)], NOW_MS)
    assert slow_log.append(0, slow_log.acquire(0, epoch), [record(4)], NOW_MS) == 3
    assert [one.item_id for one in slow_log.read(0, 0, 9)] == [1, 2, 4]


def test_what_was_deleted_stays_deleted_when_an_upsert_arrives_late(
    slow: Slow, slow_log: RedisLog, generation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequencer = Sequencer(slow_log, load_live_generation(generation.path))

    def apply(*updates: Update) -> int:
        checked = sequencer.check([mutation_to(one) for one in updates])
        (outcome,) = sequencer.commit(0, [checked.writes])
        assert not outcome.rejected
        return outcome.position

    apply(ItemUpsert(5), ItemDelete(5))
    heads, append = slow_log.heads, slow_log.append

    def late(*arguments: Any) -> int:
        slow.hold()
        return append(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(slow_log, "append", late)
        with pytest.raises(LogUnavailable):
            apply(ItemUpsert(5))
    slow.pass_on()

    def heads_before_it_arrives(*arguments: Any) -> Any:
        found = heads(*arguments)
        slow.arrive()
        return found

    monkeypatch.setattr(slow_log, "heads", heads_before_it_arrives)
    assert apply(ItemDelete(5)) == 2
    assert heads(0, [5])[5].deleted
    assert slow_log.end(0) == 2


@pytest.mark.parametrize("arrives", ["before", "after"])
def test_an_acquire_without_an_answer_does_not_fence_its_own_writer(
    slow: Slow, slow_log: RedisLog, arrives: str
) -> None:
    epoch = slow_log.acquire(0)
    slow.hold()
    with pytest.raises(LogUnavailable):
        slow_log.acquire(0, epoch)
    slow.pass_on()
    if arrives == "before":
        slow.arrive()
    renewed = slow_log.acquire(0, epoch)
    if arrives == "after":
        slow.arrive()
    assert renewed == epoch + 1
    assert slow_log.append(0, renewed, [record(1)], NOW_MS) == 1


def lose_an_answer(log: RedisLog, monkeypatch: pytest.MonkeyPatch, *, at: int = 1) -> None:
    """Let the ``at``-th script run on the server and its answer never arrive."""
    run, calls = log._client.evalsha, iter(range(1, 1000))

    def evalsha(*arguments: Any) -> Any:
        answer = run(*arguments)
        if next(calls) == at:
            raise redis.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(log._client, "evalsha", evalsha)


def test_an_append_whose_answer_was_lost_is_stored_once(
    log: RedisLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    lose_an_answer(log, monkeypatch)
    assert log.append(0, epoch, [record(2), record(3)], NOW_MS) == 2
    assert log.append(0, epoch, [record(4)], NOW_MS) == 4
    assert [one.item_id for one in log.read(0, 0, 9)] == [1, 2, 3, 4]


def test_an_append_that_was_stored_before_the_fence_is_told_as_stored(
    log: RedisLog, open_at: Callable[..., RedisLog], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, epoch = open_at(server.url()), log.acquire(0)
    run, calls = log._client.evalsha, []

    def evalsha(*arguments: Any) -> Any:
        answer = run(*arguments)
        calls.append(None)
        if len(calls) == 1:
            other.acquire(0)
            raise redis.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(log._client, "evalsha", evalsha)
    assert log.append(0, epoch, [record(1)], NOW_MS) == 1
    with pytest.raises(Fenced):
        log.append(0, epoch, [record(2)], NOW_MS)
    assert log.end(0) == 1


def test_a_fence_behind_a_lost_answer_leaves_it_unknown_what_is_stored(
    log: RedisLog, open_at: Callable[..., RedisLog], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, epoch = open_at(server.url()), log.acquire(0)
    run, calls = log._client.evalsha, []

    def evalsha(*arguments: Any) -> Any:
        answer = run(*arguments)
        calls.append(None)
        if len(calls) == 1:
            other.append(0, other.acquire(0), [record(9)], NOW_MS)
            raise redis.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(log._client, "evalsha", evalsha)
    with pytest.raises(LogUnavailable, match="unknown whether the records are stored"):
        log.append(0, epoch, [record(1)], NOW_MS)


def test_a_server_that_was_emptied_is_noticed(raw: Any, log: RedisLog) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1)], NOW_MS)
    raw.flushall()
    for call in (
        lambda: log.append(0, epoch, [record(2)], NOW_MS),
        lambda: log.read(0, 0, 9),
        lambda: log.heads(0, [1]),
        lambda: log.pin("snapshot", (0,)),
        lambda: log.trim(0, 1),
        lambda: log.acquire(0),
    ):
        with pytest.raises(LogDamaged, match="was emptied, or another one took its place"):
            call()
    assert raw.dbsize() == 0


def test_a_log_in_the_place_of_another_is_noticed(
    raw: Any, log: RedisLog, open_at: Callable[..., RedisLog], server: Any
) -> None:
    raw.flushall()
    open_at(server.url())
    with pytest.raises(LogDamaged, match="another one took its place"):
        log.end(0)


@pytest.mark.parametrize("spoil", ["bit", "fields", "short"])
def test_a_damaged_record_is_noticed(raw: Any, log: RedisLog, spoil: str) -> None:
    log.append(0, log.acquire(0), [record(at) for at in (1, 2, 3)], NOW_MS)
    entries = raw.xrange("silvershard:0:records")
    raw.delete("silvershard:0:records")
    for entry_id, fields in entries:
        if entry_id == b"2-0":
            good = fields[b"r"]
            fields = {
                "bit": {b"r": good[:-1] + bytes([good[-1] ^ 1])},
                "fields": {b"r": good, b"other": good},
                "short": {b"r": good[:9]},
            }[spoil]
        raw.xadd("silvershard:0:records", fields, id=entry_id)
    assert [one.item_id for one in log.read(0, 0, 1)] == [1]
    with pytest.raises(LogDamaged, match=r"position 2 of partition 0|is no record"):
        log.read(0, 0, 9)
    assert [one.item_id for one in log.read(0, 2, 9)] == [3]


def test_a_missing_record_is_noticed(raw: Any, log: RedisLog) -> None:
    log.append(0, log.acquire(0), [record(at) for at in (1, 2, 3)], NOW_MS)
    raw.xdel("silvershard:0:records", "2-0")
    with pytest.raises(LogDamaged, match="position 2 of partition 0 is missing"):
        log.read(0, 0, 9)


def test_a_damaged_head_is_noticed(raw: Any, log: RedisLog) -> None:
    log.append(0, log.acquire(0), [record(1)], NOW_MS)
    raw.hset("silvershard:0:heads", "1", b"nonsense")
    with pytest.raises(LogDamaged, match="the head of item 1 in partition 0 is damaged"):
        log.heads(0, [1])


def test_something_else_under_the_keys_is_told_in_words(
    raw: Any, open_at: Callable[..., RedisLog], server: Any
) -> None:
    raw.hset("silvershard:log", "something", "else")
    with pytest.raises(LogDamaged, match="silvershard:log must be a log of format 1"):
        open_at(server.url())
    raw.set("other:log", "text")
    with pytest.raises(LogUnavailable, match="WRONGTYPE"):
        open_at(server.url("other"))


def test_a_server_without_memory_stores_nothing_and_is_read_and_trimmed(
    raw: Any, log: RedisLog
) -> None:
    epoch = log.acquire(0)
    log.append(0, epoch, [record(1), record(2)], NOW_MS)
    log.pin("snapshot", (1,))
    raw.config_set("maxmemory", 1)
    with pytest.raises(LogUnavailable, match=r"used memory > 'maxmemory'"):
        log.append(0, epoch, [record(3)], NOW_MS)
    assert [one.item_id for one in log.read(0, 0, 9)] == [1, 2]
    assert log.wait(0, 1, 0.0) is True
    assert sorted(log.heads(0, [1, 2, 3])) == [1, 2]
    assert log.trim(0, 2) == 1
    log.unpin("snapshot")
    assert log.trim(0, 2) == 2
    raw.config_set("maxmemory", 0)
    assert log.append(0, epoch, [record(3)], NOW_MS) == 3


def test_what_is_trimmed_takes_no_room(raw: Any, log: RedisLog) -> None:
    urgent = [record(at)._replace(urgent=True) for at in range(10)]
    log.append(0, log.acquire(0), urgent, NOW_MS)
    assert log.trim(0, 7) == 7
    assert raw.xlen("silvershard:0:records") == raw.xlen("silvershard:0:urgent") == 3


def append_until_killed(log: RedisLog, server: Any, seed: int) -> int:
    """Return the last position that was acknowledged before the server was killed."""
    rng, acked, begun = random.Random(seed), [0], threading.Event()

    def write() -> None:
        epoch = log.acquire(0)
        with contextlib.suppress(LogUnavailable):
            while True:
                records = [
                    record(rng.randrange(50), epoch, rng.randbytes(rng.randrange(600)))
                    for _ in range(rng.randrange(1, 30))
                ]
                acked.append(log.append(0, epoch, records, NOW_MS) + len(records) - 1)
                if len(acked) > 20:
                    begun.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(30)
    # An append takes about a millisecond; the blow falls anywhere in it.
    time.sleep(random.Random(seed).random() * 2e-3)
    server.kill()
    thread.join(30)
    return acked[-1]


def test_what_was_acknowledged_survives_a_power_cut(
    make_redis: Callable[..., Any], open_at: Callable[..., RedisLog], unsynced: Any
) -> None:
    server, undone = make_redis(unsynced.environment, directory=unsynced.folder), 0
    for seed in range(40):
        log = open_at(server.url(), timeout_s=0.2)
        acked = append_until_killed(log, server, seed)
        rng = random.Random(seed)
        undone += unsynced.lose(lambda count, rng=rng: rng.randrange(count + 1))
        server.start()
        end = log.end(0)
        records = log.read(0, 0, end)
        newest = {one.item_id: one.position for one in records}
        heads = log.heads(0, range(50))
        assert end >= acked
        assert len(records) == end
        assert {item_id: head.position for item_id, head in heads.items()} == newest
        # Until something was lost, this test has shown nothing.
        if seed >= 5 and undone:
            break
    assert undone > 0
    server.kill()


def test_a_server_that_does_not_sync_loses_what_it_acknowledged(
    make_redis: Callable[..., Any], open_at: Callable[..., RedisLog], unsynced: Any
) -> None:
    server = make_redis(unsynced.environment, directory=unsynced.folder)
    log = open_at(server.url(), timeout_s=0.2)
    with redis.Redis(port=server.port, protocol=2) as client:
        client.config_set("appendfsync", "no")
    acked = append_until_killed(log, server, 1)
    assert unsynced.lose() > 0
    server.start()
    assert log.end(0) < acked
    server.kill()
