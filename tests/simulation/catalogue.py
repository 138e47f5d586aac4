"""Items whose scores are known, an update log that takes them away and brings them back, and the
one right answer to every question.

Shapes: M items, U users.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.model.spec import SearchDefaults, ServingSpec
from silvershard.shard.assignment import shard_partitions
from silvershard.shard.partition import partition_of

NUM_PARTITIONS = 64
NUM_USERS = 8
LOG_ID = 77
FILTERS = ("", "kind:a", "kind:b", "kind:a AND kind:b", "NOT kind:a")

Cut = tuple[int, ...]
Ranked = list[tuple[int, float]]
"""Items and their values, best first."""

SCHEMA = Schema(
    user_features=(UserFeature(name="user", kind="numbers", dtype="float", width=1),),
    item_features=(),
    attributes=(Attribute(name="kind", kind="category", dtype="string"),),
    signals=(),
    fields=(Field(name="title", dtype="string"),),
    heads=("main",),
    tasks=("origin",),
    value="score",
    weights={},
)
PLANES = PlaneDictionary(
    dtypes={"kind": "string"},
    exact_planes={"kind": {"a": 1, "b": 2}},
    first_bloom_plane=3,
    num_bloom_planes=0,
    num_hashes=1,
    seed=1,
    columns={},
    terms_width=0,
    false_positive_rate=0.0,
)


class Scores(NamedTuple):
    """A generation: how it scans and values the items for every user."""

    scan: NDArray[np.float32]
    """``(U, M)``; many are equal."""
    value: NDArray[np.float32]
    """``(U, M)``; many are equal."""
    order: NDArray[np.int64]
    """``(U, M)`` places of the items by scan score, the best and among equals the least first."""
    worth: NDArray[np.int64]
    """``(U, M)`` place of each item by value, 0 for the best, and among equals for the least."""


class Cutting:
    """The catalogue as it is cut into S shards."""

    def __init__(self, ids: NDArray[np.int64], num_shards: int) -> None:
        self.num_shards = num_shards
        owner = np.zeros(NUM_PARTITIONS, dtype=np.int64)
        for shard in range(num_shards):
            served = shard_partitions(shard, num_shards, NUM_PARTITIONS)
            owner[served.start : served.stop] = shard
        shard_of = owner[partition_of(torch.from_numpy(ids), NUM_PARTITIONS).numpy()]
        self.shard_of = dict(zip(ids.tolist(), shard_of.tolist(), strict=True))
        """Of every item."""
        self.masks = [shard_of == shard for shard in range(num_shards)]
        """``(M,)`` of each shard: which items are its."""


class Log:
    """An update log of L partitions whose records take an item away or bring it back."""

    def __init__(self, items: int, num_partitions: int, present: NDArray[np.bool_]) -> None:
        self.partition = np.arange(items) % num_partitions
        """Of the log, by item."""
        self.written_s: list[list[float]] = [[] for _ in range(num_partitions)]
        """When each record was written."""
        self._states = [[present.copy()] for _ in range(num_partitions)]
        self._mine = [self.partition == one for one in range(num_partitions)]
        self.alive_at = lru_cache(maxsize=512)(self._alive_at)

    @property
    def end(self) -> Cut:
        return tuple(len(one) for one in self.written_s)

    def toggle(self, item: int, now_s: float) -> None:
        """Write a record."""
        partition = int(self.partition[item])
        state = self._states[partition][-1].copy()
        state[item] = not state[item]
        self._states[partition].append(state)
        self.written_s[partition].append(now_s)

    def _alive_at(self, cut: Cut) -> NDArray[np.bool_]:
        """Return which items are there at a cut, ``(M,)``."""
        alive = np.zeros(len(self.partition), dtype=np.bool_)
        for mine, states, position in zip(self._mine, self._states, cut, strict=True):
            alive[mine] = states[position][mine]
        return alive


class Catalogue:
    """All items there may be, the generations that score them, and the log that changes them."""

    def __init__(self, seed: int, *, items: int, log_partitions: int) -> None:
        draw = np.random.default_rng(seed)
        self.ids = np.sort(draw.choice(1 << 40, items, replace=False)).astype(np.int64)
        partitions = partition_of(torch.from_numpy(self.ids), NUM_PARTITIONS).numpy()
        self.place_of = {int(one): at for at, one in enumerate(self.ids)}
        present = draw.random(items) < 0.8
        self.log = Log(items, log_partitions, present) if log_partitions else None
        self._present = present
        kinds = draw.random((2, items)) < 0.6
        self.passes = {
            "": np.ones(items, dtype=np.bool_),
            "kind:a": kinds[0],
            "kind:b": kinds[1],
            "kind:a AND kind:b": kinds[0] & kinds[1],
            "NOT kind:a": ~kinds[0],
        }
        counts = np.bincount(partitions[present], minlength=NUM_PARTITIONS)
        self._counts = tuple(int(one) for one in counts)
        self._seed = seed
        self._scores: dict[int, Scores] = {}
        self._cuttings: dict[int, Cutting] = {}

    def cut_into(self, num_shards: int) -> Cutting:
        if num_shards not in self._cuttings:
            self._cuttings[num_shards] = Cutting(self.ids, num_shards)
        return self._cuttings[num_shards]

    def spec(self, generation: int) -> ServingSpec:
        """Return a generation as it was published."""
        return ServingSpec(
            model="films",
            generation=generation,
            documents=sum(self._counts),
            dim=1,
            num_clusters=4,
            num_partitions=NUM_PARTITIONS,
            partition_documents=self._counts,
            page_slots=64,
            item_schema=SCHEMA,
            planes=PLANES,
            defaults=SearchDefaults(probes=2, ann_k=24),
        )

    def scores(self, generation: int) -> Scores:
        if generation not in self._scores:
            draw = np.random.default_rng((self._seed, generation))
            shape = NUM_USERS, len(self.ids)
            scan = (draw.integers(0, 60, shape) / 8).astype(np.float32)
            value = (draw.integers(0, 90, shape) / 16).astype(np.float32)
            order = np.stack([np.lexsort((self.ids, -row)) for row in scan])
            best = np.stack([np.lexsort((self.ids, -row)) for row in value])
            self._scores[generation] = Scores(scan, value, order, np.argsort(best, axis=1))
        return self._scores[generation]

    def alive(self, cut: Cut) -> NDArray[np.bool_]:
        """Return which items are there at a cut, ``(M,)``; an empty cut is that of no log."""
        return self.log.alive_at(cut) if self.log is not None and cut else self._present

    def documents(self, num_shards: int, shard: int, cut: Cut) -> int:
        return int((self.alive(cut) & self.cut_into(num_shards).masks[shard]).sum())

    def answer(
        self,
        generation: int,
        user: int,
        text: str,
        k: int,
        ann_k: int,
        excluded: tuple[int, ...],
        num_shards: int,
        cuts: Mapping[int, Cut],
    ) -> Ranked:
        """Return the one right answer over some of so many shards, each at its cut."""
        scores = self.scores(generation)
        there = np.zeros(len(self.ids), dtype=np.bool_)
        for shard, cut in cuts.items():
            there |= self.cut_into(num_shards).masks[shard] & self.alive(cut)
        there &= self.passes[text]
        for one in excluded:
            there[self.place_of[one]] = False
        order = scores.order[user]
        kept = order[there[order]][:ann_k]
        values = scores.value[user, kept]
        best = kept[np.lexsort((self.ids[kept], -values))[:k]]
        return list(zip(self.ids[best].tolist(), scores.value[user, best].tolist(), strict=True))


def directory(root: Path, generation: int) -> Path:
    """Return where a generation is said to lie."""
    return root / f"g-{generation:06d}"
