"""What ``silvershard bench`` asks: users of the data set, golden requests, or those of a file."""

import dataclasses
import json
import random
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from silvershard.cluster import Client, Query
from silvershard.cluster.consistency import UpdateToken
from silvershard.deploy.ask import asker_of
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.feature_json import from_json, to_json
from silvershard.deploy.state import StateDir
from silvershard.deploy.users import read_user_ids
from silvershard.model.request import FilterMode, Request

_DEFAULTS = Query()
_FIELDS = {one.name for one in dataclasses.fields(Query)}


class Requests(NamedTuple):
    """The different requests of a load, serialised, with the parameters of each."""

    source: str
    """Where they come from, for people."""
    messages: tuple[bytes, ...]
    described: tuple[Mapping[str, Any], ...]


def prepare(source: str, queries: Iterable[tuple[Query, Mapping[str, Any]]]) -> Requests:
    """Return queries, each with what else its record shall say, as they go over the wire.

    Raises:
        CommandError: if one has no form there, or there is none.
    """
    messages, described = [], []
    # It never connects: it only knows how a query is written.
    with Client("127.0.0.1:1") as client:
        for number, (query, more) in enumerate(queries):
            try:
                messages.append(client.message(query).SerializeToString())
            except ValueError as error:
                raise CommandError(
                    f"request {number} of {source}: {error}", ExitCode.USAGE
                ) from None
            described.append({**more, **_described(query)})
    if not messages:
        raise CommandError(f"{source} must hold at least one request", ExitCode.USAGE)
    return Requests(source, tuple(messages), tuple(described))


def _described(query: Query) -> dict[str, Any]:
    """Return the fields of a query that are no defaults, as JSON values."""
    found: dict[str, Any] = {"k": query.k}
    for name in sorted(_FIELDS - {"k", "features"}):
        value = getattr(query, name)
        if value != getattr(_DEFAULTS, name):
            if name == "after":
                value = [list(token) for token in value]
            if name == "filter_mode":
                value = query.filter_mode.name
            found[name] = list(value) if isinstance(value, tuple) else value
    if query.features:
        found["features"] = {name: to_json(one) for name, one in query.features.items()}
    return found


def of_file(path: Path, *, k: int, filter_text: str) -> Requests:
    """Return the requests of a file of JSON lines, whose keys are the fields of ``Query``.

    Args:
        path: of the file.
        k: results wanted of a line that does not say.
        filter_text: filter of a line that has none.

    Raises:
        CommandError: naming the line that is no request.
    """

    def queries() -> Iterator[tuple[Query, Mapping[str, Any]]]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    given = {"k": k, "filter": filter_text, **_object(path, number, line)}
                    try:
                        yield _query_of(given), {}
                    except (TypeError, ValueError) as error:
                        raise _bad_line(path, number, str(error)) from None

    return prepare(str(path), queries())


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad_line(path, number, f"must be JSON, got {reprlib.repr(line)}") from None
    if not isinstance(found, dict):
        raise _bad_line(path, number, f"must be a JSON object, got {reprlib.repr(found)}")
    unknown = sorted(found.keys() - _FIELDS)
    if unknown:
        raise _bad_line(
            path, number, f"unknown key {unknown[0]!r}; there is {', '.join(sorted(_FIELDS))}"
        )
    return found


def _bad_line(path: Path, number: int, message: str) -> CommandError:
    return CommandError(f"{path} line {number}: {message}", ExitCode.USAGE)


def _query_of(given: dict[str, Any]) -> Query:
    """Return a request from its JSON values.

    Raises:
        TypeError, ValueError: if a value is of another kind.
    """
    for name, value in given.items():
        default = getattr(_DEFAULTS, name)
        wanted: tuple[type, ...] = (type(default),)
        if name in ("min_coverage", "max_staleness_s"):
            wanted = (int, float, type(None))
        elif name in ("semantic_k", "generation"):
            wanted = (int, type(None))
        elif isinstance(default, tuple):
            wanted = (list,)
        elif name == "filter_mode":
            wanted = (str,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            kinds = " or ".join(one.__name__ for one in wanted)
            raise TypeError(f"{name} must be {kinds}, got {reprlib.repr(value)}")
    made = dict(given)
    if "features" in made:
        made["features"] = {name: from_json(one) for name, one in made["features"].items()}
    if "filter_mode" in made:
        try:
            made["filter_mode"] = FilterMode[made["filter_mode"].upper()]
        except KeyError:
            known = ", ".join(one.name for one in FilterMode)
            raise ValueError(
                f"filter_mode must be one of {known}, got {made['filter_mode']!r}"
            ) from None
    if "after" in made:
        made["after"] = [UpdateToken(*token) for token in made["after"]]
    return Query(**made)


def of_users(state: StateDir, *, count: int, seed: int, k: int, filter_text: str) -> Requests:
    """Return a request for each of some users of the data set, drawn without one coming twice.

    They ask as ``silvershard query --user`` does, which leaves out what they have seen.

    Raises:
        CommandError: if the file of the users is damaged, or holds nobody.
    """
    known = read_user_ids(state.users_file)
    chosen = random.Random(seed).sample(known, min(count, len(known)))

    def queries() -> Iterator[tuple[Query, Mapping[str, Any]]]:
        for user in chosen:
            asker = asker_of(state, user=user, history=None, include_seen=False)
            query = Query(
                features=asker.request_features,
                k=k,
                filter=filter_text,
                exclude_ids=tuple(asker.exclude),
                return_task_scores=False,
            )
            yield query, {"user": user}

    return prepare(str(state.users_file), queries())


def of_golden(state: StateDir, *, k: int, filter_text: str) -> Requests:
    """Return the golden requests of the generation that runs, with other ``k`` and filter.

    Exact ones are left out: nobody asks for them under load.

    Raises:
        CommandError: if there is no generation with golden requests.
    """
    from silvershard.shard.generations import generation_dir, list_generations
    from silvershard.shard.golden import read_golden
    from silvershard.shard.snapshot import open_snapshot

    record = state.read_record() if state.root.is_dir() else None
    published = list_generations(state.generations)
    generation = record.generation if record else max(published, default=0)
    if generation not in published:
        raise CommandError(
            f"{state.root} has neither users nor a generation to take requests from: name the "
            "state directory of the cluster with --state, or give --requests FILE"
        )
    path = generation_dir(state.generations, generation)
    cases = read_golden(open_snapshot(path)).cases

    def queries() -> Iterator[tuple[Query, Mapping[str, Any]]]:
        for number, case in enumerate(cases):
            request: Request = case.to_request()
            if not request.exact:
                fields = {**request.__dict__, "k": k}
                if filter_text:
                    fields |= {"filter": filter_text, "params": {}}
                yield Query(**fields, return_task_scores=False), {"golden": number}

    return prepare(f"golden requests of {path}", queries())
