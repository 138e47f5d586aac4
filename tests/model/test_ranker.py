from typing import Any

import pytest
import torch

from silvershard.model.ranker import MLPRanker


def ranker(num_tasks: int = 2) -> MLPRanker:
    torch.manual_seed(5)
    made = MLPRanker(dim=12, num_heads=2, state_dim=20, num_signals=3, num_tasks=num_tasks)
    return made.requires_grad_(requires_grad=False)


def trained(made: MLPRanker) -> MLPRanker:
    made.out.weight[:32, :2].normal_()
    made.signal_mean.uniform_()
    made.signal_scale.uniform_()
    return made


def pairs(count: int, requests: int = 9) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    return {
        "query": torch.randn(requests, 2, 12, generator=generator),
        "user_state": torch.randn(requests, 20, generator=generator),
        "request": torch.randint(requests, (count,), generator=generator),
        "items": torch.randn(count, 12, generator=generator),
        "refined": torch.randn(count, 2, generator=generator),
        "signals": torch.rand(count, 3, generator=generator),
    }


def only(given: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    per_pair = ("request", "items", "refined", "signals")
    return {name: value[rows] if name in per_pair else value for name, value in given.items()}


def test_an_untrained_ranker_orders_each_task_as_its_head_does() -> None:
    given = pairs(50)
    logits = ranker()(**given)
    for task in range(2):
        assert torch.equal(logits[:, task].argsort(), given["refined"][:, task].argsort())


def test_an_untrained_ranker_with_other_tasks_orders_as_the_mean_of_the_heads() -> None:
    given = pairs(50)
    logits = ranker(num_tasks=3)(**given)
    assert logits.shape == (50, 3)
    assert torch.equal(logits[:, 2].argsort(), given["refined"].mean(1).argsort())


def test_a_trained_ranker_reads_every_input() -> None:
    made, given = trained(ranker()), pairs(20)
    before = made(**given)
    for name in ("query", "user_state", "items", "refined", "signals"):
        changed = made(**{**given, name: given[name] + 1.0})
        assert not torch.equal(before, changed), name


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pair_has_the_same_bits_whatever_pairs_surround_it(threads: int) -> None:
    made, given = trained(ranker()), pairs(400)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = made(**given)
        for rows in (*torch.arange(0, 400, 29).split(1), torch.arange(17), torch.randperm(400)):
            assert torch.equal(made(**only(given, rows)), together[rows])
        alone = {**only(given, torch.tensor([3])), "request": torch.tensor([0])}
        user = int(given["request"][3])
        alone["query"] = given["query"][user : user + 1]
        alone["user_state"] = given["user_state"][user : user + 1]
        assert torch.equal(made(**alone), together[3:4])
    finally:
        torch.set_num_threads(threads_before)


def test_no_pairs_give_no_logits() -> None:
    assert ranker()(**pairs(0)).shape == (0, 2)


def cached(given: dict[str, Any], width: int) -> dict[str, Any]:
    """The pairs of ``given``, request by request, as slots of a cache with padding."""
    requests = len(given["query"])
    slots = torch.full((requests, width), -1)
    refined = torch.zeros(requests, width, 2)
    signals = torch.zeros(requests, width, 3)
    for request in range(requests):
        mine = (given["request"] == request).nonzero()[:, 0]
        slots[request, : len(mine)] = mine
        refined[request, : len(mine)] = given["refined"][mine]
        signals[request, : len(mine)] = given["signals"][mine]
    return {
        "query": given["query"],
        "user_state": given["user_state"],
        "cache": given["items"].half()[None],
        "slots": slots,
        "refined": refined,
        "signals": signals,
    }


def test_cached_candidates_have_the_logits_of_their_pairs() -> None:
    made, given = trained(ranker()), pairs(100)
    given["items"] = given["items"].half().float()
    expected = made(**given)
    got = made.rank_slots(**cached(given, 30))
    slots = cached(given, 30)["slots"]
    assert got.shape == (9, 30, 2)
    assert torch.allclose(got[slots >= 0], expected[slots[slots >= 0]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[slots >= 0], expected[slots[slots >= 0]].roll(1, 0), atol=1e-2)


def test_a_cached_candidate_has_the_same_bits_in_any_company() -> None:
    made, given = trained(ranker()), pairs(100)
    whole = cached(given, 30)
    together = made.rank_slots(**whole)
    for request in range(9):
        alone = {name: whole[name][request : request + 1] for name in whole if name != "cache"}
        for columns in (slice(0, 1), slice(3, 9), slice(0, 30)):
            some = {
                name: value[:, columns] if name in ("slots", "refined", "signals") else value
                for name, value in alone.items()
            }
            got = made.rank_slots(cache=whole["cache"], **some)
            assert torch.equal(got, together[request : request + 1, columns])
