import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.mutation_codec import logged
from silvershard.cluster.update_log import NewRecord, UpdateLog, open_log
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.deploy import recluster, verbs
from silvershard.deploy.config import Config, load
from silvershard.deploy.errors import CommandError, ExitCode, Refused
from silvershard.deploy.state import StateDir
from silvershard.deploy.state_log import log_url
from silvershard.model.request import Request
from silvershard.shard.generations import generation_dir
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import open_snapshot

OWN = 1 << 41


@pytest.fixture
def state(tmp_path: Path, generation: Any) -> StateDir:
    made = StateDir(tmp_path / "s")
    made.create()
    shutil.copytree(generation.path, generation_dir(made.generations, 1))
    return made


@pytest.fixture
def config() -> Config:
    return load(None, environ={}, options={"index.golden_requests": 4})


@pytest.fixture
def log(state: StateDir, config: Config) -> Iterator[UpdateLog]:
    made = open_log(log_url(state, config))
    yield made
    made.close()


def append(log: UpdateLog, *updates: Update) -> None:
    epoch = log.acquire(0)
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
    log.append(0, epoch, records, 1)


def own(item: int, version: int = 1, year: int = 2000) -> ItemUpsert:
    return ItemUpsert(
        OWN + item,
        attributes={"genre": ["own"], "year": year},
        signals={"popularity": 1.0},
        fields={"title": f"own {item}"},
        features={"movie": [OWN + item], "genres": ["Drama"]},
        version=version,
    )


def eligible(path: Path, text: str) -> list[int]:
    retriever, _ = load_retriever(path)
    (answer,) = retriever([Request(k=1000, filter=text, exact=True)])
    return sorted(answer.item_ids.tolist())


@pytest.mark.slow
def test_the_next_generation_holds_what_the_log_made_of_the_live_one(
    state: StateDir, config: Config, log: UpdateLog, generation: Any
) -> None:
    gone = int(generation.catalogue.item_ids[0])
    append(log, own(0), own(1), own(2), ItemDelete(gone, version=1))
    append(log, ItemPatch(OWN + 1, attributes={"year": 2024}, version=2))
    append(log, ItemDelete(OWN + 2, version=2))
    heard: list[str] = []
    published = recluster.republish(state, config, heard.append)
    assert heard[0] == recluster.READING
    manifest = open_snapshot(published.path).manifest
    assert (manifest.log_id, manifest.cut) == (log.log_id, (6,))
    assert (published.generation, published.documents) == (2, 601)
    assert manifest.spec.num_clusters == 16
    assert manifest.spec.defaults.probes == 4
    assert eligible(published.path, "genre:own") == [OWN, OWN + 1]
    assert eligible(published.path, "genre:own AND year >= 2010") == [OWN + 1]
    assert gone not in eligible(published.path, "")
    assert list(log.pins().values()) == [(6,)]
    # From there it goes on at its cut.
    state.control.change(lambda now: now.pointed("live", 2))
    append(log, own(3))
    third = recluster.republish(state, config)
    assert open_snapshot(third.path).manifest.cut == (7,)
    assert eligible(third.path, "genre:own") == [OWN, OWN + 1, OWN + 3]


def test_the_live_generation_is_the_base_and_not_the_newest(
    state: StateDir, config: Config, log: UpdateLog
) -> None:
    generation_dir(state.generations, 7).mkdir()
    state.control.change(lambda now: now.pointed("live", 1))
    append(log, own(0))
    assert recluster.republish(state, config).generation == 8


def test_another_number_of_clusters_keeps_the_share_that_is_probed(
    state: StateDir, log: UpdateLog
) -> None:
    append(log, own(0))
    config = load(None, environ={}, options={"index.clusters": 32, "index.golden_requests": 0})
    spec = open_snapshot(recluster.republish(state, config).path).spec
    assert (spec.num_clusters, spec.defaults.probes, spec.defaults.ann_k) == (32, 8, 40)


def test_without_a_log_there_is_nothing_to_publish_again(state: StateDir, config: Config) -> None:
    with pytest.raises(CommandError, match="there is no update log in"):
        recluster.republish(state, config)


def test_what_was_trimmed_cannot_be_published_again(
    state: StateDir, config: Config, log: UpdateLog
) -> None:
    append(log, own(0), own(1))
    log.trim(0, 1)
    with pytest.raises(Refused, match="can be brought up to date no more"):
        recluster.republish(state, config)


def test_the_verb_publishes_and_says_what_comes_next(
    state: StateDir, log: UpdateLog, capsys: pytest.CaptureFixture[str]
) -> None:
    append(log, own(0))
    words = ["publish", "--recluster", "--state", str(state.root)]
    assert verbs.run([*words, "--data", "x"]) == ExitCode.USAGE
    assert verbs.run([*words, "--activate"]) == ExitCode.FAILED
    assert "no cluster runs on" in capsys.readouterr().err
    assert verbs.run(words) == ExitCode.OK
    out = capsys.readouterr().out
    assert "published generation 2, 601 items" in out
    assert "next: silvershard activate 2" in out
    assert os.path.samefile(
        state.generations / "gen-000001" / "tables" / "item_tables.movie.safetensors",
        state.generations / "gen-000002" / "tables" / "item_tables.movie.safetensors",
    )
