import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from silvershard.deploy.checks import Check, incompatibilities, measure_recall, run_checks
from silvershard.model.catalogue import Ragged
from silvershard.model.request import Request
from silvershard.model.schema import Attribute, Field
from silvershard.model.spec import SearchDefaults
from silvershard.shard.errors import SnapshotError
from silvershard.shard.golden import read_golden
from silvershard.shard.publish import publish_generation
from silvershard.shard.snapshot import Snapshot, open_snapshot


def checked(path: Path, live: Path | None = None, **options: Any) -> list[Check]:
    return list(run_checks(path, live, **{"max_recall_loss": 0.05, **options}))


@pytest.fixture
def copy(generation: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generation.path, tmp_path / "gen-000001"))


def changed(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """Return a snapshot whose manifest names another schema."""
    schema = snapshot.spec.item_schema.model_copy(update=changes)
    spec = snapshot.spec.model_copy(update={"item_schema": schema})
    return Snapshot(snapshot.path, snapshot.manifest.model_copy(update={"spec": spec}))


def test_a_sound_generation_passes_every_check(generation: Any) -> None:
    found = checked(generation.path, generation.path)
    assert [one.name for one in found] == ["checksums", "schema", "golden requests", "recall"]
    assert all(one.passed for one in found)
    assert found[2].text.startswith("24 requests are answered bit for bit")
    assert [one.name for one in checked(generation.path, load=False)] == ["checksums"]


def test_a_damaged_file_is_named_and_nothing_more_is_tried(copy: Path) -> None:
    os.truncate(copy / "dense.safetensors", 50)
    (found,) = checked(copy)
    assert not found.passed
    assert "dense.safetensors is damaged" in found.text


def test_a_generation_under_a_wrong_name_is_refused(copy: Path) -> None:
    moved = copy.rename(copy.with_name("gen-000007"))
    (found,) = checked(moved)
    assert "it holds generation 1, not its own" in found.text


def test_a_generation_without_a_manifest_cannot_be_checked(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(SnapshotError, match=r"manifest.json is missing"):
        checked(copy)


def test_what_clients_name_must_stay_as_it_is(generation: Any) -> None:
    live = open_snapshot(generation.path)
    schema = live.spec.item_schema
    assert incompatibilities(live, live) == []
    more = (*schema.attributes, Attribute(name="country", kind="category", dtype="string"))
    assert incompatibilities(live, changed(live, attributes=more)) == []
    for changes, problem in (
        ({"attributes": schema.attributes[1:]}, "attributes: genre is gone"),
        (
            {"attributes": tuple(one.model_copy(update={"dtype": "int"}) for one in more)},
            "attributes: dtype of genre must be string, got int",
        ),
        ({"signals": ("freshness",)}, "signals: popularity is gone"),
        ({"tasks": ("rated",)}, "tasks: liked is gone"),
        (
            {"fields": (Field(name="title", dtype="string"), Field(name="year", dtype="float"))},
            "fields: dtype of year must be int, got float",
        ),
        (
            {
                "item_features": tuple(
                    one.model_copy(update={"max_length": one.max_length - 1})
                    if one.name == "genres"
                    else one
                    for one in schema.item_features
                )
            },
            "item_features: max_length of genres must be at least 8, got 7",
        ),
    ):
        assert problem in incompatibilities(live, changed(live, **changes))
    spec = live.spec.model_copy(update={"model": "songs"})
    other = Snapshot(live.path, live.manifest.model_copy(update={"spec": spec}))
    assert incompatibilities(live, other) == ["model must be films, got songs"]


def test_planes_that_hold_less_than_those_of_the_live_one_are_named_with_numbers(
    tmp_path: Path, generation: Any
) -> None:
    live = open_snapshot(generation.path)
    lost = len(live.spec.planes.exact_planes["genre"])
    assert lost > 0
    column = Ragged.from_rows([["Western"]] * len(generation.catalogue), dtype="string")
    categories = {**generation.catalogue.categories, "genre": column}
    # In another repository, so that it knows nothing of the live one.
    others = published(
        tmp_path, generation, catalogue=replace(generation.catalogue, categories=categories)
    )
    problem = (
        f"planes: terms_width must be at least {4 + lost}, for 4 rare values and {lost} that lose "
        "their planes, got 4"
    )
    assert problem in incompatibilities(live, open_snapshot(others))
    *_, last = checked(others, generation.path)
    assert (last.name, last.passed, last.text) == ("schema", False, problem)


def test_remote_tables_may_be_others(publish_model: Any) -> None:
    live = open_snapshot(publish_model(remote=("history",)).path)
    plain = open_snapshot(publish_model().path)
    assert incompatibilities(live, plain) == incompatibilities(plain, live) == []


def published(repository: Path, source: Any, **changes: Any) -> Path:
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
    return publish_generation(repository, **options).path


def test_an_index_that_finds_much_less_than_the_live_one_fails(
    tmp_path: Path, generation: Any
) -> None:
    poor = published(tmp_path, generation, defaults=SearchDefaults(probes=1, ann_k=40))
    requests = [Request(features=one.to_request().features) for one in _cases(generation.path)]
    good, bad = measure_recall(generation.path, requests), measure_recall(poor, requests)
    assert bad < good - 0.1
    *_, last = checked(poor, generation.path)
    assert (last.name, last.passed) == ("recall", False)
    assert f"finds {bad:.4f} of the 40 best" in last.text
    assert f"that of the live one {good:.4f}, at most 0.05 less is allowed" in last.text
    assert all(one.passed for one in checked(poor, generation.path, max_recall_loss=0.9))
    exact = published(tmp_path, generation, defaults=SearchDefaults(probes=16, ann_k=600))
    assert measure_recall(exact, requests) == pytest.approx(1.0, abs=0.01)


def _cases(path: Path) -> Any:
    return read_golden(open_snapshot(path)).cases


def test_a_schema_that_does_not_fit_is_let_through_only_when_that_is_said(
    tmp_path: Path, generation: Any
) -> None:
    renamed = published(tmp_path, generation, name="songs")
    *_, last = checked(renamed, generation.path)
    assert (last.name, last.passed) == ("schema", False)
    allowed = checked(renamed, generation.path, allow_schema=True)
    assert allowed[1].text == "allowed: model must be films, got songs"
    assert len(allowed) == 4


def test_without_golden_requests_nothing_is_measured(tmp_path: Path, generation: Any) -> None:
    silent = published(tmp_path, generation, golden_requests=0)
    *_, last = checked(silent)
    assert last == Check(
        "recall", True, "published without golden requests, so nothing is measured"
    )
