from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.model.dense import PaddedLinear
from silvershard.model.ranker_config import MixtureOfLogitsConfig
from silvershard.model.ranker_interface import RankerShape
from silvershard.model.ranker_mixture import MixtureOfLogitsRanker


def ranker(num_tasks: int = 2, **settings: Any) -> MixtureOfLogitsRanker:
    torch.manual_seed(5)
    shape = RankerShape(12, 2, 20, 9, 3, num_tasks)
    made = MixtureOfLogitsRanker(MixtureOfLogitsConfig(**settings), shape)
    made.requires_grad_(requires_grad=False)
    made.scale.uniform_(0.5, 1.5)
    made.signal_mean.uniform_()
    made.signal_scale.uniform_()
    return made.eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        "query": torch.randn(3, 2, 12, generator=generator),
        "user_state": torch.randn(3, 20, generator=generator),
        "items": torch.randn(3, 6, 12, generator=generator),
        "refined": torch.randn(3, 6, 2, generator=generator),
        "signals": torch.rand(3, 6, 3, generator=generator),
    }


def linear(layer: PaddedLinear, x: Tensor) -> Tensor:
    weight = layer.weight[: layer.in_features, : layer.out_features]
    return x @ weight.double() + layer.bias.double()


def reference(made: MixtureOfLogitsRanker, given: dict[str, Tensor], at: tuple[int, int]) -> Tensor:
    """Every gate and every inner product of one pair by itself."""
    config = made.config
    user = torch.cat([given["query"][at[0]].flatten(), given["user_state"][at[0]]]).double()
    scaled = (given["signals"][at] - made.signal_mean) * made.signal_scale
    item = linear(made.item, torch.cat([given["items"][at], scaled]).double())
    users = linear(made.user, user).view(config.user_components, -1)
    items = item[: -config.gate_hidden].view(config.item_components, -1)
    cosines = torch.stack([(x @ u) / (x.norm() * u.norm()) for x in items for u in users])
    scores = given["refined"][at].double()
    crossed = torch.relu(linear(made.cross_hidden, torch.cat([cosines, scores])))
    gates = linear(made.gate, torch.cat([torch.relu(item[-config.gate_hidden :]), crossed]))
    gates = gates + linear(made.user_gate, torch.relu(linear(made.user_hidden, user)))
    logits = linear(made.skip, scores)
    for task, gate in enumerate(gates.view(made.shape.num_tasks, -1)):
        mixed = torch.softmax(gate, 0) @ (cosines / config.temperature)
        logits[task] += made.scale[task].double() * mixed
    return logits


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"user_components": 1, "item_components": 1, "component_dim": 1, "gate_hidden": 1},
        {"user_components": 3, "item_components": 5, "component_dim": 7, "gate_hidden": 9},
        {"user_components": 17, "item_components": 2, "component_dim": 16, "temperature": 1.0},
    ],
)
def test_logits_are_those_of_the_formula(num_tasks: int, settings: dict[str, Any]) -> None:
    made, given = ranker(num_tasks, **settings), inputs()
    found = made(**given)
    for request in range(3):
        for column in range(6):
            expected = reference(made, given, (request, column))
            assert torch.allclose(found[request, column].double(), expected, atol=2e-4, rtol=1e-5)


def test_gates_far_apart_choose_one_pair_of_components() -> None:
    made, given = ranker(temperature=1.0), inputs()
    made.scale.fill_(1.0)
    made.user_gate.bias.zero_()
    made.user_gate.bias[5] = made.user_gate.bias[32 + 9] = 1e4
    learned = made(**given) - made.skip(given["refined"].flatten(0, 1)).view(3, 6, 2)
    assert torch.isfinite(learned).all()
    assert learned.abs().max() <= 1.0 + 1e-5
    made.user_gate.bias[5] = 0.0
    made.user_gate.bias[9] = 1e4
    both = made(**given) - made.skip(given["refined"].flatten(0, 1)).view(3, 6, 2)
    assert torch.allclose(both[..., 0], learned[..., 1], atol=1e-5)
