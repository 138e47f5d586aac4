"""A generated catalogue that is served and changed at once: items, a model for them, mutations.

Items have a cell (one of many ids) and a few words, which the item tower reads; users have visited
cells. The model has random weights: what it serves is of no use, but costs as much as if it were.

Shapes: n items.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.ranker_config import MLPConfig
from silvershard.model.schema import Attribute, Field, Schema, UserFeature
from silvershard.model.spec import SearchDefaults
from silvershard.model.two_tower import TwoTower
from silvershard.model.two_tower_config import ItemTable, TwoTowerConfig
from silvershard.shard.generations import generation_dir
from silvershard.shard.publish import publish_generation

DIM = 64
CELLS = 50_000
WORDS = 20_000
WORDS_PER_ITEM = 4
TOPICS = 64
SIGNALS = ("popularity", "trend", "price", "quality")
MODEL = "live"
_DRAWN = 250

CANARIES, CANARY_YEAR = 1 << 48, 100_000

SHARES = {"patch": 0.7, "upsert": 0.2, "delete": 0.1}


def schema() -> Schema:
    """Return what items and users have."""
    return Schema(
        user_features=(UserFeature(name="visited"),),
        item_features=(
            UserFeature(name="cell", max_length=1),
            UserFeature(name="words", max_length=WORDS_PER_ITEM),
        ),
        attributes=(
            Attribute(name="topic", kind="category", dtype="int"),
            Attribute(name="year", kind="number", dtype="int"),
        ),
        signals=SIGNALS,
        fields=(Field(name="title", dtype="string"),),
        tasks=("view",),
        value="view * (1 + 0.1 * popularity) + 0.01 * trend",
    )


def items(item_ids: NDArray[np.int64], seed: int) -> Catalogue:
    """Return these items with values that depend on the seed alone."""
    draw, count = np.random.default_rng(seed), len(item_ids)
    one = np.arange(count + 1, dtype=np.int64)
    titles = np.empty(count, dtype=object)
    titles[:] = [f"item {item}" for item in item_ids.tolist()]
    words = draw.integers(0, WORDS, count * WORDS_PER_ITEM)
    return Catalogue(
        item_ids=item_ids,
        categories={"topic": Ragged(draw.integers(0, TOPICS, count), one)},
        numbers={"year": draw.integers(1950, 2030, count)},
        signals=draw.random((count, len(SIGNALS)), dtype=np.float32),
        fields={"title": titles},
        features={
            "cell": Ragged(draw.integers(0, CELLS, count), one),
            "words": Ragged(words, one * WORDS_PER_ITEM),
        },
    )


def model(seed: int = 0) -> TwoTower:
    """Return a tower over those features with random weights."""
    torch.manual_seed(seed)
    made = TwoTower(
        TwoTowerConfig(
            dim=DIM,
            heads=("user",),
            tasks=("view",),
            signals=SIGNALS,
            history="visited",
            item="cell",
            tables=(
                ItemTable(name="cell", dtype="int", size=CELLS),
                ItemTable(name="words", dtype="int", size=WORDS),
            ),
            max_history=32,
            ranker=MLPConfig(hidden=(64, 32)),
        )
    )
    made.vocabulary("cell").fill(list(range(CELLS)))
    made.vocabulary("words").fill(list(range(WORDS)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return made.eval()


def publish(repository: Path, num_items: int, num_clusters: int) -> Path:
    """Publish generation 1 below ``repository`` unless it is there, and return its directory."""
    path = generation_dir(repository, 1)
    if path.is_dir():
        return path
    tower = model()
    return publish_generation(
        repository,
        name=MODEL,
        model=tower,
        builder="two_tower",
        config=tower.config.model_dump(mode="json"),
        catalogue=items(np.arange(num_items, dtype=np.int64), seed=1),
        schema=schema(),
        defaults=SearchDefaults(probes=16, ann_k=200, k_max=1000),
        num_clusters=num_clusters,
        golden_requests=4,
    ).path


def updates(num_items: int, seed: int) -> Iterator[Update]:
    """Yield updates for ever, 70 % signal patches, 20 % upserts, 10 % deletes.

    Half of the upserts are of new items, so that as many come as go. Items that were deleted stay
    away, and nothing else happens to them. Seeds 0 and 1 change items of their own, so that both
    can be used one after the other; those of ``canaries`` are left alone.
    """
    draw = np.random.default_rng(seed)
    kinds, shares = list(SHARES), list(SHARES.values())
    fresh, gone = num_items + (seed << 32), set[int]()
    while True:
        new = items(np.arange(_DRAWN, dtype=np.int64), seed=int(draw.integers(1 << 31)))
        for row, kind in enumerate(draw.choice(kinds, _DRAWN, p=shares).tolist()):
            item_id = _draw_item(draw, num_items, seed)
            while item_id in gone:
                item_id = _draw_item(draw, num_items, seed)
            if kind == "patch":
                signals = dict(zip(SIGNALS, draw.random(len(SIGNALS)).tolist(), strict=True))
                yield ItemPatch(item_id, signals=signals)
            elif kind == "delete":
                gone.add(item_id)
                yield ItemDelete(item_id)
            else:
                if draw.random() < 0.5:
                    item_id, fresh = fresh, fresh + 1
                yield upsert_of(new, row, item_id)


def _draw_item(draw: np.random.Generator, num_items: int, seed: int) -> int:
    return 2 * int(draw.integers(num_items // 2)) + seed % 2


def upsert_of(catalogue: Catalogue, row: int, item_id: int) -> ItemUpsert:
    """Return an upsert of a row of a catalogue under another id."""
    return ItemUpsert(
        item_id,
        attributes={
            "topic": catalogue.categories["topic"].row(row),
            "year": int(catalogue.numbers["year"][row]),
        },
        signals=dict(zip(SIGNALS, catalogue.signals[row].tolist(), strict=True)),
        fields={"title": f"item {item_id}"},
        features={name: catalogue.features[name].row(row) for name in ("cell", "words")},
    )


def canaries(count: int) -> list[ItemUpsert]:
    """Return new items that a filter tells from all others: each has a year of its own."""
    item_ids = np.arange(count, dtype=np.int64) + CANARIES
    catalogue = items(item_ids, seed=7)
    catalogue = replace(catalogue, numbers={"year": np.arange(count) + CANARY_YEAR})
    return [upsert_of(catalogue, row, item) for row, item in enumerate(item_ids.tolist())]
