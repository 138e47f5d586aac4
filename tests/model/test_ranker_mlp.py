import torch

from silvershard.model.dense import PaddedLinear
from silvershard.model.ranker_config import MLPConfig
from silvershard.model.ranker_interface import RankerShape
from silvershard.model.ranker_mlp import MLPRanker

SHAPE = RankerShape(dim=12, num_heads=2, state_dim=20, session_length=9, num_signals=3, num_tasks=2)


def linear(layer: PaddedLinear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight[: layer.in_features, : layer.out_features]
    return x @ weight.double() + layer.bias.double()


def test_logits_are_those_of_the_formula() -> None:
    torch.manual_seed(5)
    made = MLPRanker(MLPConfig(hidden=(24, 10)), SHAPE).requires_grad_(requires_grad=False)
    made.out.weight[:10, :2].normal_()
    made.out.bias.normal_()
    made.signal_mean.uniform_()
    made.signal_scale.uniform_()
    query, state = torch.randn(3, 2, 12), torch.randn(3, 20)
    items, refined, signals = torch.randn(3, 7, 12), torch.randn(3, 7, 2), torch.rand(3, 7, 3)
    found = made(query, state, items, refined, signals)
    for request in range(3):
        for column in range(7):
            x, u = items[request, column].double(), query[request].double()
            scores = refined[request, column].double()
            scaled = (signals[request, column] - made.signal_mean) * made.signal_scale
            given = torch.cat([x, (u * x).flatten(), scores, scaled.double()])
            user = linear(made.user, torch.cat([u.flatten(), state[request].double()]))
            hidden = torch.relu(user + linear(made.item, given))
            hidden = torch.relu(linear(made.middle, hidden))
            expected = linear(made.out, hidden) + linear(made.skip, scores)
            assert torch.allclose(found[request, column].double(), expected, atol=1e-5)
