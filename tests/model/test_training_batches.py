import pytest
import torch

from silvershard.model.catalogue import Ragged, UserColumn
from silvershard.model.training_batches import (
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    without_some,
)
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import TwoTowerConfig


def test_a_learning_rate_rises_and_then_falls_as_its_schedule_says() -> None:
    linear = [learning_rate_factor("linear", step, 100, 10) for step in range(100)]
    assert linear[0] == pytest.approx(0.1)
    assert linear[:10] == sorted(linear[:10])
    assert linear[10:] == sorted(linear[10:], reverse=True)
    assert linear[50] == pytest.approx(0.5)
    assert linear[99] == pytest.approx(0.01)
    assert learning_rate_factor("cosine", 50, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor("cosine", 25, 100, 10) > linear[25]
    assert learning_rate_factor("constant", 99, 100, 10) == 1.0
    assert learning_rate_factor("constant", 0, 100, 0) == 1.0


def test_the_warm_up_is_at_most_a_tenth_of_all_steps() -> None:
    assert learning_rate_factor("constant", 2, 30, 50) == 1.0
    assert learning_rate_factor("constant", 1, 30, 50) == pytest.approx(2 / 3)


def test_an_optimizer_goes_on_where_it_was() -> None:
    def steps(weight: torch.nn.Parameter, optimizer: torch.optim.Adam, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (weight**3).sum().backward()
            optimizer.step()

    one = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    first = torch.optim.Adam([one], lr=0.1)
    steps(one, first, 3)
    saved, weights = optimizer_state(first), one.detach().clone()
    assert sorted(saved) == ["0.exp_avg", "0.exp_avg_sq", "0.step"]
    other = torch.nn.Parameter(weights)
    second = torch.optim.Adam([other], lr=0.1)
    load_optimizer_state(second, saved)
    steps(one, first, 2)
    steps(other, second, 2)
    assert torch.equal(one, other)


def test_each_user_feature_is_absent_of_a_share_of_the_users() -> None:
    model = TwoTower(
        TwoTowerConfig.model_validate(
            {
                "dim": 4,
                "heads": ["user"],
                "history": "history",
                "item": "film",
                "tables": [{"name": "film", "dtype": "int", "size": 2}],
                "user_ids": [{"name": "tags", "dtype": "int", "size": 500}],
                "user_numbers": [{"name": "age", "width": 1}],
            }
        )
    )
    columns = {
        "tags": UserColumn(Ragged.from_rows([[user, 0] for user in range(500)])),
        "age": UserColumn(Ragged.from_rows([[float(user)] for user in range(500)], dtype="float")),
    }
    users = model.user_features.of_columns(columns, 500)
    torch.manual_seed(1)
    thinned = without_some(model, users, 0.3)
    absent = {name: thinned[name].lengths != bags.lengths for name, bags in users.items()}
    for name, gone in absent.items():
        assert 0.2 < gone.float().mean() < 0.4
        kept, before = thinned[name].take(torch.nonzero(~gone)[:, 0]), users[name]
        for one, other in zip(kept, before.take(torch.nonzero(~gone)[:, 0]), strict=True):
            assert torch.equal(one, other)
        alone = model.user_features.of_columns({}, 1)[name]
        (first,) = thinned[name].take(torch.nonzero(gone)[:1, 0]).lengths.tolist()
        assert first == int(alone.lengths)
    # They are dropped one by one: not always together.
    assert (absent["user_tags"] ^ absent["numbers:age"]).any()
    for name, bags in without_some(model, users, 0.0).items():
        assert torch.equal(bags.rows, users[name].rows)
    assert without_some(model, {}, 0.5) == {}
