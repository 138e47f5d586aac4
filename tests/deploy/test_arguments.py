import argparse
import json
from pathlib import Path

import pytest

from silvershard.deploy.arguments import (
    generation_number,
    listen_address,
    load_settings,
    parents,
    positive,
    query_options,
    reporter,
    serving_options,
    show,
    state_of,
    weighted_history,
)
from silvershard.deploy.state import StateDir
from silvershard.model.request import WeightedIds


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(parents=[*parents()])
    serving_options(made)
    return made


def test_a_generation_is_a_number_and_the_newest_is_none_of_them() -> None:
    assert generation_number("7") == 7
    assert generation_number("latest") == 0
    for text in ("0", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="a number from 1, or latest"):
            generation_number(text)


def test_times_addresses_and_histories_are_checked() -> None:
    assert positive("0.5") == 0.5
    assert listen_address("[::1]:80") == ("::1", 80)
    assert weighted_history("1:0.5,2") == WeightedIds([1, 2], [0.5, 1.0])
    for kind, text in ((positive, "0"), (listen_address, "80"), (weighted_history, "a")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_options_decide_only_what_they_were_given_for(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    state = StateDir(tmp_path)
    given = parser.parse_args(["--shards", "3", "--replicas", "2", "--listen", "::1:9"])
    config = load_settings(given, state, **{"runtime.drain_s": 1.0, "admission.queue": None}).config
    assert (config.sharding.shards, config.sharding.replicas) == (3, 2)
    assert (config.listen.host, config.listen.port, config.runtime.drain_s) == ("::1", 9, 1.0)
    (tmp_path / "config.yaml").write_text("sharding: {replicas: 4}")
    given = parser.parse_args(["--state", str(tmp_path)])
    assert load_settings(given, state_of(given)).config.sharding.replicas == 4


def test_with_json_only_the_answer_is_on_standard_output(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("json", "table"):
        options = parser.parse_args(["--output", form])
        reporter(options)("a line")
        show(options, {"a": 1}, lambda: "text")
        out, err = capsys.readouterr()
        if form == "json":
            assert (json.loads(out), err) == ({"a": 1}, "a line\n")
        else:
            assert (out, err) == ("a line\ntext\n", "")


def test_a_question_names_one_user(parser: argparse.ArgumentParser) -> None:
    query_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--user", "1", "--history", "2"])
