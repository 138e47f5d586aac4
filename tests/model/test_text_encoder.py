from collections.abc import Callable

import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def encoder(make_text_encoder: Callable[..., TextEncoder]) -> TextEncoder:
    return make_text_encoder(query_prefix="Genres : ", item_prefix="Action ")


def test_a_query_is_embedded_behind_its_prefix(encoder: TextEncoder) -> None:
    features = [{"query": ("Drama", "Horror")}, {}, {"history": (1,)}]
    texts = encoder.query_texts(features)
    assert texts == ["Drama Horror", "", ""]
    found = encoder.embed_queries(texts)
    assert torch.equal(
        found.embedding,
        encoder.embed_texts(["Genres : Drama Horror", "Genres : ", "Genres : "]).embedding,
    )
    assert found.truncated == [False] * 3


def test_an_item_whose_features_are_all_empty_or_absent_has_zeros(encoder: TextEncoder) -> None:
    found = encoder.embed_present({"genres": Ragged.from_rows([[], ["Drama"]])}, 2)
    expected = encoder.embed_texts(["Action Genres: Drama"]).embedding
    assert torch.equal(found, torch.cat([torch.zeros(1, encoder.dim), expected]))
    assert not encoder.embed_present({}, 3).any()
    assert encoder.embed_present({}, 0).shape == (0, encoder.dim)
    with pytest.raises(ValueError, match="feature genres is part of item_text"):
        encoder.embed_items({})


def test_the_state_of_other_modules_is_left_alone(encoder: TextEncoder) -> None:
    other = torch.nn.Linear(3, 2)
    both = torch.nn.ModuleDict({"other": other, "again": other, "encoder": encoder})
    state = both.state_dict()
    assert state["other.weight"].data_ptr() == state["again.weight"].data_ptr()
