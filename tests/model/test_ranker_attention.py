import math
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.model.dense import PaddedLinear
from silvershard.model.ranker_attention import SelfAttentionRanker
from silvershard.model.ranker_config import SelfAttentionConfig
from silvershard.model.ranker_interface import RankerShape
from silvershard.model.ranker_session import pack_session

STATE = 20


def ranker(dim: int = 12, **settings: Any) -> SelfAttentionRanker:
    torch.manual_seed(5)
    shape = RankerShape(dim, 2, STATE, 40, 3, 2)
    made = SelfAttentionRanker(SelfAttentionConfig(**settings), shape)
    made.requires_grad_(requires_grad=False)
    made.out.weight[:dim, :2].normal_()
    made.out.bias.normal_()
    made.signal_mean.uniform_()
    made.signal_scale.uniform_()
    return made.eval()


def inputs(made: SelfAttentionRanker, lengths: list[int], width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    batch, dim = len(lengths), made.shape.dim
    sessions = torch.randn(batch, made.session_rows, dim, generator=generator)
    state = torch.randn(batch, STATE, generator=generator)
    return {
        "query": torch.randn(batch, 2, dim, generator=generator),
        "user_state": torch.cat([state, pack_session(sessions, torch.tensor(lengths))], 1),
        "items": torch.randn(batch, width, dim, generator=generator),
        "refined": torch.randn(batch, width, 2, generator=generator),
        "signals": torch.rand(batch, width, 3, generator=generator),
    }


def linear(layer: PaddedLinear, x: Tensor) -> Tensor:
    weight = layer.weight[: layer.in_features, : layer.out_features]
    return x @ weight.double() + layer.bias.double()


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


def attended(layer: Any, tokens: list[Tensor], at: int) -> Tensor:
    """Token ``at`` after attention to the tokens up to itself, one head after the other."""
    dim = tokens[0].shape[0]
    projected = [normed(token) @ layer.inputs.double() for token in tokens[: at + 1]]
    size = dim // layer.heads
    mixed = []
    for head in range(layer.heads):
        mine = slice(head * size, (head + 1) * size)
        query = projected[at][:dim][mine]
        keys = torch.stack([one[dim : 2 * dim][mine] for one in projected])
        values = torch.stack([one[2 * dim :][mine] for one in projected])
        mixed.append(torch.softmax(keys @ query / math.sqrt(size), 0) @ values)
    x = tokens[at] + linear(layer.mix, torch.cat(mixed))
    return x + linear(layer.narrow, torch.relu(linear(layer.widen, normed(x))))


def reference(
    made: SelfAttentionRanker, given: dict[str, Any], request: int, column: int
) -> Tensor:
    """A causal transformer over the session with this candidate as its last token."""
    dim = made.shape.dim
    state, packed = (
        given["user_state"][request].double().split([STATE, made.session_rows * dim + 1])
    )
    length = int(packed[-1])
    session = packed[:-1].view(-1, dim)[:length]
    tokens = [
        linear(made.session, one) + made.position[length - 1 - place].double()
        for place, one in enumerate(session)
    ]
    scores = given["refined"][request, column].double()
    signals = (given["signals"][request, column] - made.signal_mean) * made.signal_scale
    candidate = torch.cat([given["items"][request, column].double(), scores, signals.double()])
    user = torch.cat([given["query"][request].double().flatten(), state])
    tokens.append(linear(made.candidate, candidate) + linear(made.user, user))
    for layer in made.layers:
        tokens = [attended(layer, tokens, at) for at in range(len(tokens))]
    return linear(made.out, normed(tokens[-1])) + linear(made.skip, scores)


@pytest.mark.parametrize(
    ("dim", "settings"),
    [
        (12, {"session_rows": 7, "layers": 1, "attention_heads": 1, "hidden": 8}),
        (12, {"session_rows": 15, "layers": 2, "attention_heads": 3, "hidden": 20}),
        (16, {"session_rows": 16, "layers": 3, "attention_heads": 2, "hidden": 32}),
        (64, {"session_rows": 31, "layers": 2, "attention_heads": 4, "hidden": 128}),
    ],
)
def test_logits_are_those_of_a_causal_transformer(dim: int, settings: dict[str, int]) -> None:
    made = ranker(dim, **settings)
    lengths = [0, 1, settings["session_rows"] // 2, settings["session_rows"]]
    given = inputs(made, lengths, 3)
    found = made(**given)
    for request in range(len(lengths)):
        for column in range(3):
            expected = reference(made, given, request, column)
            assert torch.allclose(found[request, column].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_session_and_its_order_matter() -> None:
    made = ranker(session_rows=7)
    given = inputs(made, [4], 5)
    found = made(**given)
    state = given["user_state"].clone()
    rows = state[:, STATE:-1].view(7, 12)
    rows[[0, 3]] = rows[[3, 0]]
    assert not torch.allclose(made(**{**given, "user_state": state}), found, atol=1e-3)
    state[:, -1] = 3
    assert not torch.allclose(made(**{**given, "user_state": state}), found, atol=1e-3)


def test_rows_beyond_the_length_of_a_session_change_nothing() -> None:
    made = ranker(session_rows=7)
    given = inputs(made, [4, 0], 5)
    found = made(**given)
    state = given["user_state"].clone()
    state[:, STATE + 4 * 12 : -1] = 9.0
    assert torch.equal(made(**{**given, "user_state": state}), found)


def test_scores_far_apart_give_finite_logits() -> None:
    made = ranker(session_rows=7)
    made.layers[0].inputs.mul_(300.0)  # type: ignore[operator, union-attr]
    given = inputs(made, [7, 3], 5)
    assert torch.isfinite(made(**given)).all()
    with torch.enable_grad():
        made.requires_grad_()
        tracked = made(**given)
        assert torch.isfinite(tracked).all()
