import argparse
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster.tokens import TokenFile, Tokens
from silvershard.deploy import verbs
from silvershard.deploy.token_verbs import _run, lifetime

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``silvershard token`` on the file; its exit code and what it printed."""

    def invoke(*arguments: str) -> tuple[int, str, str]:
        try:
            code = verbs.run(["token", *arguments, "--file", str(path)])
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


def as_json(found: tuple[int, str, str]) -> Any:
    code, out, err = found
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_token_is_shown_once_and_lets_its_owner_in(run: Run, path: Path) -> None:
    code, out, err = run("create", "alice", "--role", "query", "--tenant", "acme")
    assert (code, err) == (0, "")
    token = out.splitlines()[0]
    caller = Tokens(path).caller(token)
    assert (caller.name, set(caller.roles), caller.tenant) == ("alice", {"query"}, "acme")
    code, out, err = run("list")
    assert "alice" in out
    assert token not in out
    assert token not in path.read_text()


def test_roles_and_the_end_are_as_they_were_given(run: Run) -> None:
    before_s = int(time.time())
    options = ("--role", "update", "--role", "query", "--expires", "90d", "--output", "json")
    made = as_json(run("create", "feed", *options))
    assert made["roles"] == ["update", "query"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["expires"])
    (row,) = TokenFile.read(Path(made["file"])).tokens
    assert 0 <= row.expires_unix_s - before_s - 90 * 86400 <= 60
    assert as_json(run("create", "plain", "--output", "json"))["roles"] == ["query"]
    listed = as_json(run("list", "--output", "json"))["tokens"]
    assert [one["name"] for one in listed] == ["feed", "plain"]
    assert not any(one["expired"] for one in listed)


def test_a_token_is_revoked_by_its_id_or_all_of_a_name(run: Run, path: Path) -> None:
    made = [as_json(run("create", "alice", "--output", "json")) for _ in range(3)]
    other = as_json(run("create", "bob", "--output", "json"))
    assert run("revoke", made[0]["token_id"])[0] == 0
    assert len(TokenFile.read(path).tokens) == 3
    gone = as_json(run("revoke", "alice", "--output", "json"))["revoked"]
    assert [one["token_id"] for one in gone] == [one["token_id"] for one in made[1:]]
    assert [one.token_id for one in TokenFile.read(path).tokens] == [other["token_id"]]
    code, _, err = run("revoke", "alice")
    assert (code, "no token of 'alice'" in err) == (2, True)


def test_those_who_change_it_at_the_same_time_lose_nothing(path: Path) -> None:
    threads = [
        threading.Thread(target=create, args=(path, f"name-{number}")) for number in range(8)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert len(TokenFile.read(path).tokens) == 8


def create(path: Path, name: str) -> None:
    options = {"what": "create", "name": name, "file": path, "role": None, "tenant": ""}
    _run(argparse.Namespace(**options, expires=0, output="json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create",), "token create needs a NAME"),
        (("revoke",), "token revoke needs a NAME"),
        (("create", "a", "--role", "root"), "invalid choice: 'root'"),
        (("create", "a", "--expires", "soon"), "must be a time as 90d"),
        (("create", "x" * 65), "token: name"),
        (("list", "--role", "query"), "go with create"),
        (("list",), "No such file"),
    ],
)
def test_wrong_usage_is_said(run: Run, path: Path, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert not path.exists()


def test_the_file_is_that_of_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ["--state", str(tmp_path / "s"), "--output", "json"]
    assert verbs.run(["token", "create", "alice", *state]) == 2
    assert "set security.tokens, or give --file" in capsys.readouterr().err
    monkeypatch.setenv("SILVERSHARD__SECURITY__TOKENS", str(tmp_path / "t.json"))
    assert verbs.run(["token", "create", "alice", *state]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("30m", 1800), ("12h", 43200), ("90d", 7776000)]
)
def test_a_lifetime_has_a_unit(text: str, seconds: int) -> None:
    assert lifetime(text) == seconds
