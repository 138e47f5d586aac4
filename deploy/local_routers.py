"""The routers of this machine: they share their port, so that the system deals out connections."""

from collections.abc import Callable

from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.config import Config
from silvershard.deploy.control_store import Control
from silvershard.deploy.router_watch import RouterWatch
from silvershard.deploy.state import RouterPhase, RouterRecord, StateDir

MakeRouter = Callable[[Config, int], RouterWatch]
"""Returns the router of a number, which is not started."""


class LocalRouters:
    """One router or more; see ``site.Routers``."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        dialer: Dialer = PLAIN,
        *,
        make: MakeRouter | None = None,
    ) -> None:
        """Prepare ``runtime.routers`` of them; nothing runs yet.

        Args:
            state: where their settings and logs go.
            config: settings.
            dialer: how they are asked for their health.
            make: makes each; by default as a process.
        """
        self.refused = ""
        """Why not all of them were replaced when that was last asked for; empty: they were."""
        self._config = config
        self._make = make or (lambda own, number: RouterWatch(state, own, dialer, number=number))
        self._wanted = config.runtime.routers
        self._routers = [self._make(config, 0)]
        self._ending: list[RouterWatch] = []
        """Those that are too many, until the last request in flight is answered."""
        self._to_replace: list[RouterWatch] = []
        """Those that are still to be replaced, the present one first."""

    @property
    def phase(self) -> RouterPhase:
        """Return that of the one which is furthest behind."""
        phases: set[RouterPhase] = {one.phase for one in self._routers}
        if len(self._routers) < self._wanted:
            phases.add("starting")
        order: tuple[RouterPhase, ...] = ("restarting", "starting", "serving")
        return next(one for one in order if one in phases)

    @property
    def address(self) -> str:
        """Return ``host:port`` of them all, empty before the first one listens."""
        return self._routers[0].address

    @property
    def http(self) -> str:
        """Return ``host:port`` of probes and metrics of the first one; empty: there are none."""
        return self._routers[0].http

    @property
    def record(self) -> RouterRecord:
        """Return the first one as status shows it."""
        return self._routers[0].record

    @property
    def records(self) -> tuple[RouterRecord, ...]:
        """Return every router, if there are several."""
        if self._wanted == len(self._routers) == 1:
            return ()
        return tuple(
            one.record.model_copy(update={"address": one.address, "http": one.http})
            for one in self._routers
        )

    @property
    def has_failed(self) -> bool:
        """Return whether one has ended by itself."""
        return any(one.has_failed for one in self._routers)

    def last_words(self) -> str:
        """Return why one has failed."""
        failed = [one for one in self._routers if one.has_failed]
        return (failed or self._routers)[0].last_words()

    def start(self) -> None:
        """Start the first one; the others follow on its port."""
        self._routers[0].start()

    def follow(self, control: Control) -> None:
        """Have as many as the control store says."""
        number = control.routers or self._config.runtime.routers
        if number != self._wanted:
            self.resize(number)

    def resize(self, number: int) -> None:
        """Run so many of them; those that are too many end in order."""
        self._wanted = number
        while len(self._routers) > number:
            router = self._routers.pop()
            router.begin_stop()
            self._ending.append(router)
        self._to_replace = [one for one in self._to_replace if one in self._routers]

    @property
    def is_sized(self) -> bool:
        """Return whether as many serve as shall."""
        return self.phase == "serving" and not self._ending

    def replace(self) -> None:
        """Let a new process take the place of each, one after the other; no request is refused."""
        self.refused = ""
        self._to_replace = list(self._routers)
        self._to_replace[0].replace()

    @property
    def is_replacing(self) -> bool:
        """Return whether one is being replaced, or is still to be."""
        return bool(self._to_replace)

    def poll(self) -> None:
        """Look once."""
        for one in self._routers:
            one.poll()
        self._ending = [one for one in self._ending if not one.has_stopped()]
        if len(self._routers) < self._wanted and self.address:
            self._routers.append(self._make(self._at_port, len(self._routers)))
            self._routers[-1].start()
        self._poll_replacing()

    def _poll_replacing(self) -> None:
        if not self._to_replace or self._to_replace[0].is_replacing:
            return
        done = self._to_replace.pop(0)
        if done.refused:
            self.refused, self._to_replace = done.refused, []
        elif self._to_replace:
            self._to_replace[0].replace()

    @property
    def _at_port(self) -> Config:
        """Return the settings with the port that the first one found, if it could have any."""
        if self._config.listen.port:
            return self._config
        listen = self._config.listen.model_copy(
            update={"port": int(self.address.rpartition(":")[2])}
        )
        http = self._config.observability.http
        any_port = f"{http.rpartition(':')[0]}:0" if http else ""
        observability = self._config.observability.model_copy(update={"http": any_port})
        return self._config.model_copy(update={"listen": listen, "observability": observability})

    def stop(self) -> None:
        """End them in order, all at the same time."""
        routers = [*self._routers, *self._ending]
        for one in routers:
            one.begin_stop()
        for one in routers:
            one.end_stop()
        self._ending, self._to_replace = [], []
