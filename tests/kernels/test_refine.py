import pytest
import torch
from torch import Tensor

from silvershard.kernels import fixed_dot, refine

pytestmark = pytest.mark.usefixtures("implementation")


def test_hand_computed_case() -> None:
    cache = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]).half()
    query = torch.tensor([[[1.0, 1.0], [0.5, -1.0]]])
    scores = refine(query, cache, torch.tensor([[3, -1, 0]]))
    assert scores.tolist() == [[[15.0, -4.5], [-torch.inf, -torch.inf], [3.0, -1.5]]]


@pytest.mark.parametrize("dim", [1, 16, 63, 1024])
@pytest.mark.parametrize(("batch", "heads", "candidates"), [(1, 1, 1), (5, 3, 17), (2, 1, 0)])
def test_every_score_is_the_fixed_dot_of_its_row(
    dim: int, batch: int, heads: int, candidates: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn((batch, heads, dim), generator=generator)
    cache = torch.randn((3, 64, dim), generator=generator).half()
    slots = torch.randint(-1, 192, (batch, candidates), generator=generator)
    scores = refine(query.to(device), cache.to(device), slots.to(device)).cpu()
    assert scores.shape == (batch, candidates, heads)
    rows = cache.view(-1, dim).float()
    for request in range(batch):
        for candidate, slot in enumerate(slots[request].tolist()):
            for head in range(heads):
                expected = (
                    float(fixed_dot(query[request, head], rows[slot])) if slot >= 0 else -torch.inf
                )
                assert float(scores[request, candidate, head]) == expected


def test_a_batch_that_is_scored_in_pieces_equals_its_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((4, 2, 64), generator=generator)
    cache = torch.randn((40, 64, 64), generator=generator).half()
    slots = torch.randint(-1, 2560, (4, 3000), generator=generator)
    whole = refine(query, cache, slots)
    for request in range(4):
        for start in (0, 1, 1234):
            part = refine(
                query[request : request + 1],
                cache,
                slots[request : request + 1, start : start + 700],
            )
            assert torch.equal(part[0], whole[request, start : start + 700])


def test_an_empty_pool_scores_nothing() -> None:
    scores = refine(torch.ones(2, 1, 4), torch.empty(0, 64, 4).half(), torch.full((2, 3), -1))
    assert (scores == -torch.inf).all()
    assert scores.shape == (2, 3, 1)


def test_bad_input_is_refused() -> None:
    query = torch.ones(1, 2, 4)
    cache = torch.ones(2, 64, 4).half()
    slots = torch.zeros((1, 3), dtype=torch.int64)

    def refuses(
        message: str, query: Tensor = query, cache: Tensor = cache, slots: Tensor = slots
    ) -> None:
        with pytest.raises(ValueError, match=message):
            refine(query, cache, slots)

    refuses("query must be torch.float32", query=query.half())
    refuses(r"query must have shape \(B, H, D\)", query=query[0])
    refuses("query must have D >= 1", query=query[..., :0], cache=cache[..., :0])
    refuses("query must be finite", query=query * torch.nan)
    refuses("cache must be torch.float16", cache=cache.float())
    refuses(r"cache must have shape \(N, G, 4\)", cache=cache[..., :3].contiguous())
    refuses("cache must be contiguous", cache=cache.transpose(0, 1))
    refuses("cache must be finite at the slots asked for", cache=cache * torch.nan)
    refuses("cache must be finite at the slots asked for", cache=cache * -torch.inf)
    refuses("slots must be torch.int64", slots=slots.int())
    refuses(r"slots must have shape \(1, U\)", slots=slots.expand(2, -1))
    refuses("slots must be on the device", slots=slots.to("meta"))
    refuses(r"slots must be in \[-1, 128\), got 128", slots=slots + 128)
    refuses(r"slots must be in \[-1, 128\), got -2", slots=slots - 2)


def test_a_bad_value_at_a_slot_nobody_asks_for_does_no_harm() -> None:
    cache = torch.ones(1, 64, 4).half()
    cache[0, 5] = torch.nan
    assert refine(torch.ones(1, 1, 4), cache, torch.tensor([[4, 6]])).tolist() == [[[4.0], [4.0]]]
