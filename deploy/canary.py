"""The first question to a cluster."""

from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.errors import CommandError
from silvershard.shard.errors import RemoteError

_CANARY_TIMEOUT_S = 30.0


def ask_canary(address: str, dialer: Dialer = PLAIN) -> None:
    """Ask one question through the whole cluster, which also warms it for the first user.

    Raises:
        CommandError: if it is not answered from every document.
    """
    from silvershard.cluster.client import Client

    try:
        with Client(address, timeout_s=_CANARY_TIMEOUT_S, dialer=dialer) as client:
            client.retrieve(k=1, min_coverage=1.0)
    except RemoteError as error:
        raise CommandError(f"the first question was not answered: {error}") from None
