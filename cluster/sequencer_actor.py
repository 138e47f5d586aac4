"""The Ray actor of the sequencer: it takes over the update log and serves on its own thread."""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from silvershard.cluster.document import RELEASE
from silvershard.cluster.faults import faults_of_sequencer
from silvershard.cluster.feed_block import FeedBlock
from silvershard.cluster.incarnation import Incarnation
from silvershard.cluster.live_generation import load_live_generation
from silvershard.cluster.logs import log_to_stderr
from silvershard.cluster.security import peers_of
from silvershard.cluster.security_config import PeerSection
from silvershard.cluster.sequencer import Sequencer
from silvershard.cluster.sequencer_server import SequencerServer
from silvershard.cluster.shard_map import ShardMap
from silvershard.cluster.shard_reports import ShardReports
from silvershard.cluster.staged import await_staged
from silvershard.cluster.update_log import open_log
from silvershard.shard.errors import LogUnavailable, StateError

_RETRY_S = 0.5
# Where processors are short, queries go before acks, which get a quarter of what a query gets.
_NICENESS = 5
_LEAVES_S = 3.0

_log = logging.getLogger(__name__)

T = TypeVar("T")


class SequencerProcess:
    """One incarnation of the sequencer; Ray starts the next one when its process dies.

    Once another sequencer has taken over the log it ends and stays ended: started again, it would
    only take the log back.
    """

    def __init__(
        self,
        snapshot: str,
        log_url: str,
        *,
        map_path: str,
        feed_block: float,
        hysteresis: float,
        expiry_every_s: float = 1.0,
        host: str = "127.0.0.1",
        peers: Mapping[str, Any] | None = None,
        faults_dir: str = "",
        patient: bool = False,
    ) -> None:
        """Become the writer of every partition of a log, once it can be reached; open a free port.

        Args:
            snapshot: directory of the generation that updates are checked against as long as there
                is no shard map.
            log_url: update log, which must be there.
            map_path: shard map file; names the processes whose room and cuts are asked for.
            feed_block: share of the slots of any shard from which upserts are refused.
            hysteresis: how far below that the share must fall for upserts to pass again.
            expiry_every_s: time between two looks for items whose time is over.
            host: address to bind.
            peers: the fields of a ``PeerSection``.
            faults_dir: where its faults are written down; empty: there are none.
            patient: wait for a generation that is on its way to this host.

        Raises:
            SnapshotError: if the generation is damaged.
            ConfigError: if the log would not keep what it acknowledges.
        """
        log_to_stderr()
        os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), _NICENESS))
        own = peers_of(PeerSection.model_validate(peers or {}))
        feed, faults = FeedBlock(feed_block, hysteresis), faults_of_sequencer(faults_dir)
        if patient:
            await_staged(lambda: str(_snapshot_of(Path(map_path), snapshot)))
        live = load_live_generation(_snapshot_of(Path(map_path), snapshot))
        self._log = _reached(lambda: open_log(log_url, None, create=False))
        self._server = SequencerServer(
            _reached(lambda: Sequencer(self._log, live, feed=feed, faults=faults)),
            reports=ShardReports(Path(map_path), own.dialer),
            feed=feed,
            host=host,
            peers=own,
            expiry_every_s=expiry_every_s,
            on_fenced=partial(_leave, Incarnation.current()),
        )
        # The collector need not look through what stays, which took a third of a check's time.
        gc.collect()
        gc.freeze()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sequencer", daemon=True).start()
        self._wait(self._server.start())

    def describe(self) -> dict[str, Any]:
        """Return where this incarnation serves, and what it writes."""
        return {
            "address": self._server.address,
            "pid": os.getpid(),
            "release": RELEASE,
            "log_id": self._log.log_id,
            "epochs": list(self._server.sequencer.epochs),
            "generation": self._server.sequencer.live.spec.generation,
        }

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._wait(self._server.stop(grace_s))
        self._log.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@ray.remote(num_cpus=0.1, max_restarts=-1)
class SequencerActor:
    """A ``SequencerProcess`` of the release that is installed when Ray starts it.

    Ray gives every incarnation the code of this class as it was when the actor was made, which may
    be that of an earlier release: so there is none here.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        """Make the process."""
        self._process = SequencerProcess(*args, **more)

    def describe(self) -> dict[str, Any]:
        """Return what it says of itself."""
        return self._process.describe()

    def stop(self, grace_s: float = 2.0) -> None:
        """Answer what runs for at most ``grace_s``, then close the port."""
        self._process.stop(grace_s)


def _leave(incarnation: Incarnation) -> None:
    """End for good, once who still asks here has had time to learn of the next sequencer."""
    timer = threading.Timer(_LEAVES_S, incarnation.end_for_good)
    timer.daemon = True
    timer.start()


def _reached(make: Callable[[], T]) -> T:
    """Return what needs the log; waits for one that is away, since Ray gives up what fails here."""
    while True:
        try:
            return make()
        except LogUnavailable as error:
            _log.warning("the sequencer waits for its log: %s", error)
            time.sleep(_RETRY_S)


def _snapshot_of(map_path: Path, first: str) -> Path:
    """Return the directory of the generation that the map names, or else of the first one."""
    try:
        return Path(ShardMap.read(map_path).snapshot)
    except StateError:
        return Path(first)
