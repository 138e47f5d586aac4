from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from silvershard.model.answer import Answer
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request, RequestError
from silvershard.model.retriever import Retriever, assemble
from silvershard.model.semantic_ids import item_scores
from silvershard.model.types import Work
from silvershard.shard.load import load_retriever


@pytest.fixture(scope="module")
def retriever(semantic_generation: Any) -> Retriever:
    return load_retriever(semantic_generation.path)[0]


def history(generation: Any, start: int, stop: int) -> dict[str, list[int]]:
    return {"history": generation.catalogue.item_ids[start:stop].tolist()}


def make_work(retriever: Retriever, requests: list[Request]) -> Work:
    spec = retriever.spec
    compiled = [compile_request(one, spec) for one in requests]
    plans = [one.plan(spec, 100) for one in compiled]
    encoded = retriever.encode([one.features for one in compiled])
    return assemble(compiled, plans, encoded.embedding, encoded.user_state)


def eligible_ids(retriever: Retriever, request: Request) -> set[int]:
    """The ids that pass the filter and are not excluded, by a search that scores every item."""
    everything = Request(k=600, exact=True, filter=request.filter, params=request.params)
    return set(retriever([everything])[0].item_ids.tolist()) - set(request.exclude_ids)


@torch.inference_mode()
def ranked_by_decoder(retriever: Retriever, request: Request) -> list[int]:
    """Every eligible item scored by itself, best first."""
    source = retriever.semantic
    part = retriever.indexes[0]
    item_ids, codes = part.item_ids.flatten(), part.semantic_codes.flatten(0, 1).long()
    allowed = eligible_ids(retriever, request)
    features = compile_request(request, retriever.spec).features
    state = retriever.model.encode([features]).user_state[:, : source.spec.state_dim]
    held = torch.tensor([at for at, item in enumerate(item_ids.tolist()) if item in allowed])
    if not len(held):
        return []
    scores = item_scores(source.decoder, state.expand(len(held), -1), codes[held])
    keys = zip((-scores).tolist(), item_ids[held].tolist(), strict=True)
    return [item for _, item in sorted(keys)]


def test_the_published_codes_are_those_of_the_embeddings(
    semantic_generation: Any, retriever: Retriever
) -> None:
    catalogue = semantic_generation.catalogue
    with torch.inference_mode():
        embeddings = semantic_generation.model.embed_items(dict(catalogue.features))
    wanted = retriever.semantic.item_codes(embeddings)
    part = retriever.indexes[0]
    slots = part.slots_of(torch.from_numpy(catalogue.item_ids))
    assert torch.equal(part.semantic_codes.flatten(0, 1)[slots], wanted)
    assert 20 < len(wanted.unique(dim=0)) < 500


def test_a_part_finds_what_scoring_every_eligible_item_finds(
    semantic_generation: Any, retriever: Retriever, request_maker: Callable[..., list[Request]]
) -> None:
    asked = request_maker(semantic_generation, 30, seed=5)
    requests = [replace(one, semantic_k=40, exact=False) for one in asked]
    found = retriever.semantic.search(
        make_work(retriever, requests), retriever.indexes[0], retriever.tries[0]
    )
    assert bool(found.exact.all())
    short = 0
    for row, request in enumerate(requests):
        wanted = ranked_by_decoder(retriever, request)[:40]
        short += len(wanted) < 40
        assert [item for item in found.item_ids[row].tolist() if item >= 0] == wanted
    assert 3 < short < 30


def test_a_request_that_asks_for_none_gets_none_beside_one_that_does(
    semantic_generation: Any, retriever: Retriever
) -> None:
    features = history(semantic_generation, 0, 6)
    requests = [
        Request(features=features, semantic_k=asked, ann_k=5, k=5) for asked in (0, 8, None)
    ]
    work = make_work(retriever, requests)
    assert work.semantic_k.tolist() == [0, 8, 30]
    first, _ = retriever.open(work)
    assert (first.semantic_item_ids >= 0).sum(1).tolist() == [0, 30, 30]
    answers = retriever(requests)
    assert [one.counts.semantic_kept for one in answers] == [0, 8, 30]
    for request, answer in zip(requests, answers, strict=True):
        alone = retriever([request])[0]
        assert alone.counts == answer.counts
        assert torch.equal(alone.item_ids, answer.item_ids)
        assert torch.equal(alone.scores, answer.scores)


def test_turned_off_the_source_changes_nothing(
    generation: Any, semantic_generation: Any, retriever: Retriever
) -> None:
    plain = load_retriever(generation.path)[0]
    request = Request(features=history(generation, 3, 9), k=60)
    without = retriever([replace(request, semantic_k=0)])[0]
    wanted = plain([request])[0]
    assert str(without.plan) == str(wanted.plan)
    assert torch.equal(without.item_ids, wanted.item_ids)
    assert torch.equal(without.scores, wanted.scores)
    assert "semantic" not in without.times
    assert "semantic" in retriever([request])[0].times


def reranked(retriever: Retriever, request: Request) -> Answer:
    return retriever([replace(request, k=600)])[0]


@pytest.mark.parametrize("head_merge", ["union", "intersection"])
def test_what_the_source_finds_is_united_with_what_the_heads_keep(
    publish_semantic: Callable[..., Any], head_merge: str
) -> None:
    generation = publish_semantic(head_merge=head_merge)
    retriever = load_retriever(generation.path)[0]
    base = Request(features=history(generation, 0, 8), nprobe=2, ann_k=25)
    heads = set(reranked(retriever, replace(base, semantic_k=0)).item_ids.tolist())
    both = reranked(retriever, replace(base, semantic_k=30))
    generated = ranked_by_decoder(retriever, base)[:30]
    assert set(both.item_ids.tolist()) == heads | set(generated)
    assert len(set(generated) - heads) > 10
    assert both.counts.semantic_kept == 30
    assert both.counts.reranked == len(heads | set(generated))
    if head_merge == "intersection":
        wide = load_retriever(publish_semantic().path)[0]
        united = reranked(wide, replace(base, semantic_k=0))
        assert len(heads) < united.counts.reranked


def test_an_item_that_only_the_source_finds_is_refined_ranked_and_valued_like_any_other(
    semantic_generation: Any, retriever: Retriever
) -> None:
    base = Request(features=history(semantic_generation, 0, 8), nprobe=1, ann_k=5)
    heads = set(reranked(retriever, replace(base, semantic_k=0)).item_ids.tolist())
    new = [item for item in ranked_by_decoder(retriever, base)[:30] if item not in heads]
    everything = retriever([Request(features=base.features, k=600, exact=True)])[0]
    place = {item: at for at, item in enumerate(everything.item_ids.tolist())}
    answer = reranked(retriever, base)
    found = answer.item_ids.tolist()
    assert set(new) <= set(found)
    rows = torch.tensor([place[item] for item in found])
    assert torch.equal(answer.scores, everything.scores[rows])
    assert torch.equal(answer.refined, everything.refined[rows])
    for name, scores in answer.task_scores.items():
        assert torch.equal(scores, everything.task_scores[name][rows])
    best = min(new, key=lambda item: place[item])
    top = [item for item in everything.item_ids.tolist() if item in heads or item == best]
    assert best in retriever([replace(base, k=top.index(best) + 1 + len(new))])[0].item_ids


def test_no_answer_holds_an_item_that_is_not_eligible(
    semantic_generation: Any, retriever: Retriever, request_maker: Callable[..., list[Request]]
) -> None:
    requests = [
        replace(one, semantic_k=200, k=600, exact=False)
        for one in request_maker(semantic_generation, 60, seed=9)
    ]
    filtered = 0
    for request, answer in zip(requests, retriever(requests), strict=True):
        allowed = eligible_ids(retriever, request)
        assert set(answer.item_ids.tolist()) <= allowed
        filtered += bool(request.filter) and answer.counts.semantic_kept < 200
        assert answer.counts.semantic_kept == min(200, len(allowed))
    assert filtered > 10


def test_several_parts_answer_as_one(
    semantic_generation: Any, retriever: Retriever, request_maker: Callable[..., list[Request]]
) -> None:
    parts = load_retriever(semantic_generation.path, devices=("cpu",) * 3)[0]
    requests = request_maker(semantic_generation, 20, seed=4)
    for one, other in zip(parts(requests), retriever(requests), strict=True):
        assert torch.equal(one.item_ids, other.item_ids)
        assert torch.equal(one.scores, other.scores)
        assert one.counts == other.counts


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"semantic_k": 10_001}, "search.semantic_k", "must be in 0..10000, got 10001"),
        ({"semantic_k": -1}, "search.semantic_k", "must be in 0..10000, got -1"),
        (
            {"semantic_k": 0, "plan": "probe(probes=1,ann_k=5)"},
            "search.plan",
            "a pinned plan excludes exact, nprobe, ann_k, semantic_k",
        ),
        (
            {"plan": "probe(probes=1,ann_k=5,semantic_k=10001)"},
            "search.plan",
            "semantic_k must be in 0..10000",
        ),
    ],
)
def test_a_request_that_the_source_cannot_serve_is_refused(
    retriever: Retriever, changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        retriever([Request(**changes)])
    assert raised.value.field == field


def test_a_model_without_semantic_ids_refuses_to_generate(
    generation: Any, retriever: Retriever
) -> None:
    plain = load_retriever(generation.path)[0]
    with pytest.raises(RequestError, match="must be 0, as model films has no semantic ids, got 3"):
        plain([Request(semantic_k=3)])
    work = make_work(plain, [Request()])._replace(semantic_k=torch.tensor([3]))
    with pytest.raises(ValueError, match="semantic_k must be 0 in a generation without"):
        plain.open(work)
    with pytest.raises(ValueError, match="if and only if the generation has semantic ids"):
        Retriever(plain.model, None, plain.indexes, plain.spec, retriever.semantic)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every item must have 3 semantic codes, got none"):
        retriever.semantic.trie(plain.indexes[0])


def test_a_pinned_plan_asks_as_often_as_it_says(
    semantic_generation: Any, retriever: Retriever
) -> None:
    request = Request(features=history(semantic_generation, 0, 5), k=20)
    answer = retriever([request])[0]
    assert str(answer.plan) == "probe(probes=4,ann_k=40,semantic_k=30)"
    pinned = retriever([replace(request, plan=str(answer.plan))])[0]
    assert torch.equal(pinned.scores, answer.scores)
    off = retriever([replace(request, plan="probe(probes=4,ann_k=40)")])[0]
    assert off.counts.semantic_kept == 0


def test_what_the_decoder_reads_of_a_user_is_made_once_and_depends_on_nobody_else(
    semantic_generation: Any, retriever: Retriever
) -> None:
    users = [history(semantic_generation, at, at + at % 9) for at in range(33)]
    source = retriever.semantic
    with torch.inference_mode():
        plain = semantic_generation.model.encode(users).user_state
    together = retriever.encode(users).user_state
    assert together.shape[1] == plain.shape[1] + source.spec.decoder.hidden
    assert torch.equal(source.without_context(together), plain)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for at in (0, 7, 32):
                assert torch.equal(retriever.encode(users[at : at + 1]).user_state[0], together[at])
        finally:
            torch.set_num_threads(1)
