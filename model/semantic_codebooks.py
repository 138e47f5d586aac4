"""Codebooks of semantic ids by residual k-means.

Shapes: n items, D embedding dimension, L levels, V codes of a level.

Source: Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization",
Sensors 10, 2010, section 3 (codebooks level by level); Lloyd, "Least Squares Quantization in PCM",
IEEE Transactions on Information Theory 28, 1982 (the steps of each).
"""

import math

import torch
from torch import Tensor

from silvershard.kernels import fixed_dot
from silvershard.kernels.contract import check_finite, check_tensor
from silvershard.model.clustering import spherical_kmeans
from silvershard.model.semantic_config import SemanticConfig
from silvershard.model.semantic_ids import encode_items

_SAMPLE_PER_CODE = 256
_SEED_ITERATIONS = 10
# Residuals become integers of this many bits, so that their sums are exact in any order.
_SUM_BITS = 24


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
