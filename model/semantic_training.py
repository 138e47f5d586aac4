"""Training of semantic IDs: codebooks by residual k-means, and the decoder over their codes.

Shapes: n items, D embedding dimension, L levels, V codes of a level, M examples, Us user state, B
examples of a batch.

Source: Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization",
Sensors 10, 2010, section 3 (codebooks level by level); Lloyd, "Least Squares Quantization in PCM",
IEEE Transactions on Information Theory 28, 1982 (the steps of each); Rajput et al., "Recommender
Systems with Generative Retrieval", NeurIPS 2023, section 3.2 (the decoder's cross-entropy).
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm

from silvershard.kernels import fixed_dot
from silvershard.kernels.contract import check_finite, check_range, check_tensor
from silvershard.model.clustering import spherical_kmeans
from silvershard.model.semantic_ids import SemanticConfig, SemanticDecoder, encode_items

_SAMPLE_PER_CODE = 256
_SEED_ITERATIONS = 10
# Residuals become integers of this many bits, so that their sums are exact in any order.
_SUM_BITS = 24
_SMALLEST_SPREAD = 1e-6


class SemanticTrainingConfig(BaseModel):
    """What a person decides about the training of a decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1, description="batches")
    batch: int = Field(default=512, ge=1, description="examples of a batch")
    learning_rate: float = Field(default=3e-3, gt=0, description="of Adam, at its highest")
    warm_up: int = Field(
        default=50, ge=0, description="steps in which the learning rate rises, at most a tenth"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="of the elements of the scaled user state"
    )
    threads: int = Field(default=1, ge=1, description="threads of torch")


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


def fit_codebooks(
    items: Tensor, config: SemanticConfig, *, seed: int, iterations: int = 10
) -> Tensor:
    """Return codebooks ``(L, V, D)`` float32, each of what the levels before it left.

    A level starts from spherical k-means and goes on with Lloyd's steps, on a sample of at most 256
    items per code. A code that no item has takes the item that is furthest from its own. The
    result depends only on the arguments and the instruction set: not on threads.

    Args:
        items: ``(n, D)`` float32, finite, n >= 1.
        config: the number and width of the levels.
        seed: of the sample and the initial codes.
        iterations: Lloyd's steps of a level.

    Raises:
        ValueError: if the shape, the dtype, a value or a setting is out of range.
    """
    check_tensor("items", items, torch.float32, ("n", "D"))
    check_finite("items", items)
    if not items.numel():
        raise ValueError(f"items must hold at least one embedding, got {tuple(items.shape)}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(items), generator=generator)[: _SAMPLE_PER_CODE * config.width]
    rest = items[chosen.sort().values]
    codebooks = items.new_zeros(config.levels, config.width, items.shape[1])
    for level in range(config.levels):
        codebooks[level] = _fit_level(rest, config.width, seed + level, iterations)
        codes = encode_items(rest, codebooks[level : level + 1])[:, 0].long()
        rest = rest - codebooks[level][codes]
    return codebooks


def _fit_level(rest: Tensor, width: int, seed: int, iterations: int) -> Tensor:
    """Return the codebook ``(V, D)`` of what the earlier levels left of the sample."""
    largest = float(rest.abs().max())
    if not largest:
        return rest.new_zeros(width, rest.shape[1])
    scale = 2.0 ** (_SUM_BITS - math.frexp(largest)[1])
    whole = torch.round(rest.double() * scale).long()
    codes = spherical_kmeans(
        rest, width, seed=seed, iterations=_SEED_ITERATIONS, max_imbalance=width
    ).assignment
    codebook = _means(whole, codes, rest.new_zeros(width, rest.shape[1]), scale)
    for _ in range(iterations):
        codes = encode_items(rest, codebook[None])[:, 0].long()
        codebook = _means(whole, codes, codebook, scale)
        _fill_empty(codebook, codes, rest)
    return codebook


def _means(whole: Tensor, codes: Tensor, before: Tensor, scale: float) -> Tensor:
    """Return the mean of the rows of each code, or what it was before if there is none."""
    sums = torch.zeros(before.shape, dtype=torch.int64, device=whole.device)
    sums.index_add_(0, codes, whole)
    sizes = torch.bincount(codes, minlength=len(before))[:, None]
    return torch.where(sizes > 0, (sums.double() / sizes.clamp(min=1) / scale).float(), before)


def _fill_empty(codebook: Tensor, codes: Tensor, rest: Tensor) -> None:
    """Move codes that no row has to the rows that are furthest from theirs."""
    empty = torch.nonzero(torch.bincount(codes, minlength=len(codebook)) == 0)[:, 0]
    if not len(empty):
        return
    off = rest - codebook[codes]
    furthest = torch.argsort(fixed_dot(off, off), descending=True, stable=True)[: len(empty)]
    codebook[empty[: len(furthest)]] = rest[furthest]


def train_decoder(
    config: SemanticConfig,
    user_states: Tensor,
    codes: Tensor,
    training: SemanticTrainingConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> TrainedDecoder:
    """Train a decoder to predict the codes of the next item from a frozen user state.

    The result depends only on the arguments and the instruction set. The global random state and
    the number of threads are left as they were.

    Args:
        config: sizes of the decoder.
        user_states: ``(M, Us)`` float32, finite, M >= 1; the towers that made them are not trained.
        codes: ``(M, L)`` int64 in [0, V) of the item that came next.
        training: the recipe.
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
    with _threads(training.threads), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        decoder = SemanticDecoder(config, user_states.shape[1]).to(user_states.device)
        decoder.state_mean.copy_(user_states.double().mean(0))
        spread = user_states.double().std(0, correction=0)
        decoder.state_scale.copy_((1.0 / spread).where(spread > _SMALLEST_SPREAD, 0.0))
        losses = _run(decoder, user_states, codes, training, progress)
    decoder.requires_grad_(requires_grad=False).eval()
    tenths = [float(part.mean()) for part in np.array_split(np.array(losses), 10) if len(part)]
    return TrainedDecoder(decoder, tuple(tenths), time.perf_counter() - began)


def _run(
    decoder: SemanticDecoder,
    user_states: Tensor,
    codes: Tensor,
    training: SemanticTrainingConfig,
    progress: bool,
) -> list[float]:
    """Train in place; return the loss of every step."""
    decoder.train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=training.learning_rate)
    rising = min(training.warm_up, training.steps // 10)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (training.steps - step) / (training.steps - rising)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # Elements that are dropped are the mean, which scales to 0.
    kept = 1.0 - training.dropout
    losses = []
    steps = tqdm(range(training.steps), desc="training the decoder", disable=not progress)
    for _ in steps:
        rows = torch.randint(len(user_states), (training.batch,)).to(user_states.device)
        states = user_states[rows]
        drop = (torch.rand(states.shape) >= kept).to(states.device)
        log_probs = decoder(torch.where(drop, decoder.state_mean, states), codes[rows])
        loss = -log_probs.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
