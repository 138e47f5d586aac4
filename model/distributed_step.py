"""The embeddings of a training step, by the towers of one process or of several.

Positions, negatives, losses and all random numbers but an encoder's dropout are the same on every
process. Only the work of the towers is divided: each process embeds its share of the batch, and
then all of them have all embeddings, so that losses over a whole batch need no second form.

Shapes: B positions of a batch, m items of a batch, H heads, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from silvershard.model.bags import Bags
from silvershard.model.training_batches import UserBatch, load_optimizer_state, optimizer_state
from silvershard.model.two_tower import TwoTower

T = TypeVar("T")

_SEED_STRIDE = 1_000_003


class BothTowers(nn.Module):
    """User and item tower in one call, as data parallelism needs them."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, users: UserBatch, items: Mapping[str, Bags]) -> tuple[Tensor, Tensor]:
        """Return query embeddings ``(B, H, D)`` and item embeddings ``(m, D)``."""
        state = self.model.user_state(users.history)[:, : users.dropout.shape[1]]
        query = self.model.user_embedding(state * users.dropout)
        return query, self.model.item_embedding(items)


class TowerStep(Protocol):
    """The towers while they are trained.

    Every process calls the same methods in the same order.
    """

    device: torch.device
    """Where the embeddings are."""
    leads: bool
    """Whether this process evaluates, logs and keeps what was trained."""
    parameters: list[nn.Parameter]
    """What the optimizer of this process updates, in place of ``TwoTower.tower_parameters``."""

    def embed(
        self, users: UserBatch, items: Mapping[str, Bags], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings ``(B, H, D)`` and ``(m, D)`` of the whole batch.

        Args:
            users: B positions, the same on every process.
            items: bags of m items, the same on every process.
            seed: of the dropout within the towers.
        """

    def synchronise(self) -> None:
        """Bring the present weights into the model of the process that leads."""

    def agree(self, answer: Callable[[], T]) -> T:
        """Return what the process that leads answers; the others do not ask."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the whole state of the optimizer to the process that leads, else part of it.

        It names parameters by their number in ``TwoTower.tower_parameters``, and then on.
        """

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        """Continue from the whole state of an optimizer, of any number of processes."""


StartStep = Callable[[TwoTower], TowerStep]
"""Makes the towers of a model ready for training."""


class LocalStep:
    """The towers on one process."""

    device = torch.device("cpu")
    leads = True

    def __init__(self, model: TwoTower) -> None:
        self.parameters = list(model.tower_parameters())
        self._towers = BothTowers(model)

    def embed(
        self, users: UserBatch, items: Mapping[str, Bags], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the batch."""
        self._towers.train()
        with dropout_seed(seed, 0):
            query, embedded = self._towers(users, items)
        return query, embedded

    def synchronise(self) -> None:
        """Do nothing: the model has its weights."""

    def agree(self, answer: Callable[[], T]) -> T:
        """Return the answer."""
        return answer()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the tensors of the optimizer."""
        return optimizer_state(optimizer)

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
    ) -> None:
        """Continue from these tensors."""
        load_optimizer_state(optimizer, tensors)


@contextmanager
def dropout_seed(seed: int, rank: int) -> Iterator[None]:
    """Draw other random numbers in between, by seed and process, and then go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * _SEED_STRIDE + rank)
        yield


def share_of(total: int, rank: int, size: int) -> slice:
    """The part of so many rows that a process has: parts differ by one row at most."""
    return slice(total * rank // size, total * (rank + 1) // size)
