import torch

from silvershard.model.answer import split_answers
from silvershard.model.compiled_request import compile_request
from silvershard.model.plan import Plan
from silvershard.model.request import Request
from silvershard.model.types import RoundOne, RoundTwo
from silvershard.shard.snapshot import open_snapshot

INF = float("inf")


def rounds(found: list[int], width: int) -> tuple[RoundOne, RoundTwo]:
    batch = len(found)
    ids = torch.full((batch, width), -1)
    for row, count in enumerate(found):
        ids[row, :count] = torch.arange(count) + 10 * row
    values = torch.where(ids < 0, -INF, -ids.float())
    counts = torch.tensor(found)
    first = RoundOne(
        torch.zeros(batch, 2, 1),
        torch.zeros(batch, 2, 1),
        counts + 1,
        counts,
        torch.zeros(batch, 0),
        torch.zeros(batch, 0),
        {},
    )
    tasks = torch.stack([ids.float(), ids.float() + 0.5], 2)
    return first, RoundTwo(ids, values, values, tasks, counts * 2, counts - 1, counts, {})


def answer(
    generation,
    request: Request,
    plan: Plan,
    found: int,
    warnings: tuple[str, ...] = (),
    eligible: int | None = 99,
    head_merge: str = "union",
    kept: int | None = None,
):
    spec = open_snapshot(generation.path).spec
    schema = spec.item_schema.model_copy(update={"head_merge": head_merge})
    spec = spec.model_copy(update={"item_schema": schema})
    first, second = rounds([found], 8)
    if kept is not None:
        second = second._replace(kept=torch.tensor([kept]))
    compiled = compile_request(request, spec)
    return split_answers(
        [compiled], [plan], [warnings], first, second, spec, [eligible], {"ann": 5}
    )[0]


def test_results_are_cut_to_k_and_never_padded(generation) -> None:
    got = answer(generation, Request(k=3), Plan("probe", 4, 10), found=5)
    assert got.item_ids.tolist() == [0, 1, 2]
    assert got.task_scores["liked"].tolist() == [0.5, 1.5, 2.5]
    assert not got.exhausted
    assert got.warnings == ()
    assert got.times == {"ann": 5}


def test_a_short_answer_is_exhausted_only_when_every_cluster_was_scanned(generation) -> None:
    whole = answer(generation, Request(k=7), Plan("all_pages", 16, 10), found=5)
    assert whole.exhausted
    assert whole.warnings == ()
    part = answer(generation, Request(k=7), Plan("probe", 4, 10), found=5, warnings=("odd",))
    assert not part.exhausted
    assert part.warnings[0] == "odd"
    assert "only 5 of 7 results lie in the 4 probed clusters of 16" in part.warnings[1]


def test_a_short_answer_that_the_scan_cut_is_not_exhausted(generation) -> None:
    cut = answer(generation, Request(k=7), Plan("all_pages", 16, 5), found=5)
    assert not cut.exhausted
    assert cut.warnings == ("only 5 of 7 results were kept by the scan: raise search.ann_k, now 5",)


def test_a_scan_that_keeps_all_that_is_eligible_cuts_nothing(generation) -> None:
    kept = answer(generation, Request(k=7), Plan("all_pages", 16, 5), found=5, eligible=5)
    assert kept.exhausted
    whole = answer(generation, Request(k=7), Plan("all_pages", 16, 600), found=5, eligible=None)
    assert whole.exhausted


def test_a_decoder_that_found_less_than_was_asked_of_it_found_all_that_is_eligible(
    generation,
) -> None:
    request = Request(k=7)
    found = answer(generation, request, Plan("probe", 4, 3, semantic_k=9), found=5)
    assert found.exhausted
    assert found.warnings == ()
    cut = answer(generation, request, Plan("probe", 4, 3, semantic_k=4), found=5)
    assert not cut.exhausted
    assert len(cut.warnings) == 1


def test_exactly_k_found_is_not_exhausted(generation) -> None:
    assert not answer(generation, Request(k=5), Plan("all_pages", 16, 10), found=5).exhausted


def test_counts_are_those_of_the_request(generation) -> None:
    counts = answer(generation, Request(k=5), Plan("probe", 4, 10), found=5).counts
    assert counts == type(counts)(
        addressed=600, probed=6, eligible=99, ann_kept=10, reranked=5, semantic_kept=4
    )


def test_an_intersection_that_is_short_because_heads_were_cut_is_not_exhausted(generation) -> None:
    """Two heads kept ten items each and agree on five; more may be eligible."""
    every, plan = Plan("all_pages", 16, 10), Request(k=7)
    cut = answer(generation, plan, every, found=5, head_merge="intersection", kept=20)
    assert not cut.exhausted
    assert "only 5 of 7 results were kept by the scan: raise search.ann_k" in cut.warnings[0]
    whole = answer(generation, plan, every, found=5, head_merge="intersection", kept=10)
    assert whole.exhausted
    assert answer(generation, plan, every, found=5, eligible=10, kept=20).exhausted
    some = Plan("probe", 4, 10)
    cut = answer(generation, plan, some, found=5, head_merge="intersection", kept=12)
    assert "raise search.ann_k" in cut.warnings[0]
    short = answer(generation, plan, some, found=5, head_merge="intersection", kept=9)
    assert "raise search.nprobe" in short.warnings[0]
