"""Items, queries, attributes and inverted lists for the kernel benchmarks, made once and cached.

Items and queries come from one mixture of Gaussians with power-law weights, a decaying and rotated
spectrum, and unit length. Every item has tags such that any three tags of a family let 1, 10 or
50 % of the items through.

Shapes: n items, D embedding dimension, C lists, q queries.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.clustering import spherical_kmeans

NUM_QUERIES = 448
COMPONENTS = 3000
WEIGHT_EXPONENT = 0.8
SIGMA = 0.7
SPECTRUM_EXPONENT = 0.35
TAGS_PER_FAMILY = 9
MAX_TAGS = 16
"""Tags of the families that an item keeps; the few that draw more lose some at random."""
RARE_TAGS = 4
"""Further tags of every item that no filter names: the long tail that fills Bloom planes."""
RARE_VALUES = 5_000
"""Values of each of them."""
MAX_TERMS = MAX_TAGS + RARE_TAGS
SELECTIVITIES = (0.01, 0.1, 0.5)
NUM_TAGS = TAGS_PER_FAMILY * len(SELECTIVITIES)
_VERSION = 1
_CHUNK = 1 << 17


def progress(text: str) -> None:
    """Print a line at once, with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def cache_root() -> Path:
    """Return where generated data and peer indexes are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("SILVERSHARD_BENCH_CACHE") or f"{home}/silvershard/benchmarks")


def cached_file(path: Path, make: Callable[[Path], None]) -> Path:
    """Return the file, made under another name first, so that a file that exists is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        make(partial)
        partial.rename(path)
    return path


def _array(path: Path, make: Callable[[], NDArray[np.generic]]) -> NDArray[np.generic]:
    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, make())

    return np.asarray(np.load(cached_file(path, write), mmap_mode="c"))


@dataclass(frozen=True)
class Filter:
    """Three tags that an item must all have."""

    tags: tuple[int, int, int]

    @property
    def bits(self) -> int:
        """Return the tags as bits."""
        return sum(1 << tag for tag in self.tags)

    @property
    def text(self) -> str:
        """Return the filter in the filter language."""
        return " AND ".join(f"tag:{tag}" for tag in self.tags)


def filters(selectivity: float) -> list[Filter]:
    """Return the distinct filters that let about this share of the items through."""
    family = SELECTIVITIES.index(selectivity)
    first = family * TAGS_PER_FAMILY
    found = [
        Filter((a, b, c))
        for a, b, c in itertools.combinations(range(first, first + TAGS_PER_FAMILY), 3)
    ]
    return [found[at] for at in np.random.default_rng(family).permutation(len(found))]


@dataclass(frozen=True, eq=False)
class Lists:
    """Centroids and the list of every item; the same for ours and for the peer."""

    centroids: NDArray[np.float32]
    """``(C, D)``."""
    assignment: NDArray[np.int64]
    """``(n,)``."""
    folder: Path

    @property
    def count(self) -> int:
        """Return C."""
        return len(self.centroids)

    @cached_property
    def members(self) -> list[NDArray[np.int64]]:
        """The items of every list, ascending."""
        order = np.argsort(self.assignment, kind="stable")
        ends = np.cumsum(np.bincount(self.assignment, minlength=self.count))
        return np.split(order, ends[:-1])

    @property
    def imbalance(self) -> float:
        """Return the longest list over the mean."""
        sizes = np.bincount(self.assignment, minlength=self.count)
        return float(sizes.max() / sizes.mean())


@dataclass(frozen=True, eq=False)
class DataSet:
    """Items with tags, and queries; item ids are 0 to n - 1."""

    vectors: NDArray[np.float32]
    """``(n, D)`` of unit length."""
    queries: NDArray[np.float32]
    """``(448, D)`` of unit length."""
    tags: NDArray[np.uint32]
    """``(n,)`` one bit per tag."""
    rare_tags: NDArray[np.int32]
    """``(n, RARE_TAGS)`` distinct tags beyond those of the families."""
    folder: Path

    @property
    def dim(self) -> int:
        """Return D."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.vectors)

    def passing(self, which: Filter) -> NDArray[np.bool_]:
        """Return which items have all tags of a filter, ``(n,)``."""
        found: NDArray[np.bool_] = (self.tags & np.uint32(which.bits)) == which.bits
        return found

    def batch(self, size: int, number: int) -> slice:
        """Return the queries of a batch; consecutive numbers give different ones."""
        start = number % (NUM_QUERIES // size) * size
        return slice(start, start + size)

    def lists(self, count: int) -> Lists:
        """Return ``count`` lists over the items: k-means of a sample, then the nearest centre."""
        folder = self.folder / f"lists-{count}"

        def train() -> NDArray[np.generic]:
            rows = min(len(self), max(100 * count, 50_000), 200_000)
            progress(f"k-means: {count} lists of {rows} sampled items, D {self.dim}")
            chosen = np.random.default_rng(3).permutation(len(self))[:rows]
            sample = torch.from_numpy(self.vectors[np.sort(chosen)])
            return spherical_kmeans(sample, count, seed=0).centroids.numpy()

        centroids = _array(folder / "centroids.npy", train).astype(np.float32, copy=False)

        def assign() -> NDArray[np.generic]:
            progress(f"assigning {len(self)} items to {count} lists")
            centres = torch.from_numpy(np.ascontiguousarray(centroids)).T
            rows = max((1 << 24) // count, 1)
            parts = [
                (torch.from_numpy(self.vectors[at : at + rows]) @ centres).argmax(1)
                for at in range(0, len(self), rows)
            ]
            return torch.cat(parts).numpy()

        assignment = _array(folder / "assignment.npy", assign).astype(np.int64, copy=False)
        return Lists(np.ascontiguousarray(centroids), assignment, folder)

    def best(
        self, rows: range, k: int, which: Sequence[Filter] | None = None
    ) -> list[NDArray[np.int64]]:
        """Return the exact float32 best k items of some queries among those that pass.

        Best first; the answers are cached.

        Args:
            rows: queries.
            k: items; fewer are returned where fewer pass.
            which: the filter of each query.
        """
        key = f"{rows.start}-{rows.stop}-{k}-{[one.tags for one in which] if which else ''}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]

        def make() -> NDArray[np.generic]:
            progress(f"exact answers of {len(rows)} queries, k {k}")
            table = torch.from_numpy(self.vectors)
            found = np.full((len(rows), k), -1, dtype=np.int32)
            for place, row in enumerate(rows):
                scores = torch.mv(table, torch.from_numpy(self.queries[row]))
                if which is None:
                    ids = torch.topk(scores, k).indices
                else:
                    kept = torch.from_numpy(np.flatnonzero(self.passing(which[place])))
                    ids = kept[torch.topk(scores[kept], min(k, len(kept))).indices]
                found[place, : len(ids)] = ids.numpy()
            return found

        table = _array(self.folder / f"best-{name}.npy", make).astype(np.int64)
        return [row[row >= 0] for row in table]


def recall(found: Sequence[NDArray[np.int64]], truth: Sequence[NDArray[np.int64]]) -> list[float]:
    """Return the share of the true items that were found, per query."""
    return [
        float(np.isin(want, got).mean()) if len(want) else 1.0
        for got, want in zip(found, truth, strict=True)
    ]


def data_set(num_items: int, dim: int) -> DataSet:
    """Return the items and queries of this size, from the cache where they are there."""
    folder = cache_root() / f"v{_VERSION}-items-{num_items}-d{dim}"
    recipe = {
        "components": COMPONENTS,
        "weight_exponent": WEIGHT_EXPONENT,
        "sigma": SIGMA,
        "spectrum_exponent": SPECTRUM_EXPONENT,
        "tags": [TAGS_PER_FAMILY, MAX_TAGS, RARE_TAGS, RARE_VALUES, *SELECTIVITIES],
    }
    stamp = folder / "recipe.json"
    if folder.exists() and (not stamp.exists() or json.loads(stamp.read_text()) != recipe):
        shutil.rmtree(folder)
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(recipe))

    def vectors() -> NDArray[np.generic]:
        progress(f"drawing {num_items} items, D {dim}")
        return _draw(num_items, dim, seed=1).numpy()

    return DataSet(
        vectors=_array(folder / "vectors.npy", vectors).astype(np.float32, copy=False),
        queries=np.ascontiguousarray(
            _array(folder / "queries.npy", lambda: _draw(NUM_QUERIES, dim, seed=2).numpy())
        ).astype(np.float32, copy=False),
        tags=_array(folder / "tags.npy", lambda: _draw_tags(num_items)).astype(
            np.uint32, copy=False
        ),
        rare_tags=_array(folder / "rare_tags.npy", lambda: _draw_rare_tags(num_items)).astype(
            np.int32, copy=False
        ),
        folder=folder,
    )


def _draw(count: int, dim: int, *, seed: int) -> Tensor:
    """Return rows of the mixture, ``(count, D)`` float32 of unit length."""
    shape = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float() ** -SPECTRUM_EXPONENT
    centres = torch.randn(COMPONENTS, dim, generator=shape) * spectrum
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=shape)).Q
    weights = torch.arange(1, COMPONENTS + 1).double() ** -WEIGHT_EXPONENT
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, dim)
    for part in rows.split(_CHUNK):
        which = torch.multinomial(weights, len(part), replacement=True, generator=generator)
        noise = torch.randn(part.shape, generator=generator) * (SIGMA * spectrum)
        part.copy_(torch.nn.functional.normalize((centres[which] + noise) @ rotation, dim=1))
    return rows


def _draw_rare_tags(count: int) -> NDArray[np.generic]:
    """Return further tags of every item, each from a range of its own."""
    first = NUM_TAGS + RARE_VALUES * np.arange(RARE_TAGS)
    draw = np.random.default_rng(7).integers(0, RARE_VALUES, (count, RARE_TAGS))
    return (first + draw).astype(np.int32)


def _draw_tags(count: int) -> NDArray[np.generic]:
    """Return the tags of every item as bits, at most ``MAX_TAGS`` each."""
    generator = np.random.default_rng(4)
    share = np.repeat([one ** (1 / 3) for one in SELECTIVITIES], TAGS_PER_FAMILY)
    tags = np.zeros(count, dtype=np.uint32)
    for at in range(0, count, _CHUNK):
        draw = generator.random((min(_CHUNK, count - at), NUM_TAGS), dtype=np.float32)
        # Tags beyond the limit go in a random order: those whose draw was closest to failing.
        margin = np.where(draw < share, draw / share, np.inf)
        limit = np.partition(margin, MAX_TAGS - 1, axis=1)[:, MAX_TAGS - 1 : MAX_TAGS]
        held = np.isfinite(margin) & (margin <= limit)
        tags[at : at + len(draw)] = (held * (1 << np.arange(NUM_TAGS, dtype=np.uint32))).sum(
            1, dtype=np.uint32
        )
    return tags
