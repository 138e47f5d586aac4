"""Hosts on one machine: namespaces for network, processes and mounts, joined by a bridge.

Each host has an address of its own, sees only its own processes, and finds its own folder at a path
that is the same on all of them. All of it ends with the process that made it, however that ends.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multihost.releases import Installed

NETWORK = "10.77.0"
HEAD = f"{NETWORK}.9"
SWITCH = f"{NETWORK}.1"
GCS_PORT = 6399
REDIS_PORT = 6379
WAIT_S = 120.0
_SHORT = "/var/tmp"
"""The paths of Ray's sockets have at most 107 bytes."""

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_storage": "rocksdb",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_timeout_ms_task_wait_for_death_info": "50",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def reason_to_skip() -> str:
    """Return why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "NOT RUN: hosts are made of namespaces, which takes root"
    tools = ("ip", "tc", "unshare", "nsenter", "setpriv")
    missing = [one for one in tools if not shutil.which(one)]
    if missing:
        return f"NOT RUN: {', '.join(missing)} is missing: apt-get install iproute2 util-linux"
    if shutil.which("redis-server") is None:
        return "NOT RUN: redis-server is missing, apt-get install redis-server"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "NOT RUN: namespaces are not allowed here"


def until(true: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until something holds."""
    give_up_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.05)


class Box:
    """A set of namespaces that lives as long as its first process."""

    def __init__(
        self,
        name: str,
        folder: Path,
        mounts: Sequence[str],
        service: Sequence[str],
        environment: dict[str, str],
    ) -> None:
        self.name = name
        self.folder = folder
        self.environment = environment
        self._mounts = mounts
        self._service = service
        self.init = 0
        self.start()

    def start(self) -> None:
        """Make the namespaces; the service begins with ``begin``."""
        (self.folder / "ready").unlink(missing_ok=True)
        (self.folder / "go").unlink(missing_ok=True)
        script = Path(__file__).with_name("host_init.py")
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"),
                *("--kill-child", "--propagation", "private"),
                *(sys.executable, "-P", str(script), self.name, str(self.folder), *self._mounts),
                *("--", *self._service),
            ],
            env=self.environment,
            # It complains of its own end.
            stderr=subprocess.DEVNULL,
        )
        until((self.folder / "ready").exists, f"host {self.name} did not start")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.init = int(children.read_text().split()[0])
        self.ip("link", "set", "lo", "up")

    def begin(self) -> None:
        """Start the service, and again whenever it ends."""
        (self.folder / "go").touch()

    def command(self, *words: str) -> list[str]:
        """Return a command as it is run inside."""
        return [
            "nsenter",
            f"--target={self.init}",
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--",
            *words,
        ]

    def ip(self, *words: str) -> None:
        """Change the network inside."""
        subprocess.run(["nsenter", f"--target={self.init}", "--net", "ip", *words], check=True)

    def tc(self, *words: str) -> None:
        """Change how packets leave the network inside."""
        subprocess.run(["nsenter", f"--target={self.init}", "--net", "tc", *words], check=True)

    def run(self, *words: str, timeout_s: float = 300.0) -> "subprocess.CompletedProcess[str]":
        """Run a command inside and wait for it."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=str(self.folder),
        )

    def spawn(self, *words: str, **more: Any) -> "subprocess.Popen[str]":
        """Start a command inside."""
        return subprocess.Popen(
            self.command(*words), env=self.environment, text=True, cwd=str(self.folder), **more
        )

    def pids(self) -> list[int]:
        """Return the processes inside, numbered as outside."""
        mine = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for entry in os.scandir("/proc"):
            try:
                if entry.name.isdigit() and os.readlink(f"/proc/{entry.name}/ns/pid") == mine:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def named(self, part: str) -> list[int]:
        """Return the processes inside whose command line holds ``part``."""
        found = []
        for pid in self.pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if part in words:
                found.append(pid)
        return found

    def kill(self) -> None:
        """End every process inside at once, as losing power would."""
        if self.init:
            os.kill(self.init, signal.SIGKILL)
            self._process.wait()
            self.init = 0


class Network:
    """Hosts ``h0``, ``h1``, ..., a head of Ray and a Redis, all on one bridge.

    The head is no host: it has no shards, and may be killed without them.
    """

    def __init__(self, num_hosts: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="sh-", dir=_SHORT))
        self.state = self.root / "state"
        self.boxes: dict[str, Box] = {}
        self._clients: list[subprocess.Popen[str]] = []
        self.installed = Installed(self.root, "1.0")
        (self.root / "token").write_text("0" * 64)
        (self.root / "token").chmod(0o600)
        for name in ("state", "ray", "gcs"):
            (self.root / name).mkdir(mode=0o700)
        self.environment = {
            **{
                name: one
                for name, one in os.environ.items()
                if not name.startswith(("RAY_", "SILVERSHARD_"))
            },
            **RAY_ENVIRONMENT,
            "RAY_AUTH_TOKEN_PATH": str(self.root / "token"),
            "RAY_gcs_storage_path": str(self.root / "gcs"),
            "RAY_TMPDIR": str(self.root),
            "RAY_ADDRESS": f"{HEAD}:{GCS_PORT}",
            "PYTHONPATH": str(self.installed.path),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            self._make(num_hosts)
        except BaseException:
            self.close()
            raise

    def _make(self, num_hosts: int) -> None:
        self.switch = self._box("switch", [])
        self.switch.ip("link", "add", "br0", "type", "bridge")
        self.switch.ip("addr", "add", f"{SWITCH}/24", "dev", "br0")
        self.switch.ip("link", "set", "br0", "up")
        ray = str(Path(sys.executable).with_name("ray"))
        common = [
            *("--object-store-memory=80000000", "--disable-usage-stats", "--block"),
        ]
        self.head = self._box(
            "head",
            [
                *(ray, "start", "--head", f"--node-ip-address={HEAD}", f"--port={GCS_PORT}"),
                *(
                    "--num-cpus=0",
                    "--include-dashboard=false",
                    f"--temp-dir={self.root}/ray",
                    *common,
                ),
            ],
        )
        self._join(self.head, HEAD)
        self.hosts = []
        for number in range(num_hosts):
            address = f"{NETWORK}.{10 + number}"
            box = self._box(
                f"h{number}",
                [
                    *(ray, "start", f"--address={HEAD}:{GCS_PORT}"),
                    *(f"--node-ip-address={address}", "--num-cpus=4", *common),
                ],
            )
            self._join(box, address)
            self.hosts.append(box)
        self._redis()
        self.head.begin()
        until(lambda: self._listens(HEAD, GCS_PORT), "the head of Ray does not listen")
        for box in self.hosts:
            box.begin()

    def _box(self, name: str, service: Sequence[str]) -> Box:
        folder = self.root / "boxes" / name
        folder.mkdir(parents=True)
        mounts = []
        for part in ("state", "ray"):
            (folder / part).mkdir(mode=0o700)
            mounts.append(f"{folder}/{part}:{self.root}/{part}")
        self.boxes[name] = Box(name, folder, mounts, service, self.environment)
        return self.boxes[name]

    def _join(self, box: Box, address: str) -> None:
        """Connect a box to the bridge."""
        port = f"p-{box.name}"
        self.switch.ip(
            *("link", "add", port, "type", "veth", "peer", "name", "veth0"),
            *("netns", str(box.init)),
        )
        self.switch.ip("link", "set", port, "master", "br0")
        self.switch.ip("link", "set", port, "up")
        box.ip("addr", "add", f"{address}/24", "dev", "veth0")
        box.ip("link", "set", "veth0", "up")

    def _redis(self) -> None:
        folder = self.switch.folder / "redis"
        folder.mkdir()
        settings = {
            **{"bind": SWITCH, "port": str(REDIS_PORT), "protected-mode": "no", "save": ""},
            **{"appendonly": "yes", "appendfsync": "always", "dir": str(folder)},
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        with (folder / "out").open("wb") as out:
            self._clients.append(self.switch.spawn("redis-server", *words, stdout=out, stderr=out))
        until(lambda: self._listens(SWITCH, REDIS_PORT), "Redis does not listen")

    def _listens(self, host: str, port: int) -> bool:
        code = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
        return self.switch.run(sys.executable, "-c", code).returncode == 0

    def redis_url(self, prefix: str = "test") -> str:
        return f"redis://{SWITCH}:{REDIS_PORT}/0?prefix={prefix}"

    def cut(self, box: Box) -> None:
        """Take the link of a host down."""
        self.switch.ip("link", "set", f"p-{box.name}", "down")

    def heal(self, box: Box) -> None:
        """Take the link of a host up again."""
        self.switch.ip("link", "set", f"p-{box.name}", "up")

    def slow(self, box: Box, rate: str) -> None:
        """Let so many bits a second through the link of a host, such as ``1mbit``, each way.

        What waits for 0.2 s is lost. Delay by itself takes netem, which not every kernel has.
        """
        limit = ("tbf", "rate", rate, "burst", "16kb", "latency", "200ms")
        self.switch.tc("qdisc", "add", "dev", f"p-{box.name}", "root", *limit)
        box.tc("qdisc", "add", "dev", "veth0", "root", *limit)

    def fast(self, box: Box) -> None:
        """Take the limit of a link away."""
        self.switch.tc("qdisc", "del", "dev", f"p-{box.name}", "root")
        box.tc("qdisc", "del", "dev", "veth0", "root")

    def restart(self, box: Box, address: str) -> None:
        """Boot a host again that was killed."""
        box.start()
        self._join(box, address)
        box.begin()

    def cli(
        self,
        box: Box,
        *words: str,
        environment: dict[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> "subprocess.CompletedProcess[str]":
        """Run our command on a host."""
        before = box.environment
        box.environment = {**before, **(environment or {})}
        try:
            return box.run(
                *(sys.executable, "-P", "-m", "silvershard.deploy.cli", *words),
                *("--state", str(self.state)),
                timeout_s=timeout_s,
            )
        finally:
            box.environment = before

    def status(self, box: Box) -> dict[str, Any]:
        """Return what ``silvershard status`` says on a host."""
        done = self.cli(box, "status", "--output", "json")
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return found

    def close(self) -> None:
        """End everything."""
        for one in self._clients:
            one.kill()
        for box in self.boxes.values():
            box.kill()
        for one in self._clients:
            one.wait()
        shutil.rmtree(self.root, ignore_errors=True)
