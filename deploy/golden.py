"""The verb ``golden``: asks a running cluster what its generation was published with."""

from typing import Any

from silvershard.cluster import Client, DegradeMode, DegradePolicy, Query, Result
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.errors import CommandError
from silvershard.deploy.state import StateDir
from silvershard.model.request import Request
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.golden import differences, read_golden
from silvershard.shard.snapshot import open_snapshot


def check(
    state: StateDir, address: str, *, timeout_s: float, dialer: Dialer = PLAIN
) -> dict[str, Any]:
    """Ask a cluster every golden request of its generation and compare, bit for bit.

    Args:
        state: where the generation was published. The generation is the one that runs on it, else
            the newest.
        address: of the router.
        timeout_s: of one request.
        dialer: opens the channel to it.

    Raises:
        CommandError: if there is no generation, it has no golden requests, or the cluster serves
            other content under its number.
        RequestRefused: if the cluster refuses a request, or serves another generation.
        SnapshotError: if the generation in the state directory is damaged.
    """
    record = state.read_record() if state.root.is_dir() else None
    published = list_generations(state.generations)
    generation = record.generation if record else max(published, default=0)
    if generation not in published:
        what = f"generation {generation}" if generation else "a generation"
        raise CommandError(
            f"{state.generations} must have {what}: name the state directory that it was published "
            "in with --state"
        )
    path = generation_dir(state.generations, generation)
    snapshot = open_snapshot(path)
    content_hash = snapshot.manifest.content_hash
    golden = read_golden(snapshot)
    if not golden.cases:
        raise CommandError(
            f"{path} was published without golden requests: publish with index.golden_requests"
        )
    with Client(address, timeout_s=timeout_s, dialer=dialer) as client:

        def answer(request: Request) -> Result:
            result = client.retrieve(
                Query(
                    **request.__dict__,
                    generation=generation,
                    min_coverage=1.0,
                    degrade=DegradePolicy(DegradeMode.NEVER),
                )
            )
            if result.content_hash != content_hash:
                raise CommandError(
                    f"{address} serves generation {generation} with content "
                    f"{result.content_hash[:12]}, that of {path} is {content_hash[:12]}"
                )
            return result

        found = list(differences(golden, answer))
    return {
        "generation": generation,
        "requests": len(golden.cases),
        "differences": [
            {"request": golden.cases[one.number].request, "text": str(one)} for one in found
        ],
    }


def render(document: dict[str, Any]) -> str:
    """Return what was found for people."""
    asked = f"{document['requests']} golden requests of generation {document['generation']}"
    wrong = document["differences"]
    if not wrong:
        return f"{asked} are answered bit for bit as by the model that was published"
    lines = [f"{len(wrong)} of {asked} are answered otherwise than by the model:"]
    return "\n".join([*lines, *(f"  {one['text']}" for one in wrong)])
