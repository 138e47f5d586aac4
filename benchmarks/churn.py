"""Measures an index that changes in place: a fixed catalogue under millions of updates.

Usage: ``python -P benchmarks/churn.py [--quick] [--updates N] [--items N] [--batch N]``. As many
updates are committed at once as by a shard where nothing else is decided. 70 % of the updates are
patches, 20 % upserts with other embeddings and 10 % deletes, whose items come back later; in the
end every item is what it was. No number is printed before the index equals a rebuild of its
items. Each run appends one JSON line to ``benchmarks/results/<machine>.jsonl``; the last line
printed is one JSON object.

Shapes: n items, T contents that items can have, D embedding dimension, S signals, C clusters.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

_HERE = Path(__file__).resolve().parent
if "benchmarks" not in sys.modules:
    # The folder is no package and the root stays off sys.path, where `import model` would work.
    _PACKAGE = types.ModuleType("benchmarks")
    _PACKAGE.__path__ = [str(_HERE)]
    sys.modules["benchmarks"] = _PACKAGE

from benchmarks.run import machine  # noqa: E402
from silvershard.cluster.follower import MAX_BATCH  # noqa: E402
from silvershard.kernels import quantize_rows  # noqa: E402
from silvershard.model.catalogue import Catalogue, Ragged  # noqa: E402
from silvershard.model.clustering import nearest_clusters  # noqa: E402
from silvershard.model.filter import FilterMode, compile_filter  # noqa: E402
from silvershard.model.filter_parser import parse_filter  # noqa: E402
from silvershard.model.index import ItemIndex  # noqa: E402
from silvershard.model.planes import ItemBits, choose_planes, encode_items  # noqa: E402
from silvershard.model.schema import Attribute, Field, Schema  # noqa: E402
from silvershard.model.spec import SearchDefaults, ServingSpec  # noqa: E402
from silvershard.shard.build import build_index  # noqa: E402
from silvershard.shard.changes import Changes, NewItems, PatchedItems  # noqa: E402
from silvershard.shard.fields import FieldStore  # noqa: E402
from silvershard.shard.live_index import LiveIndex  # noqa: E402
from silvershard.shard.page_pool import PoolUsage  # noqa: E402
from silvershard.shard.snapshot import PartitionData  # noqa: E402

_Ints = NDArray[np.int64]
_T = TypeVar("_T")

DIM, SIGNALS, GENRES, TAGS = 64, 4, 150, 20_000
HEADROOM = 0.25
FILTERS = ("", "genre:3", "NOT genre:1", "tag:7 OR tag:11", "year >= 2000 AND NOT tag:3")
SCHEMA = Schema(
    attributes=(
        Attribute(name="genre", kind="category", dtype="int"),
        Attribute(name="tag", kind="category", dtype="int"),
        Attribute(name="year", kind="number", dtype="int"),
    ),
    signals=tuple(f"signal_{number}" for number in range(SIGNALS)),
    fields=(Field(name="title", dtype="string"),),
    tasks=("view",),
    value="view",
)


class Contents:
    """What items can be: embeddings near some centres, frequent genres, rare tags, a year."""

    def __init__(self, count: int, num_clusters: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        unit = torch.nn.functional.normalize
        self.centroids = unit(torch.randn(num_clusters, DIM, generator=generator), dim=1)
        near = torch.from_numpy(draw.integers(0, num_clusters, count))
        noise = torch.randn(count, DIM, generator=generator)
        embeddings = unit(self.centroids[near] + 0.1 * noise, dim=1)
        self.clusters = nearest_clusters(embeddings, self.centroids)
        self.codes, self.scales = quantize_rows(embeddings)
        self.cache = embeddings.half()
        self.queries = unit(torch.randn(8, DIM, generator=generator), dim=1)
        one = np.arange(count + 1, dtype=np.int64)
        genres = draw.integers(0, GENRES, 2 * count)
        tags = draw.integers(0, TAGS, 3 * count)
        titles = np.empty(count, dtype=object)
        titles[:] = [f"content {number}" for number in range(count)]
        self.titles = titles
        catalogue = Catalogue(
            item_ids=np.arange(count, dtype=np.int64),
            categories={"genre": Ragged(genres, 2 * one), "tag": Ragged(tags, 3 * one)},
            numbers={"year": draw.integers(1950, 2025, count)},
            signals=np.zeros((count, SIGNALS), dtype=np.float32),
            fields={"title": titles},
            features={},
        )
        self.planes = choose_planes(SCHEMA, catalogue)
        self.bits = encode_items(self.planes, SCHEMA, catalogue)

    def __len__(self) -> int:
        return len(self.titles)


class State:
    """Every item of the catalogue as the updates so far have left it."""

    def __init__(self, contents: Contents, num_items: int, seed: int = 1) -> None:
        self.draw = np.random.default_rng(seed)
        self.contents = contents
        self.item_ids = np.unique(self.draw.integers(0, 1 << 62, num_items + num_items // 8))
        self.item_ids = self.draw.permutation(self.item_ids)[:num_items]
        self.base = self.draw.integers(0, len(contents), num_items)
        self.content = self.base.copy()
        self.tags_of = self.base.copy()
        """The content that an item has its tags from."""
        self.alive = np.ones(num_items, dtype=np.bool_)
        self.signals = self.draw.random((num_items, SIGNALS), dtype=np.float32)
        self.version = 0

    def spec(self, num_clusters: int) -> ServingSpec:
        """Return the generation of the catalogue."""
        return ServingSpec(
            model="churn",
            generation=1,
            documents=len(self.item_ids),
            dim=DIM,
            num_clusters=num_clusters,
            num_partitions=1,
            partition_documents=(len(self.item_ids),),
            page_slots=64,
            item_schema=SCHEMA,
            planes=self.contents.planes,
            defaults=SearchDefaults(probes=1, ann_k=100),
        )

    def bits(self, rows: _Ints) -> ItemBits:
        """Return what is encoded of some items."""
        contents = self.contents
        own, tags = torch.from_numpy(self.content[rows]), torch.from_numpy(self.tags_of[rows])
        of_tags = torch.zeros(contents.bits.exact.shape[1], dtype=torch.bool)
        for plane in contents.planes.exact_planes.get("tag", {}).values():
            of_tags[plane - 1] = True
        exact = torch.where(of_tags, contents.bits.exact[tags], contents.bits.exact[own])
        return ItemBits(exact, contents.bits.terms[tags], contents.bits.columns[own])

    def partition(self) -> PartitionData:
        """Return the items that are there now."""
        rows = np.flatnonzero(self.alive)
        of, empty = self.contents, np.zeros(len(rows) + 1, dtype=np.int64)
        at = torch.from_numpy(self.content[rows])
        none = Ragged(np.zeros(0, dtype=np.int64), empty)
        catalogue = Catalogue(
            item_ids=self.item_ids[rows],
            categories={"genre": none, "tag": none},
            numbers={"year": self.contents.bits.columns[at, 0].numpy()},
            signals=self.signals[rows],
            fields={"title": of.titles[self.content[rows]]},
            features={},
        )
        return PartitionData(
            catalogue, of.clusters[at], of.codes[at], of.scales[at], of.cache[at], self.bits(rows)
        )

    def churned(self, count: int) -> Changes:
        """Return ``count`` updates of different items; those that are gone come back."""
        drawn = self.draw.permutation(np.unique(self.draw.integers(0, len(self.base), 2 * count)))
        rows = drawn[:count]
        alive, kind = self.alive[rows], self.draw.random(len(rows))
        upserted = rows[~alive | ((kind >= 0.7) & (kind < 0.9))]
        deleted = rows[alive & (kind >= 0.9)]
        patched = rows[alive & (kind < 0.7)]
        self.content[upserted] = self.draw.integers(0, len(self.contents), len(upserted))
        self.tags_of[upserted] = self.content[upserted]
        return self._changes(upserted, patched, deleted)

    def restored(self, limit: int) -> Changes:
        """Return updates that make at most ``limit`` items what they were; none when all are."""
        other = ~self.alive | (self.content != self.base) | (self.tags_of != self.base)
        rows, none = np.flatnonzero(other)[:limit], np.zeros(0, dtype=np.int64)
        self.content[rows] = self.tags_of[rows] = self.base[rows]
        return self._changes(rows, none, none)

    def _changes(self, upserted: _Ints, patched: _Ints, deleted: _Ints) -> Changes:
        self.version += 1
        self.alive[upserted], self.alive[deleted] = True, False
        with_tags = self.draw.random(len(patched)) < 0.2
        self.tags_of[patched[with_tags]] = self.draw.integers(
            0, len(self.contents), np.count_nonzero(with_tags)
        )
        given = self.draw.random((len(patched), SIGNALS)) < 0.5
        for rows, mask in ((upserted, slice(None)), (patched, given)):
            fresh = self.signals[rows]
            fresh[mask] = self.draw.random(fresh[mask].shape, dtype=np.float32)
            self.signals[rows] = fresh
        of, at = self.contents, torch.from_numpy(self.content[upserted])

        def versions(rows: _Ints) -> torch.Tensor:
            return torch.full((len(rows),), self.version)

        upserts = NewItems(
            item_ids=torch.from_numpy(self.item_ids[upserted]),
            versions=versions(upserted),
            clusters=of.clusters[at],
            codes=of.codes[at],
            scales=of.scales[at],
            cache=of.cache[at],
            bits=self.bits(upserted),
            signals=torch.from_numpy(self.signals[upserted]),
            fields={"title": of.titles[self.content[upserted]]},
            semantic_codes=None,
        )
        bits = self.bits(patched)
        gives = torch.from_numpy(with_tags)
        bits.terms[~gives] = torch.iinfo(torch.int64).max
        patches = PatchedItems(
            item_ids=torch.from_numpy(self.item_ids[patched]),
            versions=versions(patched),
            bits=bits,
            attributes={"tag": gives},
            signals=torch.from_numpy(self.signals[patched]),
            signals_given=torch.from_numpy(given),
            fields={},
        )
        dead = torch.from_numpy(self.item_ids[deleted])
        return Changes(upserts, patches, dead, versions(deleted))


@dataclass
class Pauses:
    """How long commits, and what tidies up after each, kept queries waiting."""

    seconds: list[float]
    cpu_seconds: list[float]
    updates: int = 0
    moved: int = 0
    _epoch: int = 0
    """Before the last commit."""

    def commit(self, live: LiveIndex, changes: Changes) -> None:
        """Apply changes while the queries of the commit before are still open."""
        count = len(changes.deletes) + len(changes.patches.item_ids)
        self.updates += count + len(changes.upserts.item_ids)
        oldest, self._epoch = self._epoch, live.epoch
        rejected = self._paused(lambda: (live.reclaim(oldest), live.commit(changes))[1])
        # A shard lets queries pass between the two.
        self.moved += self._paused(live.tidy_up)
        if rejected:
            raise RuntimeError(f"updates were rejected: {rejected[:3]}")

    def _paused(self, work: Callable[[], _T]) -> _T:
        began, cpu = time.perf_counter(), time.thread_time()
        done = work()
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.thread_time() - cpu)
        return done


def check_equal(live: LiveIndex, state: State, spec: ServingSpec) -> None:
    """Refuse an index that differs from a rebuild of its items.

    Raises:
        RuntimeError: naming what differs.
    """
    fresh = build_index([state.partition()], spec)
    ids = torch.from_numpy(state.item_ids)
    there, here = fresh.slots_of(ids), live.slots_of(ids)
    if not torch.equal(there >= 0, here >= 0) or live.documents != int((there >= 0).sum()):
        raise RuntimeError("the index holds other items than a rebuild")
    there, here = there[there >= 0], here[here >= 0]
    for name in ("codes", "scales", "item_ids", "terms", "cache", "signals"):
        wanted, got = fresh.get_buffer(name), live.index.get_buffer(name)
        if not torch.equal(wanted.flatten(0, 1)[there], got.flatten(0, 1)[here]):
            raise RuntimeError(f"{name} differ from a rebuild")
    if not torch.equal(fresh.columns.flatten(1)[:, there], live.index.columns.flatten(1)[:, here]):
        raise RuntimeError("columns differ from a rebuild")
    for text in FILTERS:
        wanted, got = _searched(fresh, state, text), _searched(live.index, state, text)
        if not all(map(torch.equal, wanted, got)):
            raise RuntimeError(f"the answers to {text!r} differ from those of a rebuild")


def _searched(index: ItemIndex, state: State, text: str) -> list[torch.Tensor]:
    """Return scores, ids and counts of a search in all clusters."""
    queries = state.contents.queries
    codes, scales = quantize_rows(queries)
    count, num_clusters = len(queries), len(state.contents.centroids)
    none = torch.zeros(0, 4, dtype=torch.int64)
    scan, verify = none, none
    if text:
        filters = compile_filter(
            parse_filter(text, {}, SCHEMA), state.contents.planes, SCHEMA, FilterMode.BLOOM_VERIFIED
        )
        scan, verify = filters.scan, filters.verify
    found = index.scan(
        codes,
        scales,
        torch.arange(num_clusters, dtype=torch.int32).repeat(count, 1),
        scan.repeat(count, 1, 1),
        verify.repeat(count, 1, 1),
        torch.from_numpy(state.item_ids[:count, None]).contiguous(),
        200,
    )
    return [found.scores, found.item_ids, found.probed, index.count(scan[None])]


def run(
    num_items: int, num_updates: int, num_clusters: int, batch: int = MAX_BATCH
) -> dict[str, object]:
    """Return the figures of one run of commits of ``batch`` updates.

    Raises:
        RuntimeError: if the index is not what a rebuild would be.
    """
    contents = Contents(max(num_items // 16, 1 << 12), num_clusters)
    state = State(contents, num_items)
    spec = state.spec(num_clusters)
    partition = state.partition()
    index = build_index([partition], spec, headroom=HEADROOM)
    store = FieldStore(partition.catalogue.item_ids, partition.catalogue.fields)
    live = LiveIndex(index, store, spec, contents.centroids)
    before, fewest, most_away = live.usage(), live.usage().free_pages, 0
    pauses = Pauses([], [])
    while pauses.updates < num_updates:
        pauses.commit(live, state.churned(batch))
        usage: PoolUsage = live.usage()
        fewest, most_away = min(fewest, usage.free_pages), max(most_away, usage.overflowed)
        if len(pauses.seconds) % 500 == 0:
            print(f"{pauses.updates:,} updates, {usage.free_pages:,} free pages", file=sys.stderr)
    during = live.usage()
    check_equal(live, state, spec)
    restoring = Pauses([], [])
    while len((changes := state.restored(batch)).upserts.item_ids):
        restoring.commit(live, changes)
    idle = 0
    live.reclaim(live.epoch)
    while live.tidy_up():
        live.reclaim(live.epoch)
        idle += 1
    after = live.usage()
    check_equal(live, state, spec)
    milliseconds = 1e3 * np.array(pauses.seconds)
    cpu = 1e3 * np.array(pauses.cpu_seconds)
    return {
        "items": num_items,
        "updates": pauses.updates,
        "updates_per_commit": batch,
        "restoring_updates": restoring.updates,
        "num_clusters": num_clusters,
        "planes": contents.planes.num_planes,
        "pages": before.pages,
        "free_pages_before": before.free_pages,
        "free_pages_fewest": fewest,
        "free_pages_under_churn": during.free_pages,
        "free_pages_after": after.free_pages,
        "idle_commits": idle,
        "most_overflowed": most_away,
        "moved": pauses.moved,
        "updates_per_s": round(pauses.updates / sum(pauses.seconds)),
        "pause_ms_p50": round(float(np.median(milliseconds)), 2),
        "pause_ms_p99": round(float(np.quantile(milliseconds, 0.99)), 2),
        "pause_ms_max": round(float(milliseconds.max()), 2),
        "pause_cpu_ms_p50": round(float(np.median(cpu)), 2),
        "pause_cpu_ms_p99": round(float(np.quantile(cpu, 0.99)), 2),
        "pause_cpu_ms_max": round(float(cpu.max()), 2),
    }


def main() -> None:
    """Run once and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="300,000 updates of 100,000 items")
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--items", type=int, default=None)
    parser.add_argument("--batch", type=int, default=MAX_BATCH)
    given = parser.parse_args()
    items = given.items or (100_000 if given.quick else 1_000_000)
    updates = given.updates or (300_000 if given.quick else 10_000_000)
    torch.set_num_threads(1)
    figures = run(items, updates, max(16, items * 4096 // 1_000_000), given.batch)
    figures = {"benchmark": "churn", **figures, **machine()}
    results = _HERE / "results"
    results.mkdir(exist_ok=True)
    name = "".join(one if one.isalnum() else "-" for one in str(figures["cpu"]).lower())
    with (results / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
