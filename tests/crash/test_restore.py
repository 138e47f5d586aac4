"""A generation that comes back from a URL on other shards answers bit for bit as before."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from history.recorder import Recorder, RecordingClient

from silvershard.cluster import Client, Query
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, Update
from silvershard.deploy import verbs
from silvershard.deploy.errors import ExitCode
from silvershard.deploy.processes import is_alive
from silvershard.deploy.state import StateDir
from silvershard.shard.generations import generation_dir, list_generations
from silvershard.shard.snapshot import open_snapshot

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OWN = 1 << 41


class Answer(NamedTuple):
    """All that a user sees of an answer."""

    generation: int
    content_hash: str
    cut: Any
    item_ids: tuple[int, ...]
    scores: bytes
    titles: tuple[str, ...]
    exhausted: bool


def run(state: StateDir, *words: str) -> None:
    assert verbs.run([*words, "--state", str(state.root)]) == ExitCode.OK


@contextmanager
def up(state: StateDir, shards: int, recorder: Recorder) -> Iterator[RecordingClient]:
    run(state, "up", "--shards", str(shards))
    try:
        record = state.read_record()
        assert record is not None
        assert len(record.shards) == shards
        with RecordingClient(Client(record.address, timeout_s=20.0), recorder) as client:
            yield client
    finally:
        run(state, "down")
    assert not [one for one in record.processes if is_alive(one)]


def directory(root: Path, log: Path) -> StateDir:
    """Return a new state directory that follows a log."""
    state = StateDir(root)
    state.create()
    settings = {
        "model": {"name": "films"},
        "listen": {"port": 0},
        "sharding": {"threads": 1},
        "index": {"golden_requests": 4},
        "updates": {"log": f"sqlite:///{log}"},
        "swap": {"max_recall_loss": 0.5},
        "runtime": {"start_timeout_s": 300.0},
    }
    state.config_file.write_text(yaml.safe_dump(settings))
    return state


def apply(client: RecordingClient, updates: Sequence[Update]) -> Any:
    while True:
        result = client.apply(updates)
        if not result.rejected:
            return result.tokens
        # For a moment nobody knows how much room a shard has that has just come.
        assert {one.code for one in result.rejected} == {"RESOURCE_EXHAUSTED"}


def updates(catalogue: Any, start: int) -> list[Update]:
    """Return forty updates of new items and of those of the catalogue."""
    films = catalogue.item_ids[start : start + 20].tolist()
    return [
        *[
            ItemUpsert(
                OWN + start + at,
                attributes={"genre": ["own"], "year": 1980 + at},
                signals={"popularity": at / 20, "freshness": 0.5},
                fields={"title": f"own {at}", "year": at},
                features={"movie": [films[at]], "genres": ["Drama", "Crime"][: at % 3]},
                version=1,
            )
            for at in range(20)
        ],
        *[ItemPatch(film, signals={"popularity": 0.75}, version=1) for film in films[:12]],
        *[ItemDelete(film, urgent=film % 2 == 0, version=1) for film in films[12:]],
    ]


def asked(client: RecordingClient, history: list[int], tokens: Any) -> list[Answer]:
    """Ask one question of every kind, of which all documents must answer."""
    kinds: list[dict[str, Any]] = [
        {},
        {"nprobe": 1, "k": 20},
        {"exact": True, "k": 200},
        {"filter": "genre:own AND year >= 1985"},
        {"filter": "NOT genre:own", "exclude_ids": history},
        {"features": {}},
        {"value": "rated + 0.5 * popularity"},
    ]
    found = []
    for kind in kinds:
        asks: dict[str, Any] = {"features": {"history": history}, "k": 50, **kind}
        query = Query(**asks, return_fields=["title"], min_coverage=1.0, after=tokens)
        result = client.retrieve(query)
        found.append(
            Answer(
                result.generation,
                result.content_hash,
                result.cut,
                tuple(result.item_ids.tolist()),
                result.scores.tobytes(),
                tuple(map(str, result.fields["title"])),
                result.exhausted,
            )
        )
    return found


@pytest.mark.timeout(600)
def test_another_number_of_shards_answers_bit_for_bit_at_the_same_cut(
    tmp_path: Path, crash: Any, recorder: Recorder, generation: Any
) -> None:
    for number in (1, 2):
        partitions = open_snapshot(generation.path).spec.num_partitions
        recorder.catalogue(number, generation.catalogue, num_partitions=partitions)
    log, url = tmp_path / "log.sqlite", f"file://{tmp_path}/copies"
    state = directory(tmp_path / "first", log)
    shutil.copytree(generation.path, generation_dir(state.generations, 1))
    history = generation.catalogue.item_ids[100:106].tolist()
    with up(state, 2, recorder) as client:
        apply(client, updates(generation.catalogue, 0))
        with recorder.activation(2):
            run(state, "publish", "--recluster", "--activate")
        # The copy does not hold these: they come from the log.
        tokens = apply(client, updates(generation.catalogue, 20))
        expected = asked(client, history, tokens)
        while expected[0].generation != 2:
            expected = asked(client, history, tokens)
        run(state, "snapshots", "--push", url)
    other = directory(tmp_path / "second", log)
    run(other, "restore", url, "2")
    assert list_generations(other.generations) == [2]
    with up(other, 3, recorder) as client:
        found = asked(client, history, tokens)
    assert found == expected
    assert [one.cut for one in found] == [tokens] * len(found)
    assert all(one.item_ids for one in found)
    crash.assert_right(recorder, "no_resurrected_delete", "read_your_writes", "no_ineligible_item")
    own = [one for one in found[3].item_ids if one >= OWN + 20]
    assert len(own) == 15
