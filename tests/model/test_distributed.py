from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.model.bags import Bags, Sequences
from silvershard.model.distributed import (
    DistributedStep,
    Peers,
    ValueTables,
    _piece_of,
    joined,
    part_of,
)
from silvershard.model.distributed_step import LocalStep, TowerStep
from silvershard.model.embeddings import SequenceTables
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.training_batches import UserBatch
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import ItemTable, TwoTowerConfig

CPU = torch.device("cpu")

# Of fbgemm's dense lookup, whose gradient the tests below compare with torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:fbgemm.*an autograd kernel was not registered")


def make_model() -> TwoTower:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dim": 12,
        "heads": ("a", "b"),
        "tasks": (),
        "signals": (),
        "history": "history",
        "item": "film",
        "tables": (ItemTable(name="film", dtype="int", size=9),),
        "pooled": (),
        "max_history": 5,
        "encoder": HSTUEncoderConfig(max_length=4, heads=1, dropout=0.0),
    }
    return TwoTower(TwoTowerConfig.model_validate(settings))


def make_batch(model: TwoTower) -> tuple[UserBatch, dict[str, Bags]]:
    history = model.history(torch.tensor([1, 2, 3, 4, 9]), torch.tensor([3, 0, 2]))
    rows = torch.arange(4)
    one = Bags(rows, torch.ones(4), torch.ones_like(rows))
    items = dict.fromkeys(model.item_tables.features, one)
    return UserBatch(history, torch.ones(3, model.config.profile_dim)), items


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """A group of this process alone: every path but those between processes."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    with joined(meeting, 0, 1, device="cpu", timeout_s=60.0) as alone:
        yield alone


def one_step(step: TowerStep, model: TwoTower, optimizer: torch.optim.Optimizer) -> Tensor:
    query, items = step.embed(*make_batch(model), seed=0)
    loss = (query.sum(1) @ items.T).square().sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    step.synchronise()
    return loss.detach()


def test_divided_towers_learn_as_whole_ones(peers: Peers) -> None:
    whole, divided = make_model(), make_model()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    steps: list[TowerStep] = [LocalStep(whole), DistributedStep(divided, peers)]
    assert torch.equal(torch.rand(3), expected), "making the step took random numbers"
    optimizers = [torch.optim.Adam(step.parameters, lr=0.1) for step in steps]
    for _ in range(3):
        losses = [
            one_step(step, model, optimizer)
            for step, model, optimizer in zip(steps, (whole, divided), optimizers, strict=True)
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for name, value in whole.named_parameters():
        torch.testing.assert_close(divided.get_parameter(name), value, rtol=1e-4, atol=1e-4)
    states = [step.optimizer_state(one) for step, one in zip(steps, optimizers, strict=True)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_the_optimizer_goes_on_from_the_state_of_whole_towers(peers: Peers) -> None:
    model = make_model()
    local = LocalStep(model)
    further = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*local.parameters, further], lr=0.1)
    further.grad = torch.ones(2)
    query, items = local.embed(*make_batch(model), seed=0)
    (query.sum() + items.sum()).backward()
    optimizer.step()
    state = local.optimizer_state(optimizer)
    divided = DistributedStep(make_model(), peers)
    again = torch.optim.Adam([*divided.parameters, further], lr=0.1)
    divided.load_optimizer_state(again, state)
    found = divided.optimizer_state(again)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_step_agrees_on_what_the_leader_says(peers: Peers) -> None:
    step = DistributedStep(make_model(), peers)
    assert step.leads
    assert step.agree(lambda: torch.ones(2)).tolist() == [1.0, 1.0]


def test_values_as_bags_of_one_are_the_rows_of_the_table() -> None:
    tables = SequenceTables({"one": 5}, 8)
    values = ValueTables(tables)
    given = {"one": Sequences(torch.tensor([4, 0, 0]), torch.tensor([1, 0, 2]))}
    assert torch.equal(values(given)["one"], tables(given)["one"])
    empty = {"one": Sequences(torch.zeros(0, dtype=torch.int64), torch.zeros(2).long())}
    found = values(empty)["one"]
    assert found.shape == (0, 8)
    found.sum().backward()
    assert not values.values.weight("one").grad.any()


def test_the_parts_of_all_processes_are_the_whole() -> None:
    lengths = torch.tensor([2, 0, 3, 1, 0])
    bags = Bags(torch.arange(6), torch.rand(6), lengths)
    parts = [part_of(bags, Peers(rank, 3, CPU)) for rank in range(3)]
    assert [part.lengths.tolist() for part in parts] == [[2], [0, 3], [1, 0]]
    for name in Bags._fields:
        assert torch.equal(torch.cat([getattr(one, name) for one in parts]), getattr(bags, name))
    sequences = part_of(Sequences(torch.arange(6), lengths), Peers(1, 3, CPU))
    assert sequences.rows.tolist() == [2, 3, 4]


def test_two_shards_of_a_table_in_one_parameter_are_told_apart() -> None:
    storage = torch.arange(100.0)
    own = storage[4:52].view(12, 4)
    shards = [
        SimpleNamespace(
            tensor=storage[first : first + 24].view(6, 4),
            metadata=SimpleNamespace(shard_offsets=[0, column], shard_sizes=[6, 4]),
        )
        for first, column in ((4, 0), (28, 8))
    ]
    pieces = [_piece_of(shard, own) for shard in shards]
    assert [piece.at for piece in pieces] == [
        (slice(0, 6), slice(0, 4)),
        (slice(0, 6), slice(8, 12)),
    ]
    for piece, shard in zip(pieces, shards, strict=True):
        assert torch.equal(own[piece.rows], shard.tensor)
