import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from silvershard.kernels import (
    NULL_KEY,
    PAD_TERM,
    FilterOp,
    Relation,
    ScanResult,
    ivf_scan,
    native_library,
)
from silvershard.kernels.ivf_scan import ivf_scan_reference

Rows = list[list[int]]

# native_builds.py runs the tests with libraries of its own making.
_LIBRARY = os.environ.get("SILVERSHARD_NATIVE_LIBRARY")
if _LIBRARY:
    native_library.LIBRARY_PATH = Path(_LIBRARY)
    if native_library.load_library() is None:
        raise RuntimeError(f"the native library {_LIBRARY} cannot be loaded")


@pytest.fixture(params=native_library.IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each implementation of the CPU operators."""
    name: str = request.param
    if name not in native_library.available():
        lacking = "library" if native_library.load_library() is None else "instruction set"
        pytest.skip(f"no native {lacking} for {name!r} here")
    with native_library.use(name):
        yield name


@pytest.fixture
def run_python() -> Callable[..., str]:
    """``run_python(code, *arguments)`` returns what a fresh process with this library prints."""

    def run(code: str, *arguments: str) -> str:
        prelude = (
            "import sys\n"
            "from pathlib import Path\n"
            "from silvershard.kernels import native_library\n"
            f"native_library.LIBRARY_PATH = Path({str(native_library.LIBRARY_PATH)!r})\n"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", prelude + code, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class Queries(NamedTuple):
    """What differs between the rows of a batch."""

    codes: Tensor
    scales: Tensor
    clusters: Tensor
    programs: Tensor
    verify: Tensor
    excluded: Tensor

    def rows(self, rows: slice) -> "Queries":
        return Queries(*(part[rows] for part in self))


@dataclass(kw_only=True)
class Pool:
    """A random paged index; its methods are slow oracles that look at one slot at a time."""

    planes: Tensor
    columns: Tensor
    terms: Tensor
    codes: Tensor
    scales: Tensor
    item_ids: Tensor
    page_table: Tensor

    @property
    def page_size(self) -> int:
        return self.terms.shape[1]

    @property
    def num_slots(self) -> int:
        return self.terms.shape[0] * self.terms.shape[1]

    def bit(self, plane: int, slot: int) -> bool:
        page, offset = divmod(slot, self.page_size)
        word = int(self.planes[plane, page, offset // 64]) & ((1 << 64) - 1)
        return bool(word >> (offset % 64) & 1)

    def accepts(self, rows: Sequence[Sequence[int]], slot: int) -> bool:
        page, offset = divmod(slot, self.page_size)
        stack = []
        for op, a, b, c in rows:
            if op == FilterOp.TRUE:
                stack.append(True)
            elif op == FilterOp.FALSE:
                stack.append(False)
            elif op == FilterOp.PLANE:
                stack.append(self.bit(a, slot))
            elif op == FilterOp.COMPARE:
                key = int(self.columns[a, page, offset])
                truth = {
                    Relation.LT: key < c,
                    Relation.LE: key <= c,
                    Relation.EQ: key == c,
                    Relation.NE: key != c,
                    Relation.GE: key >= c,
                    Relation.GT: key > c,
                }[Relation(b)]
                stack.append(truth and key != NULL_KEY)
            elif op == FilterOp.TERM:
                stack.append(c in self.terms[page, offset].tolist())
            elif op == FilterOp.NOT:
                stack.append(not stack.pop())
            elif op in (FilterOp.AND, FilterOp.OR):
                right, left = stack.pop(), stack.pop()
                stack.append(left and right if op == FilterOp.AND else left or right)
        return stack.pop() if stack else True

    def filters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.planes, self.columns, self.terms

    def scan_arguments(self) -> tuple[Tensor, ...]:
        return (
            self.page_table,
            self.codes,
            self.scales,
            self.item_ids,
            self.planes,
            self.columns,
            self.terms,
        )

    def queries(
        self, seed: int, num_queries: int, *, probes: int = 3, exclusions: int = 0
    ) -> Queries:
        """Random queries without programs."""
        generator = torch.Generator().manual_seed(seed)
        num_clusters, dim = self.page_table.shape[0], self.codes.shape[2]
        order = torch.rand((num_queries, num_clusters), generator=generator).argsort(dim=1)
        clusters = order[:, :probes]
        clusters[torch.rand(clusters.shape, generator=generator) < 0.1] = -1
        none = torch.empty((num_queries, 0, 4), dtype=torch.int64)
        shape = (num_queries, exclusions)
        return Queries(
            codes=torch.randint(-127, 128, (num_queries, dim), generator=generator).to(torch.int8),
            scales=torch.rand(num_queries, generator=generator),
            clusters=clusters.int(),
            programs=none,
            verify=none,
            excluded=torch.randint(-1, self.num_slots, shape, generator=generator),
        )

    def everywhere(self, seed: int, num_queries: int, *, exclusions: int = 0) -> Queries:
        """Random queries that probe every cluster."""
        queries = self.queries(seed, num_queries, exclusions=exclusions)
        every = torch.arange(self.page_table.shape[0], dtype=torch.int32)
        return queries._replace(clusters=every.repeat(num_queries, 1))

    def arguments(self, queries: Queries) -> tuple[Tensor, ...]:
        return (*queries[:3], *self.scan_arguments(), *queries[3:])

    def scan(self, queries: Queries, num_results: int) -> ScanResult:
        scan: Callable[..., ScanResult] = ivf_scan
        return scan(*self.arguments(queries), num_results)

    def reference(self, queries: Queries, num_results: int) -> ScanResult:
        reference: Callable[..., tuple[Tensor, ...]] = ivf_scan_reference
        return ScanResult(*reference(*self.arguments(queries), num_results))

    def score(self, queries: Queries, query: int, slot: int) -> float:
        page, offset = divmod(slot, self.page_size)
        codes = zip(queries.codes[query].tolist(), self.codes[page, offset].tolist(), strict=True)
        dot = np.float32(sum(a * b for a, b in codes))
        scale, query_scale = self.scales[page, offset].item(), queries.scales[query].item()
        return float((dot * np.float32(scale)) * np.float32(query_scale))

    def ranked(self, queries: Queries, query: int) -> tuple[list[tuple[float, int, int]], int, int]:
        """Every slot that may be returned, best first, and the two counts."""
        clusters = {cluster for cluster in queries.clusters[query].tolist() if cluster >= 0}
        pages = {
            page for cluster in clusters for page in self.page_table[cluster].tolist() if page >= 0
        }
        excluded = set(queries.excluded[query].tolist())
        programs, verify = queries.programs[query].tolist(), queries.verify[query].tolist()
        slots = [page * self.page_size + at for page in pages for at in range(self.page_size)]
        live = [slot for slot in slots if self.bit(0, slot)]
        eligible = [slot for slot in live if slot not in excluded and self.accepts(programs, slot)]
        ranked = sorted(
            (-self.score(queries, query, slot), int(self.item_ids.flatten()[slot]), slot)
            for slot in eligible
            if self.accepts(verify, slot)
        )
        return ranked, len(live), len(eligible)

    def check(self, queries: Queries, result: ScanResult) -> None:
        """Assert that a result is what one slot at a time gives."""
        num_results = result.scores.shape[1]
        for query in range(queries.codes.shape[0]):
            ranked, probed, eligible = self.ranked(queries, query)
            best = ranked[:num_results]
            padding = num_results - len(best)
            assert int(result.probed[query]) == probed
            assert int(result.eligible[query]) == eligible
            scores = [-row[0] for row in best] + [-torch.inf] * padding
            assert result.scores[query].tolist() == scores
            assert result.item_ids[query].tolist() == [row[1] for row in best] + [-1] * padding
            assert result.slots[query].tolist() == [row[2] for row in best] + [-1] * padding


def make_pool(
    seed: int,
    *,
    num_pages: int = 9,
    page_size: int = 64,
    dim: int = 16,
    num_clusters: int = 5,
    num_planes: int = 6,
    num_columns: int = 2,
    num_terms: int = 3,
    live: float = 0.7,
    distinct_scores: bool = False,
) -> Pool:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shape = (num_pages, page_size)
    planes = integers(-(1 << 62), 1 << 62, (num_planes, num_pages, page_size // 64))
    planes ^= integers(0, 2, planes.shape) << 63
    alive = torch.rand(shape, generator=generator) < live
    weights = 1 << torch.arange(64)
    planes[0] = (alive.view(num_pages, -1, 64) * weights).sum(-1)
    columns = integers(-3, 4, (num_columns, *shape))
    columns[torch.rand(columns.shape, generator=generator) < 0.2] = NULL_KEY
    terms = integers(0, 6, (*shape, num_terms))
    terms[torch.rand(terms.shape, generator=generator) < 0.3] = PAD_TERM
    bound = 128 if distinct_scores else 3
    codes = integers(1 - bound, bound, (*shape, dim)).to(torch.int8)
    scales = torch.rand(shape, generator=generator) if distinct_scores else torch.ones(shape)
    item_ids = torch.randperm(num_pages * page_size * 3, generator=generator)
    item_ids = item_ids[: num_pages * page_size].view(shape)
    # The last page and the last cluster stay free, so that there is an empty one of each.
    page_table = torch.full((num_clusters, num_pages), -1, dtype=torch.int32)
    used = [0] * num_clusters
    for page in range(num_pages - 1):
        cluster = int(integers(0, max(1, num_clusters - 1), (1,)))
        page_table[cluster, used[cluster]] = page
        used[cluster] += 1
    return Pool(
        planes=planes,
        columns=columns,
        terms=terms,
        codes=codes,
        scales=scales,
        item_ids=item_ids,
        page_table=page_table,
    )


def random_rows(rng: random.Random, pool: Pool, depth: int, *, with_terms: bool) -> Rows:
    if depth == 0 or rng.random() < 0.2:
        leaves = [FilterOp.PLANE, FilterOp.COMPARE, FilterOp.TRUE, FilterOp.FALSE]
        weights = [6, 4, 1, 1]
        if with_terms:
            leaves.append(FilterOp.TERM)
            weights.append(6)
        op = rng.choices(leaves, weights)[0]
        if op == FilterOp.PLANE:
            return [[op, rng.randrange(pool.planes.shape[0]), 0, 0]]
        if op == FilterOp.COMPARE:
            column = rng.randrange(pool.columns.shape[0])
            return [[op, column, rng.choice(list(Relation)), rng.randrange(-4, 5)]]
        return [[op, 0, 0, rng.randrange(7) if op == FilterOp.TERM else 0]]
    left = random_rows(rng, pool, depth - 1, with_terms=with_terms)
    if rng.random() < 0.3:
        return [*left, [FilterOp.NOT, 0, 0, 0]]
    right = random_rows(rng, pool, depth - 1, with_terms=with_terms)
    return [*left, *right, [rng.choice([FilterOp.AND, FilterOp.OR]), 0, 0, 0]]


def pad_programs(programs: Sequence[Rows]) -> Tensor:
    length = max((len(rows) for rows in programs), default=0)
    padded = [rows + [[0, 0, 0, 0]] * (length - len(rows)) for rows in programs]
    return torch.tensor(padded, dtype=torch.int64).view(len(programs), length, 4)


def assert_equal_bits(mine: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for a, b in zip(mine, other, strict=True):
        assert a.dtype == b.dtype
        if a.is_floating_point():
            a, b = a.view(torch.int32), b.view(torch.int32)
        assert torch.equal(a, b)


@pytest.fixture
def assert_same() -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """``assert_same(mine, other)`` compares tensors bit for bit."""
    return assert_equal_bits


@pytest.fixture
def pool_of() -> Callable[..., Pool]:
    return make_pool


@pytest.fixture
def rows_of() -> Callable[..., Rows]:
    return random_rows


@pytest.fixture
def programs_of() -> Callable[[Sequence[Rows]], Tensor]:
    return pad_programs
