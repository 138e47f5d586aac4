import argparse
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from silvershard.cluster import (
    ApplyResult,
    Durability,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    RequestRefused,
    UpdateRejection,
    UpdateToken,
)
from silvershard.cluster.dialer import Dialer
from silvershard.deploy import change
from silvershard.deploy.errors import CommandError, ExitCode

ACCEPTED = ApplyResult((UpdateToken(9, 0, 12),), ())


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """``parse("update", "5")`` gives the options as the command line does."""
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)

    def verb(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text)
        added.set_defaults(run=run, timeout=None, state=tmp_path / "none")
        return added

    change.add_options(verb)
    return lambda *arguments: parser.parse_args(arguments)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was applied, and with what durability; ``sent.answer`` is what came back."""
    calls: list[Any] = []

    class FakeClient:
        def __init__(self, address: str, *, timeout_s: float, dialer: Dialer) -> None:
            assert (address, timeout_s, dialer) == ("here:1", 10.0, Dialer("own"))

        def __enter__(self) -> "FakeClient":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def apply(self, updates: Sequence[Any], *, durability: Durability) -> ApplyResult:
            calls.append((*updates, durability))
            return ACCEPTED if updates[0].item_id != 404 else REJECTED

    monkeypatch.setattr("silvershard.cluster.Client", FakeClient)
    monkeypatch.setenv("SILVERSHARD_TOKEN", "own")
    return calls


REJECTED = ApplyResult((), (UpdateRejection(0, "NOT_FOUND", "there is no item 404 to patch"),))


def run(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = options.run(options, lambda: "here:1")
    return found


def test_columns_of_an_item_are_changed(parse: Any, sent: list[Any]) -> None:
    options = parse(
        *("update", "5", "--attribute", "year=1994", "--attribute", 'genre=["Drama"]'),
        *("--signal", "popularity=0.5", "--field", "title=The Film", "--field", "year=null"),
        *("--feature", "movie=[3]", "--if-version", "2"),
    )
    document = run(options)
    patch = ItemPatch(
        5,
        attributes={"year": 1994, "genre": ["Drama"]},
        signals={"popularity": 0.5},
        fields={"title": "The Film", "year": None},
        features={"movie": [3]},
        if_version=2,
    )
    assert sent == [(patch, Durability.LOGGED)]
    assert change.render(document) == (
        "patch of item 5: durable, and applied shortly (position 12 of log partition 0)"
    )
    json.dumps(document)


def test_a_whole_item_is_replaced(parse: Any, sent: list[Any]) -> None:
    document = run(parse("update", "5", "--replace", "--ttl", "60", "--version", "7", "--applied"))
    assert sent == [(ItemUpsert(5, ttl_s=60.0, version=7), Durability.APPLIED_ALL_READY)]
    assert "upsert of item 5: applied by every replica" in change.render(document)


def test_an_item_is_deleted(parse: Any, sent: list[Any]) -> None:
    document = run(parse("delete", "5", "--urgent", "--version", "3"))
    assert sent == [(ItemDelete(5, urgent=True, version=3), Durability.LOGGED)]
    assert change.render(document).startswith("delete of item 5: durable")


def test_an_update_is_read_from_a_file_or_standard_input(
    parse: Any, sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '{"item_id": 5, "attributes": {"year": 1994}}'
    path = tmp_path / "update.json"
    path.write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    for name in (str(path), "-"):
        run(parse("update", "--from", name))
    assert sent == [(ItemUpsert(5, attributes={"year": 1994}), Durability.LOGGED)] * 2


def test_a_dry_run_sends_nothing(parse: Any, sent: list[Any]) -> None:
    document = run(parse("update", "5", "--signal", "popularity=1", "--dry-run"))
    assert not sent
    assert change.render(document) == (
        'would send the patch of item 5: {"op": "patch", "item_id": 5, '
        '"signals": {"popularity": 1}}'
    )
    with pytest.raises(CommandError, match="item_id: must be in"):
        run(parse("delete", "--dry-run", "--", "-5"))


def test_a_rejection_is_that_of_the_command(parse: Any, sent: list[Any]) -> None:
    with pytest.raises(RequestRefused, match="there is no item 404") as raised:
        run(parse("update", "404"))
    assert raised.value.code == "NOT_FOUND"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["update"], "name the item, or give the update with --from"),
        (["update", "5", "--from", "x"], "--from gives the whole update"),
        (["update", "--from", "x", "--replace"], "--from gives the whole update"),
        (["update", "5", "--ttl", "3"], "--ttl needs --replace"),
        (["update", "5", "--signal", "popularity"], "--signal must be name=value"),
        (["update", "5", "--signal", "=1"], "--signal must be name=value"),
        (["update", "5", "--signal", "a=1", "--signal", "a=2"], "--signal a is given twice"),
        (["update", "5", "--signal", "a=x"], "signals.a: must be a number, got 'x'"),
        (["update", "5", "--attribute", "a=" + "[" * 100_000], "--attribute a is nested too deep"),
        (["update", "5", "--attribute", 'a=[1, "x"]'], "attributes.a: must be ints, floats or"),
    ],
)
def test_options_that_make_no_update_are_wrong_usage(
    parse: Any, sent: list[Any], arguments: list[str], text: str
) -> None:
    with pytest.raises(CommandError, match=text) as raised:
        run(parse(*arguments))
    assert raised.value.exit_code is ExitCode.USAGE
    assert not sent


def test_a_file_that_is_no_update_is_refused(parse: Any, sent: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    for text, message in (
        ("{", "is no JSON"),
        ("[" * 100_000, "is nested too deep"),
        ("[]", "must be a JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(CommandError, match=message):
            run(parse("update", "--from", str(path)))
    with pytest.raises(CommandError, match="cannot be read"):
        run(parse("update", "--from", str(tmp_path / "nothing")))
    assert not sent
