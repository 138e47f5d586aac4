import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from silvershard.kernels import NULL_KEY, PAD_TERM, FilterOp, Relation

Rows = list[list[int]]


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


@pytest.fixture
def pool_of() -> Callable[..., Pool]:
    return make_pool


@pytest.fixture
def rows_of() -> Callable[..., Rows]:
    return random_rows


@pytest.fixture
def programs_of() -> Callable[[Sequence[Rows]], Tensor]:
    return pad_programs
