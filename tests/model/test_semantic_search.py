from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from silvershard.kernels import merge_topk, pack_bits
from silvershard.model.semantic_config import SemanticConfig
from silvershard.model.semantic_ids import SemanticDecoder, item_scores
from silvershard.model.semantic_search import Generated, generate
from silvershard.model.semantic_trie import CodeTrie

STATE = 10


class Items(NamedTuple):
    """Items in the slots of an index, some of them dead, and the decoder over their codes."""

    decoder: SemanticDecoder
    codes: Tensor
    item_ids: Tensor

    @property
    def trie(self) -> CodeTrie:
        return CodeTrie(self.codes, self.item_ids, self.decoder.config.width)

    def search(self, states: Tensor, flags: Tensor, num_results: int, **options: int) -> Generated:
        context, eligible = self.decoder.context(states), pack_bits(flags)
        return generate(self.decoder, context, self.trie, eligible, num_results, **options)


def make_decoder(
    levels: int, width: int, *, sharpness: float = 1.0, seed: int = 0
) -> SemanticDecoder:
    torch.manual_seed(seed)
    config = SemanticConfig(levels=levels, width=width, hidden=12)
    decoder = SemanticDecoder(config, STATE).requires_grad_(requires_grad=False)
    for out in decoder.out:
        out.weight.mul_(sharpness)
    return decoder.eval()


def make_items(
    num_items: int,
    levels: int,
    width: int,
    *,
    sharpness: float = 3.0,
    page: int = 64,
    seed: int = 0,
) -> Items:
    generator = torch.Generator().manual_seed(seed)
    num_pages = -(-5 * num_items // (4 * page)) + 1
    slots = torch.randperm(num_pages * page, generator=generator)[:num_items]
    item_ids = torch.full((num_pages * page,), -1)
    item_ids[slots] = torch.randperm(1 << 20, generator=generator)[:num_items]
    # Some codes are much more frequent than others, so prefixes are of all sizes.
    draw = torch.rand(num_pages * page, levels, generator=generator) ** 2
    codes = (draw * width).short()
    return Items(
        make_decoder(levels, width, sharpness=sharpness, seed=seed),
        codes.view(num_pages, page, levels),
        item_ids.view(num_pages, page),
    )


def make_states(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, STATE, generator=torch.Generator().manual_seed(seed))


def make_flags(items: Items, count: int, share: float, seed: int = 2) -> Tensor:
    """Random bits of all slots, dead ones included, ``(count, N, G)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *items.item_ids.shape, generator=generator) < share


def brute_force(items: Items, states: Tensor, flags: Tensor, num_results: int) -> Generated:
    """Score every eligible item by itself and sort."""
    scores = torch.full((len(states), num_results), float("-inf"))
    item_ids = torch.full((len(states), num_results), -1)
    slots = torch.full((len(states), num_results), -1)
    for row, state in enumerate(states):
        alive = torch.nonzero(flags[row].flatten() & (items.item_ids.flatten() >= 0))[:, 0]
        if not len(alive):
            continue
        codes = items.codes.flatten(0, 1)[alive].long()
        found = item_scores(items.decoder, state.expand(len(alive), -1), codes)
        keys = zip((-found).tolist(), items.item_ids.flatten()[alive].tolist(), strict=True)
        order = [at for _, at in sorted((key, at) for at, key in enumerate(keys))][:num_results]
        scores[row, : len(order)] = found[order]
        slots[row, : len(order)] = alive[order]
        item_ids[row, : len(order)] = items.item_ids.flatten()[alive][order]
    return Generated(
        scores, item_ids, slots, torch.zeros(len(states)), torch.ones(len(states), dtype=bool)
    )


def assert_same(got: Generated, want: Generated) -> None:
    assert bool(got.exact.all())
    assert torch.equal(got.item_ids, want.item_ids)
    assert torch.equal(got.slots, want.slots)
    assert torch.equal(got.scores, want.scores)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0, 0.0])
@pytest.mark.parametrize(
    ("num_items", "levels", "width", "num_results"),
    [
        (640, 3, 8, 20),
        (600, 3, 16, 100),
        (500, 2, 7, 30),
        (400, 4, 5, 50),
        (300, 1, 11, 25),
        (200, 5, 3, 1),
        (70, 3, 2, 500),
    ],
)
def test_the_search_finds_what_scoring_every_item_finds(
    num_items: int, levels: int, width: int, num_results: int, share: float
) -> None:
    for seed, sharpness in enumerate((0.3, 3.0, 30.0)):
        items = make_items(num_items, levels, width, sharpness=sharpness, seed=seed)
        states, flags = make_states(3, seed), make_flags(items, 3, share, seed)
        want = brute_force(items, states, flags, num_results)
        got = items.search(states, flags, num_results, batch=4)
        assert_same(got, want)
        found = got.slots >= 0
        which = torch.nonzero(found)[:, 0]
        assert bool(flags.flatten(1)[which, got.slots[found]].all())
        assert bool((got.scores[found] <= 0).all())


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_equal_scores_come_in_the_order_of_ids(batch: int) -> None:
    """A decoder without weights finds all codes equally likely."""
    items = make_items(300, 3, 4)
    for parameter in items.decoder.parameters():
        parameter.zero_()
    flags = make_flags(items, 2, 0.5)
    got = items.search(make_states(2), flags, 40, batch=batch)
    assert_same(got, brute_force(items, make_states(2), flags, 40))
    for row in range(2):
        alive = items.item_ids[flags[row] & (items.item_ids >= 0)]
        assert got.item_ids[row].tolist() == sorted(alive.tolist())[:40]


def test_a_bound_that_ties_with_the_last_result_is_still_opened() -> None:
    """All but one code are so unlikely that whole levels add exactly nothing to a score."""
    items = make_items(300, 3, 4, sharpness=0.0)
    for out in items.decoder.out:
        out.bias.copy_(torch.tensor([60.0, 60.0, -60.0, -60.0]))
    items.decoder.out[2].bias.copy_(torch.tensor([60.0, -60.0, -60.0, -60.0]))
    flags = make_flags(items, 1, 1.0)
    want = brute_force(items, make_states(1), flags, 10)
    assert len(want.scores.unique()) == 1
    for batch in (1, 2, 64):
        got = items.search(make_states(1), flags, 10, batch=batch)
        assert_same(got, want)


def test_items_with_the_same_codes_are_told_apart_by_id() -> None:
    items = make_items(150, 3, 6)
    items.codes[...] = torch.tensor([5, 0, 3])
    flags = make_flags(items, 1, 0.5)
    got = items.search(make_states(1), flags, 20)
    alive = items.item_ids[flags[0] & (items.item_ids >= 0)]
    assert got.item_ids[0].tolist() == sorted(alive.tolist())[:20]
    assert len(got.scores.unique()) == 1
    assert got.expanded.tolist() == [3]


def test_a_single_item_is_found_and_an_empty_trie_gives_padding() -> None:
    one = make_items(1, 3, 6)
    got = one.search(make_states(2), make_flags(one, 2, 1.0), 3)
    assert_same(got, brute_force(one, make_states(2), make_flags(one, 2, 1.0), 3))
    assert got.item_ids[:, 0].tolist() == [int(one.item_ids.max())] * 2
    for pages in (0, 2):
        trie = CodeTrie(
            torch.zeros(pages, 64, 3, dtype=torch.int16), torch.full((pages, 64), -1), 6
        )
        eligible = torch.full((2, pages, 1), -1)
        got = generate(one.decoder, one.decoder.context(make_states(2)), trie, eligible, 3)
        assert got.item_ids.tolist() == [[-1] * 3] * 2
        assert got.scores.tolist() == [[float("-inf")] * 3] * 2
        assert bool(got.exact.all())


def test_no_request_gives_no_items() -> None:
    items = make_items(50, 3, 6)
    got = items.search(make_states(0), make_flags(items, 0, 1.0), 3)
    assert got.item_ids.shape == (0, 3)
    assert got.exact.shape == (0,)


@pytest.mark.parametrize("batch", [1, 5, 37, 1000])
def test_the_answer_does_not_depend_on_how_many_prefixes_are_expanded_at_a_time(
    batch: int,
) -> None:
    items = make_items(2000, 3, 16)
    states, flags = make_states(4), make_flags(items, 4, 0.4)
    want = items.search(states, flags, 60)
    got = items.search(states, flags, 60, batch=batch)
    assert_same(got, want)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_request_has_the_same_bits_alone_and_in_any_batch(num_threads: int) -> None:
    items = make_items(1500, 3, 16)
    states, flags = make_states(33), make_flags(items, 33, 0.5)
    flags[::3] = make_flags(items, 11, 0.01, seed=9)
    trie, eligible, context = items.trie, pack_bits(flags), items.decoder.context(states)
    with threads(num_threads):
        alone = [
            generate(items.decoder, context[row : row + 1], trie, eligible[row : row + 1], 40)
            for row in range(33)
        ]
        for size in (2, 7, 33):
            rows = torch.randperm(33, generator=torch.Generator().manual_seed(size))[:size]
            together = generate(items.decoder, context[rows], trie, eligible[rows], 40)
            for place, row in enumerate(rows.tolist()):
                for name, value, single in zip(
                    Generated._fields, together, alone[row], strict=True
                ):
                    assert torch.equal(value[place], single[0]), name


def shards_of(items: Items, count: int) -> list[Items]:
    """The items dealt to shards by id, each in an index of its own."""
    return [
        items._replace(item_ids=items.item_ids.where(items.item_ids % count == shard, -1))
        for shard in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_best_of_all_shards_are_the_best_of_the_whole(count: int) -> None:
    for num_items, width, num_results in ((1200, 8, 50), (40, 8, 30), (4, 3, 10)):
        items = make_items(num_items, 3, width)
        states, flags = make_states(3), make_flags(items, 3, 0.6)
        whole = items.search(states, flags, num_results)
        parts = [shard.search(states, flags, num_results) for shard in shards_of(items, count)]
        merged = merge_topk(
            torch.stack([part.scores for part in parts]),
            torch.stack([part.item_ids for part in parts]),
            num_results,
        )
        assert torch.equal(merged.scores, whole.scores)
        assert torch.equal(merged.item_ids, whole.item_ids)


def test_no_prefix_is_expanded_that_need_not_be() -> None:
    """One at a time, those above the last result are expanded, and perhaps some that tie."""
    items = make_items(1500, 3, 16)
    states, flags = make_states(3), make_flags(items, 3, 0.5)
    got = items.search(states, flags, 20, batch=1)
    for row, state in enumerate(states):
        alive = flags[row].flatten() & (items.item_ids.flatten() >= 0)
        codes = items.codes.flatten(0, 1)[alive].long()
        terms = items.decoder(state.expand(len(codes), -1), codes)
        prefixes = {(): 0.0}
        for item, term in zip(codes.tolist(), terms, strict=True):
            total = torch.tensor(0.0)
            for level in range(2):
                total = total + term[level]
                prefixes[tuple(item[: level + 1])] = float(total)
        last = float(got.scores[row, -1])
        above = sum(score > last for score in prefixes.values())
        reaching = sum(score >= last for score in prefixes.values())
        assert above <= int(got.expanded[row]) <= reaching
        assert reaching < len(prefixes) / 2


def test_a_search_that_reaches_its_limit_says_so_and_returns_true_scores() -> None:
    items = make_items(1500, 3, 16, sharpness=0.3)
    states, flags = make_states(4), make_flags(items, 4, 0.5)
    everything = brute_force(items, states, flags, 1500)
    free = items.search(states, flags, 200)
    assert int(free.expanded.min()) > 40
    for limit in (1, 2, 12, 40):
        got = items.search(states, flags, 200, max_expansions=limit)
        assert not bool(got.exact.any())
        assert got.expanded.tolist() == [limit] * 4
        alone = items.search(states[2:3], flags[2:3], 200, max_expansions=limit)
        assert torch.equal(alone.item_ids[0], got.item_ids[2])
        if limit >= 12:
            assert bool((got.item_ids[:, 0] >= 0).all())
        for row in range(4):
            score_of = dict(
                zip(everything.item_ids[row].tolist(), everything.scores[row].tolist(), strict=True)
            )
            for item_id, score in zip(
                got.item_ids[row].tolist(), got.scores[row].tolist(), strict=True
            ):
                assert item_id < 0 or score_of[item_id] == score
    got = items.search(states, flags, 200, batch=1)
    limited = items.search(
        states,
        flags,
        200,
        batch=1,
        max_expansions=2 * int(got.expanded.max()) + 1,
    )
    assert_same(limited, got)


def test_a_decoder_that_gives_no_number_is_refused() -> None:
    items = make_items(50, 3, 6)
    items.decoder.out[1].bias[3] = float("nan")
    with pytest.raises(ValueError, match="the decoder's logits must not be NaN"):
        items.search(make_states(1), make_flags(items, 1, 1.0), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.update(num_results=0), "num_results must be at least 1, got 0"),
        (lambda given: given.update(batch=0), "batch must be at least 1, got 0"),
        (lambda given: given.update(max_expansions=0), "max_expansions must be at least 1"),
        (
            lambda given: given.update(eligible=given["eligible"][:, 1:]),
            "eligible must have 2 words per request, got 1",
        ),
        (lambda given: given.update(eligible=given["eligible"][:1]), r"eligible must have shape"),
        (
            lambda given: given.update(decoder=make_decoder(3, 7)),
            "trie must have the decoder's 3 levels of 7 codes, got 3 of 6",
        ),
        (
            lambda given: given.update(context=given["context"][:, 1:]),
            r"context must have shape \(B, 12\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    change: Callable[[dict[str, object]], object], message: str
) -> None:
    items = make_items(50, 3, 6)
    given = {
        "decoder": items.decoder,
        "context": items.decoder.context(make_states(2)),
        "trie": items.trie,
        "eligible": pack_bits(make_flags(items, 2, 1.0)),
        "num_results": 5,
    }
    change(given)
    with pytest.raises(ValueError, match=message):
        generate(**given)


def test_a_search_is_not_limited_unless_it_is_told_to_be() -> None:
    """A decoder that finds nothing likely opens every prefix with an eligible item."""
    items = make_items(900, 3, 12, sharpness=0.0)
    states, flags = make_states(2), make_flags(items, 2, 0.9)
    got = items.search(states, flags, 900)
    assert_same(got, brute_force(items, states, flags, 900))
    assert int(got.expanded.min()) > 0.5 * items.trie.bounds[-1]
