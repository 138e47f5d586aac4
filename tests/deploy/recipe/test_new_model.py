"""A newly trained model over the items of today: published, swapped to, and asked."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from silvershard.cluster import Client, Query
from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.deploy import launch, recipe, recluster, verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import log_url
from silvershard.model.two_tower import TwoTower
from silvershard.shard.snapshot import PartitionData, open_snapshot

NEW = 9_000_001
WAIT_S = 60.0


class World(NamedTuple):
    config: Config
    prepared: recipe.Prepared
    models: tuple[Path, Path]
    generation: Path


@pytest.fixture(scope="module")
def world(films_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two models of the same films, and a generation of the first one."""
    options = {
        "training.steps": 6,
        "training.ranker_steps": 3,
        "training.dim": 16,
        "index.clusters": 16,
        "index.golden_requests": 6,
        "listen.port": 0,
        "sharding.threads": 1,
        "swap.max_recall_loss": 0.5,
    }
    config = load(None, environ={}, options=options)
    prepared = recipe.prepare(config, data=films_folder, environ={}, report=lambda _: None)
    states = []
    for seed in (1, 2):
        state = StateDir(tmp_path_factory.mktemp(f"seed{seed}"))
        state.create()
        seeded = config.model_copy(update={"model": config.model.model_copy(update={"seed": seed})})
        recipe.train_model(state, seeded, prepared, progress=False)
        states.append(state)
    loaded = recipe.load_model(states[0].model_dir)
    published = recipe.publish(states[0], config, prepared, loaded)
    return World(config, prepared, (states[0].model_dir, states[1].model_dir), published.path)


@pytest.fixture
def state(world: World, tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(world.generation, made.generations / world.generation.name)
    shutil.copytree(world.models[0], made.model_dir)
    return made


@pytest.fixture
def log(state: StateDir, world: World) -> Iterator[UpdateLog]:
    made = open_log(log_url(state, world.config))
    yield made
    made.close()


def append(log: UpdateLog, *updates: Update) -> None:
    records = [
        NewRecord(
            item_id=one.item_id,
            version=one.version,
            urgent=False,
            deleted=isinstance(one, ItemDelete),
            expires_unix_ms=0,
            payload=logged(mutation_to(one), one.version),
        )
        for one in updates
    ]
    log.append(0, log.acquire(0), records, 1)


def write_settings(state: StateDir, config: Config) -> None:
    state.config_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))


def film(item: int, title: str, version: int = 1) -> ItemUpsert:
    return ItemUpsert(
        item,
        attributes={"genre": ["Own"], "year": 2020},
        signals={"popularity": 0.5, "mean_rating": 0.5, "recency": 0.9},
        fields={"title": title, "year": 2020},
        features={"movie_id": [item], "genres": ["Drama", "Crime"], "year": [2020]},
        version=version,
    )


def embedded(path: Path) -> dict[int, torch.Tensor]:
    """Return the embedding of every item of a generation, as it is cached."""
    snapshot = open_snapshot(path)
    found: dict[int, torch.Tensor] = {}
    for number in range(snapshot.spec.num_partitions):
        part: PartitionData | None = snapshot.load_partition(number)
        if part is not None:
            found |= dict(zip(part.catalogue.item_ids.tolist(), part.cache, strict=True))
    return found


def tower_of(model: Path) -> TwoTower:
    loaded = recipe.load_model(model).model
    assert isinstance(loaded, TwoTower)
    return loaded


def assert_embedded_by(model: Path, path: Path) -> None:
    """Every item of a generation is embedded by a model from its raw features there."""
    snapshot, found = open_snapshot(path), embedded(path)
    tower = tower_of(model)
    for number in range(snapshot.spec.num_partitions):
        part = snapshot.load_partition(number)
        if part is None:
            continue
        with torch.inference_mode():
            wanted = tower.embed_items(dict(part.catalogue.features)).half()
        for item, row in zip(part.catalogue.item_ids.tolist(), wanted, strict=True):
            assert torch.equal(found[item], row)


def test_the_live_items_are_embedded_by_the_new_model(
    world: World, state: StateDir, log: UpdateLog
) -> None:
    gone = int(world.prepared.catalogue.item_ids[0])
    append(log, film(NEW, "new"), film(NEW + 1, "short"), ItemDelete(gone, version=1))
    append(log, ItemPatch(NEW, fields={"title": "renamed"}, version=2))
    append(log, ItemDelete(NEW + 1, version=2))
    published = recluster.republish(state, world.config, model=world.models[1])
    found = embedded(published.path)
    assert NEW in found
    assert gone not in found
    assert NEW + 1 not in found
    assert len(found) == published.documents == 400
    assert_embedded_by(world.models[1], published.path)
    before = embedded(world.generation)
    assert not any(torch.equal(found[item], before[item]) for item in found.keys() & before)
    manifest = open_snapshot(published.path).manifest
    assert (manifest.log_id, manifest.cut) == (log.log_id, (5,))
    assert manifest.spec.defaults.probes == round(world.config.index.probe_share * 16)
    # The same without a model keeps the one that is live.
    state.control.change(lambda now: now.pointed("live", 1))
    again = recluster.republish(state, world.config)
    assert_embedded_by(world.models[0], again.path)


def test_a_model_that_reads_what_the_items_have_not_is_refused(
    world: World, state: StateDir, log: UpdateLog, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(world.models[1], tmp_path / "other"))
    file = model / recipe.DESCRIPTION
    text = file.read_text()
    assert text.count('"name": "genres"') > 0
    description = recipe.ModelDescription.model_validate_json(text)
    tables = [dict(one) for one in description.config["tables"]]
    reads = next(one for one in tables if one["name"] == "genres")
    reads["name"] = "moods"
    changed = {**description.config, "tables": tables, "pooled": []}
    loaded = recipe.load_model(world.models[1])
    other = loaded._replace(description=description.model_copy(update={"config": changed}))
    with pytest.raises(CommandError, match=r"does not fit the items of generation 1: .*moods"):
        recluster._schema_of(other, open_snapshot(world.generation).spec, model)
    with pytest.raises(CommandError, match="no model is trained in"):
        recluster.republish(state, world.config, model=tmp_path / "none")
    assert log.pins() == {}


def run(state: StateDir, *words: str) -> int:
    return verbs.run([*words, "--state", str(state.root)])


def test_data_that_hold_updates_are_published_at_their_place_in_the_log(
    world: World, state: StateDir, log: UpdateLog, films_folder: Path
) -> None:
    write_settings(state, world.config)
    patched = int(world.prepared.catalogue.item_ids[3])
    append(log, ItemPatch(patched, fields={"title": "old"}, version=1))
    append(log, ItemPatch(patched, fields={"title": "as exported"}, version=2))
    append(log, ItemPatch(patched, fields={"title": "after"}, version=3))
    data = ("publish", "--data", str(films_folder))
    assert run(state, *data, "--data-as-of", f"{log.log_id}:2") == ExitCode.OK
    assert run(state, *data) == ExitCode.OK
    assert run(state, *data, "--model", str(world.models[1]), "--data-as-of", "now") == ExitCode.OK
    paths = [state.generations / f"gen-{number:06d}" for number in (2, 3, 4)]
    cuts = [open_snapshot(path).manifest.cut for path in paths]
    assert cuts == [(2,), (), (3,)]
    assert_embedded_by(world.models[1], paths[2])
    # From data alone a trimmed log takes nothing, and with their moment it does.
    shutil.rmtree(paths[1])
    shutil.rmtree(state.generations / "gen-000001")
    state.control.change(lambda now: now.model_copy(update={"live": 4}))
    assert run(state, "snapshots", "--prune", "2") == ExitCode.OK
    assert log.start(0) == 2
    assert run(state, *data) == ExitCode.REFUSED
    assert run(state, *data, "--data-as-of", "1") == ExitCode.REFUSED
    assert run(state, *data, "--data-as-of", "2") == ExitCode.OK
    assert run(state, *data, "--data-as-of", "4") == ExitCode.USAGE
    assert run(state, "publish", "--recluster", "--data-as-of", "2") == ExitCode.USAGE


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_swaps_to_the_new_model_and_keeps_what_was_acked(
    world: World, state: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(state, world.config)
    launch.start(state, world.config, detached=False)
    try:
        record = state.read_record()
        assert record is not None
        gone = int(world.prepared.catalogue.item_ids[0])
        with Client(record.address, timeout_s=20.0) as client:

            def asked(after: object = ()) -> tuple[int, dict[int, str], torch.Tensor]:
                query = Query(
                    features={"history": world.prepared.catalogue.item_ids[1:5].tolist()},
                    k=400,
                    exact=True,
                    return_fields=["title"],
                    after=after,
                    min_coverage=1.0,
                )
                result = client.retrieve(query)
                titles = map(str, result.fields["title"])
                found = dict(zip(result.item_ids.tolist(), titles, strict=True))
                return result.generation, found, torch.as_tensor(result.scores)

            give_up_s = time.monotonic() + WAIT_S
            while True:
                result = client.apply([film(NEW, "first"), ItemDelete(gone)])
                if not result.rejected:
                    break
                assert time.monotonic() < give_up_s
            generation, before, scores = asked(result.tokens)
            assert (generation, before[NEW], gone in before) == (1, "first", False)
            words = ("publish", "--recluster", "--model", str(world.models[1]), "--activate")
            assert run(state, *words) == ExitCode.OK, capsys.readouterr().err
            result = client.apply([ItemPatch(NEW, fields={"title": "second"})])
            while (found := asked(result.tokens))[0] != 2:
                assert time.monotonic() < give_up_s
            _, after, new_scores = found
            assert (after[NEW], gone in after) == ("second", False)
            assert after.keys() == before.keys()
            assert not torch.equal(scores, new_scores)
    finally:
        launch.stop(state, timeout_s=20.0)
    assert_embedded_by(world.models[1], state.generations / "gen-000002")
