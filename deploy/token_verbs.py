"""The verbs ``token create``, ``token list`` and ``token revoke``."""

import argparse
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silvershard.cluster.roles import ROLES
from silvershard.cluster.tokens import TokenFile, make_token
from silvershard.deploy.arguments import AddVerb, Parents, load_settings, show, state_of
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.tables import table
from silvershard.shard.errors import ConfigError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_verbs(verb: AddVerb, shared: Parents) -> None:
    """Declare the verb and what it does."""
    text = "make, list or revoke the bearer tokens that a cluster knows"
    parser = verb("token", text, _run, shared.state, shared.config)
    parser.add_argument("what", choices=("create", "list", "revoke"))
    parser.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="whose token; to revoke, or its id"
    )
    parser.add_argument(
        "--role",
        action="append",
        choices=ROLES,
        help="what it is good for; may be given several times (default query)",
    )
    parser.add_argument(
        "--tenant", default="", metavar="NAME", help="the only tenant that it acts for"
    )
    parser.add_argument(
        "--expires",
        type=lifetime,
        default=0,
        metavar="TIME",
        help="how long it is good: 90d, 12h, 30m (default: until it is revoked)",
    )
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="file of tokens (default security.tokens)"
    )
    parser.set_defaults(wrong_usage=parser.error)


def lifetime(text: str) -> int:
    """Return seconds."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a time as 90d, 12h or 30m, got {text!r}")
    return int(found[1]) * _UNITS_S[found[2]]


def _run(options: argparse.Namespace) -> int:
    path = options.file or load_settings(options, state_of(options)).config.security.tokens
    if not path:
        raise CommandError("no file of tokens: set security.tokens, or give --file", ExitCode.USAGE)
    if options.what != "list" and not options.name:
        options.wrong_usage(f"token {options.what} needs a NAME")
    if options.what != "create" and (options.role or options.tenant or options.expires):
        options.wrong_usage("--role, --tenant and --expires go with create")
    run = {"create": _create, "list": _list, "revoke": _revoke}[options.what]
    return run(options, Path(path))


def _create(options: argparse.Namespace, path: Path) -> int:
    now_s = int(time.time())
    made = make_token(
        options.name,
        options.role or ["query"],
        tenant=options.tenant,
        now_unix_s=now_s,
        expires_unix_s=now_s + options.expires if options.expires else 0,
    )
    with _changing(path):
        known = TokenFile.read(path) if path.exists() else TokenFile()
        TokenFile(tokens=(*known.tokens, made.row)).write(path)
    document = {**made.row.described(now_s), "token": made.text, "file": str(path)}
    show(options, document, lambda: f"{made.text}\nIt is shown once, and kept nowhere.")
    return ExitCode.OK


def _list(options: argparse.Namespace, path: Path) -> int:
    found = [one.described(time.time()) for one in TokenFile.read(path).tokens]
    show(options, {"file": str(path), "tokens": found}, lambda: _render(found))
    return ExitCode.OK


def _revoke(options: argparse.Namespace, path: Path) -> int:
    with _changing(path):
        known = TokenFile.read(path)
        gone = [one for one in known.tokens if options.name in (one.token_id, one.name)]
        if not gone:
            raise CommandError(f"no token of {options.name!r} in {path}", ExitCode.USAGE)
        left = tuple(one for one in known.tokens if one not in gone)
        TokenFile(tokens=left).write(path)
    now_s = time.time()
    document = {"file": str(path), "revoked": [one.described(now_s) for one in gone]}
    named = ", ".join(f"{one.token_id} of {one.name}" for one in gone)
    show(options, document, lambda: f"revoked {named}; routers refuse it within a second")
    return ExitCode.OK


def _render(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(one["token_id"]),
            str(one["name"]),
            ", ".join(one["roles"]),
            str(one["tenant"] or "any"),
            str(one["created"]),
            f"{one['expires'] or 'never'}{' (expired)' if one['expired'] else ''}",
        ]
        for one in found
    ]
    return table(["id", "name", "roles", "tenant", "created", "expires"], rows)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keep other commands from changing the file at the same time."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"security.tokens {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
