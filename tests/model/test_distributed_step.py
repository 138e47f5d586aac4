from typing import Any

import pytest
import torch

from silvershard.model.bags import Bags
from silvershard.model.distributed_step import LocalStep, dropout_seed, share_of
from silvershard.model.encoder_config import AttentionEncoderConfig
from silvershard.model.training_batches import UserBatch
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import ItemTable, TwoTowerConfig


def make_model(**changes: Any) -> TwoTower:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dim": 8,
        "heads": ("a", "b"),
        "tasks": (),
        "signals": (),
        "history": "history",
        "item": "film",
        "tables": (ItemTable(name="film", dtype="int", size=9),),
        "pooled": (),
        "max_history": 5,
    }
    return TwoTower(TwoTowerConfig.model_validate(settings | changes))


def make_batch(model: TwoTower) -> UserBatch:
    history = model.history(torch.tensor([1, 2, 3, 4, 9]), torch.tensor([3, 0, 2]))
    return UserBatch(history, torch.full((3, model.config.profile_dim), 2.0))


def one_item(model: TwoTower) -> dict[str, Bags]:
    """An item of which nothing is known."""
    one = torch.ones(1, dtype=torch.int64)
    return dict.fromkeys(model.item_tables.features, Bags(one - 1, one.float(), one))


@pytest.mark.parametrize(("total", "size"), [(7, 3), (1, 1), (2, 5), (512, 4)])
def test_shares_cover_everything_once_and_differ_by_one_at_most(total: int, size: int) -> None:
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert [row for one in shares for row in range(total)[one]] == list(range(total))
    lengths = [one.stop - one.start for one in shares]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_embeds_as_the_model_does() -> None:
    model = make_model()
    users = make_batch(model)
    items = one_item(model)
    query, embedded = LocalStep(model).embed(users, items, seed=1)
    state = model.user_state(users.history)
    assert torch.equal(query, model.user_embedding(2.0 * state))
    assert torch.equal(embedded, model.item_embedding(items))
    assert model.training


def test_dropout_within_an_encoder_follows_the_seed_and_takes_no_random_numbers() -> None:
    model = make_model(encoder=AttentionEncoderConfig(max_length=4, heads=1, dropout=0.5))
    users, step = make_batch(model), LocalStep(model)
    items = one_item(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, again, other = (step.embed(users, items, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_every_process_has_a_dropout_of_its_own() -> None:
    drawn = []
    for rank in (0, 1, 0):
        with dropout_seed(5, rank):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_one_process_agrees_with_itself_and_keeps_its_optimizer() -> None:
    model = make_model()
    step = LocalStep(model)
    assert step.leads
    assert step.agree(lambda: 3) == 3
    step.synchronise()
    parameters = list(model.tower_parameters())
    assert all(one is other for one, other in zip(step.parameters, parameters, strict=True))
    optimizer = torch.optim.Adam(step.parameters)
    for one in step.parameters:
        one.grad = torch.ones_like(one)
    optimizer.step()
    state = step.optimizer_state(optimizer)
    assert state["0.exp_avg"].shape == parameters[0].shape
    fresh = torch.optim.Adam(step.parameters)
    step.load_optimizer_state(fresh, state)
    assert torch.equal(step.optimizer_state(fresh)["0.exp_avg"], state["0.exp_avg"])
