from collections.abc import Callable

import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.text_config import TextTrainingConfig
from silvershard.model.text_encoder import TextEncoder
from silvershard.model.text_features import TextFeatures
from silvershard.model.training_texts import TrainingTexts, embed_training_texts, query_texts

CONFIG = TextTrainingConfig(encoder="a folder", query_texts=("genres", "tags"))
FEATURES = {
    "genres": Ragged.from_rows([["Drama", "Horror"], [], ["Drama"]], dtype="string"),
    "tags": Ragged.from_rows([["Comedy"], [], [" ", "Drama"]], dtype="string"),
}


@pytest.fixture
def texts(make_text_encoder: Callable[..., TextEncoder]) -> TrainingTexts:
    return embed_training_texts(make_text_encoder(query_prefix="Genres "), FEATURES, CONFIG)


def test_each_distinct_text_that_asks_for_an_item_is_embedded_once(texts: TrainingTexts) -> None:
    distinct = texts.encoder.embed_queries(["Comedy", "Drama", "Horror"]).embedding
    assert torch.equal(texts.queries, distinct)
    assert texts.lengths.tolist() == [3, 0, 2]
    assert texts.numbers.tolist() == [1, 2, 0, 1, 1]


def test_items_have_the_embeddings_of_their_texts(texts: TrainingTexts) -> None:
    expected = texts.encoder.embed_texts(["Genres: Drama, Horror", "Genres: Drama"]).embedding
    assert torch.equal(texts.items[[0, 2]], expected)
    assert not texts.items[1].any()


def test_a_share_of_the_items_draws_any_of_its_texts(texts: TrainingTexts) -> None:
    features = TextFeatures(texts.encoder.config, 8)
    asking = query_texts(texts, features)
    torch.manual_seed(0)
    items = torch.arange(3).repeat(1000)
    bags, given = asking.draw(items, 0.4)
    assert 0.35 < float(given[items == 0].float().mean()) < 0.45
    assert not given[items == 1].any()
    assert torch.equal(bags.lengths, given * 25)
    drawn = bags.weights.view(-1, 25)[:, 1:]
    first = torch.unique(drawn[items[given] == 0], dim=0)
    assert len(first) == 3
    assert torch.equal(torch.unique(drawn[items[given] == 2], dim=0), texts.queries[1:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("genres",), r"text\.query_texts must name item features, which are genres, got tags"),
        (("tags",), r"text\.item_text must name item features, which are tags, got genres"),
    ],
)
def test_a_feature_that_items_do_not_have_is_named(
    make_text_encoder: Callable[..., TextEncoder], given: tuple[str, ...], message: str
) -> None:
    features = {name: FEATURES[name] for name in given}
    with pytest.raises(ValueError, match=message):
        embed_training_texts(make_text_encoder(), features, CONFIG)
