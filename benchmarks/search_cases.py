"""Cases of the index scan: unfiltered, filtered, own filters, selective filters, HNSW.

Shapes: B queries of a batch, k results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.mixture import NUM_QUERIES, DataSet, Filter, Lists, filters, recall
from benchmarks.ours import OurIndex, Programs
from benchmarks.peers import Found, Peers, ThreadedLoop, modes
from benchmarks.quiet import Call
from benchmarks.rows import Case, Gate, not_below

NUM_FILTERS = 8
"""Filters that single queries take in turn."""
HNSW_WIDTHS = (100, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FaissCall = Callable[[int], Found]
_MIN_SAME_CLUSTERS = 0.98
_MIN_SELECTIVE_RECALL = 0.95
_LARGE_K = 20_000


@dataclass(frozen=True, eq=False)
class Bench:
    """One data set with its lists, our index, the peers, and what gates have found already."""

    data: DataSet
    lists: Lists
    ours: OurIndex
    peers: Peers
    gate_queries: int
    """Queries whose recall is measured."""
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return what all cases of this bench share."""
        data = f"n={len(self.data)}/D={self.data.dim}"
        return f"{data}/lists={self.lists.count}/G={self.ours.page_slots}"

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave when the key was first asked for."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def filter_of(self, selectivity: float | None, row: int, distinct: int) -> Filter | None:
        """Return the filter of a query."""
        return None if selectivity is None else filters(selectivity)[row % distinct]

    def gate_rows(self, k: int) -> range:
        """Return the queries that the gate asks: few where every answer is long."""
        return range(min(self.gate_queries, 4) if k > _LARGE_K else self.gate_queries)

    def truth(self, k: int, selectivity: float | None, distinct: int) -> list[NDArray[np.int64]]:
        """Return the exact answer of the queries of the gate."""
        longest = k
        if k <= _LARGE_K:
            longest = min(10_000 if selectivity is None else 2048, len(self.data))

        def make() -> list[NDArray[np.int64]]:
            rows = self.gate_rows(k)
            which = None
            if selectivity is not None:
                found = filters(selectivity)
                which = [found[row % distinct] for row in rows]
            return self.data.best(rows, longest, which)

        key = ("truth", longest, selectivity, 1 if selectivity is None else distinct)
        answer: list[NDArray[np.int64]] = self.once(key, make)
        return [one[:k] for one in answer]

    def our_recall(
        self,
        k: int,
        probes: int,
        selectivity: float | None,
        distinct: int,
        implementation: str | None = None,
    ) -> list[float]:
        """Return the recall of ours per query of the gate."""

        def make() -> list[float]:
            found = []
            for row in self.gate_rows(k):
                which = self.filter_of(selectivity, row, distinct)
                programs = self.ours.programs(None if which is None else [which], 1)
                query = torch.from_numpy(self.data.queries[row : row + 1])
                found.append(self.ours.search(query, probes, k, programs).item_ids[0].numpy())
            return recall(found, self.truth(k, selectivity, distinct))

        key = ("ours", k, probes, selectivity, distinct, implementation)
        answer: list[float] = self.once(key, make)
        return answer

    def peer_recall(
        self, k: int, probes: int, selectivity: float | None, distinct: int
    ) -> list[float]:
        """Return the recall of Faiss IVF per query of the gate."""

        def make() -> list[float]:
            found = []
            for row in self.gate_rows(k):
                which = self.filter_of(selectivity, row, distinct)
                query = self.data.queries[row : row + 1]
                parameters = self.parameters(probes, which)
                found.append(self.peers.ivf.search(query, k, parameters)[1][0])
            return recall(found, self.truth(k, selectivity, distinct))

        answer: list[float] = self.once(("peer", k, probes, selectivity, distinct), make)
        return answer

    def parameters(self, probes: int, which: Filter | None) -> Any:
        """Return search parameters of Faiss with the bitmap of the filter ready."""
        if which is None:
            return self.peers.ivf.parameters(probes)

        def make() -> tuple[Any, NDArray[np.uint8]]:
            bitmap = self.peers.bitmaps.ready(which)
            return self.peers.bitmaps.selector(bitmap), bitmap

        selector, _ = self.once(("bitmap", which), make)
        return self.peers.ivf.parameters(probes, selector)


def batch_programs(
    bench: Bench, selectivity: float | None, batch: int, distinct: int
) -> list[Programs]:
    """Return the programs of consecutive batches; they repeat after these."""
    if selectivity is None:
        return [bench.ours.programs(None, batch)]
    found = filters(selectivity)[:distinct]
    if batch > 1:
        return [bench.ours.programs([found[row % distinct] for row in range(batch)], batch)]
    return [bench.ours.programs([one], 1) for one in found]


def our_call(
    bench: Bench, batch: int, probes: int, k: int, programs: Sequence[Programs]
) -> Callable[[int], Any]:
    """Return the timed call of ours: from a float32 query tensor to sorted scores and ids."""
    queries = torch.from_numpy(bench.data.queries)
    count = NUM_QUERIES // batch
    batches = [queries[bench.data.batch(batch, number)] for number in range(count)]
    ours, variants = bench.ours, len(programs)
    return lambda at: ours.search(batches[at % count], probes, k, programs[at % count % variants])


def same_as_definition(
    bench: Bench, call: Callable[[int], Any], batch: int, probes: int, k: int,
    which: Callable[[int], Filter | None],
) -> list[str]:  # fmt: skip
    """Return what differs from the exact int8 definition on the same probed lists."""
    failures = []
    for number in range(2) if batch == 1 else range(1):
        found = call(number)
        rows = range(bench.data.batch(batch, number).start, bench.data.batch(batch, number).stop)
        for place in sorted({0, len(rows) - 1}):
            query = bench.data.queries[rows[place]]
            one = torch.from_numpy(query[None])
            codes, scales = torch_codes(query)
            clusters = bench.ours.probe(one, codes, scales, probes)[0].tolist()
            expected = np.argsort(-(bench.lists.centroids @ query), kind="stable")[:probes]
            same = len(set(clusters) & set(expected.tolist())) / len(expected)
            if same < _MIN_SAME_CLUSTERS:
                failures.append(f"query {rows[place]}: only {same:.3f} of the probed lists agree")
            chosen = which(rows[place])
            passing = None if chosen is None else bench.data.passing(chosen)
            scores, ids = bench.ours.definition(query, bench.lists, clusters, k, passing)
            got_ids, got_scores = found.item_ids[place].numpy(), found.scores[place].numpy()
            if not np.array_equal(got_ids[: len(ids)], ids) or (got_ids[len(ids) :] != -1).any():
                wrong = int((got_ids[: len(ids)] != ids).sum())
                failures.append(f"query {rows[place]}: {wrong} of {len(ids)} ids differ")
            elif not np.array_equal(got_scores[: len(ids)], scores):
                failures.append(f"query {rows[place]}: scores differ from the definition")
    return failures


def torch_codes(query: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the scale of one query by their definition."""
    scale = np.float32(np.abs(query).max() / np.float32(127))
    codes = np.rint(query / scale).astype(np.int8)
    return torch.from_numpy(codes[None]), torch.tensor([scale])


def scan_case(
    bench: Bench,
    rows: Sequence[str],
    *,
    k: int,
    probes: int,
    batch: int,
    threads: int,
    selectivity: float | None = None,
    implementation: str | None = None,
) -> Case:
    """Return a cell of ours against Faiss IVF SQ8 with the same probes.

    Args:
        bench: data and both indexes.
        rows: the row of ours against Faiss; a second one has Faiss pay for Roaring to bitmap.
        k: results.
        probes: lists per query.
        batch: queries per call.
        threads: of both sides.
        selectivity: of the filters; a batch has one of its own per query.
        implementation: see ``use_implementation``; None is what the run was asked for.
    """
    distinct = batch if batch > 1 else NUM_FILTERS
    ours = our_call(bench, batch, probes, k, batch_programs(bench, selectivity, batch, distinct))

    def which(row: int) -> Filter | None:
        return bench.filter_of(selectivity, row % batch if batch > 1 else row, distinct)

    def gate() -> Gate:
        failures = same_as_definition(bench, ours, batch, probes, k, which)
        mine = bench.our_recall(k, probes, selectivity, distinct, implementation)
        theirs = bench.peer_recall(k, probes, selectivity, distinct)
        if not not_below(mine, theirs):
            failures.append(f"recall {np.mean(mine):.4f} is below {np.mean(theirs):.4f}")
        return Gate(tuple(failures), float(np.mean(mine)), float(np.mean(theirs)))

    peers: dict[str, Mapping[str, Call]] = {
        rows[0]: _faiss_calls(bench, k, probes, batch, threads, which)
    }
    if len(rows) > 1:
        peers[rows[1]] = roaring_calls(bench, k, probes, threads, which)
    share = "" if selectivity is None else f"/share={selectivity}"
    return Case(
        name=f"{bench.label}/probes={probes}/k={k}{share}/batch={batch}/threads={threads}",
        threads=threads,
        ours=ours,
        gate=gate,
        peers=peers,
        absolute={},
        implementation=implementation,
    )


def _faiss_calls(
    bench: Bench, k: int, probes: int, batch: int, threads: int,
    which: Callable[[int], Filter | None],
) -> dict[str, FaissCall]:  # fmt: skip
    """Return a call per parallel mode of Faiss; with filters a batch is a loop."""
    ivf, data, count = bench.peers.ivf, bench.data, NUM_QUERIES // batch
    batches = [data.queries[data.batch(batch, number)] for number in range(count)]
    if batch > 1 and which(0) is not None:
        own = [bench.parameters(probes, which(row)) for row in range(batch)]

        def loop(mode: int) -> FaissCall:
            return lambda at: ivf.search_each(batches[at % count], k, own, mode)

        calls = {f"loop, mode {mode}": loop(mode) for mode in modes(threads)}
        if threads > 1:
            pool = ThreadedLoop(ivf, threads)
            calls["loop on a pool"] = lambda at: pool(batches[at % count], k, own)
        return calls
    given = [bench.parameters(probes, which(row)) for row in range(NUM_FILTERS)]

    def whole(mode: int) -> FaissCall:
        return lambda at: ivf.search(batches[at % count], k, given[at % count % NUM_FILTERS], mode)

    return {f"mode {mode}": whole(mode) for mode in modes(threads)}


def roaring_calls(
    bench: Bench, k: int, probes: int, threads: int, which: Callable[[int], Filter | None]
) -> dict[str, FaissCall]:
    """Return calls of single queries in which Faiss pays for its bitmap."""
    peers, queries = bench.peers, bench.data.queries

    def in_mode(mode: int) -> FaissCall:
        def call(at: int) -> Found:
            row = at % NUM_QUERIES
            chosen = which(row)
            assert chosen is not None
            bitmap = peers.bitmaps.from_roaring(chosen)
            parameters = peers.ivf.parameters(probes, peers.bitmaps.selector(bitmap))
            return peers.ivf.search(queries[row : row + 1], k, parameters, mode)

        return call

    return {f"mode {mode}": in_mode(mode) for mode in modes(threads)}


def selective_cases(bench: Bench, *, k: int, probes: int, threads: int) -> list[Case]:
    """Return the 1 % filter by the plan that reads every list, against two settings of Faiss.

    Args:
        bench: data and both indexes.
        k: results.
        probes: of Faiss in the first row; the second takes as many as equal recall needs.
        threads: of both sides.
    """
    selectivity, every = 0.01, bench.lists.count
    ours = our_call(bench, 1, every, k, batch_programs(bench, selectivity, 1, NUM_FILTERS))

    def which(row: int) -> Filter | None:
        return bench.filter_of(selectivity, row, NUM_FILTERS)

    def recall_at(count: int) -> float:
        return float(np.mean(bench.peer_recall(k, count, selectivity, NUM_FILTERS)))

    def mine() -> float:
        return float(np.mean(bench.our_recall(k, every, selectivity, NUM_FILTERS)))

    def needed() -> int:
        """Return the fewest probes with which Faiss reaches our recall; all lists if none do."""
        steps = sorted({max(1, every * part // 32) for part in range(1, 33)})
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if recall_at(steps[middle]) >= mine() else (middle + 1, high)
        return steps[low]

    def case(row: str, count: Callable[[], int], note: str) -> Case:
        calls: dict[str, FaissCall] = {}

        def gate() -> Gate:
            failures = same_as_definition(bench, ours, 1, every, k, which)
            calls.update(_faiss_calls(bench, k, count(), 1, threads, which))
            if mine() < _MIN_SELECTIVE_RECALL:
                failures.append(f"recall {mine():.4f} is below {_MIN_SELECTIVE_RECALL}")
            return Gate(tuple(failures), mine(), recall_at(count()), f"{count()} probes of Faiss")

        # The probes are known only after the gate, which runs first.
        def in_mode(mode: int) -> FaissCall:
            return lambda at: calls[f"mode {mode}"](at)

        return Case(
            name=f"{bench.label}/plan=all/k={k}/share={selectivity}/{note}/threads={threads}",
            threads=threads,
            ours=ours,
            gate=gate,
            peers={row: {f"mode {mode}": in_mode(mode) for mode in modes(threads)}},
            absolute={},
        )

    found = case("selective", lambda: probes, f"peer probes={probes}")
    equal = case("selective_equal", lambda: bench.once(("needed", k), needed), "equal recall")
    return [found, equal]


def hnsw_case(bench: Bench, *, k: int, target: float, refined: bool) -> Case:
    """Return a cell against Faiss HNSW, each side as narrow as a recall allows.

    Args:
        bench: data and both indexes.
        k: results.
        target: recall that both must reach: ours with the fewest probes of a ladder, HNSW with the
            narrowest beam of a ladder.
        refined: ours keeps 1.5 k candidates and scores them again from the fp16 cache.
    """
    queries = torch.from_numpy(bench.data.queries)
    programs = bench.ours.programs(None, 1)
    every = bench.lists.count
    ladder = sorted({min(every, round(1.4**step)) for step in range(40)})
    probes: list[int] = []
    width: list[Any] = []

    def ids(row: int, count: int) -> NDArray[np.int64]:
        query = queries[row : row + 1]
        if refined:
            found = bench.ours.search_refined(query, count, k, k + k // 2, programs)[1]
        else:
            found = bench.ours.search(query, count, k, programs).item_ids
        return found[0].numpy()

    def our_recall(count: int) -> float:
        found = [ids(row, count) for row in bench.gate_rows(k)]
        return float(np.mean(recall(found, bench.truth(k, None, 1))))

    def graph_recall(beam: int) -> float:
        def make() -> float:
            rows = bench.gate_rows(k)
            given = bench.peers.hnsw.parameters(beam)
            found = bench.peers.hnsw.search(bench.data.queries[rows.start : rows.stop], k, given)
            return float(np.mean(recall(list(found[1]), bench.truth(k, None, 1))))

        return float(bench.once(("hnsw", k, beam), make))

    def gate() -> Gate:
        low, high = 0, len(ladder) - 1
        while low < high:
            middle = (low + high) // 2
            enough = our_recall(ladder[middle]) >= target
            low, high = (low, middle) if enough else (middle + 1, high)
        mine = our_recall(ladder[low])
        beams = [beam for beam in HNSW_WIDTHS if beam >= k] or [2 * k]
        beam = next((one for one in beams if graph_recall(one) >= target), beams[-1])
        probes[:] = [ladder[low]]
        width[:] = [bench.peers.hnsw.parameters(beam)]
        failures = [] if mine >= target else [f"recall {mine:.4f} with all lists"]
        if len(set(ids(0, ladder[low]).tolist())) != k:
            failures.append("ids are missing or come twice")
        note = f"{ladder[low]} probes, efSearch {beam}"
        if graph_recall(beam) < target:
            note += ", its widest: it does not reach this recall"
        return Gate(tuple(failures), mine, graph_recall(beam), note)

    def ours(at: int) -> NDArray[np.int64]:
        return ids(at % NUM_QUERIES, probes[0])

    def beam_search(at: int) -> Found:
        row = at % NUM_QUERIES
        return bench.peers.hnsw.search(bench.data.queries[row : row + 1], k, width[0])

    how = "refined" if refined else "scan"
    return Case(
        name=f"{bench.label}/recall={target}/k={k}/{how}/batch=1/threads=1",
        threads=1,
        ours=ours,
        gate=gate,
        peers={"hnsw": {"beam": beam_search}},
        absolute={},
    )
