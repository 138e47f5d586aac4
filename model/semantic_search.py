"""Best-first search for the most probable eligible items under a decoder of semantic IDs.

The score of a prefix bounds the scores of all items below it, bit for bit. So prefixes are expanded
in the order of their scores, those without an eligible item never, and the search stops when no
open prefix can reach the last result: what it has then is exact. As the score of an item depends on
no other item, the best of several shards merge into the best of all.

Shapes: B requests, E hidden units, n items, N pages of G slots, W = G / 64 words, L levels, V codes
of a level, M prefixes of a trie, F open prefixes, R results, x entries of all requests, X entries
of the request that has most.

Source: Russell and Norvig, "Artificial Intelligence: A Modern Approach", 4th edition, section 3.4.2
(uniform-cost search); Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023
(generation of the codes of items).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from silvershard.kernels import eligibility, popcount, select_topk
from silvershard.kernels.contract import check_tensor
from silvershard.model.index import ItemIndex
from silvershard.model.semantic_ids import SemanticDecoder
from silvershard.model.semantic_trie import CodeTrie

BATCH = 1024
"""Most prefixes of a request that are expanded at a time."""
_NONE = float("-inf")
# A round costs as much as some hundred prefixes, and expands some that need not be. The first one
# takes so many, each later one twice as many.
_FIRST_BATCH = 32
# Log-probabilities of so many rows stay in the second-level cache.
_CHUNK_ROWS = 512
_LEVEL_BONUS = 1e4


class Generated(NamedTuple):
    """The best items of each request by their log-probability."""

    scores: Tensor
    """``(B, R)`` float32, descending, at most 0; ``-inf`` marks padding."""
    item_ids: Tensor
    """``(B, R)`` int64, ascending among equal scores; -1 marks padding."""
    slots: Tensor
    """``(B, R)`` int64; -1 marks padding."""
    expanded: Tensor
    """``(B,)`` int64 prefixes whose next codes the decoder gave."""
    exact: Tensor
    """``(B,)`` bool; False where the limit on expansions ended the search, and better items may be
    missing."""


def _ranges(begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of all ranges one after the other, and which range each is of."""
    counts = ends - begins
    which = torch.repeat_interleave(counts)
    ahead = counts.cumsum(0) - counts
    numbers = torch.arange(len(which), device=begins.device)
    return numbers + (begins - ahead)[which], which


def eligible_slots(index: ItemIndex, scan: Tensor, verify: Tensor, exclude: Tensor) -> Tensor:
    """Return which slots of an index each request may be given, ``(B, N, W)`` int64.

    Args:
        index: the items.
        scan: ``(B, Y, 4)`` int64 filter programs over the planes.
        verify: ``(B, Yv, 4)`` int64 exact filter programs.
        exclude: ``(B, E)`` int64 item ids, -1 where there is none.
    """
    filters = (index.planes, index.columns, index.terms)
    pages = torch.arange(index.planes.shape[1], dtype=torch.int32, device=scan.device)
    pages = pages.expand(len(scan), -1).contiguous()
    words = eligibility(*filters, scan, pages, index.slots_of(exclude))
    # An operation other than NOP is not zero; without one the scan is exact.
    if bool(verify.any()):
        words &= eligibility(*filters, verify, pages, exclude.new_zeros(len(scan), 0))
    return words


@torch.inference_mode()
def generate(
    decoder: SemanticDecoder,
    context: Tensor,
    trie: CodeTrie,
    eligible: Tensor,
    num_results: int,
    *,
    batch: int = BATCH,
    max_expansions: int | None = None,
) -> Generated:
    """Return the most probable eligible items of each request.

    Where ``exact`` says so, scores, ids and slots depend on the request and the eligible items
    only: not on the other requests, on ``batch``, or on how items are split over tries whose
    results are merged. A search takes five to fifteen rounds, and waits for the device several
    times in each.

    Args:
        decoder: in evaluation mode.
        context: ``(B, E)`` float32, the users' part as ``decoder.context`` gives it.
        trie: the items.
        eligible: ``(B, N, W)`` int64, as ``eligible_slots`` or ``kernels.eligibility`` over all
            pages returns it.
        num_results: R.
        batch: most prefixes of a request that are expanded at a time, at least 1.
        max_expansions: most prefixes that may be expanded for a request, at least 1; None: all, a
            core expands about 100,000 a second. In the second half of them the longest prefixes
            come first, so that a search which cannot be finished returns items.

    Returns:
        Fewer than R items where fewer are eligible.

    Raises:
        ValueError: if shapes, dtypes or settings disagree, or a log-probability is not a number.
    """
    if (trie.levels, trie.width) != (decoder.config.levels, decoder.config.width):
        raise ValueError(
            f"trie must have the decoder's {decoder.config.levels} levels of "
            f"{decoder.config.width} codes, got {trie.levels} of {trie.width}"
        )
    if max_expansions is None:
        # No prefix is expanded twice, so that even the first half is never used up.
        max_expansions = 2 * trie.bounds[-1] + 2
    for name, value in (
        ("num_results", num_results),
        ("batch", batch),
        ("max_expansions", max_expansions),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_tensor("context", context, torch.float32, ("B", decoder.config.hidden))
    check_tensor("eligible", eligible, torch.int64, (len(context), "N", "W"))
    words = eligible.shape[1] * eligible.shape[2]
    if words != len(trie.members):
        raise ValueError(f"eligible must have {len(trie.members)} words per request, got {words}")
    search = _Search(decoder, context, trie, eligible, num_results, max_expansions)
    most = min(_FIRST_BATCH, batch)
    while search.expand(most):
        most = min(2 * most, batch)
    return search.results()


class _Search:
    """The open prefixes and the best items of a batch of requests.

    Entries of all requests lie one after the other in the order of the requests while they are
    made and filtered, and padded to one row per request where they are kept.
    """

    def __init__(
        self,
        decoder: SemanticDecoder,
        context: Tensor,
        trie: CodeTrie,
        eligible: Tensor,
        num_results: int,
        max_expansions: int,
    ) -> None:
        self._decoder = decoder
        self._context = context
        self._trie = trie
        self._words = trie.in_code_order(eligible)
        counts = popcount(self._words)
        self._ahead = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
        """``(B, n // 64 + 2)`` int64 eligible items before each word."""
        self._max_expansions = max_expansions
        batch = len(context)
        device = context.device
        self._best_scores = torch.full((batch, num_results), _NONE, device=device)
        self._best_ids = torch.full((batch, num_results), -1, device=device)
        self._best_positions = torch.full((batch, num_results), -1, device=device)
        self._expanded = torch.zeros(batch, dtype=torch.int64, device=device)
        # The empty prefix is number 0; its score is 0.
        self._open_prefixes = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._open_scores = torch.where(self._ahead[:, -1:] > 0, 0.0, _NONE)

    def expand(self, most: int) -> bool:
        """Expand the best open prefixes of each request; return whether there were any."""
        self._drop_hopeless()
        request, prefixes, scores = self._take(most)
        if not len(request):
            return False
        self._expanded += torch.bincount(request, minlength=len(self._expanded))
        bounds = self._trie.bounds
        for level in range(self._trie.levels):
            rows = torch.nonzero((prefixes >= bounds[level]) & (prefixes < bounds[level + 1]))[:, 0]
            if len(rows):
                self._expand_level(level, request[rows], prefixes[rows], scores[rows])
        return True

    def results(self) -> Generated:
        """Return the best items so far."""
        self._drop_hopeless()
        found = self._best_positions >= 0
        slots = torch.full_like(self._best_positions, -1)
        slots[found] = self._trie.order[self._best_positions[found]].long()
        exact = ~(self._open_scores > _NONE).any(1)
        return Generated(self._best_scores, self._best_ids, slots, self._expanded, exact)

    def _drop_hopeless(self) -> None:
        """Forget open prefixes that cannot reach the last result; one that can tie is kept."""
        hopeless = self._open_scores < self._best_scores[:, -1:]
        self._open_scores = self._open_scores.masked_fill_(hopeless, _NONE)
        # Sorting costs more than looking at prefixes that are gone, until they are most.
        left = int((self._open_scores > _NONE).sum(1).max()) if len(hopeless) else 0
        if 4 * left < hopeless.shape[1]:
            order = torch.sort(self._open_scores, 1, descending=True)
            self._open_scores = order.values[:, : left + 1].contiguous()
            self._open_prefixes = self._open_prefixes.gather(1, order.indices[:, : left + 1])

    def _take(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take out the best open prefixes: the request, number and score of each, ``(x,)``."""
        wanted = self._open_scores
        late = 2 * self._expanded >= self._max_expansions
        if bool(late.any()):
            starts = self._open_prefixes.new_tensor(self._trie.bounds[1:])
            length = torch.bucketize(self._open_prefixes, starts, right=True)
            wanted = torch.where(late[:, None], wanted + _LEVEL_BONUS * length, wanted)
        top = torch.topk(wanted, min(most, wanted.shape[1]), 1)
        rank = torch.arange(top.values.shape[1], device=wanted.device)
        limit = torch.where(late, self._max_expansions, (self._max_expansions + 1) // 2)
        taken = (top.values > _NONE) & (rank < (limit - self._expanded)[:, None])
        at = torch.nonzero(taken)
        request, place = at[:, 0], top.indices[taken]
        scores = self._open_scores[request, place]
        self._open_scores[request, place] = _NONE
        return request, self._open_prefixes[request, place], scores

    def _expand_level(self, level: int, request: Tensor, prefixes: Tensor, scores: Tensor) -> None:
        """Expand prefixes ``(x,)`` of ``level`` codes."""
        found = [
            self._below(level, *chunk)
            for chunk in zip(
                request.split(_CHUNK_ROWS),
                prefixes.split(_CHUNK_ROWS),
                scores.split(_CHUNK_ROWS),
                strict=True,
            )
        ]
        owner, below, below_scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        if level + 1 == self._trie.levels:
            kept = self._is_eligible(owner, below)
            self._collect(owner[kept], below[kept], below_scores[kept])
        else:
            kept = self._hold_eligible(owner, below)
            self._open(owner[kept], below[kept], below_scores[kept])

    def _below(
        self, level: int, request: Tensor, prefixes: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return request, number and score of what may reach the results below some prefixes.

        These are prefixes of one more code, or items.
        """
        trie = self._trie
        starts = trie.starts[prefixes]
        so_far = trie.codes[starts, :level].long()
        log_probs = self._decoder.log_probs(self._context[request], so_far)  # (x, V)
        if level + 1 == trie.levels:
            below, row = _ranges(starts, trie.stops[prefixes])
            codes = trie.codes[below, level]
        else:
            below, row = _ranges(trie.longer[prefixes], trie.longer[prefixes + 1])
            codes = trie.codes[trie.starts[below], level]
        below_scores = scores[row] + log_probs[row, codes.long()]
        # A score at the last result's may still win by its id.
        last = self._best_scores[request, -1]
        hopeful = torch.nonzero(below_scores >= last[row])[:, 0]
        return request[row[hopeful]], below[hopeful], below_scores[hopeful]

    def _is_eligible(self, request: Tensor, positions: Tensor) -> Tensor:
        """Return whether items at ``positions`` are eligible for their requests, ``(x,)`` bool."""
        return (self._words[request, positions >> 6] >> (positions & 63) & 1).bool()

    def _hold_eligible(self, request: Tensor, prefixes: Tensor) -> Tensor:
        """Return whether eligible items lie below ``prefixes``, ``(x,)`` bool."""
        ends = torch.stack([self._trie.starts[prefixes], self._trie.stops[prefixes]])  # (2, x)
        word, before = ends >> 6, (torch.ones_like(ends) << (ends & 63)) - 1
        # The eligible items before each end.
        rank = self._ahead[request, word] + popcount(self._words[request, word] & before)
        return rank[1] > rank[0]

    def _open(self, request: Tensor, prefixes: Tensor, scores: Tensor) -> None:
        more_scores, more = self._padded(request, scores, prefixes)
        self._open_scores = torch.cat([self._open_scores, more_scores], 1)
        self._open_prefixes = torch.cat([self._open_prefixes, more], 1)

    def _collect(self, request: Tensor, positions: Tensor, scores: Tensor) -> None:
        more_scores, more = self._padded(request, scores, positions)
        all_scores = torch.cat([self._best_scores, more_scores], 1)
        all_positions = torch.cat([self._best_positions, more], 1)
        padding = all_positions < 0
        ids = self._trie.item_ids[all_positions.clamp(min=0)].masked_fill_(padding, -1)
        best = select_topk(all_scores, ids, self._best_scores.shape[1])
        self._best_scores, self._best_ids = best.scores, best.item_ids
        self._best_positions = torch.where(
            best.positions < 0, -1, all_positions.gather(1, best.positions.clamp(min=0))
        )

    def _padded(self, request: Tensor, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return entries ``(x,)`` as one row per request, ``(B, X)``, padded with -inf and -1."""
        counts = torch.bincount(request, minlength=len(self._expanded))
        rank = torch.arange(len(request), device=request.device)
        rank -= (counts.cumsum(0) - counts)[request]
        shape = (len(counts), int(counts.max()))
        padded_scores = scores.new_full(shape, _NONE)
        padded_numbers = numbers.new_full(shape, -1)
        padded_scores[request, rank] = scores
        padded_numbers[request, rank] = numbers
        return padded_scores, padded_numbers
