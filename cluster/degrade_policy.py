"""What a request allows a router to leave out when there is more to do than it can."""

from dataclasses import dataclass
from enum import IntEnum

from silvershard.cluster import retrieval_pb2
from silvershard.model.request import RequestError


class DegradeMode(IntEnum):
    """Whether less work may be spent on a request; numbers as on the wire."""

    DEFAULT = 0
    """Less of what the router chose itself; a number that the request gives stays."""
    ALLOW = 1
    """Less of the numbers that the request gives, too."""
    NEVER = 2
    """No less: the request may fail instead."""


@dataclass(frozen=True)
class DegradePolicy:
    """What a request allows under overload; the floors of the router hold besides."""

    mode: DegradeMode = DegradeMode.DEFAULT
    min_nprobe: int = 0
    """Clusters per head that are probed at least, where the plan has as many."""
    min_ann_k: int = 0
    """Candidates per head that are kept at least, where the plan has as many."""
    required_tasks: tuple[str, ...] = ()
    """Tasks that the answer must tell; with one of them, all are computed."""


UNDEMANDING = DegradePolicy()
"""That of a request which says nothing."""


def policy_from(message: retrieval_pb2.DegradePolicy) -> DegradePolicy:
    """Return the policy in a message; whether its tasks exist only a generation can tell.

    Raises:
        RequestError: if the mode is unknown.
    """
    mode = int(message.mode)
    if mode not in {known.value for known in DegradeMode}:
        raise RequestError("degrade.mode", f"unknown mode {mode}")
    return DegradePolicy(
        DegradeMode(mode),
        message.min_nprobe,
        message.min_ann_k,
        tuple(dict.fromkeys(message.required_tasks)),
    )


def policy_to(policy: DegradePolicy) -> retrieval_pb2.DegradePolicy:
    """Return a policy as a message.

    Raises:
        ValueError: naming the field that has no form on the wire.
    """
    for name in ("min_nprobe", "min_ann_k"):
        value = getattr(policy, name)
        if not 0 <= value < 2**32:
            raise ValueError(f"degrade.{name}: must be in 0..{2**32 - 1}, got {value}")
    return retrieval_pb2.DegradePolicy(
        mode=retrieval_pb2.DegradePolicy.Mode.Name(policy.mode.value),
        min_nprobe=policy.min_nprobe,
        min_ann_k=policy.min_ann_k,
        required_tasks=policy.required_tasks,
    )
