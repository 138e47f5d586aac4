"""The processes that put a load on a cluster, and what each of them does.

A load is sent from processes of their own, which do nothing else meanwhile: not even the answers
are read before it is over.
"""

import asyncio
import contextlib
import heapq
import json
import multiprocessing
import os
import selectors
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from silvershard.cluster.arrivals import Stretch, arrivals, share_of
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.cluster.load import Entry, Journal, OpenLoop
from silvershard.cluster.load_channel import LoadChannels
from silvershard.cluster.load_outcome import Judged, judge, record_line
from silvershard.cluster.load_report import Generator, LoadReport, merged
from silvershard.deploy.errors import CommandError, TimedOut
from silvershard.deploy.processes import die_with_parent
from silvershard.shard.errors import DeadlineExceeded

_STOP = "stop"

_LEAD_S = 0.1
"""From the word to begin to the begin, so that every process has heard it."""


@dataclass(frozen=True)
class Target:
    """What is asked, and whom."""

    addresses: tuple[str, ...]
    """Of the routers, which take turns."""
    requests: tuple[bytes, ...]
    """Serialised, which take turns, too."""
    described: tuple[Mapping[str, Any], ...]
    """The parameters of each request, for records."""
    dialer: Dialer = PLAIN
    """Opens the channels."""


@dataclass(frozen=True)
class Load:
    """A load, as all processes together put it."""

    stretches: tuple[Stretch, ...]
    warmup_s: float = 0.0
    """Sent before at the first rate, and not counted."""
    poisson: bool = True
    seed: int = 0
    deadline_s: float = 2.0
    """Of each request, from when it was due."""
    max_in_flight: int = 1000
    """Over all processes."""
    record: Path | None = None
    """File that gets a line of JSON per request; None: none."""

    @property
    def warmup(self) -> tuple[Stretch, ...]:
        """Return what is sent before it counts."""
        rate = self.stretches[0].rate
        return (Stretch(self.warmup_s, rate, rate),) if self.warmup_s and rate else ()


class _Place(NamedTuple):
    """One process among all."""

    process: int
    num_processes: int
    cpu: int | None
    """The one processor that it may use; None: any."""
    parent: int
    connect_s: float


class Generators:
    """The processes of a load generator, for one load after the other; a context manager."""

    def __init__(
        self,
        target: Target,
        *,
        processes: int = 1,
        cpus: Sequence[int] = (),
        connect_s: float = 10.0,
    ) -> None:
        """Start the processes; they are connected with the first load.

        Args:
            target: what they ask.
            processes: how many.
            cpus: processors that they are pinned to, in turn; none: they are not.
            connect_s: longest wait for the routers.

        Raises:
            CommandError: if a processor is not one that this process may use.
        """
        allowed = os.sched_getaffinity(0)
        for cpu in cpus:
            if cpu not in allowed:
                raise CommandError(f"cpu must be one of {sorted(allowed)}, got {cpu}")
        context = multiprocessing.get_context("spawn")
        self._running = []
        for process in range(processes):
            pinned = cpus[process % len(cpus)] if cpus else None
            place = _Place(process, processes, pinned, os.getpid(), connect_s)
            ours, theirs = context.Pipe()
            started = context.Process(target=_work, args=(theirs, target, place), daemon=True)
            # A Ctrl-C on the terminal reaches them, too; it is this process that tells them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                started.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._running.append((started, ours))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, connection in self._running:
            connection.close()
        for process, _ in self._running:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def connect(self) -> None:
        """Wait until every process has reached every router.

        Raises:
            TimedOut: if one could not.
        """
        self._tell("connect")
        self._answers({})

    def run(self, load: Load) -> tuple[LoadReport, bool]:
        """Return what a load found, and whether a Ctrl-C ended it before its time.

        Raises:
            CommandError: if a process failed or died.
            OSError: if the record cannot be written; nothing was sent then.
        """
        if load.record is not None:
            load.record.open("w").close()
        parts = [
            None if load.record is None else Path(f"{load.record}.part-{process}")
            for process in range(len(self._running))
        ]
        interrupted = False
        try:
            start_s = time.monotonic() + _LEAD_S
            for (_, connection), part in zip(self._running, parts, strict=True):
                connection.send((load, start_s, part))
            found: dict[int, LoadReport] = {}
            try:
                self._answers(found)
            except KeyboardInterrupt:
                interrupted = True
                self._tell(_STOP)
                self._answers(found)
            if load.record is not None:
                _join(load.record, [part for part in parts if part is not None])
        finally:
            for part in parts:
                if part is not None:
                    part.unlink(missing_ok=True)
        return merged(found[process] for process in sorted(found)), interrupted

    def _tell(self, message: str) -> None:
        for _, connection in self._running:
            connection.send(message)

    def _answers(self, found: dict[int, Any]) -> None:
        """Add the answer of each process that is not there yet.

        Raises:
            CommandError: if one answers with an error, or ends.
        """
        while len(found) < len(self._running):
            missing = {
                one: place for place, (_, one) in enumerate(self._running) if place not in found
            }
            for connection in wait(list(missing)):
                assert isinstance(connection, Connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionError):
                    raise CommandError("a process of the load generator has died") from None
                if isinstance(answer, Exception):
                    raise answer
                found[missing[connection]] = answer


def _join(record: Path, parts: Sequence[Path]) -> None:
    """Write the lines of all parts into one file, in the order in which requests were due."""

    def lines(file: Iterator[str]) -> Iterator[tuple[int, str]]:
        return ((json.loads(line)["number"], line) for line in file)

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(part.open(encoding="utf-8")) for part in parts]
        target = stack.enter_context(record.open("w", encoding="utf-8"))
        target.writelines(line for _, line in heapq.merge(*map(lines, opened)))


def _work(connection: Connection, target: Target, place: _Place) -> None:
    """Be one process of a load generator until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(place.parent, signal.SIGKILL)
    if place.cpu is not None:
        os.sched_setaffinity(0, {place.cpu})

    def new_loop() -> asyncio.AbstractEventLoop:
        # Epoll rounds every wait up to a millisecond, by which each request would be late.
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=new_loop) as runner, contextlib.suppress(BrokenPipeError):
        runner.run(_Worker(connection, target, place).serve())


class _Worker:
    """One process of a load generator."""

    def __init__(self, connection: Connection, target: Target, place: _Place) -> None:
        self._connection = connection
        self._target = target
        self._place = place
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self._loop: OpenLoop | None = None

    async def serve(self) -> None:
        """Carry out what is asked until nobody asks any more."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._hear)
        target = self._target
        async with LoadChannels(target.addresses, target.requests, target.dialer) as channels:
            while (message := await self._heard.get()) is not None:
                answer: LoadReport | CommandError | None = None
                try:
                    if message == "connect":
                        await channels.connect(self._place.connect_s)
                    else:
                        answer = await self._run(channels, *message)
                except DeadlineExceeded as error:
                    answer = TimedOut(str(error))
                except Exception as error:  # noqa: BLE001  # a process border; the other end raises
                    answer = CommandError(f"the load generator failed: {error!r}")
                self._connection.send(answer)

    def _hear(self) -> None:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            message = None
        if self._loop is not None and message in (None, _STOP):
            self._loop.stop()
        if message != _STOP:
            self._heard.put_nowait(message)

    async def _run(
        self, channels: LoadChannels, load: Load, start_s: float, part: Path | None
    ) -> LoadReport:
        """Send this process' share of a load and return what came of it."""
        clock, place = asyncio.get_running_loop().time, self._place
        warmup = load.warmup
        zero_s = sum(one.seconds for one in warmup)
        due = arrivals((*warmup, *load.stretches), poisson=load.poisson, seed=load.seed)
        report = LoadReport(load.stretches)
        with Journal() as journal:
            self._loop = OpenLoop(
                channels.send,
                journal,
                deadline_s=load.deadline_s,
                max_in_flight=max(load.max_in_flight // place.num_processes, 1),
                clock=clock,
            )
            await asyncio.sleep(start_s - clock())
            cpu_s = time.process_time()
            await self._loop.run(share_of(due, place.process, place.num_processes), start_s)
            spent_s = clock() - start_s
            generator = Generator(spent_s, time.process_time() - cpu_s, self._loop.cut_short)
            report.generators.append(generator)
            report.measured_s = report.whole_s
            if self._loop.stopped:
                report.measured_s = min(max(spent_s - zero_s, 0.0), report.whole_s)
            self._loop = None
            zero_unix_s = time.time() - clock() + start_s + zero_s
            with _recorder(part, self._target, channels, zero_s, zero_unix_s) as note:
                for entry in journal.entries():
                    judged = judge(entry, load.deadline_s)
                    report.add(entry, judged, zero_s)
                    note(entry, judged)
        return report


@contextlib.contextmanager
def _recorder(
    part: Path | None,
    target: Target,
    channels: LoadChannels,
    zero_s: float,
    zero_unix_s: float,
) -> Iterator[Any]:
    """Yield a function that writes what came of a request into a file, if there is to be one."""
    if part is None:
        yield lambda entry, judged: None
        return
    with part.open("w", encoding="utf-8") as file:

        def note(entry: Entry, judged: Judged) -> None:
            index = channels.request_of(entry.number)
            line = record_line(
                entry,
                judged,
                request={"index": index, **target.described[index]},
                router=channels.router_of(entry.number),
                zero_s=zero_s,
                zero_unix_s=zero_unix_s,
            )
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield note
