import pytest
import torch
from torch import Tensor

from silvershard.kernels import select_topk

pytestmark = pytest.mark.usefixtures("implementation")

PADDING = (-torch.inf, -1, -1)


def expected(scores: list[float], item_ids: list[int], k: int) -> list[tuple[float, int, int]]:
    ranked = sorted(
        (-score, item_id, position)
        for position, (score, item_id) in enumerate(zip(scores, item_ids, strict=True))
        if score != -torch.inf and item_id >= 0
    )
    best = [(-negated, item_id, position) for negated, item_id, position in ranked[:k]]
    return best + [PADDING] * (k - len(best))


def rows_of(scores: Tensor, item_ids: Tensor, k: int) -> list[list[tuple[float, int, int]]]:
    best = select_topk(scores, item_ids, k)
    assert best.scores.shape == best.item_ids.shape == best.positions.shape == (len(scores), k)
    columns = (best.scores.tolist(), best.item_ids.tolist(), best.positions.tolist())
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def test_hand_computed_case_breaks_ties_by_the_smaller_id() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, -torch.inf, 5.0]])
    item_ids = torch.tensor([[4, 9, 3, 7, 1, -1]])
    assert rows_of(scores, item_ids, 2) == [[(2.0, 3, 2), (2.0, 7, 3)]]
    assert rows_of(scores, item_ids, 6) == [
        [(2.0, 3, 2), (2.0, 7, 3), (2.0, 9, 1), (1.0, 4, 0), PADDING, PADDING]
    ]


@pytest.mark.parametrize("num_candidates", [0, 1, 2, 17, 100, 1000])
@pytest.mark.parametrize("k", [1, 3, 40, 1001])
@pytest.mark.parametrize("levels", [1, 4, 100_000])
def test_every_row_equals_a_sorted_list(
    num_candidates: int, k: int, levels: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_candidates * k + levels)
    shape = (5, num_candidates)
    scores = torch.randint(0, levels, shape, generator=generator).float() - levels // 2
    scores[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    scores[1:2] = -torch.inf
    item_ids = torch.stack([torch.randperm(num_candidates, generator=generator) for _ in range(5)])
    item_ids[torch.rand(shape, generator=generator) < 0.1] = -1
    got = rows_of(scores.to(device), item_ids.to(device), k)
    for row in range(5):
        assert got[row] == expected(scores[row].tolist(), item_ids[row].tolist(), k)


def test_equal_scores_and_ids_keep_their_order_of_position() -> None:
    scores = torch.ones(1, 50)
    item_ids = torch.tensor([[7, 3] * 25])
    assert rows_of(scores, item_ids, 30)[0] == expected([1.0] * 50, [7, 3] * 25, 30)


def test_negative_zero_ties_with_zero_and_is_returned_as_zero() -> None:
    scores = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    best = select_topk(scores, torch.tensor([[4, 3, 2, 1]]), 4)
    assert best.item_ids.tolist() == [[1, 2, 3, 4]]
    assert torch.equal(best.scores.view(torch.int32), torch.zeros((1, 4), dtype=torch.int32))


def test_infinite_scores_are_ranked() -> None:
    scores = torch.tensor([[1.0, torch.inf, torch.inf]])
    assert rows_of(scores, torch.tensor([[1, 9, 5]]), 3)[0] == [
        (torch.inf, 5, 2),
        (torch.inf, 9, 1),
        (1.0, 1, 0),
    ]


def test_a_batch_equals_its_rows_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(0, 30, (64, 200), generator=generator).float()
    item_ids = torch.stack([torch.randperm(200, generator=generator) for _ in range(64)])
    whole = select_topk(scores, item_ids, 20)
    for row in range(64):
        alone = select_topk(scores[row : row + 1], item_ids[row : row + 1], 20)
        for mine, batched in zip(alone, whole, strict=True):
            assert torch.equal(mine[0], batched[row])


def test_no_rows_give_no_rows() -> None:
    best = select_topk(torch.empty(0, 4), torch.empty((0, 4), dtype=torch.int64), 3)
    assert best.scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("scores", "item_ids", "k", "message"),
    [
        (torch.ones(1, 3).double(), torch.ones(1, 3).long(), 1, "scores must be torch.float32"),
        (torch.ones(3), torch.ones(3).long(), 1, r"scores must have shape \(Q, M\)"),
        (torch.ones(1, 3), torch.ones(1, 3).int(), 1, "item_ids must be torch.int64"),
        (torch.ones(1, 3), torch.ones(1, 2).long(), 1, r"item_ids must have shape \(1, 3\)"),
        (torch.ones(1, 3), torch.ones(1, 3, device="meta").long(), 1, "item_ids must be on"),
        (torch.ones(1, 3), torch.ones(1, 3).long(), 0, "k must be at least 1, got 0"),
        (torch.full((1, 3), torch.nan), torch.ones(1, 3).long(), 1, "scores must not be NaN"),
    ],
)
def test_bad_input_is_refused(scores: Tensor, item_ids: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_topk(scores, item_ids, k)
