"""What the coordinator needs of a connection to a replica; a simulation of faults is one, too.

Shapes: B requests, L program length.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from torch import Tensor

from silvershard.cluster.freshness import ANYTHING, Demand, Seen
from silvershard.model.request import FeatureValues
from silvershard.model.two_tower import Encoded
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo, Work
from silvershard.shard.fields import FieldValue


class LinkState(Enum):
    """What a router believes of a replica."""

    UP = "up"
    SUSPECT = "suspect"
    """Some pings are unanswered: others are preferred."""
    EJECTED = "ejected"
    """Many pings are unanswered: it hangs, and is not asked."""
    DOWN = "down"
    """There is no connection."""


class ShardLink(Protocol):
    """One generation of one replica of one shard.

    Every method that asks the shard may raise:
        ShardUnavailable: there is no connection, or the answer cannot be used.
        DeadlineExceeded: no answer came in ``remaining_s``.
        GenerationError: the shard does not serve the generation.
        Overloaded: the queue of the shard is full.

    Those that take a demand may raise, too:
        ReplicaStale: the shard has not applied what is demanded, and did not in time.
        Refusal: what is demanded is of another log than the shard follows.
        RequestError: what is demanded is beyond the end of that log.
    """

    shard: int
    replica: int

    @property
    def state(self) -> LinkState:
        """Return what is believed of the replica."""
        ...

    @property
    def seen(self) -> Seen | None:
        """Return what the replica had applied by its last word; None: it has not said yet."""
        ...

    async def encode(
        self,
        users: Sequence[Mapping[str, FeatureValues]],
        remaining_s: float,
        demand: Demand = ANYTHING,
    ) -> tuple[Encoded, Seen]:
        """Return the query embeddings of users whose features are checked already.

        And what the replica had applied: rows of the tables of its user tower change, too.
        """
        ...

    async def count(self, scan: Tensor, remaining_s: float, demand: Demand = ANYTHING) -> Tensor:
        """Return how many documents of the shard pass each program ``(B, L, 4)``, ``(B,)``."""
        ...

    async def open(
        self, key: str, work: Work, remaining_s: float, demand: Demand = ANYTHING
    ) -> tuple[RoundOne, Seen]:
        """Run round one, and tell what it saw.

        The candidates stay open under ``key`` for ``remaining_s``.
        """
        ...

    async def close(self, key: str, cutoffs: Cutoffs, remaining_s: float) -> RoundTwo:
        """Run round two on the candidates open under ``key``.

        Raises:
            CandidatesExpired: if they are open no more.
        """
        ...

    async def fields(
        self, key: str, item_ids: Sequence[int], names: Sequence[str], remaining_s: float
    ) -> dict[str, list[FieldValue]]:
        """Return stored columns of items as the candidates open under ``key`` saw them.

        Raises:
            CandidatesExpired: if they are open no more.
        """
        ...

    def release(self, key: str) -> None:
        """Tell the shard that nobody waits for ``key`` any more; never waits, never fails."""
        ...
