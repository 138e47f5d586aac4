"""The operations of the admin plane: what was asked for under which name, and what became of it.

They lie beside the control document, in the same file, a row each, and outlive the cluster.
"""

from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.deploy.control_store import Alias, OperationState, opened
from silvershard.shard.errors import StateError

Kind = Literal["plan", "stage", "verify", "warm", "activate", "rollback", "set_alias", "scale"]

KEPT = 100
"""Operations that are remembered, beside those that go on."""

_TABLE = (
    "admin_operations (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "operation_id TEXT NOT NULL UNIQUE, has_ended INTEGER NOT NULL, document TEXT NOT NULL)"
)


class AdminTask(Document):
    """What an operation shall do; two calls that mean the same are equal."""

    kind: Kind = Field(description="the call")
    generation: int = Field(default=0, ge=0, description="which one; 0: none")
    alias: Alias = Field(default="live", description="what shall name it")
    url: str = Field(default="", description="where it is fetched from")
    load: bool = Field(default=True, description="load it whole to check it")
    allow_schema: bool = Field(default=False, description="let through what would not fit")
    shards: int | None = Field(default=None, description="how many there shall be; none: as now")
    replicas: int | None = Field(default=None, description="of each shard, that are asked")
    standby: int | None = Field(default=None, description="further ones of each shard")
    dry_run: bool = Field(default=False, description="change nothing")


class Failure(Document):
    """Why an operation is not done."""

    code: str = Field(description="name of the google.rpc.Code")
    reason: str = Field(description="for programs")
    message: str = Field(description="for people")


class AdminOperation(Document):
    """One operation."""

    operation_id: str = Field(description="the name that its caller chose")
    task: AdminTask = Field(description="what it shall do")
    swap_id: str = Field(description="names what it makes the driver do in the control store")
    state: OperationState = Field(default="waiting", description="how far it is")
    progress: tuple[str, ...] = Field(default=(), description="lines for people, the newest last")
    result: dict[str, Any] | None = Field(default=None, description="what was done or found")
    failure: Failure | None = Field(default=None, description="why it is not done")
    began_unix_s: float = Field(description="when it was asked for")
    ended_unix_s: float = Field(default=0.0, description="when it ended; 0 before")

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more will happen."""
        return self.state not in ("waiting", "running")


class AdminStore:
    """The operations in the file of the control store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, operation: AdminOperation) -> AdminOperation:
        """Return the operation of this name, which is the given one unless there is one already.

        Only the newest of those that have ended are remembered.

        Raises:
            StateError: if the file is damaged or cannot be written.
        """
        with opened(self.path, _TABLE) as database:
            database.execute(
                "INSERT INTO admin_operations (operation_id, has_ended, document) "
                "VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (operation.operation_id, operation.has_ended, operation.model_dump_json()),
            )
            database.execute(
                "DELETE FROM admin_operations WHERE has_ended AND number <= "
                "(SELECT max(number) FROM admin_operations) - ?",
                (KEPT,),
            )
        return self.get(operation.operation_id) or operation

    def put(self, operation: AdminOperation) -> AdminOperation:
        """Replace an operation by its newer state; return it.

        Raises:
            StateError: if the file is damaged or cannot be written.
        """
        with opened(self.path, _TABLE) as database:
            database.execute(
                "UPDATE admin_operations SET has_ended = ?, document = ? WHERE operation_id = ?",
                (operation.has_ended, operation.model_dump_json(), operation.operation_id),
            )
        return operation

    def get(self, operation_id: str) -> AdminOperation | None:
        """Return the operation of a name, None if there is none.

        Raises:
            StateError: if the file is damaged or cannot be read.
        """
        with opened(self.path, _TABLE) as database:
            row = database.execute(
                "SELECT document FROM admin_operations WHERE operation_id = ?", (operation_id,)
            ).fetchone()
        return self._parsed(row[0]) if row else None

    def all(self) -> list[AdminOperation]:
        """Return every operation that is remembered, the newest first.

        Raises:
            StateError: if the file is damaged or cannot be read.
        """
        with opened(self.path, _TABLE) as database:
            rows = database.execute(
                "SELECT document FROM admin_operations ORDER BY number DESC"
            ).fetchall()
        return [self._parsed(row[0]) for row in rows]

    def _parsed(self, document: str) -> AdminOperation:
        try:
            return AdminOperation.model_validate_json(document)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "content"
            raise StateError(
                f"control store {self.path}: operation: {where}: {problem['msg']}"
            ) from None
