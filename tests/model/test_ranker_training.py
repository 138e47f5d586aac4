import pytest
import torch

from silvershard.model.ranker_training import ranker_loss


def test_the_ranker_loss_ignores_what_the_towers_did_not_find() -> None:
    torch.manual_seed(0)
    logits, positive = torch.randn(4, 5, 2), torch.ones(4, 2, dtype=torch.bool)
    repeated = torch.zeros(4, 5, dtype=torch.bool)
    found = torch.tensor([True, True, False, False])
    loss = ranker_loss(logits, positive, repeated, found)
    changed = logits.clone()
    changed[2:] += 9.0
    assert torch.equal(ranker_loss(changed, positive, repeated, found), loss)
    only = ranker_loss(logits[:2], positive[:2], repeated[:2], found[:2])
    assert loss.item() == pytest.approx(only.item())
    nothing = ranker_loss(logits, positive, repeated, torch.zeros(4, dtype=torch.bool))
    assert nothing.item() == 0.0


def test_the_ranker_loss_leaves_out_repeated_candidates() -> None:
    torch.manual_seed(0)
    logits, positive = torch.randn(3, 4, 1), torch.ones(3, 1, dtype=torch.bool)
    repeated = torch.zeros(3, 4, dtype=torch.bool)
    repeated[:, 3] = True
    found = torch.ones(3, dtype=torch.bool)
    short = ranker_loss(logits[:, :3], positive, repeated[:, :3], found)
    assert ranker_loss(logits, positive, repeated, found).item() == pytest.approx(short.item())
