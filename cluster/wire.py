"""The version of what routers and shards say to each other.

A shard names it when a stream opens, so that a cluster whose processes are of two releases never
guesses at a message: a router asks the shards of its own version alone.
"""

from collections.abc import Iterable

VERSION = 2
"""Counts the changes of ``ShardCall``, ``ShardReply`` and of the tensors in them that the other end
cannot read, or would read otherwise. Whoever makes one counts it here. 1 had no name: tensors were
messages of their own, and what was released a call."""

_KEY = "silvershard-wire"

METADATA = ((_KEY, str(VERSION)),)
"""What a shard sends first."""


def refusal(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Return why a shard is not asked, by what it sent first; empty if it may be."""
    for key, value in metadata or ():
        if key == _KEY:
            if value == str(VERSION):
                return ""
            named = str(value)[:20]
            break
    else:
        named = "1 or none"
    return (
        f"it speaks wire version {named}, this router {VERSION}: "
        "run the same release of silvershard on both"
    )
