import pytest
import torch
from torch import Tensor

from silvershard.kernels import merge_topk

pytestmark = pytest.mark.usefixtures("implementation")


def test_hand_computed_case() -> None:
    scores = torch.tensor([[[3.0, 1.0]], [[3.0, -torch.inf]], [[2.0, 1.0]]])
    item_ids = torch.tensor([[[8, 5]], [[6, -1]], [[7, 2]]])
    merged = merge_topk(scores, item_ids, 7)
    assert merged.item_ids.tolist() == [[6, 8, 7, 2, 5, -1, -1]]
    assert merged.positions.tolist() == [[2, 0, 4, 5, 1, -1, -1]]
    assert merged.scores.tolist() == [[3.0, 3.0, 2.0, 1.0, 1.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize("num_lists", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_merging_equals_sorting_everything(num_lists: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num_lists * 100 + k)
    shape = (num_lists, 6, 9)
    scores = torch.randint(-3, 3, shape, generator=generator).float()
    scores[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    item_ids = torch.stack([torch.randperm(num_lists * 9, generator=generator) for _ in range(6)])
    item_ids = item_ids.view(6, num_lists, 9).transpose(0, 1).contiguous()
    merged = merge_topk(scores, item_ids, k)
    for request in range(6):
        ranked = sorted(
            (-float(scores[shard, request, rank]), int(item_ids[shard, request, rank]), shard, rank)
            for shard in range(num_lists)
            for rank in range(9)
            if scores[shard, request, rank] > -torch.inf
        )[:k]
        count = len(ranked)
        assert merged.scores[request, :count].tolist() == [-row[0] for row in ranked]
        assert merged.item_ids[request, :count].tolist() == [row[1] for row in ranked]
        assert merged.positions[request, :count].tolist() == [row[2] * 9 + row[3] for row in ranked]
        assert (merged.scores[request, count:] == -torch.inf).all()
        assert (merged.item_ids[request, count:] == -1).all()
        assert (merged.positions[request, count:] == -1).all()


def test_the_order_of_shards_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (5, 8, 10), generator=generator).float()
    item_ids = torch.randperm(400, generator=generator).view(5, 8, 10)
    order = torch.tensor([3, 0, 4, 1, 2])
    merged = merge_topk(scores, item_ids, 12)
    shuffled = merge_topk(scores[order], item_ids[order], 12)
    assert torch.equal(merged.item_ids, shuffled.item_ids)
    assert torch.equal(merged.scores, shuffled.scores)


def test_no_lists_give_padding() -> None:
    merged = merge_topk(torch.empty(0, 2, 3), torch.empty((0, 2, 3), dtype=torch.int64), 4)
    assert merged.item_ids.tolist() == [[-1] * 4] * 2


@pytest.mark.parametrize(
    ("scores", "item_ids", "k", "message"),
    [
        (torch.ones(1, 1, 3).half(), torch.ones(1, 1, 3).long(), 1, "scores must be torch.float32"),
        (torch.ones(1, 3), torch.ones(1, 3).long(), 1, r"scores must have shape \(S, B, K1\)"),
        (torch.ones(1, 1, 3), torch.ones(1, 1, 3), 1, "item_ids must be torch.int64"),
        (torch.ones(1, 1, 3), torch.ones(1, 2, 3).long(), 1, "item_ids must have shape"),
        (torch.ones(1, 1, 3), torch.ones(1, 1, 3, device="meta").long(), 1, "item_ids must be on"),
        (torch.ones(1, 1, 3), torch.ones(1, 1, 3).long(), -1, "k must be at least 1, got -1"),
        (torch.full((1, 1, 3), torch.nan), torch.ones(1, 1, 3).long(), 1, "must not be NaN"),
    ],
)
def test_bad_input_is_refused(scores: Tensor, item_ids: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_topk(scores, item_ids, k)
