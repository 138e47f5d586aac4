import pytest
import torch

from silvershard.model.merge import LARGEST_ID, Merge, passes, slowest
from silvershard.model.types import Cutoffs, RoundOne, RoundTwo

INF = float("inf")
Entry = tuple[float, int]


def round_one(rows: list[list[list[Entry]]], width: int, probed: int = 1) -> RoundOne:
    """rows[b][h] is the ranked list of request b, head h."""
    scores = torch.full((len(rows), len(rows[0]), width), -INF)
    ids = torch.full(scores.shape, -1, dtype=torch.int64)
    for b, heads in enumerate(rows):
        for h, entries in enumerate(heads):
            for r, (score, item) in enumerate(entries):
                scores[b, h, r], ids[b, h, r] = score, item
    batch = torch.full((len(rows),), probed)
    none = scores[:, 0, :0], ids[:, 0, :0]
    return RoundOne(scores, ids, batch, batch * 2, *none, {"ann": probed})


def generated(first: RoundOne, rows: list[list[Entry]], width: int) -> RoundOne:
    """The same round with semantic candidates; ``rows[b]`` is the ranked list of request b."""
    one = round_one([[row] for row in rows], width)
    return first._replace(semantic_scores=one.scores[:, 0], semantic_item_ids=one.item_ids[:, 0])


def round_two(rows: list[list[Entry]], width: int) -> RoundTwo:
    values = torch.full((len(rows), width), -INF)
    ids = torch.full(values.shape, -1, dtype=torch.int64)
    for b, entries in enumerate(rows):
        for r, (score, item) in enumerate(entries):
            values[b, r], ids[b, r] = score, item
    # Payloads are functions of the id, so that a misplaced one shows.
    refined = torch.where(ids < 0, -INF, ids.float() / 8)
    tasks = torch.stack([ids.float() * 2, ids.float() * 3], 2).masked_fill((ids < 0)[..., None], 0)
    count = (ids >= 0).sum(1)
    return RoundTwo(ids, values, refined, tasks, count, count * 3, count, {"rerank": len(rows)})


def test_the_cutoff_is_the_last_kept_candidate_of_all_lists() -> None:
    first = round_one([[[(5.0, 1), (3.0, 4)]]], 2)
    second = round_one([[[(4.0, 2), (3.0, 3), (1.0, 9)]]], 3)
    cut = Merge().cutoffs([first, second], torch.tensor([3]))
    assert (cut.scores.item(), cut.item_ids.item()) == (3.0, 3)


def test_everything_passes_when_fewer_candidates_exist_than_wanted() -> None:
    only = round_one([[[(5.0, 1)], []]], 2)
    cut = Merge().cutoffs([only], torch.tensor([2]))
    assert cut.scores.tolist() == [[-INF, -INF]]
    assert cut.item_ids.tolist() == [[LARGEST_ID, LARGEST_ID]]
    kept = passes(only.scores, only.item_ids, cut)
    assert kept.tolist() == [[[True, False], [False, False]]]


def test_ties_at_the_cutoff_go_to_the_smaller_id() -> None:
    first = round_one([[[(2.0, 5), (2.0, 8)]]], 2)
    second = round_one([[[(2.0, 6), (2.0, 7)]]], 2)
    merge = Merge()
    cut = merge.cutoffs([first, second], torch.tensor([2]))
    assert (cut.scores.item(), cut.item_ids.item()) == (2.0, 6)
    assert passes(first.scores, first.item_ids, cut).flatten().tolist() == [True, False]
    assert passes(second.scores, second.item_ids, cut).flatten().tolist() == [True, False]


def test_each_request_and_head_has_its_own_cutoff() -> None:
    lists = round_one([[[(9.0, 1), (8.0, 2)], [(7.0, 3), (6.0, 4)]], [[(5.0, 5)], [(4.0, 6)]]], 2)
    cut = Merge().cutoffs([lists], torch.tensor([2, 1]))
    assert cut.scores.tolist() == [[8.0, 6.0], [5.0, 4.0]]
    assert cut.item_ids.tolist() == [[2, 4], [5, 6]]


def test_semantic_candidates_have_a_cut_of_their_own_number() -> None:
    heads = round_one([[[(9.0, 1)]], [[(8.0, 2)]], [[(7.0, 3)]], [[(6.0, 4)]]], 9)
    one = generated(heads, [[(-1.0, 5), (-3.0, 7)], [(-1.0, 5)], [(-2.0, 6)], []], 3)
    other = generated(heads, [[(-3.0, 6)], [(-1.0, 4), (-1.0, 9)], [(-1.0, 8)], [(-4.0, 9)]], 2)
    cut = Merge().cutoffs([one, other], torch.full((4,), 9), torch.tensor([2, 2, 0, 3]))
    assert cut.scores.shape == (4, 2)
    assert cut.scores[:, 1].tolist() == [-3.0, -1.0, INF, -INF]
    assert cut.item_ids[[0, 1, 3], 1].tolist() == [6, 5, LARGEST_ID]
    own = Cutoffs(cut.scores[:, 1:], cut.item_ids[:, 1:])
    kept = [
        passes(half.semantic_scores[:, None], half.semantic_item_ids[:, None], own)[:, 0]
        for half in (one, other)
    ]
    assert kept[0].sum(1).tolist() == [1, 1, 0, 0]
    assert kept[1].sum(1).tolist() == [1, 1, 0, 1]


def test_a_batch_that_asks_for_no_semantic_candidates_has_no_cut_for_them() -> None:
    heads = generated(round_one([[[(9.0, 1)]]], 1), [[(-1.0, 5)]], 1)
    for asked in (None, torch.tensor([0])):
        assert Merge().cutoffs([heads], torch.tensor([1]), asked).scores.shape == (1, 1)


def test_semantic_candidates_of_several_lists_are_one_ranking() -> None:
    heads = round_one([[[(9.0, 1)]]], 1)
    lists = [
        generated(heads, [[(-1.0, 8), (-2.0, 3)]], 2),
        generated(heads, [[(-1.0, 7)]], 1),
    ]
    both = Merge().candidates(lists, 1)
    assert both.semantic_item_ids.tolist() == [[7, 8]]
    assert both.semantic_scores.tolist() == [[-1.0, -1.0]]


def test_candidates_of_several_lists_are_one_ranking_and_counts_add_up() -> None:
    first = round_one([[[(5.0, 1), (1.0, 4)]]], 2, probed=10)
    second = round_one([[[(5.0, 0)]]], 1, probed=7)
    both = Merge().candidates([first, second], 2)
    assert both.item_ids.tolist() == [[[0, 1]]]
    assert both.probed.tolist() == [17]
    assert both.eligible.tolist() == [34]
    assert both.times == {"ann": 10}


def test_results_keep_their_own_payload_and_padding_stays_padding() -> None:
    first = round_two([[(3.0, 10), (1.0, 12)], []], 2)
    second = round_two([[(3.0, 9), (2.0, 11), (0.5, 14)], [(1.0, 20)]], 3)
    both = Merge()([first, second], 4)
    assert both.item_ids.tolist() == [[9, 10, 11, 12], [20, -1, -1, -1]]
    assert both.values.tolist() == [[3.0, 3.0, 2.0, 1.0], [1.0, -INF, -INF, -INF]]
    assert both.refined[0].tolist() == [9 / 8, 10 / 8, 11 / 8, 12 / 8]
    assert both.refined[1].tolist() == [2.5, -INF, -INF, -INF]
    assert both.tasks[0, :, 0].tolist() == [18.0, 20.0, 22.0, 24.0]
    assert both.tasks[1].tolist() == [[40.0, 60.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert both.reranked.tolist() == [5, 1]
    assert both.semantic_kept.tolist() == [15, 3]


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_the_split_into_lists_does_not_matter(shards: int) -> None:
    generator = torch.Generator().manual_seed(shards)
    # Few distinct values, so that ties are everywhere.
    entries = [(float(torch.randint(5, (1,), generator=generator)), item) for item in range(60)]
    whole = sorted(entries, key=lambda one: (-one[0], one[1]))
    lists = [[one for one in whole if one[1] % shards == shard] for shard in range(shards)]
    got = Merge()([round_two([one], 60) for one in lists], 25)
    assert list(zip(got.values[0].tolist(), got.item_ids[0].tolist(), strict=True)) == whole[:25]


def test_a_model_without_tasks_merges() -> None:
    bare = round_two([[(1.0, 3)]], 1)._replace(tasks=torch.zeros(1, 1, 0))
    assert Merge()([bare, bare._replace(item_ids=torch.tensor([[4]]))], 2).tasks.shape == (1, 2, 0)


def test_passing_never_lets_padding_through() -> None:
    scores = torch.full((1, 1, 2), -INF)
    ids = torch.full((1, 1, 2), -1, dtype=torch.int64)
    everything = Cutoffs(torch.full((1, 1), -INF), torch.full((1, 1), LARGEST_ID))
    assert not bool(passes(scores, ids, everything).any())


def test_times_of_lists_made_side_by_side_are_the_slowest() -> None:
    assert slowest([{"a": 3, "b": 1}, {"a": 2, "c": 5}]) == {"a": 3, "b": 1, "c": 5}
