"""Measures semantic-ID generation beside scoring every item with the same decoder.

Usage: ``python -P benchmarks/semantic.py [--quick] [--items N] [--rounds N] [--threads N]``. The
decoder is trained on users near an item of the mixture; the queries are other points of it. A cell
prints no number before the tests hold and its answers equal the exhaustive ones bit for bit. Each
run appends one JSON line to ``benchmarks/results/<machine>.jsonl``; the last line printed is one
JSON object.
"""

import argparse
import json
import statistics
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.mixture import DataSet, data_set, filters, progress  # noqa: E402
from benchmarks.quiet import Guard, busy_cores, interleave  # noqa: E402
from benchmarks.run import machine, passes  # noqa: E402
from silvershard.kernels import pack_bits, select_topk  # noqa: E402
from silvershard.model.semantic_codebooks import fit_codebooks  # noqa: E402
from silvershard.model.semantic_config import (  # noqa: E402
    SemanticConfig,
    SemanticTrainingConfig,
)
from silvershard.model.semantic_ids import SemanticDecoder, encode_items  # noqa: E402
from silvershard.model.semantic_search import Generated, generate  # noqa: E402
from silvershard.model.semantic_training import train_decoder  # noqa: E402
from silvershard.model.semantic_trie import CodeTrie  # noqa: E402

DIM = 64
PAGE_SLOTS = 64
NOISE = 0.08
"""Standard deviation of each element of a user state around its item, before it gets length 1."""
SHARES = (1.0, 0.01)
RESULTS = (100, 1000)
BATCHES = (1, 16)
NUM_QUERIES = 64
GATE_QUERIES = 3
GATES = tuple(
    f"tests/model/test_semantic_{part}.py"
    for part in ("ids", "trie", "search", "codebooks", "training")
)


@dataclass(frozen=True)
class Line:
    """What was measured in one cell."""

    share: float
    """Of the items that the filter lets through."""
    results: int
    batch: int
    ms_per_query: float
    """Median over the rounds."""
    p20_ms: float
    p80_ms: float
    exhaustive_ms: float
    """The same answers by scoring every item."""
    expanded: float
    """Mean prefixes expanded per query."""
    disturbed: int
    """Samples that no quiet moment was found for."""


class Catalogue(NamedTuple):
    """Items with codes in the slots of an index, and the decoder over them."""

    decoder: SemanticDecoder
    trie: CodeTrie
    states: Tensor
    """``(NUM_QUERIES, Us)`` float32."""
    context: Tensor
    """``(NUM_QUERIES, E)`` float32, what the decoder reads of them."""
    item_slots: Tensor
    """``(n,)`` int64."""
    num_pages: int

    def eligible(self, data: DataSet, share: float) -> Tensor:
        """Return which slots each query may be given, ``(NUM_QUERIES, N, W)``."""
        flags = torch.zeros(self.num_pages * PAGE_SLOTS, dtype=torch.bool)
        if share == 1.0:
            flags[self.item_slots] = True
            return pack_bits(flags.view(1, -1, PAGE_SLOTS)).expand(NUM_QUERIES, -1, -1).contiguous()
        found = []
        for query in range(NUM_QUERIES):
            which = filters(share)[query % len(filters(share))]
            flags[self.item_slots] = torch.from_numpy(data.passing(which))
            found.append(pack_bits(flags.view(-1, PAGE_SLOTS)))
        return torch.stack(found)


def make_catalogue(data: DataSet, config: SemanticConfig, steps: int) -> Catalogue:
    """Return the items with the codes and the decoder that were trained for them."""
    generator = torch.Generator().manual_seed(0)
    items = torch.from_numpy(data.vectors.copy())
    progress(f"codebooks of {len(items)} items")
    codes = encode_items(items, fit_codebooks(items, config, seed=0))
    progress(f"{len(codes.unique(dim=0))} distinct codes; training the decoder, {steps} steps")
    wanted = torch.randint(len(items), (200 * steps,), generator=generator)
    noise = NOISE * torch.randn(len(wanted), DIM, generator=generator)
    states = torch.nn.functional.normalize(items[wanted] + noise, dim=1)
    trained = train_decoder(
        config,
        states,
        codes[wanted].long(),
        SemanticTrainingConfig(steps=steps),
        progress=False,
    )
    progress(f"cross-entropy per code from {trained.losses[0]:.2f} to {trained.losses[-1]:.2f}")
    num_pages = -(-len(items) // PAGE_SLOTS) + 1
    slots = torch.randperm(num_pages * PAGE_SLOTS, generator=generator)[: len(items)]
    item_ids = torch.full((num_pages * PAGE_SLOTS,), -1)
    item_ids[slots] = torch.arange(len(items))
    slot_codes = torch.zeros(num_pages * PAGE_SLOTS, config.levels, dtype=torch.int16)
    slot_codes[slots] = codes
    began = time.perf_counter()
    trie = CodeTrie(
        slot_codes.view(num_pages, PAGE_SLOTS, -1), item_ids.view(num_pages, -1), config.width
    )
    progress(f"trie of {trie.bounds[-1]} prefixes in {time.perf_counter() - began:.2f} s")
    queries = torch.from_numpy(data.queries[:NUM_QUERIES].copy())
    context = trained.decoder.context(queries)
    return Catalogue(trained.decoder, trie, queries, context, slots, num_pages)


@torch.inference_mode()
def exhaustive(catalogue: Catalogue, state: Tensor, eligible: Tensor, k: int) -> Generated:
    """Score every prefix and every item of one request; its shapes have B = 1."""
    decoder, trie = catalogue.decoder, catalogue.trie
    context = decoder.context(state)
    parents, scores = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    for level in range(trie.levels):
        first, end = trie.bounds[level : level + 2]
        codes = trie.codes[trie.starts[first:end], :level].long()
        table = torch.cat(
            [decoder.log_probs(context.expand(len(part), -1), part) for part in codes.split(512)]
        )
        last = level + 1 == trie.levels
        below = torch.arange(trie.num_items) if last else trie.starts[end : trie.bounds[level + 2]]
        parents = torch.searchsorted(trie.starts[first:end], below, right=True) - 1
        scores = scores[parents] + table[parents, trie.codes[below, level].long()]
    flags = torch.zeros(len(trie.every) * 64, dtype=torch.bool)
    flags[: trie.num_items] = (
        eligible.flatten()[trie.order.long() >> 6] >> (trie.order.long() & 63) & 1
    ).bool()
    ids = trie.item_ids.where(flags[: trie.num_items], -1)
    best = select_topk(scores[None], ids[None], k)
    slots = torch.where(best.positions < 0, -1, trie.order[best.positions.clamp(min=0)].long())
    everything = torch.tensor([trie.bounds[-1]])
    return Generated(best.scores, best.item_ids, slots, everything, torch.ones(1, dtype=torch.bool))


def agrees(catalogue: Catalogue, eligible: Tensor, k: int, batch: int) -> bool:
    """Return whether some queries, searched in a batch, have the exhaustive answers."""
    count = max(batch, GATE_QUERIES)
    found = generate(
        catalogue.decoder, catalogue.context[:count], catalogue.trie, eligible[:count], k
    )
    for query in range(GATE_QUERIES):
        one = slice(query, query + 1)
        want = exhaustive(catalogue, catalogue.states[one], eligible[one], k)
        for name in ("scores", "item_ids", "slots", "exact"):
            if not torch.equal(getattr(found, name)[one], getattr(want, name)):
                print(f"query {query}: {name} differ from the exhaustive ones", file=sys.stderr)
                return False
    return True


def measure(
    catalogue: Catalogue, eligible: Tensor, share: float, k: int, batch: int, rounds: int
) -> Line:
    """Return the times of one cell, the exhaustive search in turn with ours."""
    expanded: list[float] = []

    def ours(number: int) -> None:
        start = number * batch % (NUM_QUERIES - batch + 1)
        rows = slice(start, start + batch)
        found = generate(
            catalogue.decoder, catalogue.context[rows], catalogue.trie, eligible[rows], k
        )
        expanded.append(float(found.expanded.double().mean()))

    def every(number: int) -> None:
        one = slice(number % NUM_QUERIES, number % NUM_QUERIES + 1)
        exhaustive(catalogue, catalogue.states[one], eligible[one], k)

    peer = interleave({"every": every}, rounds=3, guard=Guard())["every"]
    series = interleave({"ours": ours}, rounds=rounds, guard=Guard(), budget_s=20.0)["ours"]
    each = [1e3 * one / batch for one in series.seconds]
    fifths = statistics.quantiles(each, n=5)
    return Line(
        share=share,
        results=k,
        batch=batch,
        ms_per_query=round(statistics.median(each), 3),
        p20_ms=round(fifths[0], 3),
        p80_ms=round(fifths[3], 3),
        exhaustive_ms=round(1e3 * peer.median, 1),
        expanded=round(statistics.mean(expanded), 1),
        disturbed=series.unsettled,
    )


def main() -> int:
    """Run the gate, the cells and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 items, a shorter training")
    parser.add_argument("--items", type=int, default=None, help="items in the catalogue")
    parser.add_argument("--rounds", type=int, default=None, help="measured rounds per cell")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    num_items = given.items or (100_000 if given.quick else 1_000_000)
    rounds = given.rounds or (7 if given.quick else 21)
    for gate in GATES:
        if not passes(gate):
            print(f"gate {gate} is red: no number is printed", file=sys.stderr)
            return 1
    data, config = data_set(num_items, DIM), SemanticConfig()
    catalogue = make_catalogue(data, config, 200 if given.quick else 1000)
    about = {
        **machine(),
        "benchmark": "semantic",
        "threads": given.threads,
        "items": num_items,
        "levels": config.levels,
        "width": config.width,
        "busy_cores": round(busy_cores(), 2),
        "unix_s": int(time.time()),
    }
    lines: list[Line] = []
    print(
        f"{'share':>6} {'R':>5} {'batch':>6} {'ms':>9} {'p20':>9} {'p80':>9} {'every':>9} prefixes"
    )
    for share in SHARES:
        eligible = catalogue.eligible(data, share)
        for k in RESULTS:
            for batch in BATCHES:
                if not agrees(catalogue, eligible, k, batch):
                    return 1
                line = measure(catalogue, eligible, share, k, batch, rounds)
                lines.append(line)
                print(
                    f"{share:>6} {k:>5} {batch:>6} {line.ms_per_query:>9.2f} {line.p20_ms:>9.2f} "
                    f"{line.p80_ms:>9.2f} {line.exhaustive_ms:>9.1f} {line.expanded:>8.0f}",
                    flush=True,
                )
    report = {"machine": about, "cases": [asdict(line) for line in lines]}
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in about["cpu"].lower())
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(report) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
