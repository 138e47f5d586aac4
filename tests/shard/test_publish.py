import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.catalogue import Ragged
from silvershard.model.planes import shortfall
from silvershard.model.request import Request
from silvershard.model.schema import Schema, SchemaError
from silvershard.model.semantic_config import SemanticConfig, SemanticSpec
from silvershard.model.semantic_source import SemanticSource
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import MutationError, SnapshotError
from silvershard.shard.generations import list_generations
from silvershard.shard.load import load_retriever, load_semantic
from silvershard.shard.mutations import ItemValues, Upsert, check
from silvershard.shard.publish import PHASES, Published, publish_generation
from silvershard.shard.snapshot import open_snapshot


def publish_again(repository: Path, source: Any, **changes: Any) -> Published:
    options: dict[str, Any] = {
        "name": "films",
        "model": source.model,
        "builder": "two_tower",
        "config": source.model.config.model_dump(mode="json"),
        "catalogue": source.catalogue,
        "schema": source.schema,
        "defaults": SearchDefaults(probes=4, ann_k=40),
        "num_clusters": 16,
        "false_positive_rate": 0.1,
        "max_exact_planes": 6,
        **changes,
    }
    return publish_generation(repository, **options)


def test_generations_are_numbered_from_one_upwards(tmp_path: Path, generation) -> None:
    numbers = [publish_again(tmp_path, generation).generation for _ in range(2)]
    assert numbers == [1, 2]
    assert list_generations(tmp_path) == [1, 2]
    with pytest.raises(SnapshotError, match="exists already"):
        publish_again(tmp_path, generation, generation=2)


def test_the_same_input_gives_the_same_content_whatever_the_order_of_the_items(
    tmp_path: Path, generation
) -> None:
    shuffled = generation.catalogue.take(np.random.default_rng(0).permutation(600))
    first = publish_again(tmp_path / "a", generation)
    second = publish_again(tmp_path / "b", generation)
    hashes = [open_snapshot(one.path).manifest.content_hash for one in (first, second)]
    assert hashes[0] == hashes[1] == open_snapshot(generation.path).manifest.content_hash
    assert publish_again(tmp_path / "c", generation, catalogue=shuffled).documents == 600


def test_the_report_says_how_even_the_lists_and_how_wide_the_planes_are(
    tmp_path: Path, generation
) -> None:
    published = publish_again(tmp_path, generation)
    assert published.documents == 600
    assert published.mean_list == 37.5
    assert published.longest_list <= 4 * 37.5
    assert published.planes.num_exact_planes == 6
    assert published.planes.num_bloom_planes > 0


def test_a_generation_takes_what_every_other_one_of_the_model_takes(
    tmp_path: Path, generation
) -> None:
    first = publish_again(tmp_path, generation, max_exact_planes=4)
    column = Ragged.from_rows([[f"g{at % 3}"] for at in range(600)], dtype="string")
    categories = {**generation.catalogue.categories, "genre": column}
    other = replace(generation.catalogue, categories=categories)
    unrelated = publish_again(tmp_path, generation, catalogue=other, name="songs")
    second = publish_again(tmp_path, generation, catalogue=other, max_exact_planes=6)
    (tmp_path / "gen-000009").mkdir()
    kept, alone, new = (open_snapshot(one.path).spec.planes for one in (first, unrelated, second))
    assert shortfall(kept, alone)
    assert shortfall(kept, new) == ""
    assert "g0" in new.exact_planes["genre"]
    # The widest item that the first one takes.
    makers = (*map(int, kept.exact_planes["maker"]), *range(900, 900 + kept.terms_width))
    genres = tuple(kept.exact_planes["genre"])
    widest = Upsert(1, 1, ItemValues(attributes={"genre": genres, "maker": makers}))
    for one in (first, second):
        check(widest, open_snapshot(one.path).spec)
    with pytest.raises(MutationError, match="must have at most terms_width=4"):
        check(widest, open_snapshot(unrelated.path).spec)
    # Without the first one it chooses as if it had never been.
    alone_again = publish_again(tmp_path / "other", generation, catalogue=other)
    assert open_snapshot(alone_again.path).spec.planes == alone


def test_more_planned_shards_give_more_partitions(tmp_path: Path, generation) -> None:
    published = publish_again(tmp_path, generation, planned_shards=20)
    assert open_snapshot(published.path).spec.num_partitions == 256


def test_pages_of_128_slots_give_the_same_answers(
    tmp_path: Path, generation, request_maker
) -> None:
    wide = load_retriever(publish_again(tmp_path, generation, page_slots=128).path)[0]
    narrow = load_retriever(generation.path)[0]
    requests = request_maker(generation, 30, seed=8)
    for one, other in zip(wide(requests), narrow(requests), strict=True):
        assert torch.equal(one.item_ids, other.item_ids)
        assert torch.equal(one.scores, other.scores)


def test_a_catalogue_that_does_not_fit_its_schema_is_refused(tmp_path: Path, generation) -> None:
    schema = generation.schema.model_copy(update={"signals": ("popularity",), "value": "score"})
    with pytest.raises(SchemaError, match="signals"):
        publish_again(tmp_path, generation, schema=schema)
    assert list_generations(tmp_path) == []


@pytest.mark.parametrize(
    ("part", "names"), [("heads", ("rated",)), ("tasks", ("liked", "rated")), ("tasks", ("rated",))]
)
def test_a_model_that_was_made_for_another_schema_is_refused(
    tmp_path: Path, generation, part: str, names: tuple[str, ...]
) -> None:
    schema = generation.schema.model_copy(update={part: names, "value": "score"})
    with pytest.raises(SchemaError, match=f"{part}: the schema has"):
        publish_again(tmp_path, generation, schema=schema)
    assert list_generations(tmp_path) == []


def test_a_false_positive_rate_out_of_reach_publishes_nothing(tmp_path: Path, generation) -> None:
    with pytest.raises(ValueError, match=r"must be in \[1e-09, 1\), got 1e-30"):
        publish_again(tmp_path, generation, false_positive_rate=1e-30)
    assert list_generations(tmp_path) == []


def test_embeddings_that_are_not_finite_are_refused(
    tmp_path: Path, generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = torch.full((600, 16), float("nan"))
    monkeypatch.setattr(generation.model, "embed_items", lambda features: broken)
    with pytest.raises(ValueError, match="not finite"):
        publish_again(tmp_path, generation)
    assert list_generations(tmp_path) == []


def test_a_weight_that_is_not_finite_publishes_nothing(tmp_path: Path, generation) -> None:
    broken = copy.deepcopy(generation.model)
    with torch.no_grad():
        broken.user_head.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.user_head\.bias must be finite, got NaN"):
        publish_again(tmp_path, generation, model=broken)
    assert list_generations(tmp_path) == []


def test_a_history_of_another_type_than_the_items_publishes_nothing(
    tmp_path: Path, generation
) -> None:
    features = [one.model_dump() for one in generation.schema.user_features]
    features[0]["dtype"] = "string"
    schema = Schema.model_validate({**generation.schema.model_dump(), "user_features": features})
    with pytest.raises(SchemaError, match="history: the model reads ids history of dtype int"):
        publish_again(tmp_path, generation, schema=schema)
    assert list_generations(tmp_path) == []


def test_every_phase_is_announced_in_order(tmp_path: Path, generation) -> None:
    heard: list[str] = []
    publish_again(tmp_path, generation, on_phase=heard.append)
    assert tuple(heard) == PHASES


def test_the_decoder_is_part_of_the_content(tmp_path: Path, semantic_generation) -> None:
    source = load_semantic(open_snapshot(semantic_generation.path))
    assert source is not None
    defaults = SearchDefaults(probes=4, ann_k=40, semantic_k=30)
    again = publish_again(tmp_path / "a", semantic_generation, semantic=source, defaults=defaults)
    wanted = open_snapshot(semantic_generation.path).manifest
    assert open_snapshot(again.path).manifest.content_hash == wanted.content_hash
    source.decoder.level += 1.0
    other = publish_again(tmp_path / "b", semantic_generation, semantic=source, defaults=defaults)
    assert open_snapshot(other.path).manifest.content_hash != wanted.content_hash


@pytest.mark.parametrize(
    ("state_dim", "dim", "message"),
    [
        (8, 15, "semantic ids must be of embeddings of 16 elements, got 15"),
        (500, 16, r"must read at most the \d+ elements of a user state, got 500"),
    ],
)
def test_semantic_ids_of_another_model_are_refused(
    tmp_path: Path, generation, state_dim: int, dim: int, message: str
) -> None:
    spec = SemanticSpec(decoder=SemanticConfig(levels=2, width=5), state_dim=state_dim)
    with pytest.raises(ValueError, match=message):
        publish_again(tmp_path, generation, semantic=SemanticSource(spec, dim))
    assert list_generations(tmp_path) == []


def test_centroids_that_do_not_fit_publish_nothing(tmp_path: Path, generation) -> None:
    for centroids, problem in (
        (torch.ones(15, 16), "centroids must be as many as num_clusters, 16, got 15"),
        (torch.ones(16, 8), "D of the items, 16, got 8"),
        (torch.full((16, 16), torch.nan), "centroids must be finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            publish_again(tmp_path, generation, centroids=centroids)
    assert list_generations(tmp_path) == []


def test_what_plans_find_is_measured_once_and_no_part_of_the_content(
    tmp_path: Path, generation
) -> None:
    plain = open_snapshot(publish_again(tmp_path / "a", generation).path).manifest
    assert plain.calibration is None
    again = open_snapshot(publish_again(tmp_path / "b", generation, recall_requests=9).path)
    manifest = again.manifest
    assert manifest.content_hash == plain.content_hash
    assert manifest.calibration is not None
    assert manifest.calibration.requests == 9
    assert manifest.calibration.probes[-1] == manifest.spec.num_clusters
    users = [Request(features={"history": [1, 2]})] * 3
    real = publish_again(
        tmp_path / "c", generation, golden_requests=0, golden_users=users, recall_requests=3
    )
    found = open_snapshot(real.path).manifest.calibration
    assert found is not None
    # Real users come first, and these are all alike.
    assert set(found.recall[0][-1]) <= {at / 10 for at in range(11)}
