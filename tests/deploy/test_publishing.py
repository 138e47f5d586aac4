from typing import Any

import pytest
import torch

from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError
from silvershard.deploy.publishing import index_options, num_clusters, served_model


@pytest.mark.parametrize(
    ("documents", "clusters"), [(0, 2), (1, 2), (2000, 128), (9742, 256), (62_000, 512)]
)
def test_clusters_grow_with_the_root_of_the_items(documents: int, clusters: int) -> None:
    assert num_clusters(Config(), documents) == clusters
    assert num_clusters(load(None, environ={}, options={"index.clusters": 7}), documents) == 7


def test_centroids_that_were_trained_decide_the_clusters() -> None:
    centroids = torch.zeros(24, 4)
    options = index_options(Config(), 9742, None, centroids)
    assert options["num_clusters"] == 24
    assert options["centroids"] is centroids
    assert options["defaults"].semantic_k == 0
    wrong = load(None, environ={}, options={"index.clusters": 16})
    with pytest.raises(CommandError, match=r"index\.clusters must be 0 or 24, .* got 16"):
        index_options(wrong, 9742, None, centroids)


def test_a_model_is_served_in_the_form_that_the_settings_want(generation: Any) -> None:
    settings = generation.model.config.model_dump(mode="json")
    plain = served_model(Config(), generation.model, settings)
    assert (plain.model, plain.config, plain.remote_rows) == (generation.model, settings, {})
    quantized = load(None, environ={}, options={"index.table_precision": "int8"})
    assert served_model(quantized, generation.model, settings).config != settings
    remote = load(None, environ={}, options={"tables.remote": ["history"]})
    served = served_model(remote, generation.model, settings)
    assert list(served.remote_rows) == ["history"]
    wrong = load(None, environ={}, options={"tables.remote": ["films"]})
    with pytest.raises(CommandError, match=r"^tables\.remote: .* got 'films'"):
        served_model(wrong, generation.model, settings)
