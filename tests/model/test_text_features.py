from collections.abc import Callable

import pytest
import torch

from silvershard.model.text_encoder import TextEncoder
from silvershard.model.text_features import TextFeatures


@pytest.fixture
def features(make_text_encoder: Callable[..., TextEncoder]) -> TextFeatures:
    encoder = make_text_encoder()
    made = TextFeatures(encoder.config, 8)
    made.encoder.load_state_dict(encoder.state_dict())
    return made


def test_inputs_are_standardised_and_divided_by_their_number(
    features: TextFeatures,
) -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(50, 24) * 3 + 1, torch.randn(30, 24) * 0.1 - 5
    items[::7] = 0
    features.fill(items, queries)
    for bags, embedded in (
        (features.item_bags(items), items),
        (features.query_bags(queries), queries),
    ):
        given = embedded.any(1)
        assert torch.equal(bags.lengths, given * 25)
        inputs = bags.weights.view(-1, 25)
        assert torch.equal(inputs[:, 0], torch.ones(len(inputs)))
        assert torch.allclose(inputs[:, 1:].mean(0), torch.zeros(24), atol=1e-5)
        assert torch.allclose(inputs[:, 1:].square().mean().sqrt(), torch.tensor(1 / 24), atol=1e-5)


def test_only_requests_with_a_text_are_encoded(
    features: TextFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    embed = features.encoder.embed_texts

    def embed_texts(texts):  # type: ignore[no-untyped-def]
        asked.append(list(texts))
        return embed(texts)

    monkeypatch.setattr(features.encoder, "embed_texts", embed_texts)
    bags, warnings = features.of_requests([{}, {"query": ("Drama",)}, {"history": (3,)}])
    assert asked == [["Drama"]]
    assert bags.lengths.tolist() == [0, 25, 0]
    assert warnings == [[], [], []]
