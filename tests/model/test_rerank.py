from typing import Any

import pytest
import torch
from torch import Tensor

from silvershard.kernels import fixed_sigmoid
from silvershard.model.rerank import task_probabilities
from silvershard.model.types import Work

B, H, D, U, V, T = 4, 2, 8, 5, 1, 3


class Ranker:
    """Logits that follow from the request and the slot, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, query: Tensor, state: Tensor, cache: Tensor, slots: Tensor, *_: Any) -> Any:
        self.asked.append(len(query))
        base = state[:, :1, None] + slots[:, :, None] * 0.25
        return base + torch.arange(T) * 0.5  # (B, U, T)


def probabilities(ranker: Ranker, wanted: list[list[int]]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    nothing = torch.zeros(B, 0)
    fields = dict.fromkeys(Work._fields, nothing)
    fields["embedding"] = torch.randn(B, H, D, generator=generator)
    work = Work(**{**fields, "tasks": torch.tensor(wanted, dtype=torch.int8)})
    state = torch.arange(B, dtype=torch.float32)[:, None]
    slots = torch.arange(B * U).view(B, U)
    refined, signals = torch.zeros(B, U, H), torch.zeros(B, U, V)
    cache = torch.zeros(1, B * U, D, dtype=torch.float16)
    return task_probabilities(ranker, work, state, cache, slots, refined, signals)


def test_all_tasks_of_all_requests_are_one_call_of_the_ranker() -> None:
    ranker = Ranker()
    found = probabilities(ranker, [[1, 1, 1]] * B)
    assert ranker.asked == [B]
    assert found.shape == (B, U, T)
    assert bool((found > 0).all())


@pytest.mark.parametrize(
    "wanted",
    [
        [[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]],
        [[0, 0, 1]] * B,
        [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ],
)
def test_what_is_wanted_has_the_same_bits_and_the_rest_is_zero(wanted: list[list[int]]) -> None:
    whole, ranker = probabilities(Ranker(), [[1, 1, 1]] * B), Ranker()
    found = probabilities(ranker, wanted)
    mask = torch.tensor(wanted, dtype=torch.bool)[:, None].expand_as(whole)
    assert torch.equal(found, torch.where(mask, whole, torch.zeros(())))
    # Requests that want no task are not reranked.
    assert ranker.asked == [sum(map(any, wanted))]


def test_where_nobody_wants_a_task_the_ranker_does_not_run() -> None:
    ranker = Ranker()
    assert not probabilities(ranker, [[0, 0, 0]] * B).any()
    assert ranker.asked == []


def test_a_logit_that_is_no_number_is_refused() -> None:
    def broken(*_: Any) -> Tensor:
        return torch.full((B, U, T), torch.nan)

    with pytest.raises(ValueError, match="the reranker's logits"):
        probabilities(broken, [[1, 1, 1]] * B)  # type: ignore[arg-type]


def test_the_probability_is_the_sigmoid_of_the_logit() -> None:
    found = probabilities(Ranker(), [[1, 1, 1]] * B)
    assert torch.equal(found[0, 0], fixed_sigmoid(torch.tensor([0.0, 0.5, 1.0])))
