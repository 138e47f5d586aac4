"""The verbs ``update`` and ``delete``: change one item of a running cluster."""

import argparse
import json
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from silvershard.deploy.access import access_options, dialer_of
from silvershard.deploy.arguments import state_of
from silvershard.deploy.errors import CommandError, ExitCode

COLUMNS = {
    "attribute": ("attributes", "what filters read, such as year=1994 or genre='[\"Drama\"]'"),
    "signal": ("signals", "a number that value formulas read"),
    "field": ("fields", "what answers return"),
    "feature": ("features", "a raw feature that the item tower reads"),
}
"""Options of ``update`` by the columns that they give."""


def add_options(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare the options of both verbs.

    Args:
        verb: given a name, a text and the function that runs it, adds a parser that knows the
            state directory, the time limit and the form of the output.
    """
    update = verb("update", "change one item of a running cluster", run_update)
    update.add_argument("item_id", type=int, nargs="?", metavar="ITEM", help="the item")
    update.add_argument(
        "--from",
        dest="file",
        metavar="FILE",
        help="the update as a JSON object instead of options, - reads it from standard input: "
        '{"op": "upsert", "item_id": 5, "attributes": {"year": 1994}}',
    )
    for option, (_, text) in COLUMNS.items():
        update.add_argument(
            f"--{option}", action="append", default=[], metavar="NAME=VALUE", help=text
        )
    update.add_argument(
        "--replace",
        action="store_true",
        help="write the whole item: what is not given becomes empty (default: it stays)",
    )
    update.add_argument(
        "--ttl", type=float, metavar="S", help="with --replace: delete it after so many seconds"
    )
    delete = verb("delete", "delete one item of a running cluster", run_delete)
    delete.add_argument("item_id", type=int, metavar="ITEM", help="the item")
    delete.add_argument(
        "--urgent", action="store_true", help="go ahead of all updates that are waiting"
    )
    for parser in (update, delete):
        parser.add_argument(
            "--version", type=int, metavar="N", help="of the change (default: the next one)"
        )
        parser.add_argument(
            "--if-version",
            type=int,
            metavar="N",
            help="change it only if this is its version; 0: only if there is no such item",
        )
        parser.add_argument(
            "--applied", action="store_true", help="wait until every replica has applied it"
        )
        parser.add_argument("--dry-run", action="store_true", help="show it and send nothing")
        parser.add_argument("--address", default="", metavar="HOST:PORT", help="router to ask")
        access_options(parser)


def run_update(options: argparse.Namespace, address: Callable[[], str]) -> dict[str, Any]:
    """Carry out the verb ``update`` and return what became of it.

    Args:
        options: as declared.
        address: returns the router to ask.

    Raises:
        CommandError: if the options make no update.
        RequestRefused: if the cluster refuses it.
    """
    return _change(options, update_document(options), address)


def run_delete(options: argparse.Namespace, address: Callable[[], str]) -> dict[str, Any]:
    """Carry out the verb ``delete`` and return what became of it.

    Args:
        options: as declared.
        address: returns the router to ask.

    Raises:
        CommandError: if the options make no update.
        RequestRefused: if the cluster refuses it.
    """
    document = {"op": "delete", "item_id": options.item_id, **_versions(options)}
    return _change(options, {**document, "urgent": options.urgent}, address)


def update_document(options: argparse.Namespace) -> object:
    """Return the update that the options of ``update`` ask for, as a JSON value.

    Raises:
        CommandError: if they contradict each other, or a value cannot be read.
    """
    columns = {
        what: _named_values(f"--{option}", getattr(options, option))
        for option, (what, _) in COLUMNS.items()
    }
    if options.file is not None:
        if options.item_id is not None or any(columns.values()) or options.replace or options.ttl:
            raise CommandError("--from gives the whole update: no other", ExitCode.USAGE)
        return _read(options.file)
    if options.item_id is None:
        raise CommandError("name the item, or give the update with --from", ExitCode.USAGE)
    if options.ttl is not None and not options.replace:
        raise CommandError("--ttl needs --replace: a patch keeps the time", ExitCode.USAGE)
    return {
        "op": "upsert" if options.replace else "patch",
        "item_id": options.item_id,
        **{what: given for what, given in columns.items() if given},
        **({} if options.ttl is None else {"ttl_s": options.ttl}),
        **_versions(options),
    }


def render(document: dict[str, Any]) -> str:
    """Return what became of a change for people."""
    change = document["update"]
    what = f"{change.get('op', 'upsert')} of item {change['item_id']}"
    if document["dry_run"]:
        return f"would send the {what}: {json.dumps(change, ensure_ascii=False)}"
    places = ", ".join(
        f"position {one['position']} of log partition {one['partition']}"
        for one in document["tokens"]
    )
    state = "applied by every replica" if document["applied"] else "durable, and applied shortly"
    return f"{what}: {state} ({places})"


def _versions(options: argparse.Namespace) -> dict[str, int]:
    given = {"version": options.version, "if_version": options.if_version}
    return {name: value for name, value in given.items() if value is not None}


def _named_values(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return values from ``name=value``; a value is JSON, or else plain text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(
                f"{option} must be name=value, got {reprlib.repr(text)}", ExitCode.USAGE
            )
        if name in found:
            raise CommandError(f"{option} {name} is given twice", ExitCode.USAGE)
        try:
            found[name] = json.loads(value)
        except RecursionError:
            raise CommandError(f"{option} {name} is nested too deep", ExitCode.USAGE) from None
        except ValueError:
            found[name] = value
    return found


def _read(file: str) -> object:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise CommandError(f"{file} is nested too deep", ExitCode.USAGE) from None
    except ValueError as error:
        raise CommandError(f"{file} is no JSON: {error}", ExitCode.USAGE) from None


def _change(
    options: argparse.Namespace, document: object, address: Callable[[], str]
) -> dict[str, Any]:
    from silvershard.cluster import Client, Durability, RequestRefused
    from silvershard.cluster.update_message import mutation_to
    from silvershard.deploy.update_json import update_from

    try:
        update = update_from(document)
        mutation_to(update)
    except ValueError as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    found: dict[str, Any] = {"update": document, "dry_run": options.dry_run, "applied": False}
    if options.dry_run:
        return {**found, "tokens": []}
    dialer = dialer_of(options, state_of(options))
    durability = Durability.APPLIED_ALL_READY if options.applied else Durability.LOGGED
    with Client(address(), timeout_s=options.timeout or 10.0, dialer=dialer) as client:
        result = client.apply([update], durability=durability)
    for one in result.rejected:
        raise RequestRefused(one.code, one.reason, reason="UPDATE_REJECTED")
    tokens = [token._asdict() for token in result.tokens]
    return {**found, "applied": options.applied, "tokens": tokens}
