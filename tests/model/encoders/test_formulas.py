from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silvershard.model.dense import PaddedLinear
from silvershard.model.encoder_config import (
    AttentionEncoderConfig,
    HSTUEncoderConfig,
    MeanEncoderConfig,
)
from silvershard.model.encoders import (
    AttentionLayer,
    CausalAttention,
    HSTULayer,
    LayeredEncoder,
    RowNorm,
    SequenceEncoder,
    build_encoder,
)

Rows = NDArray[np.float64]


def array(x: Tensor) -> Rows:
    return x.detach().double().numpy()


def linear(layer: nn.Module, x: Rows) -> Rows:
    assert isinstance(layer, PaddedLinear)
    weight = array(layer.weight)[: layer.in_features, : layer.out_features]
    return np.stack([row @ weight + array(layer.bias) for row in x])


def norm(layer: nn.Module, x: Rows) -> Rows:
    assert isinstance(layer, RowNorm)
    out = [(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in x]
    return np.stack(out) * array(layer.scale) + array(layer.shift)


def silu(x: Rows) -> Rows:
    return x / (1.0 + np.exp(-x))


def attended(attention: nn.Module, query: Rows, key: Rows, value: Rows, *, softmax: bool) -> Rows:
    assert isinstance(attention, CausalAttention)
    width = query.shape[1] // attention.num_heads
    bias = None if attention.bias is None else array(attention.bias)
    out = np.zeros_like(query)
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(query)):
            scores = np.array([query[i, part] @ key[j, part] for j in range(i + 1)])
            if softmax:
                scores /= np.sqrt(width)
            if bias is not None:
                scores += np.array([bias[head, i - j] for j in range(i + 1)])
            if softmax:
                powers = np.exp(scores - scores.max())
                weights = powers / powers.sum()
            else:
                weights = silu(scores) / attention.max_length
            for j in range(i + 1):
                out[i, part] += weights[j] * value[j, part]
    return out


def attention_layer(layer: AttentionLayer, x: Rows) -> Rows:
    normed = norm(layer.norm, x)
    key, value = np.split(linear(layer.key_value, normed), 2, axis=1)
    mixed = attended(layer.attention, linear(layer.query, normed), key, value, softmax=True)
    x = x + linear(layer.out, mixed)
    hidden = np.maximum(linear(layer.hidden, norm(layer.hidden_norm, x)), 0.0)
    return x + linear(layer.hidden_out, hidden)


def hstu_layer(layer: HSTULayer, x: Rows) -> Rows:
    normed = norm(layer.norm, x)
    gate, query = np.split(silu(linear(layer.gate_query, normed)), 2, axis=1)
    key, value = np.split(silu(linear(layer.key_value, normed)), 2, axis=1)
    mixed = attended(layer.attention, query, key, value, softmax=False)
    return x + linear(layer.out, norm(layer.mixed_norm, mixed) * gate)


def states_of(encoder: SequenceEncoder, items: Rows) -> Rows:
    """The states of one session without padding."""
    if not isinstance(encoder, LayeredEncoder):
        return np.stack([items[: count + 1].mean(0) for count in range(len(items))])
    x = items
    if encoder.positions is not None:
        x = x + array(encoder.positions)[: len(x)]
    for layer in encoder.layers:
        if isinstance(layer, AttentionLayer):
            x = attention_layer(layer, x)
        else:
            assert isinstance(layer, HSTULayer)
            x = hstu_layer(layer, x)
    return norm(encoder.norm, x) if isinstance(encoder.norm, RowNorm) else x


@pytest.mark.parametrize(
    ("count", "length", "heads", "dim"),
    [(1, 1, 1, 16), (2, 3, 2, 18), (3, 16, 4, 32), (5, 17, 1, 33), (4, 33, 4, 20), (5, 50, 2, 64)],
)
@pytest.mark.parametrize("kind", ["mean", "attention", "hstu"])
@pytest.mark.parametrize("relative", [False, True])
def test_states_are_those_of_the_formulas(
    kind: str, count: int, length: int, heads: int, dim: int, relative: bool
) -> None:
    torch.manual_seed(count)
    config: MeanEncoderConfig | AttentionEncoderConfig | HSTUEncoderConfig
    positions: dict[str, Any] = {"absolute_positions": not relative, "relative_bias": relative}
    if kind == "mean":
        config = MeanEncoderConfig()
    elif kind == "attention":
        config = AttentionEncoderConfig(heads=heads, feed_forward=1 + count % 2, **positions)
    else:
        config = HSTUEncoderConfig(heads=heads, **positions)
    encoder = build_encoder(config, dim).requires_grad_(requires_grad=False).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith(("scale", "shift", "bias", "positions")):
            parameter.add_(0.5 * torch.randn(parameter.shape))
    x = torch.randn(count, length, dim)
    lengths = torch.randint(0, length + 1, (count,))
    lengths[0] = length
    states = encoder(x, lengths)
    for row, number in enumerate(lengths.tolist()):
        assert not states[row, number:].any()
        if number:
            expected = torch.from_numpy(states_of(encoder, array(x[row, :number])))
            assert torch.allclose(states[row, :number].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_ones_and_twos_is_exact() -> None:
    encoder = build_encoder(MeanEncoderConfig(), 1).eval()
    x = torch.tensor([[[1.0], [2.0], [3.0], [2.0]]])
    expected = torch.tensor([[[1.0], [1.5], [2.0], [0.0]]])
    assert torch.equal(encoder(x, torch.tensor([3])), expected)


def test_an_attention_layer_of_equal_scores_averages_the_values() -> None:
    torch.manual_seed(0)
    layer = AttentionEncoderConfig(layers=1, heads=1, absolute_positions=False)
    encoder = build_encoder(layer, 16).requires_grad_(requires_grad=False).eval()
    encoder.get_parameter("layers.0.query.weight").zero_()
    encoder.get_parameter("layers.0.hidden_out.weight").zero_()
    # Values are the normalised items and the output is the identity.
    key_value = encoder.get_parameter("layers.0.key_value.weight")
    key_value[:, 16:] = torch.eye(16)
    encoder.get_parameter("layers.0.out.weight").copy_(torch.eye(16))
    x = torch.randn(1, 7, 16)
    items = nn.functional.layer_norm(x, (16,))
    means = items.cumsum(1) / torch.arange(1, 8)[:, None]
    expected = nn.functional.layer_norm(x + means, (16,))
    assert torch.allclose(encoder(x, torch.tensor([7])), expected, atol=1e-5)
