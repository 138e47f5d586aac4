"""The control store: which generation a cluster shall serve, and what is being done about it.

It is one document, in a SQLite file of the state directory or in Redis. Whoever changes it has read
it before: a change is taken only if nobody else changed it meanwhile. Commands write what they
want, the driver of the cluster makes it so and writes how far it is. What is there is durable.
"""

import os
import secrets
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal, Self

import pydantic
from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.deploy.cluster_size import Scaled
from silvershard.deploy.host_state import HostState
from silvershard.shard.errors import StateError

LIVE: Final = "live"
CANARY: Final = "canary"
WARM: Final = "warm"
"""No name for requests: what is loaded beside the live one, to take over quickly."""

Alias = Literal["live", "canary", "warm"]
Kind = Literal["activate", "rollback", "scale", "restart", "move"]
OperationState = Literal["waiting", "running", "done", "failed", "cancelled", "abandoned"]

_KEPT = 20
"""Operations that are remembered."""
_BUSY_S = 5.0
_CREATING = threading.Lock()
_TABLE = (
    "control (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, "
    "document TEXT NOT NULL)"
)


class Operation(Document):
    """Something a person wanted, and what became of it."""

    operation_id: str = Field(description="unique name")
    kind: Kind = Field(description="the command")
    generation: int = Field(default=0, ge=0, description="what the alias shall name; 0: nothing")
    alias: Alias = Field(default="live", description="which alias")
    content_hash: str = Field(default="", description="of the generation that was checked")
    allow_refused: bool = Field(
        default=False, description="go on although it refused updates that the live one took"
    )
    scaled: Scaled | None = Field(default=None, description="how large the cluster shall be")
    state: OperationState = Field(default="waiting", description="how far it is")
    progress: str = Field(default="", description="what is being waited for")
    reason: str = Field(default="", description="why it was not done")
    began_unix_s: float = Field(description="when it was wanted")
    ended_unix_s: float = Field(default=0.0, description="when it ended; 0 before")

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more will happen."""
        return self.state not in ("waiting", "running")

    @property
    def what(self) -> str:
        """Return what is being done for people."""
        if self.scaled is not None:
            return f"{self.kind} to {self.scaled.size}"
        if self.kind == "restart":
            return "a rolling restart"
        if self.kind == "move":
            return "a move of copies between hosts"
        return f"{self.kind} of generation {self.generation}"

    def ended(self, state: OperationState, reason: str = "") -> Self:
        """Return the operation as it is when it has ended now."""
        changes = {"state": state, "reason": reason, "ended_unix_s": time.time()}
        return self.model_copy(update=changes)


class Control(Document):
    """The document."""

    version: int = Field(default=0, ge=0, description="grows by one with every change")
    state_id: str = Field(default="", description="random name of its pins in an update log")
    log_id: int = Field(default=0, ge=0, description="the update log that is its own; 0: none yet")
    live: int = Field(default=0, ge=0, description="generation that is served; 0: none yet")
    previous: int = Field(default=0, ge=0, description="served before it; 0: none")
    canary: int = Field(default=0, ge=0, description="served to those who ask for it; 0: none")
    warm: int = Field(default=0, ge=0, description="held to become live quickly; 0: none")
    scaled: Scaled | None = Field(default=None, description="what `scale` did last; none: nothing")
    routers: int = Field(
        default=0, ge=0, le=64, description="routers of a machine; 0: as its settings say"
    )
    host_states: dict[str, HostState] = Field(
        default={}, description="state of each host that is not as it was listed, by name"
    )
    operations: tuple[Operation, ...] = Field(default=(), description="the newest one last")

    @property
    def current(self) -> Operation | None:
        """Return the operation that is going on, if there is one."""
        last = self.operations[-1] if self.operations else None
        return last if last is not None and not last.has_ended else None

    @property
    def kept(self) -> set[int]:
        """Return the generations that must not be removed."""
        going = self.current
        named = {self.live, self.previous, self.canary, self.warm}
        named.add(going.generation if going else 0)
        return named - {0}

    def operation(self, operation_id: str) -> Operation | None:
        """Return an operation that is remembered."""
        found = [one for one in self.operations if one.operation_id == operation_id]
        return found[0] if found else None

    def with_operation(self, operation: Operation) -> Self:
        """Return the document with an operation added, or put in the place of its older state."""
        others = [one for one in self.operations if one.operation_id != operation.operation_id]
        return self.model_copy(update={"operations": (*others, operation)[-_KEPT:]})

    def replaced(self, operation: Operation) -> Self:
        """Return the document with a newer state of its current operation.

        It is this very document where that operation has ended, or is another one.
        """
        going = self.current
        if going is None or going.operation_id != operation.operation_id:
            return self
        return self.with_operation(operation)

    def pointed(self, alias: Alias, generation: int) -> Self:
        """Return the document with an alias that names another generation."""
        if alias != LIVE:
            return self.model_copy(update={alias: generation})
        if generation == self.live:
            return self
        # What was warm was so for this moment, or is in the way of what is parked now.
        changes = {"live": generation, "previous": self.live, "warm": 0}
        # What becomes live is no canary any more.
        if self.canary == generation:
            changes["canary"] = 0
        return self.model_copy(update=changes)


class Conflict(StateError):
    """A change of a document that somebody else changed meanwhile."""


class ControlStore(ABC):
    """Where the document is; any number of processes may use it."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Return what people call it."""

    @abstractmethod
    def load(self) -> str:
        """Return the document as it was written; empty before the first change.

        Raises:
            StateError: if the store is damaged or cannot be read.
        """

    @abstractmethod
    def replace(self, document: str, version: int) -> bool:
        """Replace the document of version ``version - 1``; return False if that is not there.

        Args:
            document: what shall be there.
            version: its version, 1 for the first one.

        Raises:
            StateError: if the store is damaged or cannot be written.
        """

    def read(self) -> Control:
        """Return the document; an empty one before the first change.

        Raises:
            StateError: if it is damaged or cannot be read.
        """
        text = self.load()
        try:
            return Control.model_validate_json(text) if text else Control()
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "content"
            raise StateError(f"control store {self.place}: {where}: {problem['msg']}") from None

    def write(self, control: Control) -> Control:
        """Replace the document that ``control`` was made from; return the new one.

        Raises:
            Conflict: if the document is of another version by now.
            StateError: if the store is damaged or cannot be written.
        """
        changed = control.model_copy(update={"version": control.version + 1})
        if not self.replace(changed.model_dump_json(), changed.version):
            raise Conflict(
                f"control store {self.place}: somebody else changed it after version "
                f"{control.version}"
            )
        return changed

    def change(self, make: Callable[[Control], Control]) -> Control:
        """Replace the document by what ``make`` makes of it, whoever else changes it meanwhile.

        Args:
            make: is called again after a conflict; if it raises, nothing is changed.

        Raises:
            StateError: if the file is damaged or cannot be written.
        """
        while True:
            control = self.read()
            made = make(control)
            if made == control:
                return control
            try:
                return self.write(made)
            except Conflict:
                continue

    def call_off(self, operation_id: str, reason: str) -> Operation | None:
        """End an operation that is going on; return what has become of it, None if it is unknown.

        Raises:
            StateError: if the file is damaged or cannot be written.
        """

        def make(now: Control) -> Control:
            going = now.current
            if going is None or going.operation_id != operation_id:
                return now
            return now.with_operation(going.ended("cancelled", reason))

        return self.change(make).operation(operation_id)


class FileControlStore(ControlStore):
    """The document in a SQLite file."""

    def __init__(self, path: Path) -> None:
        """Use the file ``path``, which the first change makes."""
        self.path = path

    @property
    def place(self) -> str:
        """Return the path of the file."""
        return str(self.path)

    def load(self) -> str:
        """See ``ControlStore.load``."""
        if not self.path.is_file():
            return ""
        with opened(self.path, _TABLE) as database:
            row = database.execute("SELECT document FROM control").fetchone()
        return str(row[0]) if row else ""

    def replace(self, document: str, version: int) -> bool:
        """See ``ControlStore.replace``."""
        with opened(self.path, _TABLE) as database:
            if version == 1:
                done = database.execute(
                    "INSERT INTO control (one, version, document) VALUES (1, 1, ?) "
                    "ON CONFLICT DO NOTHING",
                    (document,),
                )
            else:
                done = database.execute(
                    "UPDATE control SET version = ?, document = ? WHERE version = ?",
                    (version, document, version - 1),
                )
            return done.rowcount == 1


def _create(path: Path) -> None:
    """Make the file if it is missing: SQLite would let others read what it makes."""
    # To close a file drops all locks that other threads of this process hold on it, so it is only
    # opened while nobody can have it open.
    with _CREATING:
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


@contextmanager
def opened(path: Path, table: str) -> Iterator[sqlite3.Connection]:
    """Give a connection to the file, each statement of which is durable when it has ended.

    Args:
        path: the file, which is made when missing.
        table: name and columns of a table, which is made when missing.

    Raises:
        StateError: if the file is damaged or cannot be used.
    """
    try:
        _create(path)
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute(f"CREATE TABLE IF NOT EXISTS {table} STRICT")
            yield database
    except (sqlite3.Error, OSError) as error:
        raise StateError(f"control store {path}: {error}") from None


def wanted(
    kind: Kind,
    generation: int,
    alias: Alias,
    content_hash: str = "",
    operation_id: str = "",
    *,
    allow_refused: bool = False,
) -> Operation:
    """Return a new operation; it has a random name unless one is given."""
    return Operation(
        operation_id=operation_id or secrets.token_hex(8),
        kind=kind,
        generation=generation,
        alias=alias,
        content_hash=content_hash,
        allow_refused=allow_refused,
        began_unix_s=time.time(),
    )
