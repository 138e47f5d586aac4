"""Faults that a process makes itself suffer, so that a cluster can be tested while it serves.

The admin plane writes faults into a file beside the shard map; every process that may suffer one
reads it, if ``chaos.enabled``. A fault ends by the clock of the process that suffers it, whatever
has become of whoever ordered it.
"""

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from silvershard.cluster import shard_pb2
from silvershard.shard.errors import LogUnavailable, StateError

FaultKind = Literal["kill", "hang", "slow", "drop", "partition", "corrupt", "stall", "fill"]
FaultState = Literal["active", "over", "cleared"]

MAX_SECONDS = 3600.0
MAX_DELAY_MS = 60_000

_FILE = "faults.json"
_LOOK_S = 0.05

_log = logging.getLogger(__name__)


class FaultRecord(BaseModel):
    """A fault as its file has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="its operation_id")
    kind: FaultKind = Field(description="what happens")
    target: str = Field(description="what it happens to: `shard 1.0`, `router`, `host 10.0.0.2`")
    seconds: float = Field(
        default=0.0, ge=0, description="how long it lasts; 0: it is done at once"
    )
    delay_ms: int = Field(default=0, ge=0, description="of `slow`: added to every call")
    share: float = Field(
        default=1.0, ge=0, le=1, description="of `drop`: of the messages; of `fill`: of free slots"
    )
    copy_url: str = Field(default="", description="of `corrupt`: where another copy is")
    path: str = Field(default="", description="of `corrupt`: the file")
    offset: int = Field(default=0, ge=0, description="of `corrupt`: of the byte")
    byte: int = Field(default=0, ge=0, le=255, description="of `corrupt`: as it was")
    pids: tuple[int, ...] = Field(default=(), description="processes that it happens to")
    keeper: int = Field(default=0, ge=0, description="process that keeps it up; 0: they do")
    began_unix_s: float = Field(description="when it was ordered")
    ended_unix_s: float = Field(default=0.0, description="when it was over; 0: it is not")
    state: FaultState = Field(default="active", description="whether it goes on")

    def __str__(self) -> str:
        """Return it for people."""
        more = {"slow": f" by {self.delay_ms} ms", "drop": f" {self.share:g}"}.get(self.kind, "")
        lasting = f" for {self.seconds:g} s" if self.seconds else ""
        return f"{self.kind} {self.target}{more}{lasting}"


class _FaultFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    faults: tuple[FaultRecord, ...] = ()


def read_faults(directory: Path) -> tuple[FaultRecord, ...]:
    """Return the faults that are written down in a directory, the oldest first.

    Raises:
        StateError: if their file cannot be read.
    """
    try:
        content = (directory / _FILE).read_bytes()
        return _FaultFile.model_validate_json(content).faults
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise StateError(f"{directory / _FILE} cannot be read: {reason}") from None


def write_faults(directory: Path, faults: tuple[FaultRecord, ...]) -> None:
    """Write faults down, so that a reader sees the old or the new ones."""
    _write(directory / _FILE, _FaultFile(faults=faults).model_dump_json(indent=1))


def suffering(directory: Path, pid: int) -> tuple[str, ...]:
    """Return the names of the faults that a process said it suffers or keeps up."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(json.loads(_said(directory, pid).read_bytes()))
    return ()


def forget_said(directory: Path, is_alive: Callable[[int], bool]) -> None:
    """Remove what processes have said that are gone."""
    for path in directory.glob("said-*.json"):
        if not is_alive(int(path.stem.removeprefix("said-"))):
            path.unlink(missing_ok=True)


def _said(directory: Path, pid: int) -> Path:
    return directory / f"said-{pid}.json"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)


class Faults:
    """The faults that one process suffers; any thread may ask.

    Args:
        directory: where they are written down.
        concerns: returns whether a fault is for this process to suffer.
        clock: tells when they are over.
        unix_clock: tells how old a fault is that was ordered before this process began.
        seed: decides which messages are dropped.
    """

    def __init__(
        self,
        directory: Path,
        concerns: Callable[[FaultRecord], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        seed: int = 0,
    ) -> None:
        self._directory = directory
        self._concerns = concerns
        self._clock = clock
        self._unix_clock = unix_clock
        self._draw = random.Random(seed)
        self._until_s: dict[str, float] = {}
        """By the clock, when each fault is over that is written down as active."""
        self._held: tuple[FaultRecord, ...] = ()
        self._said: tuple[str, ...] = ()
        self._trouble = ""
        self._ended = threading.Event()

    def start(self) -> None:
        """Follow the file on a thread of its own until ``stop``."""
        self.look()
        threading.Thread(target=self._follow, name="faults", daemon=True).start()

    def stop(self) -> None:
        """Follow it no more."""
        self._ended.set()

    def look(self) -> None:
        """Take over what is written down, and say what is suffered."""
        try:
            found = read_faults(self._directory)
            self._trouble = ""
        except StateError as error:
            # What is suffered already still ends in time.
            found = self._held
            if self._trouble != str(error):
                _log.error("%s", error)
            self._trouble = str(error)
        now_s = self._clock()
        wanted = [one for one in found if one.state == "active" and self._concerns(one)]
        known = self._until_s
        self._until_s = {one.name: known.get(one.name, self._end_s(one)) for one in wanted}
        self._held = tuple(one for one in wanted if self._until_s[one.name] > now_s)
        said = tuple(one.name for one in self._held)
        if said != self._said:
            _log.warning("faults suffered now: %s", ", ".join(map(str, self._held)) or "none")
            _write(_said(self._directory, os.getpid()), json.dumps(said))
            self._said = said

    def _end_s(self, fault: FaultRecord) -> float:
        """Return when a fault that this process has just heard of is over."""
        age_s = max(self._unix_clock() - fault.began_unix_s, 0.0)
        return self._clock() + max(fault.seconds - age_s, 0.0)

    def _follow(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                self.look()
            except OSError as error:
                _log.error("faults cannot be followed: %s", error)

    def _active(self, kind: FaultKind) -> list[FaultRecord]:
        held = self._held
        if not held:
            return []
        now_s = self._clock()
        return [one for one in held if one.kind == kind and self._until_s[one.name] > now_s]

    def holds(self, name: str) -> bool:
        """Return whether a fault is suffered."""
        return any(one.name == name and self._until_s[name] > self._clock() for one in self._held)

    def delay_s(self) -> float:
        """Return by how much every call shall take longer."""
        return sum(one.delay_ms for one in self._active("slow")) / 1e3

    def fill(self, report: shard_pb2.ShardReport) -> None:
        """Count free slots as taken in what a shard says of its generations."""
        share = max((one.share for one in self._active("fill")), default=0.0)
        for one in report.generations:
            pool = one.pool
            taken = int(share * pool.dead_slots)
            pool.retired_slots += taken
            pool.dead_slots -= taken
            pool.free_pages -= int(share * pool.free_pages)

    def check_log(self, url: str) -> None:
        """Raise what a process meets that cannot reach the update log at ``url``.

        Raises:
            LogUnavailable: while the log is stalled.
        """
        for one in self._active("stall"):
            raise LogUnavailable(url, f"stalled by fault {one.name}")

    def loses(self, shard: int, replica: int, address: str) -> bool:
        """Return whether a message to or from a replica at ``host:port`` is lost on its way."""
        places = (f"shard {shard}.{replica}", f"host {address.rpartition(':')[0].strip('[]')}")
        cut = any(one.target in places for one in self._active("partition"))
        return cut or any(
            one.target in places and self._draw.random() < one.share for one in self._active("drop")
        )


def faults_of_shard(directory: str, shard: int, replica: int) -> Faults | None:
    """Return the faults of a process of a shard, followed from now on; None without a directory."""
    return _followed(directory, f"shard {shard}.{replica}", ("slow", "stall", "fill"))


def faults_of_sequencer(directory: str) -> Faults | None:
    """Return the faults of the sequencer, followed from now on; None without a directory."""
    return _followed(directory, "sequencer", ("stall",))


def faults_of_router(directory: str) -> Faults | None:
    """Return the faults of the links of a router; None without a directory."""
    return _started(directory, lambda fault: fault.kind in ("drop", "partition"))


def _followed(directory: str, name: str, kinds: tuple[FaultKind, ...]) -> Faults | None:
    return _started(directory, lambda fault: fault.target == name and fault.kind in kinds)


def _started(directory: str, concerns: Callable[[FaultRecord], bool]) -> Faults | None:
    if not directory:
        return None
    faults = Faults(Path(directory), concerns)
    faults.start()
    return faults
