"""Semantic IDs of items and a decoder that gives their probabilities, code by code.

Every item has a tuple of codes, those of its embedding under residual quantisation. The decoder
gives the probability of each code from the user state and the codes before it, over all codes and
not only over those that items have: the score of an item depends on no other item. Logarithms are
at most 0 and are added from the first code on; a rounded sum never exceeds one of its terms while
the other is not positive. So the score of a prefix bounds those of all items below it, bit for bit.

Shapes: B requests, Us user state, n items or rows, L levels, V codes of a level, E hidden units,
D embedding dimension, l codes so far.

Source: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023, section 3
(semantic IDs by residual quantisation, a decoder over them).
"""

import math

import torch
from torch import Tensor, nn

from silvershard.kernels import fixed_dot, fixed_log
from silvershard.kernels.contract import check_finite, check_not_nan, check_range, check_tensor
from silvershard.model.dense import PaddedLinear, padded_product
from silvershard.model.ranker_arithmetic import fixed_exp2, normed_rows
from silvershard.model.semantic_config import MAX_WIDTH, SemanticConfig

_LOG2_E = math.log2(math.e)
_MAX_INPUT = 16.0
_CHUNK_ROWS = 1 << 14


def encode_items(items: Tensor, codebooks: Tensor) -> Tensor:
    """Return the codes of embeddings, each level the nearest to what the levels before it left.

    An item has the same codes alone and in any batch. Ties go to the smaller code.

    Args:
        items: ``(n, D)`` float32, finite.
        codebooks: ``(L, V, D)`` float32.

    Returns:
        ``(n, L)`` int16.

    Raises:
        ValueError: if a shape or dtype disagrees, or a value is not finite.
    """
    check_tensor("codebooks", codebooks, torch.float32, ("L", "V", "D"))
    check_tensor("items", items, torch.float32, ("n", codebooks.shape[2]))
    check_finite("items", items)
    if codebooks.shape[1] > MAX_WIDTH:
        raise ValueError(f"codebooks must have at most {MAX_WIDTH} codes, got {codebooks.shape[1]}")
    # The nearest code has the largest inner product less half its squared length.
    halves = fixed_dot(codebooks, codebooks) * 0.5  # (L, V)
    codes = torch.empty(len(items), len(codebooks), dtype=torch.int16, device=items.device)
    for part, out in zip(items.split(_CHUNK_ROWS), codes.split(_CHUNK_ROWS), strict=True):
        rest = part
        for level, codebook in enumerate(codebooks):
            chosen = (padded_product(rest, codebook.T) - halves[level]).argmax(1)
            out[:, level] = chosen
            rest = rest - codebook[chosen]
    return codes


class _GatedLayer(nn.Module):
    """``x + out(relu(gate) * value)`` of the normalised input.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6 (ReGLU).
    """

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.gate_value = PaddedLinear(hidden, 2 * units)
        self.out = PaddedLinear(units, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows ``(n, E)`` float32."""
        gate, value = self.gate_value(normed_rows(x)).chunk(2, 1)
        out: Tensor = x + self.out(torch.relu(gate) * value)
        return out


class SemanticDecoder(nn.Module):
    """Log-probabilities of the next code of an item, given the user state and the codes so far.

    A position sums the user's part, an embedding of each code so far and one of the level, as the
    codes of a residual quantiser sum to the item; gated layers shared by the levels follow, then an
    output layer per level. Without gradients every row has the same bits alone and in any batch.

    Args:
        config: the sizes.
        state_dim: Us.

    Raises:
        ValueError: if ``state_dim`` is below 1.
    """

    state_mean: Tensor
    state_scale: Tensor

    def __init__(self, config: SemanticConfig, state_dim: int) -> None:
        super().__init__()
        if state_dim < 1:
            raise ValueError(f"state_dim must be at least 1, got {state_dim}")
        self.config = config
        self.state_dim = state_dim
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_scale", torch.ones(state_dim))
        """What states are multiplied by after their mean is taken off."""
        self.user = PaddedLinear(state_dim, config.hidden)
        self.codes = nn.Parameter(
            torch.randn(config.levels - 1, config.width, config.hidden) / math.sqrt(config.hidden)
        )
        """``(L - 1, V, E)`` float32; nothing follows the last code."""
        self.level = nn.Parameter(torch.zeros(config.levels, config.hidden))
        self.layers = nn.ModuleList(
            _GatedLayer(config.hidden, config.expansion * config.hidden)
            for _ in range(config.blocks)
        )
        self.out = nn.ModuleList(
            PaddedLinear(config.hidden, config.width) for _ in range(config.levels)
        )

    def context(self, user_state: Tensor) -> Tensor:
        """Return the user's part of every position, ``(B, E)`` float32.

        Args:
            user_state: ``(B, Us)`` float32, finite.

        Raises:
            ValueError: if the shape, the dtype or a value is another.
        """
        check_tensor("user_state", user_state, torch.float32, ("B", self.state_dim))
        check_finite("user_state", user_state)
        scaled = (user_state - self.state_mean) * self.state_scale
        context: Tensor = self.user(scaled.clamp(-_MAX_INPUT, _MAX_INPUT))
        return context

    def logits(self, context: Tensor, codes: Tensor) -> Tensor:
        """Return the unnormalised scores of the next code, ``(n, V)`` float32.

        Args:
            context: ``(n, E)`` float32.
            codes: ``(n, l)`` int64 in [0, V), the codes so far; l < L.
        """
        length = codes.shape[1]
        x = context + self.level[length]
        for level, code in enumerate(codes.unbind(1)):
            x = x + self.codes[level][code]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out[length](normed_rows(x))
        return logits

    def log_probs(self, context: Tensor, codes: Tensor) -> Tensor:
        """Return the log-probabilities of the next code, ``(n, V)`` float32, at most 0.

        Args:
            context: ``(n, E)`` float32.
            codes: ``(n, l)`` int64 in [0, V), the codes so far; l < L.

        Raises:
            ValueError: if the weights are such that a logit is not finite.
        """
        logits = self.logits(context, codes)
        if logits.requires_grad:
            return torch.log_softmax(logits, 1)
        shifted = logits.sub_(logits.amax(1, keepdim=True))
        total = padded_product(fixed_exp2(shifted * _LOG2_E), logits.new_ones(logits.shape[1], 1))
        check_not_nan("the decoder's logits", total)
        # The largest logit counts 1 in the total, whose logarithm is therefore not negative.
        return shifted.sub_(fixed_log(total))

    def forward(self, user_state: Tensor, codes: Tensor) -> Tensor:
        """Return the log-probability of each code of an item after those before it.

        Args:
            user_state: ``(n, Us)`` float32, finite.
            codes: ``(n, L)`` int64 in [0, V).

        Returns:
            ``(n, L)`` float32; its sum from the first code on is the score of the item.

        Raises:
            ValueError: if shapes, dtypes or ranges disagree.
        """
        context = self.context(user_state)
        check_tensor("codes", codes, torch.int64, (len(user_state), self.config.levels))
        check_range("codes", codes, 0, self.config.width)
        return torch.cat(
            [
                self.log_probs(context, codes[:, :level]).gather(1, codes[:, level : level + 1])
                for level in range(self.config.levels)
            ],
            1,
        )


def item_scores(decoder: SemanticDecoder, user_state: Tensor, codes: Tensor) -> Tensor:
    """Return the scores that ``generate`` gives one item per user, ``(n,)`` float32.

    Args:
        decoder: whose log-probabilities are added.
        user_state: ``(n, Us)`` float32, finite.
        codes: ``(n, L)`` int64 in [0, V).
    """
    by_level = decoder(user_state, codes).unbind(1)
    total: Tensor = by_level[0]
    for one in by_level[1:]:
        total = total + one
    return total
