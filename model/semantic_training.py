"""Training of semantic ids: the codes of the items, then a decoder that predicts the next item's.

It is a phase of training like the towers and the reranker, on frozen towers, and a function for
user states that are at hand already.

Shapes: N items, D embedding dimension, L levels, V codes of a level, M examples, Us user state, B
examples of a batch, U held-out users.

Source: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023, section 3.2
(the decoder's cross-entropy).
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from silvershard.kernels import pack_bits
from silvershard.kernels.contract import check_finite, check_range, check_tensor
from silvershard.model.quality import ndcg_at_k
from silvershard.model.semantic_codebooks import fit_codebooks
from silvershard.model.semantic_config import (
    SemanticConfig,
    SemanticSpec,
    SemanticTrainingConfig,
)
from silvershard.model.semantic_ids import SemanticDecoder
from silvershard.model.semantic_search import generate
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.semantic_trie import CodeTrie
from silvershard.model.tower_training import with_prefix
from silvershard.model.training_batches import (
    all_items,
    draw,
    histories,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    user_odds,
)
from silvershard.model.training_config import TrainingConfig
from silvershard.model.training_data import HeldOut, TrainingData
from silvershard.model.two_tower import TwoTower

_SMALLEST_SPREAD = 1e-6
_EVALUATIONS = 5
_EVALUATED_K = 10
_EVALUATION_BATCH = 64
_PAGE_SLOTS = 64
_STANDARDISED_ON = 4096
"""Positions that the mean and the spread of the user states are taken from."""


class SemanticTraining:
    """The last phase of training; ``done`` counts its steps."""

    name: Final = "semantic"

    def __init__(
        self,
        model: TwoTower,
        data: TrainingData,
        config: TrainingConfig,
        held: HeldOut | None,
        seed: int,
    ) -> None:
        """Make the phase.

        Args:
            model: the trained towers; they are not changed.
            data: what they were trained on.
            config: the recipe; without its section ``semantic`` there are no steps.
            held: the items that validate.
            seed: of the codebooks.
        """
        own = config.semantic or SemanticTrainingConfig()
        self.done = 0
        self.steps = own.steps if config.semantic else 0
        self.evaluate_every = max(self.steps // _EVALUATIONS, 1)
        self.ndcg = math.nan
        """Of the last evaluation."""
        self.source = SemanticSource(
            SemanticSpec(decoder=own.decoder, state_dim=model.config.profile_dim),
            model.config.dim,
        )
        self._own = own
        self._schedule = config.schedule
        self._model = model
        self._data = data
        self._held = held
        self._seed = seed
        self._optimizer = torch.optim.Adam(self.source.parameters(), lr=own.learning_rate)
        self._positions = torch.cat([data.tower_positions, data.ranker_positions]).unique()
        self._user_odds = user_odds(data, self._positions, config)
        self._best: dict[str, Tensor] = {}
        self._codes: Tensor | None = None
        self._fitted = False

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._own.learning_rate * learning_rate_factor(
            self._schedule, self.done, max(self.steps, 1), self._own.warm_up
        )

    def step(self) -> float:
        """Train on one batch and return its loss."""
        codes = self._item_codes()
        decoder = self.source.decoder
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        positions = draw(self._positions, self._user_odds, self._own.batch)
        targets = codes[self._data.items[positions]].long()
        loss = decoder_loss(decoder, self._states(positions), targets, self._own.dropout)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self.done += 1
        return loss.item()

    @torch.no_grad()
    def _states(self, positions: Tensor) -> Tensor:
        """What the decoder reads of the users before these positions, ``(B, Us)``."""
        rows, lengths = histories(self._model, self._data, positions)
        users = self._data.users.take(positions)
        state = self._model.user_state(self._model.history(rows, lengths, users))
        return state[:, : self.source.spec.state_dim]

    @torch.no_grad()
    def _item_codes(self) -> Tensor:
        """Codes of all items ``(N, L)`` int16; the codebooks are fitted before the first step."""
        if self._codes is None:
            self._model.eval()
            items = all_items(self._model, self._data)
            if not self._fitted:
                codebooks = fit_codebooks(items, self._own.decoder, seed=self._seed)
                self.source.codebooks.copy_(codebooks)
                drawn = draw(self._positions, self._user_odds, _STANDARDISED_ON)
                standardise(self.source.decoder, self._states(drawn))
                self._fitted = True
            self._codes = self.source.item_codes(items)
        return self._codes

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return NDCG@10 of the best unseen items on the held-out ones; NaN without them."""
        held = self._held
        if held is None:
            return self.ndcg
        codes = self._item_codes()
        num_items, num_pages = len(codes), -(-len(codes) // _PAGE_SLOTS)
        slot_ids = torch.full((num_pages * _PAGE_SLOTS,), -1)
        slot_ids[:num_items] = torch.arange(num_items)
        slot_codes = codes.new_zeros(num_pages * _PAGE_SLOTS, codes.shape[1])
        slot_codes[:num_items] = codes
        trie = CodeTrie(
            slot_codes.view(num_pages, _PAGE_SLOTS, -1),
            slot_ids.view(num_pages, _PAGE_SLOTS),
            self._own.decoder.width,
        )
        history = self._model.history(held.rows, held.lengths, held.users)
        state = self._model.user_state(history)
        found = []
        for users in torch.arange(len(held.targets)).split(_EVALUATION_BATCH):
            seen = (held.seen[0] >= users[0]) & (held.seen[0] <= users[-1])
            unseen = torch.ones(len(users), num_pages * _PAGE_SLOTS, dtype=torch.bool)
            unseen[held.seen[0, seen] - users[0], held.seen[1, seen]] = False
            context = self.source.decoder.context(
                state[users, : self.source.spec.state_dim].contiguous()
            )
            eligible = pack_bits(unseen.view(len(users), num_pages, _PAGE_SLOTS))
            best = generate(self.source.decoder, context, trie, eligible, _EVALUATED_K)
            found.append(best.item_ids)
        self.ndcg = float(np.mean(ndcg_at_k(torch.cat(found), held.targets, _EVALUATED_K)))
        return self.ndcg

    def keep(self) -> None:
        """Remember the present weights as the best."""
        weights = self.source.decoder.state_dict()
        self._best = {name: value.clone() for name, value in weights.items()}

    def restore(self) -> None:
        """Go back to the best weights, if any were kept."""
        if self._best:
            self.source.decoder.load_state_dict(self._best)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, but the towers."""
        tensors = {f"optimizer.{key}": one for key, one in optimizer_state(self._optimizer).items()}
        tensors |= {f"source.{key}": one for key, one in self.source.state_dict().items()}
        return tensors | {f"best.{key}": one for key, one in self._best.items()}

    def load_state(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Continue after ``done`` steps from what ``state`` gave."""
        self.done = done
        self.source.load_state_dict(with_prefix(tensors, "source."))
        self._fitted = True
        load_optimizer_state(self._optimizer, with_prefix(tensors, "optimizer."))
        self._best = with_prefix(tensors, "best.")


@torch.no_grad()
def standardise(decoder: SemanticDecoder, user_states: Tensor) -> None:
    """Let a decoder take off the mean of user states ``(M, Us)`` and divide by their spread."""
    decoder.state_mean.copy_(user_states.double().mean(0))
    spread = user_states.double().std(0, correction=0)
    decoder.state_scale.copy_((1.0 / spread).where(spread > _SMALLEST_SPREAD, 0.0))


def decoder_loss(
    decoder: SemanticDecoder, user_states: Tensor, codes: Tensor, dropout: float
) -> Tensor:
    """Return the mean cross-entropy per code, in nats.

    Args:
        decoder: in training.
        user_states: ``(B, Us)`` float32.
        codes: ``(B, L)`` int64 of the items that came next.
        dropout: share of the elements of the states that count as their mean.
    """
    dropped = (torch.rand(user_states.shape) < dropout).to(user_states.device)
    # The mean scales to 0.
    loss: Tensor = -decoder(torch.where(dropped, decoder.state_mean, user_states), codes).mean()
    return loss


@dataclass(frozen=True)
class TrainedDecoder:
    """A trained decoder and how its training went.

    Attributes:
        decoder: in evaluation mode, without gradients.
        losses: mean cross-entropy per code, in nats, of each tenth of the steps.
        seconds: time that training took.
    """

    decoder: SemanticDecoder
    losses: tuple[float, ...]
    seconds: float


def train_decoder(
    config: SemanticConfig,
    user_states: Tensor,
    codes: Tensor,
    training: SemanticTrainingConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> TrainedDecoder:
    """Train a decoder to predict the codes of the next item from user states that are at hand.

    The result depends only on the arguments and the instruction set. The global random state and
    the number of threads are left as they were.

    Args:
        config: sizes of the decoder.
        user_states: ``(M, Us)`` float32, finite, M >= 1; the towers that made them are not trained.
        codes: ``(M, L)`` int64 in [0, V) of the item that came next.
        training: the recipe; its sizes do not count.
        seed: of the initial weights, the batches and the dropout.
        progress: show a progress bar.

    Raises:
        ValueError: if shapes, dtypes or ranges disagree.
    """
    check_tensor("user_states", user_states, torch.float32, ("M", "Us"))
    check_finite("user_states", user_states)
    check_tensor("codes", codes, torch.int64, (len(user_states), config.levels))
    check_range("codes", codes, 0, config.width)
    if not len(user_states):
        raise ValueError("user_states must hold at least one example, got none")
    began = time.perf_counter()
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        decoder = SemanticDecoder(config, user_states.shape[1]).to(user_states.device)
        standardise(decoder, user_states)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=training.learning_rate)
        losses = []
        for step in tqdm(range(training.steps), "training the decoder", disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * learning_rate_factor(
                    "linear", step, training.steps, training.warm_up
                )
            rows = torch.randint(len(user_states), (training.batch,)).to(user_states.device)
            loss = decoder_loss(decoder, user_states[rows], codes[rows], training.dropout)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    decoder.requires_grad_(requires_grad=False).eval()
    tenths = [float(part.mean()) for part in np.array_split(np.array(losses), 10) if len(part)]
    return TrainedDecoder(decoder, tuple(tenths), time.perf_counter() - began)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
