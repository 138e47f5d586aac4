"""The agents of several hosts as the supervisor replaces them, one after the other."""

from collections.abc import Callable, Mapping, Sequence

from silvershard.deploy.cluster_store import HostReport


def actor_name(host: str) -> str:
    """Return the name of the actor of a host."""
    return f"host-{host}"


class HostAgents:
    """The agents of all hosts; what they look after goes on while there is none."""

    refused = ""
    """An agent is always replaced, or its host is lost, and it starts anew when that is back."""

    def __init__(
        self, hosts: Sequence[str], restart: Callable[[str], None], runs: Callable[[str], bool]
    ) -> None:
        """Replace none yet.

        Args:
            hosts: names.
            restart: ends the process of the agent of a host, so that Ray starts the next one.
            runs: whether a host is there and has an agent.
        """
        self._hosts = hosts
        self._restart = restart
        self._runs = runs
        self._left: list[str] = []
        """Hosts whose agents are still to be replaced, the present one first."""
        self._before: int | None = None
        """The incarnation of the present one before; None: it goes on."""

    @property
    def is_replacing(self) -> bool:
        """Return whether one is being replaced, or is still to be."""
        return bool(self._left)

    def replace(self) -> None:
        """Let a new process take the place of each, one host after the other."""
        self._left, self._before = list(self._hosts), None

    def take(self, reports: Mapping[str, HostReport]) -> None:
        """Take what the hosts say, and go on to the next host once one is done."""
        if not self._left:
            return
        host = self._left[0]
        report = reports.get(host)
        now = report.incarnation if report is not None else 0
        if not self._runs(host) or self._before not in (None, now):
            self._left, self._before = self._left[1:], None
        elif self._before is None:
            self._restart(host)
            self._before = now
