from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import Coverage, Query, Result
from silvershard.deploy import ask
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.state import StateDir
from silvershard.deploy.users import write_users
from silvershard.model.counts import Counts
from silvershard.model.request import WeightedIds


@pytest.fixture
def result() -> Result:
    return Result(
        item_ids=np.array([7, 3], dtype=np.int64),
        scores=np.array([1.5, 0.25], dtype=np.float32),
        task_scores={
            "rated": np.array([0.75, 0.5], dtype=np.float32),
            "liked": np.array([0.5, 0.25], dtype=np.float32),
        },
        fields={
            "year": [1995, None],
            "title": ["Heat", "Untitled"],
            "genres": ["Action|Crime", ""],
        },
        coverage=Coverage(
            documents=0.5,
            shards_total=2,
            shards_full=1,
            shards_failed=1,
            reasons=("SHARD_UNAVAILABLE",),
            shards=(),
        ),
        model="movielens",
        generation=4,
        content_hash="ab" * 32,
        shard_map_version=1,
        plan="probe(probes=32,ann_k=600)",
        exhausted=False,
        counts=Counts(addressed=9742, probed=2252, eligible=1234, ann_kept=1200, reranked=618),
        timings_us={"total": 15000, "ann": 4360, "extra": 5},
        warnings=("from the model",),
    )


def test_parameters_are_json_or_text() -> None:
    texts = ["y=1990", "r=0.5", "g=Comedy", 'q="5"', 'l=["a", "b"]', "e=a=b", "n="]
    assert ask.parse_params(texts) == {
        "y": 1990,
        "r": 0.5,
        "g": "Comedy",
        "q": "5",
        "l": ["a", "b"],
        "e": "a=b",
        "n": "",
    }


@pytest.mark.parametrize(
    "text", ["x", "=1", "x=true", "x=null", 'x={"a": 1}', f"x={'[' * 200_000}"]
)
def test_a_bad_parameter_is_wrong_usage(text: str) -> None:
    with pytest.raises(CommandError, match="--param") as caught:
        ask.parse_params([text])
    assert caught.value.exit_code == ExitCode.USAGE


def test_features_are_values_or_pairs_of_an_id_and_its_weight() -> None:
    texts = ['tags=[["heist", 2], ["noir", 0.5]]', "activity=[3.5, 2]", "friend=7", "mood=dark"]
    assert ask.parse_features(texts) == {
        "tags": WeightedIds(("heist", "noir"), (2.0, 0.5)),
        "activity": (3.5, 2),
        "friend": (7,),
        "mood": ("dark",),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "--feature must be name=value, got 'x'"),
        ("=1", "--feature must be name=value, got '=1'"),
        ("history=[1]", "--feature has no history: use --history"),
        ('x={"a": 1}', "--feature x must be ids or numbers, or pairs"),
        ("x=[[1, 2], 3]", "--feature x must be ids or numbers, or pairs"),
        (f'x=[["a", {10**400}]]', "--feature x weight 0 must be a number that fits float32"),
        (f"x={'[' * 200_000}", "--feature x must not be nested so deep"),
    ],
)
def test_a_bad_feature_is_wrong_usage(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        ask.parse_features([text])
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_feature_that_is_given_replaces_that_of_the_user(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    write_users(state.users_file, np.array([1]), np.array([8]), [{"age": (9.0,), "tags": ("a",)}])
    stored = ask.asker_of(state, user=1, history=None, include_seen=False)
    assert stored.features == {"age": (9.0,), "tags": ("a",)}
    given = ask.asker_of(state, user=1, history=None, include_seen=False, features={"tags": ("b",)})
    assert given.features == {"age": (9.0,), "tags": ("b",)}
    weighted = WeightedIds([5, 6], [1.0, 0.5])
    asker = ask.asker_of(state, user=None, history=weighted, include_seen=False)
    assert asker.exclude == [5, 6]
    assert asker.features == {"history": weighted}


def test_an_answer_is_described_in_full(result: Result) -> None:
    document = ask.described(result, ask.Asker([1], [1], ["a note"]))
    assert document["items"][0] == {
        "item_id": 7,
        "score": 1.5,
        "tasks": {"liked": 0.5, "rated": 0.75},
        "fields": {"year": 1995, "title": "Heat", "genres": "Action|Crime"},
    }
    assert document["coverage"] == 0.5
    assert (document["generation"], document["content_hash"]) == (4, "ab" * 32)
    assert document["warnings"] == ["a note", "from the model"]
    assert document["counts"]["eligible"] == 1234
    assert list(document["timings_us"]) == [*ask.STAGES, "extra", "total"]
    assert document["timings_us"]["filter"] == 0


def test_an_answer_is_shown_with_everything_a_person_wants(result: Result) -> None:
    shown = ask.render(ask.described(result, ask.Asker([], [], [])))
    for text in (
        "Heat",
        "1995",
        "Action, Crime",
        "1.5000",
        "0.7500",
        "0.5000, 1 of 2 shards failed (SHARD_UNAVAILABLE)",
        "4 of movielens",
        "probe(probes=32,ann_k=600)",
        "9,742 documents, 1,234 eligible, 2,252 probed, 1,200 kept, 618 reranked",
        "from the model",
        "4.36 ms",
        "15.0 ms",
    ):
        assert text in shown
    assert "exhausted" not in shown
    header = shown.splitlines()[0].split()
    assert header == ["#", "title", "year", "genres", "value", "liked", "rated", "id"]


def test_an_empty_answer_says_so(result: Result) -> None:
    document: dict[str, Any] = ask.described(result, ask.Asker([], [], []))
    shown = ask.render({**document, "items": [], "exhausted": True})
    assert "no item matches" in shown
    assert "fewer items match than were asked for" in shown


def test_a_text_is_asked_with_alone_and_beside_a_history(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    asked = [
        ask.asker_of(state, user=None, history=history, include_seen=False, text=text)
        for history, text in ((None, "a heist"), ([5], "a heist"), ([5], None))
    ]
    assert [one.request_features for one in asked] == [
        {"query": ["a heist"]},
        {"history": [5], "query": ["a heist"]},
        {"history": [5]},
    ]
    weighted = WeightedIds([5], [0.5])
    both = ask.asker_of(state, user=None, history=weighted, include_seen=False, text="rain")
    assert both.request_features == {"history": weighted, "query": ["rain"]}
    with pytest.raises(CommandError, match="--text must say something") as caught:
        ask.asker_of(state, user=None, history=None, include_seen=False, text=" ")
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unknown_user_is_answered_from_defaults_and_told(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    write_users(state.users_file, np.array([1, 1, 2]), np.array([8, 4, 6]))
    unknown = ask.asker_of(state, user=999, history=None, include_seen=False)
    assert (unknown.history, unknown.exclude) == ([], [])
    assert unknown.notes == ["user 999 is not in the data set: answered from the model's defaults"]
    known = ask.asker_of(state, user=1, history=None, include_seen=False)
    assert known.history == known.exclude == [8, 4]
    assert known.notes == []
    assert ask.asker_of(state, user=1, history=None, include_seen=True).exclude == []
    assert ask.asker_of(state, user=None, history=[5, 6], include_seen=False).exclude == [5, 6]


def test_the_address_given_is_asked(tmp_path: Path) -> None:
    assert ask.address_of(StateDir(tmp_path), "a:1") == "a:1"
    with pytest.raises(CommandError, match="start one with `silvershard up`"):
        ask.address_of(StateDir(tmp_path), "")


@pytest.mark.parametrize("query", [Query(k=-1), Query(k=2**32), Query(nprobe=-3)])
def test_a_number_that_no_message_can_hold_is_wrong_usage(query: Query) -> None:
    with pytest.raises(CommandError, match="must be in 0") as caught:
        ask.ask("127.0.0.1:1", query, timeout_s=1.0)
    assert caught.value.exit_code == ExitCode.USAGE
