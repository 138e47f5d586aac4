import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from silvershard.kernels import quantize_rows
from silvershard.model.clustering import assign_clusters
from silvershard.model.joint import JointIndex, soft_assignment, straight_through
from silvershard.model.joint_config import JointConfig

OFF = {"routing": 0.0, "reading": 0.0, "balance": 0.0}


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def planted(per_group: int = 40, groups: int = 6) -> tuple[Tensor, Tensor]:
    """Items and queries around the same directions, ``(240, 16)`` and ``(240, 1, 16)``."""
    centres = unit(groups, 16, seed=1)
    label = torch.arange(groups).repeat(per_group)
    items = functional.normalize(centres[label] + 0.4 * unit(len(label), 16, seed=2), dim=1)
    query = functional.normalize(centres[label] + 0.3 * unit(len(label), 16, seed=3), dim=1)
    return items, query[:, None]


def loss_of(
    index: JointIndex, query: Tensor, items: Tensor, log_odds: Tensor | None = None
) -> Tensor:
    if log_odds is None:
        log_odds = torch.full((len(items),), -math.log(len(items)))
    scores = query @ items[len(items) - len(log_odds) :].T
    loss: Tensor = index(query, items, scores, log_odds, 0.12)
    return loss


def fit(index: JointIndex, query: Tensor, items: Tensor, steps: int = 150) -> list[float]:
    optimizer = torch.optim.Adam(index.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = loss_of(index, query, items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_straight_through_has_the_value_of_the_codes_and_the_gradient_of_the_items() -> None:
    items = (3 * unit(50, 16)).requires_grad_()
    found = straight_through(items)
    codes, scales = quantize_rows(items.detach())
    assert codes.abs().amax() == 127
    assert torch.equal(found, codes.float() * scales[:, None])
    assert not torch.equal(found, items)
    weight = torch.randn(50, 16)
    (found * weight).sum().backward()
    assert torch.equal(items.grad, weight)


def test_straight_through_keeps_rows_of_zeros_finite() -> None:
    items = torch.zeros(2, 8, requires_grad=True)
    straight_through(items).sum().backward()
    assert torch.equal(items.grad, torch.ones(2, 8))


def test_soft_assignment_has_the_gradient_of_its_closed_form() -> None:
    items = unit(7, 5).double().requires_grad_()
    centroids = unit(4, 5, seed=1).double().requires_grad_()
    weight = torch.randn(7, 4, dtype=torch.float64)
    shares = soft_assignment(items @ centroids.T, 0.3)
    assert torch.allclose(shares.sum(1), torch.ones(7, dtype=torch.float64))
    (shares * weight).sum().backward()
    plain = shares.detach()
    slope = plain * (weight - (plain * weight).sum(1, keepdim=True)) / 0.3  # (n, C)
    assert torch.allclose(items.grad, slope @ centroids.detach(), atol=1e-12)
    assert torch.allclose(centroids.grad, slope.T @ items.detach(), atol=1e-12)


def test_the_loss_has_the_gradient_that_differences_of_it_have() -> None:
    # Warm enough for finite differences to be exact to many digits.
    config = JointConfig(assignment_temperature=0.3, routing_temperature=0.4)
    query, items = unit(3, 2, 5).double(), unit(9, 5, seed=1).double()
    log_odds = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log()
    scores = query @ items[3:].T

    def loss(items: Tensor, centroids: Tensor) -> Tensor:
        index = JointIndex(config, 2.0, torch.ones(4, 5).double())
        found: Tensor = torch.func.functional_call(
            index, {"centroids": centroids}, (query, items, scores, log_odds, 0.12)
        )
        return found

    centroids = unit(4, 5, seed=2).double()
    assert torch.autograd.gradcheck(loss, (items.requires_grad_(), centroids.requires_grad_()))


def test_a_cold_assignment_is_that_of_the_published_index() -> None:
    items, centroids = unit(200, 16), unit(9, 16, seed=1)
    shares = soft_assignment(items @ centroids.T, 1e-4)
    found = assign_clusters(items, centroids, max_imbalance=9)
    assert torch.equal(shares.argmax(1), found.assignment)
    assert shares.amax(1).mean() > 0.95


@pytest.mark.parametrize("term", ["pull", "routing", "reading", "balance"])
def test_every_term_reaches_items_and_centroids_and_falls_when_it_is_trained(term: str) -> None:
    items, query = planted()
    config = JointConfig(**{**OFF, **({} if term == "pull" else {term: 1.0})})
    index = JointIndex(config, float(term == "pull"), unit(12, 16, seed=5))
    rows = items.clone().requires_grad_()
    loss_of(index, query, rows).backward()
    assert rows.grad.abs().sum() > 0
    assert index.centroids.grad.abs().sum() > 0
    losses = fit(index, query, items)
    assert losses[-1] < losses[0] - 0.005


def test_queries_get_no_gradient() -> None:
    items, query = planted()
    query.requires_grad_()
    loss_of(JointIndex(JointConfig(), 16.0, unit(12, 16)), query, items.requires_grad_()).backward()
    assert query.grad is None


def test_routing_moves_a_best_item_towards_the_cluster_that_its_query_probes_first() -> None:
    # A query scores two items alike, and each has a cluster: that of the first is a little nearer.
    items = functional.normalize(torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]), dim=1)
    query = torch.tensor([[[1.0, 0.05, 0.0]]])
    config = JointConfig(**{**OFF, "routing": 1.0}, assignment_temperature=0.5)
    rows = items.clone().requires_grad_()
    loss_of(JointIndex(config, 0.0, items), query, rows).backward()
    moved = rows.detach() - 0.1 * rows.grad
    assert moved[1] @ items[0] > items[1] @ items[0] + 1e-3
    assert moved[1] @ items[1] < items[1] @ items[1] - 1e-3


def test_routing_turns_centroids_to_the_queries_whose_items_they_hold() -> None:
    items, query = planted()
    index = JointIndex(JointConfig(**{**OFF, "routing": 1.0}), 0.0, unit(12, 16, seed=5))

    def chance() -> float:
        """That a query is sent to the cluster of its best item."""
        found = assign_clusters(items, index.centroids.detach(), max_imbalance=12)
        sent = soft_assignment(query[:, 0] @ found.centroids.T, 0.05)
        own = found.assignment[(query[:, 0] @ items.T).argmax(1)]
        return float(sent.gather(1, own[:, None]).mean())

    before = chance()
    fit(index, query, items)
    assert chance() > before + 0.1


def test_balance_evens_the_lists_of_the_whole_catalogue_not_of_the_draw() -> None:
    items = torch.cat([unit(20, 16, seed=1)] * 2)
    items[20:] += 0.01 * unit(20, 16, seed=2)
    # The first twenty are drawn nine times as often as they should, and the others once.
    drawn = torch.cat([torch.arange(20).repeat(9), torch.arange(20, 40)])
    log_odds = torch.tensor([9.0] * 180 + [1.0] * 20).log()
    index = JointIndex(JointConfig(**{**OFF, "balance": 1.0}), 0.0, unit(2, 16, seed=3))
    query = unit(4, 1, 16, seed=4)
    even = torch.full((40,), -math.log(40))
    weighted = index(query, items[drawn], query @ items[drawn].T, log_odds, 0.12)
    whole = index(query, items, query @ items.T, even, 0.12)
    assert torch.allclose(weighted, whole, atol=1e-5)


def test_an_even_reading_costs_one_mean_list() -> None:
    # Every item lies in a cluster of its own, and every query is sent to all of them alike.
    items = torch.eye(6, 16)
    query = functional.normalize(torch.ones(2, 1, 16), dim=2)
    index = JointIndex(JointConfig(**{**OFF, "reading": 1.0}), 0.0, items)
    assert loss_of(index, query, items).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assignment_temperature", 0.0),
        ("routing_temperature", -1.0),
        ("sharpness", 0.0),
        ("routing", -1.0),
        ("reading", -0.5),
        ("balance", float("nan")),
        ("centroids", 3),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        JointConfig(**{name: value})
