"""Measures the CUDA operators: ceilings first, correctness gate, cases, goals.

Usage: ``python -P benchmarks/gpu.py --part 1|2|3``, each under ten minutes on an H100 or H200. Part
1 holds ceilings and the core cases over 10 M items, part 2 selection, filters, Bloom planes and the
paper's cell over 20 M, part 3 80 M items and the whole pipeline. Every case is a CUDA graph that is
replayed over rotated query sets. Each run appends JSON lines to ``benchmarks/results/<gpu>.jsonl``
and prints the goals last. ``--tiny`` runs every case once over a few hundred items, on the CPU with
``TRITON_INTERPRET=1`` too, measures nothing and records nothing.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from silvershard.kernels import FilterOp
from silvershard.kernels.coarse_probe_triton import coarse_probe_triton
from silvershard.kernels.eligibility_triton import count_eligible_triton, eligibility_triton
from silvershard.kernels.gather_linear_triton import gather_linear_triton
from silvershard.kernels.ivf_scan import ivf_scan_reference
from silvershard.kernels.ivf_scan_triton import ivf_scan_triton
from silvershard.kernels.quantize_triton import quantize_rows_triton
from silvershard.kernels.refine_triton import refine_triton
from silvershard.kernels.select_topk_triton import select_topk_triton
from silvershard.kernels.value_program_triton import value_program_triton

ROOT = Path(__file__).resolve().parent.parent
PAGE_SIZE = 128
NUM_SETS = 4
# Planes after the live one: three that this share of the slots has, then Bloom planes.
SHARES = (0.5, 0.1, 0.01)
NUM_BLOOM = 40
Rows = list[list[int]]


@dataclass(frozen=True)
class Goal:
    """A number to reach; ``key`` names the figure that measures it."""

    name: str
    what: str
    key: str
    must: float
    stretch: float
    at_most: bool = False


GOALS = (
    Goal("G1", "dp4a scan at B 16, share of copy", "scan_share_b16", 0.80, 0.90),
    Goal("G2", "ANN stage B 1, us", "core_b1_us", 60, 35, at_most=True),
    Goal("G3", "ANN stage B 1024, M queries/s", "core_b1024_mqps", 1.2, 2.5),
    Goal("G4", "cluster-major over query-major, B 1024", "sharing_gain", 4, 8),
    Goal("G5", "over Meta's operators and torch.topk, B 1", "over_meta", 8, 12),
    Goal("G6", "over cuVS, k 2048, B 16", "over_cuvs_k2048", 2, 3),
    Goal("G7", "over cuVS, k 100, B 16", "over_cuvs_k100", 1.2, 2),
    Goal("G8", "paper's cell over cuVS float32", "over_cuvs_paper", 5, 15),
    Goal("G9", "select n 625 k, k 100 k, B 64 over torch.topk", "select_gain", 4, 10),
    Goal("G10", "80 M, B 64, k 100 k, ms", "large_k_ms", 2.0, 1.2, at_most=True),
    Goal("G11", "time at k 100 k over time at k 2048", "k_scaling", 1.5, 1.2, at_most=True),
    Goal("G12", "Bloom full scan, 8 terms, share of copy", "bloom_share", 0.70, 0.85),
    Goal("G13", "Bloom over a CPU inverted index", "over_cpu_index", 300, 525),
    Goal("G14", "full mask over probed mask, filter stage", "probe_filter_gain", 30, 100),
    Goal("G15", "unfiltered over 10 % filtered, B 16", "filter_gain", 2.5, 4),
    Goal("G16", "first rerank layer of 100 k candidates, us", "rerank_us", 52, 35, at_most=True),
    Goal("G17", "kernel launches of the ANN stage", "launches", 12, 8, at_most=True),
    Goal("G18", "answers unequal to the reference", "wrong", 0, 0, at_most=True),
    Goal("G19", "scratch at B 1024, k 2048, GB", "scratch_gb", 0.5, 0.4, at_most=True),
)


@dataclass
class Data:
    """A paged index over generated items; clusters are those that the items came from."""

    centroids: tuple[Tensor, Tensor, Tensor]
    page_table: Tensor
    pool: tuple[Tensor, Tensor, Tensor]
    filters: tuple[Tensor, Tensor, Tensor]
    cache: Tensor
    num_items: int

    @property
    def num_clusters(self) -> int:
        return self.page_table.shape[0]

    @property
    def dim(self) -> int:
        return self.cache.shape[2]


def make_data(num_items: int, num_clusters: int, dim: int, device: torch.device) -> Data:
    """A Gaussian mixture, cluster sizes lognormal; the live bits of a cluster's last page end."""
    generator = torch.Generator(device=device).manual_seed(num_items + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weights = torch.exp(0.5 * normal(num_clusters))
    sizes = (weights / weights.sum() * num_items).long().clamp_min(1)
    pages_of = (sizes + PAGE_SIZE - 1) // PAGE_SIZE
    ends = pages_of.cumsum(0)
    num_pages, width = int(ends[-1]), int(pages_of.max())
    offset = torch.arange(width, device=device)
    page_table = torch.where(
        offset < pages_of[:, None], (ends - pages_of)[:, None] + offset, -1
    ).int()
    cluster_of = torch.repeat_interleave(
        torch.arange(num_clusters, device=device), pages_of, output_size=num_pages
    )
    rank = torch.arange(num_pages, device=device) - (ends - pages_of)[cluster_of]
    alive = (sizes[cluster_of] - rank * PAGE_SIZE)[:, None] > torch.arange(PAGE_SIZE, device=device)
    centers = normal(num_clusters, dim)
    codes = torch.empty((num_pages, PAGE_SIZE, dim), dtype=torch.int8, device=device)
    scales = torch.empty((num_pages, PAGE_SIZE), device=device)
    cache = torch.empty((num_pages, PAGE_SIZE, dim), dtype=torch.float16, device=device)
    planes = torch.empty(
        (1 + len(SHARES) + NUM_BLOOM, num_pages, PAGE_SIZE // 64), dtype=torch.int64, device=device
    )
    bit = 1 << torch.arange(64, device=device)
    step = 4096
    for start in range(0, num_pages, step):
        part = slice(start, start + step)
        vectors = centers[cluster_of[part], None] + 0.7 * normal(*cache[part].shape)
        cache[part] = vectors.half()
        found, found_scales = quantize_rows_triton(cache[part].float().view(-1, dim))
        codes[part], scales[part] = found.view_as(codes[part]), found_scales.view_as(scales[part])
        for plane, share in enumerate((1.0, *SHARES, *[0.5] * NUM_BLOOM)):
            bits = torch.rand(alive[part].shape, generator=generator, device=device) < share
            bits &= alive[part]
            planes[plane, part] = (bits.view(-1, PAGE_SIZE // 64, 64) * bit).sum(-1)
    shape = (num_pages, PAGE_SIZE)
    return Data(
        centroids=(centers, *quantize_rows_triton(centers)),
        page_table=page_table,
        pool=(codes, scales, torch.arange(scales.numel(), device=device).view(shape)),
        filters=(
            planes,
            torch.empty((0, *shape), dtype=torch.int64, device=device),
            torch.empty((*shape, 0), dtype=torch.int64, device=device),
        ),
        cache=cache,
        num_items=int(alive.sum()),
    )


def make_queries(data: Data, num_queries: int, *, skewed: bool = True) -> list[Tensor]:
    """Query sets near clusters that are drawn with Zipf weights, or evenly."""
    device = data.cache.device
    generator = torch.Generator(device=device).manual_seed(num_queries)
    ranks = torch.arange(1, data.num_clusters + 1, device=device, dtype=torch.float32)
    weights = 1.0 / ranks if skewed else torch.ones_like(ranks)
    sets = []
    for _ in range(NUM_SETS):
        chosen = torch.multinomial(weights, num_queries, replacement=True, generator=generator)
        noise = torch.randn((num_queries, data.dim), generator=generator, device=device)
        sets.append(data.centroids[0][chosen] + 0.7 * noise)
    return sets


def program_of(rows: Rows, num_queries: int, device: torch.device) -> Tensor:
    """The same program for every query: ``(Q, L, 4)``."""
    table = torch.tensor(rows, dtype=torch.int64).view(1, len(rows), 4).to(device)
    return table.repeat(num_queries, 1, 1)


def share_rows(share: float) -> Rows:
    """A filter that this share of the items passes."""
    return [[FilterOp.PLANE, 1 + SHARES.index(share), 0, 0]] if share < 1 else []


def bloom_rows(num_terms: int) -> Rows:
    """The conjunction of terms of five Bloom planes each."""
    rows: Rows = []
    for number in range(5 * num_terms):
        rows.append([FilterOp.PLANE, 1 + len(SHARES) + number, 0, 0])
        rows.extend([[FilterOp.AND, 0, 0, 0]] if number else [])
    return rows


def ann_stage(
    data: Data, num_queries: int, probes: int, k: int, rows: Rows
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Quantise, probe, filter, scan and select: the function that is measured."""
    device = data.cache.device
    program = program_of(rows, num_queries, device)
    verify = program_of([], num_queries, device)
    excluded = torch.empty((num_queries, 0), dtype=torch.int64, device=device)

    def run(query: Tensor) -> tuple[Tensor, ...]:
        codes, scales = quantize_rows_triton(query)
        clusters = coarse_probe_triton(query, codes, scales, *data.centroids, probes)
        return ivf_scan_triton(
            codes,
            scales,
            clusters,
            data.page_table,
            *data.pool,
            *data.filters,
            program,
            verify,
            excluded,
            k,
        )

    return run


@dataclass
class Session:
    """What a run measures with, and what it has found."""

    device: torch.device
    tiny: bool
    deadline: float
    lines: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def size(self, count: int) -> int:
        """A size, or a small one that stands for it in a tiny run."""
        return min(count, 3 + count % 5) if self.tiny else count

    def some(self, cases: tuple[Any, ...]) -> tuple[Any, ...]:
        """The cases, or the first and the last of them in a tiny run."""
        return cases[:: max(1, len(cases) - 1)] if self.tiny else cases

    def measure(
        self, case: str, run: Callable[..., Any], sets: list[Any], **shown: Any
    ) -> dict[str, float]:
        """Time a function over query sets and keep the line; nothing after the deadline."""
        if time.monotonic() > self.deadline:
            self.lines.append({"case": case, "skipped": "out of time", **shown})
            return {}
        if self.device.type != "cuda":
            for one in sets[:1]:
                run(one)
            numbers: dict[str, float] = {}
        else:
            numbers = replayed(run, sets)
        self.lines.append({"case": case, **shown, **numbers})
        print(case, shown, {name: round(value, 4) for name, value in numbers.items()}, flush=True)
        return numbers

    def keep(self, key: str, value: Callable[[], float]) -> None:
        """Keep a figure if all that it needs was measured."""
        try:
            self.figures[key] = value()
        except (KeyError, ZeroDivisionError):
            return


def replayed(run: Callable[..., Any], sets: list[Any], replays: int = 200) -> dict[str, float]:
    """Milliseconds of graph replays, launches and scratch of one call."""
    run(sets[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    kept = run(sets[0])
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kept = run(sets[0])
        torch.cuda.synchronize()
    events = profile.key_averages()
    launches = sum(event.count for event in events if "Memset" not in event.key)
    scan_us = sum(event.device_time_total for event in events if event.key == "_scan_kernel")
    graphs = []
    for one in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run(one)
        graphs.append(graph)
    times = []
    for turn in range(replays + 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graphs[turn % len(graphs)].replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del kept, graphs
    torch.cuda.empty_cache()
    times = sorted(times[20:])
    return {
        "p50_ms": statistics.median(times),
        "p99_ms": times[math.ceil(0.99 * len(times)) - 1],
        "launches": float(launches),
        "scratch_gb": scratch / 1e9,
        "scan_ms": scan_us / 1e3,
    }


def times_faster(slow: dict[str, float], fast: dict[str, float]) -> float:
    """The ratio of two medians."""
    return slow["p50_ms"] / fast["p50_ms"]


def copy_share(
    session: Session, needed_bytes: float, numbers: dict[str, float], name: str
) -> float:
    """The rate at which bytes that had to be read were read, over that of a copy."""
    return needed_bytes / (numbers[name] * 1e9 * session.figures["copy_tbps"])


def ceilings(session: Session) -> None:
    """What the device can do at best, measured with torch."""
    count = session.size(1 << 29)
    source = torch.zeros(count, dtype=torch.int64, device=session.device)
    target = torch.empty_like(source)
    copied = session.measure("ceiling/copy", target.copy_, [source], bytes=16 * count)
    session.keep("copy_tbps", lambda: 16e-9 * count / copied["p50_ms"])
    session.measure("ceiling/read", torch.sum, [source], bytes=8 * count)
    side = 64 if session.tiny else 8192
    codes = torch.ones((side, side), dtype=torch.int8, device=session.device)
    halves = codes.to(torch.bfloat16)
    session.measure("ceiling/int8", lambda a: torch._int_mm(a, a.T), [codes], ops=2 * side**3)
    session.measure("ceiling/bf16", lambda a: a @ a.T, [halves], ops=2 * side**3)

    def nodes(x: Tensor) -> None:
        for _ in range(2 if session.tiny else 200):
            x.add_(1)

    session.measure("ceiling/200 nodes", nodes, [torch.zeros(1, device=session.device)])


def gate(session: Session, data: Data) -> None:
    """Compare answers with the reference on the same probes; a wrong one ends the run."""
    wrong = 0
    for rows in ([], share_rows(0.1)):
        for k in (100, session.size(2048)):
            query = make_queries(data, 2)[0]
            stage = ann_stage(data, 2, session.size(64), k, rows)
            codes, scales = quantize_rows_triton(query)
            clusters = coarse_probe_triton(query, codes, scales, *data.centroids, session.size(64))
            program = program_of(rows, 2, session.device)
            nothing = torch.empty((2, 0), dtype=torch.int64, device=session.device)
            expected = ivf_scan_reference(
                codes,
                scales,
                clusters,
                data.page_table,
                *data.pool,
                *data.filters,
                program,
                program_of([], 2, session.device),
                nothing,
                k,
            )
            for _ in range(2):
                got = stage(query)
                wrong += sum(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    session.figures["wrong"] = wrong
    if wrong:
        raise SystemExit(f"gate: {wrong} answers differ from the reference, nothing is measured")


def recall(data: Data, queries: Tensor, item_ids: Tensor) -> float:
    """Share of the exact best items, by products with the float16 rows, that were found."""
    k = item_ids.shape[1]
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    ids = torch.full((len(queries), k), -1, device=queries.device)
    bit = torch.arange(64, device=queries.device)
    step = max(1, (1 << 26) // (len(queries) * PAGE_SIZE))
    for start in range(0, data.cache.shape[0], step):
        rows = data.cache[start : start + step].flatten(0, 1)
        scores = queries @ rows.float().T
        live = (data.filters[0][0, start : start + step, :, None] >> bit) & 1
        scores.masked_fill_(live.flatten() == 0, -torch.inf)
        place = torch.arange(len(rows), device=queries.device) + start * PAGE_SIZE
        both = torch.cat((best, scores), dim=1)
        names = torch.cat((ids, place.expand(len(queries), -1)), dim=1)
        best, order = both.topk(k, dim=1)
        ids = names.gather(1, order)
    found = [
        torch.isin(mine, other).float().mean() for mine, other in zip(ids, item_ids, strict=True)
    ]
    return float(torch.stack(found).mean())


def core(session: Session, data: Data) -> None:
    """Batch sizes and list lengths over 10 M items."""
    figures: dict[tuple[int, int], dict[str, float]] = {}
    probes = session.size(64)
    for batch in session.some((1, 16, 64, 128, 512, 1024)):
        sets = make_queries(data, session.size(batch))
        for k in session.some((100, 2048)):
            stage = ann_stage(data, len(sets[0]), probes, session.size(k), [])
            shown = {"B": batch, "k": k, "P": 64, "D": data.dim, "N": data.num_items}
            figures[batch, k] = session.measure(f"core/B{batch}/k{k}", stage, sets, **shown)
            probed = float(stage(sets[0])[3].sum()) * data.dim
            session.lines[-1]["item_bytes"] = probed
            if batch == 16 and k == 100:
                session.keep(
                    "scan_share_b16",
                    partial(copy_share, session, probed, figures[16, 100], "scan_ms"),
                )
    sets = make_queries(data, session.size(256))
    found = ann_stage(data, len(sets[0]), probes, session.size(100), [])(sets[0])[1]
    session.lines.append({"case": "core/recall", "k": 100, "recall": recall(data, sets[0], found)})
    session.keep("core_b1_us", lambda: 1e3 * figures[1, 2048]["p50_ms"])
    session.keep("core_b1024_mqps", lambda: 1.024 / figures[1024, 2048]["p50_ms"])
    session.keep("launches", lambda: figures[1, 2048]["launches"])
    session.keep("scratch_gb", lambda: figures[1024, 2048]["scratch_gb"])
    from silvershard.kernels import cluster_scan_triton

    least, sets = cluster_scan_triton.LEAST_SHARING, make_queries(data, session.size(1024))
    cluster_scan_triton.LEAST_SHARING = 1 << 30
    stage = ann_stage(data, len(sets[0]), probes, session.size(2048), [])
    alone = session.measure("core/B1024/k2048/query-major", stage, sets)
    cluster_scan_triton.LEAST_SHARING = least
    session.keep("sharing_gain", lambda: alone["p50_ms"] / figures[1024, 2048]["p50_ms"])


def selection(session: Session) -> None:
    """Selection alone beside torch.topk."""
    for batch in session.some((1, 64, 1024)):
        for num_candidates in session.some((156_250, 625_000)):
            if batch * num_candidates > 1 << 28:
                continue
            shape = (session.size(batch), session.size(num_candidates))
            sets = [torch.randn(shape, device=session.device) for _ in range(2)]
            ids = torch.arange(shape[1], device=session.device).expand(shape)
            for k in session.some((2048, 100_000)):
                kept = min(session.size(k), shape[1])
                name = f"select/B{batch}/n{num_candidates}/k{k}"
                ours = session.measure(
                    name, lambda x, ids=ids, kept=kept: select_topk_triton(x, ids, kept), sets
                )
                peer = session.measure(
                    name + "/torch.topk",
                    lambda x, kept=kept: torch.topk(x, kept, dim=1, sorted=False),
                    sets,
                )
                if (batch, num_candidates, k) == (64, 625_000, 100_000):
                    session.keep("select_gain", partial(times_faster, peer, ours))


def filtered(session: Session, data: Data, label: str) -> None:
    """Selectivity, and the filter stage over probed pages beside a mask of all pages."""
    times: dict[tuple[int, float], dict[str, float]] = {}
    probes = session.size(64)
    for batch in session.some((1, 16, 128)):
        sets = make_queries(data, session.size(batch))
        for share in session.some((1.0, *SHARES)):
            rows = share_rows(share)
            stage = ann_stage(data, len(sets[0]), probes, session.size(2048), rows)
            times[batch, share] = session.measure(f"filter/{label}/B{batch}/f{share}", stage, sets)
    session.keep("filter_gain", lambda: times[16, 1.0]["p50_ms"] / times[16, 0.1]["p50_ms"])
    num_queries = session.size(16)
    program = program_of(bloom_rows(4), num_queries, session.device)
    excluded = torch.empty((num_queries, 0), dtype=torch.int64, device=session.device)
    width = data.page_table.shape[1]
    probed = torch.randint(0, data.num_clusters, (num_queries, probes), device=session.device)
    pages = data.page_table[probed].view(num_queries, probes * width)
    every = torch.arange(data.cache.shape[0], dtype=torch.int32, device=session.device)

    def masked(pages: Tensor) -> Tensor:
        return eligibility_triton(*data.filters, program, pages, excluded)

    few = session.measure(f"filter/{label}/probed mask", masked, [pages])
    full = session.measure(f"filter/{label}/full mask", masked, [every.repeat(num_queries, 1)])
    session.keep("probe_filter_gain", lambda: full["p50_ms"] / few["p50_ms"])


def bloom(session: Session, data: Data, label: str) -> None:
    """Counts over all pages with one, four and eight terms of five planes."""
    for batch in session.some((1, 16)):
        for num_terms in session.some((1, 4, 8)):
            program = program_of(bloom_rows(num_terms), session.size(batch), session.device)
            needed = session.size(batch) * (5 * num_terms + 1) * data.cache.shape[0] * PAGE_SIZE / 8
            numbers = session.measure(
                f"bloom/{label}/B{batch}/terms{num_terms}",
                lambda program: count_eligible_triton(*data.filters, program),
                [program],
                bytes=needed,
            )
            if (batch, num_terms) == (1, 8):
                session.keep("bloom_share", partial(copy_share, session, needed, numbers, "p50_ms"))


def paper(session: Session, data: Data) -> None:
    """The paper's cell: batch 16, k 2048, the recall curve over probes."""
    sets = make_queries(data, session.size(16))
    for probes in session.some((8, 16, 32, 64, 128, 256)):
        for k in session.some((2048, 4096)):
            stage = ann_stage(data, len(sets[0]), session.size(probes), session.size(k), [])
            session.measure(f"paper/P{probes}/k{k}", stage, sets)
            session.lines[-1]["recall"] = recall(data, sets[0], stage(sets[0])[1])


def large(session: Session, data: Data) -> None:
    """80 M items: batch sizes and large k."""
    times: dict[tuple[int, int], dict[str, float]] = {}
    for batch in session.some((1, 16, 64, 256)):
        sets = make_queries(data, session.size(batch))
        for k in session.some((2048, 16_384, 100_000, 300_000)):
            if batch == 256 and k > 2048:
                continue
            stage = ann_stage(data, len(sets[0]), session.size(64), session.size(k), [])
            times[batch, k] = session.measure(f"large/B{batch}/k{k}", stage, sets)
    session.keep("large_k_ms", lambda: times[64, 100_000]["p50_ms"])
    session.keep("k_scaling", lambda: times[64, 100_000]["p50_ms"] / times[64, 2048]["p50_ms"])


def pipeline(session: Session, data: Data) -> None:
    """Probe to value: refine, the first layer of an MLP, two dense layers, a value formula."""
    outputs = session.size(256)
    program = torch.tensor([[[1, 0], [1, 1], [3, 0]]], dtype=torch.int32)
    for batch in session.some((1, 8, 32)):
        sets = make_queries(data, session.size(batch))
        num_queries = len(sets[0])
        for k in session.some((10_000, 100_000)):
            kept = session.size(k)
            stage = ann_stage(data, num_queries, session.size(64), kept, [])
            weight = torch.randn((num_queries, data.dim, outputs), device=session.device)
            bias = torch.randn((num_queries, outputs), device=session.device)
            inner = torch.randn((outputs, 64), device=session.device).to(torch.bfloat16)
            last = torch.randn((64, 3), device=session.device).to(torch.bfloat16)
            request = torch.arange(num_queries, device=session.device).repeat_interleave(
                kept, output_size=num_queries * kept
            )
            formulas = program.to(session.device).repeat(num_queries, 1, 1)
            constants = torch.zeros((num_queries, 3), device=session.device)

            def ranked(
                slots: Tensor,
                weight: Tensor = weight,
                bias: Tensor = bias,
                inner: Tensor = inner,
                last: Tensor = last,
            ) -> Tensor:
                hidden = gather_linear_triton(data.cache, slots, weight, bias).relu()
                return ((hidden.to(torch.bfloat16) @ inner).relu() @ last).float()

            def whole(
                query: Tensor,
                stage: Callable[[Tensor], tuple[Tensor, ...]] = stage,
                ranked: Callable[[Tensor], Tensor] = ranked,
                tail: tuple[Tensor, Tensor, Tensor] = (request, formulas, constants),
            ) -> Tensor:
                slots = stage(query)[2]
                exact = refine_triton(query[:, None], data.cache, slots)
                tasks = ranked(slots)
                tasks[:, :, 0] += exact[:, :, 0]
                return value_program_triton(tasks.view(-1, 3), *tail)

            name = f"pipeline/B{batch}/k{k}"
            session.measure(name, whole, sets)
            slots = [stage(query)[2] for query in sets]
            numbers = session.measure(name + "/rerank", ranked, slots)
            if (batch, k) == (1, 100_000):
                session.keep("rerank_us", partial(times_faster, numbers, {"p50_ms": 1e-3}))


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    import triton  # type: ignore[import-untyped]

    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none",
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "unix_s": int(time.time()),
    }


def run_part(session: Session, number: int) -> None:
    """The steps of one part."""

    def data(num_items: int, num_clusters: int, dim: int) -> Data:
        if session.tiny:
            return make_data(500, 3, 32, session.device)
        return make_data(num_items, num_clusters, dim, session.device)

    ceilings(session)
    if number == 1:
        items = data(10_000_000, 4096, 64)
        gate(session, items)
        core(session, items)
    elif number == 2:
        items = data(10_000_000, 4096, 64)
        gate(session, items)
        selection(session)
        filtered(session, items, "10M")
        bloom(session, items, "10M")
        del items
        paper(session, data(20_000_000, 4096, 128))
    else:
        items = data(80_000_000, 16_384, 128)
        gate(session, items)
        bloom(session, items, "80M")
        filtered(session, items, "80M")
        large(session, items)
        pipeline(session, items)


def main() -> int:
    """Run one part, record its lines and print the goals that it measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--tiny", action="store_true", help="every case once at toy size")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for the whole part")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        print("no CUDA device: only --tiny runs here", file=sys.stderr)
        return 1
    session = Session(device, given.tiny, time.monotonic() + given.budget_s)
    run_part(session, given.part)
    about = machine(device)
    for goal in GOALS:
        value = session.figures.get(goal.key)
        reached = "-"
        if value is not None:
            held = value <= goal.must if goal.at_most else value >= goal.must
            stretched = value <= goal.stretch if goal.at_most else value >= goal.stretch
            reached = "stretch" if stretched else "must" if held else "missed"
        sign = "<=" if goal.at_most else ">="
        shown = "not measured" if value is None else f"{value:.3f}"
        print(
            f"{goal.name:4} {goal.what:48} {shown:>14} {sign} {goal.must}/{goal.stretch} {reached}"
        )
        if value is not None:
            line = {"goal": goal.name, "measured": value, "must": goal.must}
            session.lines.append({**line, "stretch": goal.stretch, "reached": reached})
    if not given.tiny:
        name = "".join(one if one.isalnum() else "-" for one in about["gpu"].lower())
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        with (results / f"{name}.jsonl").open("a") as file:
            for line in session.lines:
                file.write(json.dumps({**line, "part": given.part, **about}) + "\n")
    print(json.dumps({"machine": about, "part": given.part, "figures": session.figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
