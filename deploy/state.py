"""The state directory: everything that a cluster on one machine keeps on disk.

Layout::

    .silvershard/
      config.yaml            optional settings, written by the user
      model/                 what ``train`` made
      training/              log and last checkpoint of ``train``
      generations/           what ``publish`` made: gen-000001, gen-000002, ...
      users.safetensors      histories of the users of the data set
      control.sqlite         which generation is live, and what is being done about it
      control.url            the server that knows this instead, if there is one
      updates.sqlite         the update log, unless `updates.log` names another one
      lock                   held while a cluster runs
      work.lock              held while ``train`` or ``publish`` writes
      cluster.json           the running cluster, as its launcher sees it
      shard_map.json         where the shards are, read by the router
      tables/                where the rows of each remote table are, read by the shards
      router.json            settings of the router process
      ray.token              secret of the embedded Ray, mode 0600
      cluster.secret         what the processes of a cluster show each other, mode 0600
      faults/                faults that were injected, and who suffers them
      log/                   daemon.log, router.log, audit.jsonl
      hosts/NAME/            router of this host in a cluster of several: settings, place, log
"""

import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

import pydantic
from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.cluster.security_config import SecuritySection
from silvershard.deploy.cluster_size import ClusterSize
from silvershard.deploy.control_place import FILE, URL_FILE, control_store
from silvershard.deploy.control_store import ControlStore
from silvershard.deploy.errors import CommandError, Refused
from silvershard.deploy.processes import Process, is_alive, kill_all, send_signal, wait_gone

DEFAULT_STATE = ".silvershard"
STATE_VARIABLE = "SILVERSHARD_STATE"
RAY_DIR_PREFIX = "silvershard-"

_LAYOUT = frozenset(
    {
        *("config.yaml", "model", "training", "generations", "users.safetensors"),
        *("lock", "work.lock", "cluster.json", "shard_map.json", "router.json"),
        *("ray.token", "cluster.secret", "tokens.json", "log", "tables", "control.url"),
        *("faults", "hosts"),
        *(f"control.sqlite{suffix}" for suffix in ("", "-journal")),
        *(f"updates.sqlite{suffix}" for suffix in ("", "-wal", "-shm")),
    }
)

ShardPhase = Literal["starting", "serving", "restarting", "failed"]
RouterPhase = Literal["starting", "serving", "restarting"]
GenerationRole = Literal["live", "canary", "previous", "staged"]


class ShardRecord(Document):
    """One process of a shard as the launcher sees it."""

    shard: int = Field(ge=0, description="index of the shard")
    replica: int = Field(default=0, ge=0, description="index of the copy of the shard")
    standby: bool = Field(default=False, description="kept warm, and asked nothing")
    host: str = Field(default="", description="where it is; empty: on this machine")
    state: ShardPhase = Field(description="where it is in its life")
    pid: int = Field(default=0, ge=0, description="process id, 0 while there is none")
    epoch: int = Field(default=0, ge=0, description="incarnation, larger after every restart")
    address: str = Field(default="", description="host:port of its gRPC server")
    documents: int = Field(ge=0, description="documents of its partitions")
    release: str = Field(default="", description="release of silvershard that it runs")
    restarts: int = Field(default=0, ge=0, description="how often it was started again")
    reason: str = Field(default="", description="why it is not serving")


class TableRecord(Document):
    """One process that serves a part of every remote table, as the launcher sees it."""

    shard: int = Field(ge=0, description="index of the part")
    generations: tuple[int, ...] = Field(default=(), description="generations whose rows they are")
    state: ShardPhase = Field(description="where it is in its life")
    pid: int = Field(default=0, ge=0, description="process id, 0 while there is none")
    rows: int = Field(default=0, ge=0, description="rows that it holds, of all tables")
    addresses: dict[str, str] = Field(
        default={}, description="host:port of the gRPC server of each table"
    )
    restarts: int = Field(default=0, ge=0, description="how often it was started again")
    reason: str = Field(default="", description="why it is not serving")


class RouterRecord(Document):
    """The router as the launcher sees it."""

    state: RouterPhase = Field(description="where it is in its life")
    host: str = Field(default="", description="where it is; empty: on this machine")
    address: str = Field(default="", description="host:port that it listens on, if there are more")
    http: str = Field(default="", description="host:port of its probes and metrics, if likewise")
    pid: int = Field(default=0, ge=0, description="process id, 0 while there is none")
    release: str = Field(default="", description="release of silvershard that it runs")
    restarts: int = Field(default=0, ge=0, description="how often it was started again")
    reason: str = Field(default="", description="why it is not serving")


class SequencerRecord(Document):
    """The sequencer as the launcher sees it."""

    state: ShardPhase = Field(description="where it is in its life")
    host: str = Field(default="", description="where it is; empty: on this machine")
    pid: int = Field(default=0, ge=0, description="process id, 0 while there is none")
    address: str = Field(default="", description="host:port of its gRPC server")
    release: str = Field(default="", description="release of silvershard that it runs")
    restarts: int = Field(default=0, ge=0, description="how often it was started again")
    reason: str = Field(default="", description="why it is not serving")


class GenerationRecord(Document):
    """One generation that shard processes hold."""

    generation: int = Field(ge=1, description="its number")
    role: GenerationRole = Field(description="what it is held for")
    prepared: int = Field(ge=0, description="processes that could answer from it")
    processes: int = Field(ge=0, description="processes that shall hold it")
    reason: str = Field(default="", description="why one of them cannot")


class ClusterRecord(Document):
    """A running cluster: what is where, and every process that belongs to it."""

    guard: Process = Field(description="the process that holds the lock and cleans up at the end")
    driver: Process = Field(description="the process that started Ray and watches the shards")
    address: str = Field(description="host:port of the router")
    model: str = Field(description="logical model name")
    generation: int = Field(ge=1, description="generation that is served")
    documents: int = Field(ge=0, description="documents of the generation")
    map_version: int = Field(default=0, ge=0, description="version of the shard map")
    router: RouterRecord = Field(description="the router")
    routers: tuple[RouterRecord, ...] = Field(
        default=(), description="every router, one for each host that has one; empty: that one"
    )
    ray: str = Field(
        default="", description="host:port of the Ray that it was started on; empty: its own"
    )
    host: str = Field(default="", description="where its supervisor is; empty: on this machine")
    release: str = Field(default="", description="release of silvershard that the supervisor runs")
    shards: tuple[ShardRecord, ...] = Field(description="every shard")
    tables: tuple[TableRecord, ...] = Field(
        default=(), description="every process of remote tables"
    )
    sequencer: SequencerRecord | None = Field(
        default=None, description="what takes updates; none without updates"
    )
    generations: tuple[GenerationRecord, ...] = Field(
        default=(), description="every generation that a shard process holds"
    )
    size: ClusterSize | None = Field(
        default=None, description="how large it is; none before it has processes"
    )
    admin: str = Field(default="", description="host:port of the admin plane; empty: none")
    http: str = Field(
        default="", description="host:port of probes and metrics of the router; empty: none"
    )
    security: SecuritySection = Field(
        default=SecuritySection(), description="how its processes are reached"
    )
    ray_dir: str = Field(description="temporary directory of the embedded Ray")
    processes: tuple[Process, ...] = Field(
        default=(), description="all processes below the driver, for cleaning up after a crash"
    )
    since_unix_s: float = Field(description="when the cluster was started")

    @property
    def coverage(self) -> float:
        """Return the share of the documents that a process serves."""
        serving = {one.shard: one.documents for one in self.shards if one.state == "serving"}
        return sum(serving.values()) / self.documents if self.documents else 1.0

    @property
    def is_whole(self) -> bool:
        """Return whether every process of the cluster is serving."""
        states = [one.state for one in self.shards] + [one.state for one in self.tables]
        if self.sequencer is not None:
            states.append(self.sequencer.state)
        routers = self.routers or (self.router,)
        return all(one.state == "serving" for one in routers) and all(
            one == "serving" for one in states
        )

    @property
    def runs(self) -> bool:
        """Return whether it runs, as far as this machine can tell.

        The processes of several hosts are not looked for: their record goes when they are ended.
        """
        return bool(self.ray) or is_alive(self.driver)


class StateDir:
    """Paths and records of one state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    def named(cls, option: Path | None, environ: dict[str, str]) -> Self:
        """Return the directory of ``--state``, else of $SILVERSHARD_STATE, else the default."""
        return cls(option or Path(environ.get(STATE_VARIABLE) or DEFAULT_STATE))

    @property
    def config_file(self) -> Path:
        """Return where optional settings are."""
        return self.root / "config.yaml"

    @property
    def model_dir(self) -> Path:
        """Return where ``train`` writes."""
        return self.root / "model"

    @property
    def training_dir(self) -> Path:
        """Return where the log and the checkpoint of a training are."""
        return self.root / "training"

    @property
    def generations(self) -> Path:
        """Return the repository of generations."""
        return self.root / "generations"

    @property
    def users_file(self) -> Path:
        """Return where the histories of the users are."""
        return self.root / "users.safetensors"

    @property
    def control_file(self) -> Path:
        """Return the file of the control store, and of the operations of the admin plane."""
        return self.root / FILE

    @property
    def control_url_file(self) -> Path:
        """Return the file that names the server of the control store, if that is one."""
        return self.root / URL_FILE

    @property
    def control(self) -> ControlStore:
        """Return the control store.

        Raises:
            ConfigError: if it is on a server that cannot be used here.
        """
        return control_store(self.root)

    @property
    def updates_file(self) -> Path:
        """Return the update log that is used where the settings name none."""
        return self.root / "updates.sqlite"

    @property
    def record_file(self) -> Path:
        """Return where the running cluster is described."""
        return self.root / "cluster.json"

    @property
    def shard_map_file(self) -> Path:
        """Return the map that the router follows."""
        return self.root / "shard_map.json"

    @property
    def coming_map_file(self) -> Path:
        """Return the map by which a new set of shards is checked before it takes over."""
        return self.root / "shard_map.coming.json"

    @property
    def tables_dir(self) -> Path:
        """Return where the maps of remote tables are, which the shards follow."""
        return self.root / "tables"

    @property
    def faults_dir(self) -> Path:
        """Return where injected faults are written down, which their targets follow."""
        return self.root / "faults"

    @property
    def router_file(self) -> Path:
        """Return the settings of the router process."""
        return self.root / "router.json"

    @property
    def token_file(self) -> Path:
        """Return the secret of the embedded Ray."""
        return self.root / "ray.token"

    @property
    def secret_file(self) -> Path:
        """Return the secret of the cluster, where the settings name none."""
        return self.root / "cluster.secret"

    @property
    def audit_file(self) -> Path:
        """Return the audit log, where the settings name none."""
        return self.root / "log" / "audit.jsonl"

    @property
    def daemon_log(self) -> Path:
        """Return the log of the daemon."""
        return self.root / "log" / "daemon.log"

    @property
    def router_log(self) -> Path:
        """Return the log of the router."""
        return self.root / "log" / "router.log"

    def create(self) -> None:
        """Make the directory and its sub-folders, open to this user only.

        A state directory that is open to others is closed to them.

        Raises:
            CommandError: if it cannot be made.
            Refused: if it belongs to another user, or is open to others and holds other things.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_private()
            (self.root / "log").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"state directory {self.root} cannot be made: {error.strerror}"
            ) from None

    def _make_private(self) -> None:
        status = self.root.stat()
        if status.st_uid != os.geteuid():
            raise Refused(
                f"state directory {self.root} belongs to another user (uid {status.st_uid}): "
                "name one of your own with --state"
            )
        if not status.st_mode & 0o077:
            return
        others = sorted(
            entry.name
            for entry in self.root.iterdir()
            if entry.name not in _LAYOUT and not entry.name.endswith(".tmp")
        )
        # It may be a home or a mount point, which must not become private unasked.
        if others:
            raise Refused(
                f"state directory {self.root} is open to other users and holds {others[0]}, which "
                "is no part of a state directory: name a directory of its own with --state, or "
                "close this one with `chmod 700`"
            )
        self.root.chmod(0o700)

    def lock(self) -> int:
        """Return a descriptor that holds the cluster lock of this directory.

        The lock belongs to the open file, so it lives as long as any process that inherited the
        descriptor.

        Raises:
            Refused: if a cluster runs on this directory, naming its process.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(self._busy()) from None
        return descriptor

    def is_locked(self) -> bool:
        """Return whether a cluster runs on this directory."""
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _busy(self) -> str:
        record = self.read_record()
        who = f"pid {record.guard.pid}" if record else "another process, which is starting"
        where = f" at {record.address}" if record else ""
        return (
            f"a cluster runs on {self.root} already: {who}{where}; "
            "stop it with `silvershard down`, or use another --state"
        )

    @contextmanager
    def working(self, verb: str) -> Iterator[None]:
        """Hold the lock under which ``train`` and ``publish`` write.

        Raises:
            Refused: if another of them is at work.
        """
        self.create()
        descriptor = os.open(self.root / "work.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(
                f"{verb} on {self.root} is refused: a train or publish is at work there"
            ) from None
        try:
            yield
        finally:
            os.close(descriptor)

    def read_record(self) -> ClusterRecord | None:
        """Return the record of the cluster that runs, or ran and was not cleaned up; else None.

        Raises:
            CommandError: if the record cannot be understood.
        """
        try:
            content = self.record_file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return ClusterRecord.model_validate_json(content)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise CommandError(
                f"{self.record_file}: {where or 'content'}: {problem['msg'].lower()}; "
                "remove the file if no cluster runs"
            ) from None

    def write_record(self, record: ClusterRecord) -> None:
        """Replace the record atomically."""
        write_atomic(self.record_file, record.model_dump_json(indent=1).encode() + b"\n")

    def clear_record(self) -> None:
        """Remove what describes a running cluster."""
        for path in (
            self.record_file,
            self.shard_map_file,
            self.coming_map_file,
            self.router_file,
            self.token_file,
        ):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tables_dir, ignore_errors=True)

    def clean_leftovers(self, *, grace_s: float = 2.0) -> int:
        """End what a crashed cluster left behind; return how many processes that were.

        Only processes whose pid, start and boot are those of the record are touched. Call it while
        holding the lock.
        """
        record = self.read_record()
        if record is None:
            return 0
        own = (record.guard, record.driver, *record.processes)
        left = [process for process in own if is_alive(process)]
        for process in left:
            send_signal(process, signal.SIGTERM)
        kill_all(wait_gone(left, grace_s))
        remove_ray_dir(record.ray_dir)
        self.clear_record()
        return len(left)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)


def remove_ray_dir(path: str) -> None:
    """Remove the temporary directory of an embedded Ray; a path of any other form is left alone."""
    if path and Path(path).name.startswith(RAY_DIR_PREFIX):
        shutil.rmtree(path, ignore_errors=True)
