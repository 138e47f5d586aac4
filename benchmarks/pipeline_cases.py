"""Cases around the scan: end to end, the filter alone, memory bandwidth, streaming updates.

Shapes: n items, D embedding dimension, U candidates, O outputs of a layer, T tasks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.dram import ReadLimit
from benchmarks.mixture import NUM_QUERIES, SELECTIVITIES, Filter, Lists, filters
from benchmarks.ours import OurIndex, gather_linear, repeated, term_keys
from benchmarks.quiet import Call
from benchmarks.rows import Case, Gate, not_below
from benchmarks.search_cases import (
    NUM_FILTERS,
    Bench,
    FaissCall,
    batch_programs,
    our_call,
    roaring_calls,
    same_as_definition,
)
from silvershard.kernels import (
    bloom_build,
    bloom_positions,
    count_eligible,
    eligibility,
    fixed_sigmoid,
    quantize_rows,
    select_topk,
    value_program,
)
from silvershard.model.index import LIVE_PLANE
from silvershard.model.value import compile_value

ANSWERS = 100
HIDDEN = (128, 64)
TASKS = {"view": 0.5, "like": 2.0, "share": 1.0}
_MIN_OVERLAP = 0.99
_MAX_FALSE_POSITIVES = 0.15


@dataclass(frozen=True, eq=False)
class Ranker:
    """The perceptron over user, item and their product that both sides run."""

    first: Tensor
    """``(3 D, O)``: rows for the query, the item and their product."""
    first_bias: Tensor
    middle: Tensor
    middle_bias: Tensor
    last: Tensor
    last_bias: Tensor

    @classmethod
    def of(cls, dim: int) -> "Ranker":
        """Return random weights."""
        draw = torch.Generator().manual_seed(5)
        sizes = [(3 * dim, HIDDEN[0]), HIDDEN, (HIDDEN[1], len(TASKS))]
        layers: list[Tensor] = []
        for inputs, outputs in sizes:
            layers.append(torch.randn(inputs, outputs, generator=draw) * math.sqrt(2 / inputs))
            layers.append(torch.randn(outputs, generator=draw) * 0.1)
        return cls(*layers)

    def logits(self, query: Tensor, items: Tensor) -> Tensor:
        """Return ``(U, T)`` as the layers are written: query ``(D,)``, items ``(U, D)``."""
        given = torch.cat([query.expand_as(items), items, query * items], 1)
        return self.rest(torch.addmm(self.first_bias, given, self.first))

    def folded(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight ``(D, O)`` and bias ``(O,)`` of the first layer for one query."""
        user, item, product = self.first.chunk(3)
        return torch.addcmul(item, query[:, None], product), self.first_bias + query @ user

    def rest(self, hidden: Tensor) -> Tensor:
        """Return logits from the first layer's output."""
        hidden = torch.addmm(self.middle_bias, hidden.relu_(), self.middle)
        return torch.addmm(self.last_bias, hidden.relu_(), self.last)


def end_to_end_cases(
    bench: Bench, *, k: int, probes: int, selectivity: float, threads: int
) -> list[Case]:
    """Return filter, scan, rerank and value of single queries, as written and folded.

    The peer makes a bitmap from Roaring, searches Faiss, gathers float32 rows, runs the same
    perceptron, and takes the best 100. Ours evaluates its planes, gathers from the fp16 cache and
    runs the product's sigmoid, value program and selection.
    """
    ranker, index = Ranker.of(bench.data.dim), bench.ours.index
    compiled = compile_value(" + ".join(f"${name} * {name}" for name in TASKS), [*TASKS], TASKS)
    value_ops, constants = compiled.ops[None], compiled.constants[None]
    search = our_call(bench, 1, probes, k, batch_programs(bench, selectivity, 1, NUM_FILTERS))
    queries = torch.from_numpy(bench.data.queries)
    cache = index.cache.view(-1, bench.data.dim)
    first_layer, where = gather_linear()
    weights = torch.tensor(list(TASKS.values()))

    def which(row: int) -> Filter | None:
        return bench.filter_of(selectivity, row, NUM_FILTERS)

    def finish(logits: Tensor, item_ids: Tensor) -> Tensor:
        request = torch.zeros(logits.shape[0], dtype=torch.int64)
        values = value_program(fixed_sigmoid(logits), request, value_ops, constants)
        return select_topk(values[None], item_ids[None], ANSWERS).item_ids[0]

    def ours(at: int, *, fold: bool) -> Tensor:
        query, found = queries[at % NUM_QUERIES], search(at)
        valid = found.slots[0] >= 0
        slots, item_ids = found.slots[0][valid], found.item_ids[0][valid]
        if not fold:
            return finish(ranker.logits(query, cache.index_select(0, slots).float()), item_ids)
        weight, bias = ranker.folded(query)
        hidden = first_layer(index.cache, slots[None], weight[None], bias[None])[0]
        return finish(ranker.rest(hidden), item_ids)

    def service(at: int, find: FaissCall) -> Tensor:
        row = at % NUM_QUERIES
        found = find(at)[1][0]
        ids = found[found >= 0]
        logits = ranker.logits(queries[row], torch.from_numpy(bench.data.vectors[ids]))
        values = torch.sigmoid(logits) @ weights
        best = torch.topk(values, min(ANSWERS, len(ids))).indices
        return torch.from_numpy(ids)[best]

    def expected(row: int) -> NDArray[np.int64]:
        """Return the best items of the definition's candidates, ranked in float64."""
        programs = bench.ours.programs([filters(selectivity)[row % NUM_FILTERS]], 1)
        found = bench.ours.search(queries[row : row + 1], probes, k, programs).item_ids[0]
        ids = found[found >= 0].numpy()
        exact = Ranker(*(getattr(ranker, name).double() for name in Ranker.__annotations__))
        items = torch.from_numpy(bench.data.vectors[ids]).half().double()
        logits = exact.logits(queries[row].double(), items)
        values = torch.sigmoid(logits) @ weights.double()
        return np.asarray(ids[torch.topk(values, min(ANSWERS, len(ids))).indices.numpy()])

    faiss = roaring_calls(bench, k, probes, threads, which)

    def gate(fold: bool) -> Gate:
        failures = same_as_definition(bench, search, 1, probes, k, which)
        mine = bench.our_recall(k, probes, selectivity, NUM_FILTERS)
        theirs = bench.peer_recall(k, probes, selectivity, NUM_FILTERS)
        if not not_below(mine, theirs):
            failures.append(f"recall {np.mean(mine):.4f} is below {np.mean(theirs):.4f}")
        answers = [ours(row, fold=fold).numpy() for row in range(8)]
        right = np.mean([np.isin(expected(row), answers[row]).mean() for row in range(8)])
        if right < _MIN_OVERLAP:
            failures.append(f"only {right:.3f} of the final answer is what float64 gives")
        served = [service(row, faiss["mode 0"]).numpy() for row in range(8)]
        same = np.mean([np.isin(a, b).mean() for a, b in zip(answers, served, strict=True)])
        note = f"overlap with the peer's answer {same:.3f}"
        if fold:
            note += f", gather_linear: {where}"
        return Gate(tuple(failures), float(np.mean(mine)), float(np.mean(theirs)), note)

    def case(row: str, *, fold: bool) -> Case:
        def served(find: FaissCall) -> Call:
            return lambda at: service(at, find)

        name = f"{bench.label}/probes={probes}/k={k}/share={selectivity}/batch=1"
        return Case(
            name=f"{name}/{'folded' if fold else 'as written'}/threads={threads}",
            threads=threads,
            ours=lambda at: ours(at, fold=fold),
            gate=lambda: gate(fold),
            peers={row: {mode: served(find) for mode, find in faiss.items()}},
            absolute={},
        )

    return [case("end_to_end", fold=False), case("end_to_end_folded", fold=True)]


def filter_cases(bench: Bench) -> list[Case]:
    """Return the masks, and the counts, of single filters over all items on one thread."""
    index, dictionary = bench.ours.index, bench.ours.dictionary
    pages = torch.arange(index.planes.shape[1], dtype=torch.int32)[None]
    none = torch.zeros(1, 0, dtype=torch.int64)
    chosen = [
        one
        for share in SELECTIVITIES
        for one in filters(share)
        if len(_plane_numbers(bench, one)) == 3 * dictionary.num_hashes
    ][::9]
    programs = [bench.ours.programs([one], 1).scan for one in chosen]

    def mask(at: int) -> Tensor:
        scan = programs[at % len(programs)]
        return eligibility(index.planes, index.columns, index.terms, scan, pages, none)

    def count(at: int) -> Tensor:
        scan = programs[at % len(programs)]
        return count_eligible(index.planes, index.columns, index.terms, scan)

    def gate() -> Gate:
        failures: list[str] = []
        wrong: list[float] = []
        ids = index.item_ids.flatten().numpy()
        for at, one in enumerate(chosen):
            rows = index.planes[[LIVE_PLANE, *_plane_numbers(bench, one)]].numpy()
            expected = np.bitwise_and.reduce(rows, axis=0)
            words = mask(at)[0].numpy()
            if not np.array_equal(words, expected):
                failures.append(f"{one.text}: the mask is not the AND of its planes")
            if int(count(at)) != int(np.bitwise_count(expected.view(np.uint64)).sum()):
                failures.append(f"{one.text}: the count is not that of the mask")
            bits = np.unpackbits(words.reshape(-1).view(np.uint8), bitorder="little")
            passed = np.zeros(len(bench.data), dtype=np.bool_)
            passed[ids[bits.astype(np.bool_)]] = True
            truth = bench.data.passing(one)
            if (truth & ~passed).any():
                failures.append(f"{one.text}: an item that passes is missing")
            wrong.append(float((passed & ~truth).sum() / max(passed.sum(), 1)))
        if max(wrong) > _MAX_FALSE_POSITIVES:
            failures.append(f"{max(wrong):.3f} of the passed items do not pass")
        return Gate(
            tuple(failures),
            note=f"{len(chosen)} filters, {np.mean(wrong):.4f} of the passed are false",
        )

    per_item = 1e9 / len(bench.data)
    return [
        Case(
            name=f"{bench.label}/filter alone, {what}/threads=1",
            threads=1,
            ours=call,
            gate=gate,
            peers={},
            absolute={"filter_alone": lambda seconds: seconds * per_item},
        )
        for what, call in (("mask", mask), ("count", count))
    ]


def _plane_numbers(bench: Bench, which: Filter) -> list[int]:
    """Return the distinct Bloom planes of a filter's terms."""
    dictionary = bench.ours.dictionary
    keys = torch.tensor([dictionary.term_key("tag", tag) for tag in which.tags])
    found = bloom_positions(
        keys,
        num_planes=dictionary.num_bloom_planes,
        num_hashes=dictionary.num_hashes,
        seed=dictionary.seed,
    )
    return sorted({dictionary.first_bloom_plane + one for one in found.flatten().tolist()})


def bandwidth_case(bench: Bench, *, probes: int, limit: ReadLimit, cache_bytes: int) -> Case:
    """Return the share of the DRAM read limit that single queries reach, filters left out.

    The index is laid several times over until it is four times the last-level cache; a query
    probes the same lists in every copy. Only codes and scales of live items count as read.
    """
    copies = max(1, math.ceil(4 * cache_bytes / bench.ours.bytes_scanned))
    k = 100
    state: dict[str, Callable[[int], object]] = {}
    mean_bytes: list[float] = []

    def gate() -> Gate:
        ours: OurIndex = repeated(bench.ours, copies)
        base = bench.lists
        lists = Lists(
            np.tile(base.centroids, (copies, 1)),
            np.concatenate([base.assignment + copy * base.count for copy in range(copies)]),
            base.folder,
        )
        large = Bench(bench.data, lists, ours, bench.peers, bench.gate_queries)
        call = our_call(large, 1, probes * copies, k, batch_programs(large, None, 1, 1))
        failures = same_as_definition(large, call, 1, probes * copies, k, lambda _: None)
        probed = [int(call(row).probed) for row in range(0, NUM_QUERIES, 4)]
        mean_bytes[:] = [float(np.mean(probed)) * (bench.data.dim + 4)]
        state["call"] = call
        size = ours.bytes_scanned / 2**20
        how = f"{limit.bytes_per_s / 1e9:.1f} GB/s by {limit.how}"
        return Gate(tuple(failures), note=f"index {size:.0f} MiB, {copies} copies, limit {how}")

    return Case(
        name=f"{bench.label}/copies={copies}/probes={probes}x{copies}/k={k}/batch=1/threads=1",
        threads=1,
        ours=lambda at: state["call"](at),
        gate=gate,
        peers={},
        absolute={"dram": lambda seconds: mean_bytes[0] / seconds / limit.bytes_per_s},
    )


class _Moves(NamedTuple):
    """Items that are deleted from one slot and inserted into another of the same list."""

    item_ids: Tensor
    """``(u,)``."""
    vectors: Tensor
    """``(u, D)`` float32."""
    terms: Tensor
    """``(u, F)``."""
    slots: list[Tensor]
    """Where they are, and where they go; swapped by each update."""


def streaming_case(bench: Bench, *, updates: int, threads: int) -> Case:
    """Return delete and insert of many items in place, from float32 rows to set live bits.

    Timed: clear the live bits, quantise, write codes, scales, ids, cache, terms and planes, set the
    live bits. Not timed: choosing the list and the free slot of each item.
    """
    index, dictionary = bench.ours.index, bench.ours.dictionary
    groups = _plan_moves(bench, updates)
    live = index.planes[LIVE_PLANE].view(-1)

    def bits(slots: Tensor) -> Tensor:
        ones = torch.ones_like(slots) << (slots & 63)
        return torch.zeros_like(live).index_add_(0, slots >> 6, ones)

    def update(at: int) -> None:
        moves = groups[at % len(groups)]
        old, new = moves.slots
        live.bitwise_and_(~bits(old))
        index.item_ids.view(-1)[old] = -1
        codes, scales = quantize_rows(moves.vectors)
        index.codes.view(-1, bench.data.dim)[new] = codes
        index.scales.view(-1)[new] = scales
        index.item_ids.view(-1)[new] = moves.item_ids
        index.cache.view(-1, bench.data.dim)[new] = moves.vectors.half()
        index.terms.view(-1, index.terms.shape[2])[new] = moves.terms
        bloom_build(
            index.planes,
            new,
            moves.terms,
            first_plane=dictionary.first_bloom_plane,
            num_planes=dictionary.num_bloom_planes,
            num_hashes=dictionary.num_hashes,
            seed=dictionary.seed,
        )
        live.bitwise_or_(bits(new))
        moves.slots.reverse()

    def gate() -> Gate:
        failures = []
        for at in range(len(groups)):
            update(at)
        if index.documents != len(bench.data):
            failures.append(f"{index.documents} items are live, not {len(bench.data)}")
        probes, k = min(64, bench.lists.count), 2048
        for share in (None, 0.1):
            call = our_call(bench, 1, probes, k, batch_programs(bench, share, 1, NUM_FILTERS))
            which = partial(bench.filter_of, share, distinct=NUM_FILTERS)
            failures += same_as_definition(bench, call, 1, probes, k, which)
        return Gate(tuple(failures), note=f"{len(groups)} sets of {len(groups[0].item_ids)} items")

    size = len(groups[0].item_ids)
    return Case(
        name=f"{bench.label}/updates={size}/threads={threads}",
        threads=threads,
        ours=update,
        gate=gate,
        peers={},
        absolute={"streaming": lambda seconds: 1e3 * seconds},
    )


def _plan_moves(bench: Bench, updates: int) -> list[_Moves]:
    """Pair items with free slots of their lists, in up to eight sets of equal size."""
    index, size = bench.ours.index, bench.ours.page_slots
    flat = index.item_ids.view(-1).numpy()
    pairs = []
    for number, members in enumerate(bench.lists.members):
        pages = index.page_table[number]
        pages = pages[pages >= 0].long()
        slots = (pages[:, None] * size + torch.arange(size)).flatten().numpy()
        free = slots[flat[slots] < 0]
        count = min(len(free), len(members))
        pairs.append(np.stack([members[:count], free[:count]], 1))
    table = np.random.default_rng(6).permutation(np.concatenate(pairs))
    updates = min(updates, len(table))
    slot_of = np.empty(len(bench.data), dtype=np.int64)
    slot_of[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    found = []
    for at in range(0, min(len(table) // updates, 8) * updates, updates):
        items, new = table[at : at + updates].T
        terms = term_keys(bench.ours.dictionary, bench.data, items)
        found.append(
            _Moves(
                torch.from_numpy(items.copy()),
                torch.from_numpy(bench.data.vectors[items]),
                torch.from_numpy(terms),
                [torch.from_numpy(slot_of[items]), torch.from_numpy(new.copy())],
            )
        )
    return found
