"""The sequencer of a cluster, whose place another process can take while it serves."""

import time
from collections.abc import Callable

from silvershard.deploy.sequencer_watch import SequencerWatch

NAMES = "sequencer", "sequencer-1"
"""Of the actors that take turns: each takes the place of the other one."""
_LEAVES_S = 5.0
"""For so long the one that lost the log may refuse what comes, while routers learn of the other."""


class SequencerSeat:
    """Who takes updates.

    The next process takes the log over when it starts to serve. From then on the one before it
    refuses everything in a way that says that nothing was written, so that routers ask again.
    """

    def __init__(
        self,
        start: Callable[[str], SequencerWatch],
        is_running: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            start: starts the actor of a name, or adopts it, and watches it.
            is_running: whether there is one of a name to adopt.
            clock: for the time in which the last one leaves.
        """
        self.actor = NAMES[0]
        """The name of the one that serves."""
        self.watch: SequencerWatch | None = None
        """That one; None before the start, and where nobody takes updates."""
        self.refused = ""
        """Why it was not replaced the last time; empty: it was."""
        self._start = start
        self._is_running = is_running
        self._clock = clock
        self._coming: SequencerWatch | None = None
        self._leaving: SequencerWatch | None = None
        self._leave_s = 0.0

    def start(self) -> None:
        """Start it, or adopt the one that runs."""
        self.actor = next((one for one in NAMES if self._is_running(one)), NAMES[0])
        self.watch = self._start(self.actor)

    @property
    def serves(self) -> bool:
        """Return whether updates are taken, or nobody shall take any."""
        return self.watch is None or self.watch.state == "serving"

    @property
    def address(self) -> str:
        """Return ``host:port``; empty while nobody serves."""
        return self.watch.entry.address if self.watch and self.watch.entry else ""

    def replace(self) -> None:
        """Let a new process take its place; nothing happens where nobody takes updates."""
        self.refused = ""
        if self.watch is not None and not self.is_replacing:
            self._coming = self._start(self._other)

    @property
    def is_replacing(self) -> bool:
        """Return whether a process is taking the place of another one."""
        return self._coming is not None or self._leaving is not None

    @property
    def _other(self) -> str:
        return NAMES[1 - NAMES.index(self.actor)]

    def poll(self) -> None:
        """Look once, and let the next one take over when it serves."""
        if self.watch is not None:
            self.watch.poll()
        if self._leaving is not None and self._clock() >= self._leave_s:
            self._leaving.end()
            self._leaving = None
        if self._coming is None:
            return
        self._coming.poll()
        if self._coming.state == "failed":
            self.refused, self._coming = self._coming.reason, None
        elif self._coming.state == "serving":
            self._leaving, self._leave_s = self.watch, self._clock() + _LEAVES_S
            self.watch, self.actor, self._coming = self._coming, self._other, None

    def end(self) -> None:
        """End all of them."""
        for one in (self._coming, self._leaving, self.watch):
            if one is not None:
                one.end()
        self._coming = self._leaving = self.watch = None
