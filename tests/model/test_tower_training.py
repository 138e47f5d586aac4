import torch

from silvershard.model.tower_training import sampled_softmax, with_prefix


def test_sampled_softmax_estimates_the_loss_over_the_whole_catalogue() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50)
    targets = torch.tensor([3, 17])
    odds = torch.rand(50).square() + 0.01
    odds /= odds.sum()
    negatives = torch.multinomial(odds, 200_000, replacement=True)
    sampled = torch.cat([logits[targets, None], logits[negatives].expand(2, -1)], 1)[:, None]
    found = sampled_softmax(sampled, targets, negatives, odds[negatives].log())
    exact = torch.nn.functional.cross_entropy(logits.expand(2, -1), targets, reduction="none")
    assert torch.allclose(found[:, 0], exact, atol=0.02)


def test_a_drawn_target_does_not_count_as_a_negative() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 4)
    negatives, log_odds = torch.tensor([5, 7, 9]), torch.full((3,), -2.0)
    found = sampled_softmax(logits, torch.tensor([7, 1]), negatives, log_odds)
    changed = logits.clone()
    changed[0, 0, 2] += 50.0
    again = sampled_softmax(changed, torch.tensor([7, 1]), negatives, log_odds)
    assert torch.equal(again, found)
    changed[1, 0, 2] += 50.0
    again = sampled_softmax(changed, torch.tensor([7, 1]), negatives, log_odds)
    assert again[1, 0] > found[1, 0] + 10


def test_tensors_are_chosen_by_the_beginning_of_their_names() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    assert with_prefix({"a.x": one, "ab.x": two}, "a.") == {"x": one}
