import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import Query, retrieval_pb2
from silvershard.deploy.bench_requests import Requests, of_file, of_golden, of_users, prepare
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.state import StateDir
from silvershard.deploy.users import write_users
from silvershard.model.spec import SearchDefaults
from silvershard.shard.publish import publish_generation


def messages(requests: Requests) -> list[retrieval_pb2.RetrieveRequest]:
    return [retrieval_pb2.RetrieveRequest.FromString(one) for one in requests.messages]


def of_lines(path: Path, *lines: str, **more: Any) -> Requests:
    path.write_text("\n".join(lines))
    return of_file(path, **{"k": 10, "filter_text": "", **more})


def test_lines_of_a_file_are_requests(tmp_path: Path) -> None:
    made = of_lines(
        tmp_path / "r.jsonl",
        '{"features": {"history": [3, 4], "tags": [["noir", 0.5]]}, "k": 5, "exact": true}',
        "",
        '{"filter": "year >= $y", "params": {"y": 1990}, "exclude_ids": [8], "semantic_k": 0,'
        ' "filter_mode": "bloom", "min_coverage": 0.5, "after": [[77, 0, 5]],'
        ' "task_weights": {"like": 2}}',
        "{}",
        k=20,
        filter_text="lang:en",
    )
    first, second, third = messages(made)
    assert (list(first.named.features["history"].ints), first.k) == ([3, 4], 5)
    assert (first.search.exact, first.filter) == (True, "lang:en")
    assert len(first.named.features["tags"].weights) == 4
    assert (second.k, second.filter) == (20, "year >= $y")
    assert second.min_coverage == 0.5
    assert second.consistency.after[0].position == 5
    assert second.search.filter_mode == retrieval_pb2.FILTER_MODE_BLOOM
    assert (third.k, third.filter) == (20, "lang:en")
    assert made.described[0] == {
        "k": 5,
        "filter": "lang:en",
        "exact": True,
        "features": {"history": [3, 4], "tags": [["noir", 0.5]]},
    }
    assert made.described[1]["after"] == [[77, 0, 5]]
    assert made.described[1]["filter_mode"] == "BLOOM"
    json.dumps(made.described)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: must be JSON, got '{'"),
        ("[" * 100_000, "line 1: must be JSON"),
        ("[1]", r"line 1: must be a JSON object, got \[1\]"),
        ('{"kk": 1}', "line 1: unknown key 'kk'; there is after, alias,"),
        ('{"k": "5"}', "line 1: k must be int, got '5'"),
        ('{"k": true}', "line 1: k must be int, got True"),
        ('{"exact": 1}', "line 1: exact must be bool, got 1"),
        ('{"exclude_ids": 5}', "line 1: exclude_ids must be list, got 5"),
        ('{"generation": "a"}', "line 1: generation must be int or NoneType"),
        ('{"filter_mode": "none"}', "line 1: filter_mode must be one of DEFAULT, BLOOM"),
        ('{"features": {"a": {"b": 1}}}', "line 1: must be ids or numbers, or pairs"),
        ('{"k": -1}', "request 0 of .*: k: must be in"),
        ('{"after": [[1]]}', "line 1: "),
        ("", "must hold at least one request"),
    ],
)
def test_what_is_no_request_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        of_lines(tmp_path / "r.jsonl", line)
    assert caught.value.exit_code == ExitCode.USAGE


def test_users_are_drawn_once_each_and_ask_without_what_they_have_seen(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    write_users(state.users_file, np.repeat(np.arange(50), 2), np.arange(100))
    made = of_users(state, count=20, seed=1, k=5, filter_text="year >= 1990")
    users = [one["user"] for one in made.described]
    assert len(set(users)) == 20
    for user, message in zip(users, messages(made), strict=True):
        history = [2 * user, 2 * user + 1]
        assert list(message.named.features["history"].ints) == history
        assert list(message.exclude_ids) == history
        assert (message.k, message.filter) == (5, "year >= 1990")
    again = of_users(state, count=20, seed=1, k=5, filter_text="year >= 1990")
    assert again.messages == made.messages
    other = of_users(state, count=20, seed=2, k=5, filter_text="year >= 1990")
    assert other.messages != made.messages
    assert len(of_users(state, count=500, seed=1, k=5, filter_text="").messages) == 50


def test_golden_requests_stand_in_where_there_are_no_users(tmp_path: Path, generation: Any) -> None:
    state = StateDir(tmp_path)
    published = publish_generation(
        state.generations,
        name="films",
        model=generation.model,
        builder="two_tower",
        config=generation.model.config.model_dump(mode="json"),
        catalogue=generation.catalogue,
        schema=generation.schema,
        defaults=SearchDefaults(probes=4, ann_k=40),
        num_clusters=16,
        golden_requests=6,
        seed=18,
        generation=1,
    )
    made = of_golden(state, k=4, filter_text="")
    assert made.source == f"golden requests of {published.path}"
    assert {one.k for one in messages(made)} == {4}
    assert not any(one.search.exact for one in messages(made))
    filtered = of_golden(state, k=4, filter_text="year >= 1990")
    assert {one.filter for one in messages(filtered)} == {"year >= 1990"}


def test_nothing_to_ask_names_the_options_that_help(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"neither users nor a generation.*--requests FILE"):
        of_golden(StateDir(tmp_path), k=4, filter_text="")


def test_a_record_may_say_more_of_a_request() -> None:
    made = prepare("here", [(Query(k=3), {"user": 9})])
    assert made.described == ({"user": 9, "k": 3},)
