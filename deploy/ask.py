"""The verb ``query``: one question to a running cluster, and its answer for people.

Shapes: K results.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from silvershard.cluster import Client, Query, Result
from silvershard.cluster.dialer import PLAIN, Dialer
from silvershard.deploy.errors import CommandError, ExitCode
from silvershard.deploy.feature_json import from_json
from silvershard.deploy.hosts_launch import record_of
from silvershard.deploy.state import StateDir
from silvershard.deploy.tables import Cell, milliseconds, pairs, table
from silvershard.deploy.users import read_user
from silvershard.model.request import FeatureValues, FilterParam, WeightedIds
from silvershard.model.text_config import QUERY

SHOWN_FIELDS = ("title", "year", "genres")
STAGES = (
    "queue",
    "tower",
    "filter",
    "ann",
    "semantic",
    "refine",
    "rerank",
    "value",
    "merge",
    "network",
)
"""Stages in the order in which a query passes them."""


class Asker(NamedTuple):
    """Who asks: what the model is told, what is excluded, and what to tell the person."""

    history: list[int]
    exclude: list[int]
    notes: list[str]
    features: Mapping[str, FeatureValues] = {}
    """Beside the history, or a history with weights."""
    text: str = ""
    """A sentence to ask with; empty: none."""

    @property
    def request_features(self) -> dict[str, FeatureValues]:
        """Return what the request says; a text alone says nothing of a history."""
        told: dict[str, FeatureValues] = {}
        if self.history or not self.text:
            told["history"] = self.history
        if self.text:
            told[QUERY] = [self.text]
        return {**told, **self.features}


def asker_of(
    state: StateDir,
    *,
    user: int | None,
    history: Sequence[int] | None,
    include_seen: bool,
    features: Mapping[str, FeatureValues] | None = None,
    text: str | None = None,
) -> Asker:
    """Return the history and features of a user of the data set, or those that were given.

    A feature that was given replaces that of the user. A user whom the data set does not have is no
    error: the model answers from its defaults.

    Raises:
        CommandError: if the text is blank.
    """
    if text is not None and not text.strip():
        raise CommandError("--text must say something, it is blank", ExitCode.USAGE)
    notes = []
    known: list[int] = list(history or ())
    if isinstance(history, WeightedIds):
        features = {**(features or {}), "history": history}
    stored: dict[str, FeatureValues] = {}
    if user is not None:
        found = read_user(state.users_file, user)
        if found is None:
            notes.append(f"user {user} is not in the data set: answered from the model's defaults")
        known, stored = found or ([], {})
    given = {**stored, **(features or {})}
    return Asker(known, [] if include_seen else known, notes, given, text or "")


def parse_features(texts: Sequence[str]) -> dict[str, FeatureValues]:
    """Return user features from ``name=value``; a value is JSON, or else plain text.

    Raises:
        CommandError: if there is no name, the history is named, or the value is something else than
            ids, numbers, or pairs of an id and its weight.
    """
    features: dict[str, FeatureValues] = {}
    for text in texts:
        name, parsed = _named_value("--feature", text)
        if name == "history":
            raise CommandError("--feature has no history: use --history", ExitCode.USAGE)
        try:
            features[name] = from_json(parsed)
        except ValueError as error:
            raise CommandError(f"--feature {name} {error}", ExitCode.USAGE) from None
    return features


def parse_params(texts: Sequence[str]) -> dict[str, FilterParam]:
    """Return filter parameters from ``name=value``; a value is JSON, or else plain text.

    Raises:
        CommandError: if there is no name, or the value is no number, text, or list of those.
    """
    params: dict[str, FilterParam] = {}
    for text in texts:
        name, parsed = _named_value("--param", text)
        if not isinstance(parsed, int | float | str | list) or isinstance(parsed, bool):
            raise CommandError(
                f"--param {name} must be a number, text or a list, got {reprlib.repr(text)}",
                ExitCode.USAGE,
            )
        params[name] = parsed
    return params


def _named_value(option: str, text: str) -> tuple[str, Any]:
    """Return the name and the value of ``name=value``; a value is JSON, or else plain text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CommandError(f"{option} must be name=value, got {reprlib.repr(text)}", ExitCode.USAGE)
    try:
        return name, json.loads(value)
    except RecursionError:
        raise CommandError(f"{option} {name} must not be nested so deep", ExitCode.USAGE) from None
    except ValueError:
        return name, value


def ask(address: str, query: Query, *, timeout_s: float, dialer: Dialer = PLAIN) -> Result:
    """Return the answer of the router at ``address``.

    Raises:
        RequestRefused: with the status of the cluster.
        CommandError: if the request has no form on the wire, such as a negative k.
    """
    with Client(address, timeout_s=timeout_s, dialer=dialer) as client:
        try:
            return client.retrieve(query)
        except ValueError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None


def address_of(state: StateDir, given: str) -> str:
    """Return the router to ask: the one given, or that of the state directory.

    Raises:
        CommandError: if nothing runs there.
    """
    if given:
        return given
    record = record_of(state)
    if record is None or not record.address:
        raise CommandError(
            f"no cluster runs on {state.root}: start one with `silvershard up`, or use --address"
        )
    return record.address


def described(result: Result, asker: Asker) -> dict[str, Any]:
    """Return an answer as JSON values."""
    items = []
    for at, item in enumerate(result.item_ids.tolist()):
        items.append(
            {
                "item_id": item,
                "score": float(result.scores[at]),
                "tasks": {name: float(one[at]) for name, one in sorted(result.task_scores.items())},
                "fields": {name: column[at] for name, column in result.fields.items()},
            }
        )
    coverage = result.coverage
    return {
        "items": items,
        "exhausted": result.exhausted,
        "coverage": coverage.documents,
        "expected_recall": coverage.expected_recall,
        "shards": {"total": coverage.shards_total, "failed": coverage.shards_failed},
        "reasons": list(coverage.reasons),
        "model": result.model,
        "generation": result.generation,
        "content_hash": result.content_hash,
        "plan": result.plan,
        "counts": result.counts.__dict__,
        "timings_us": in_order(result.timings_us),
        "warnings": [*asker.notes, *result.warnings],
    }


def in_order(timings_us: Mapping[str, int]) -> dict[str, int]:
    """Return the times of all stages in their order, then what is left, then the total."""
    rest = sorted(stage for stage in timings_us if stage not in (*STAGES, "total"))
    # A stage that was not needed, such as counting a filter whose count is known, took no time.
    return {stage: timings_us.get(stage, 0) for stage in (*STAGES, *rest, "total")}


def items_table(items: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a table with the value and the probability of every task."""
    if not items:
        return "  no item matches"
    tasks = list(items[0]["tasks"])
    fields = sorted(
        items[0]["fields"],
        key=lambda name: (SHOWN_FIELDS.index(name) if name in SHOWN_FIELDS else 99, name),
    )
    rows: list[list[Cell]] = [
        [
            at,
            *(_shown(name, item["fields"][name]) for name in fields),
            item["score"],
            *(item["tasks"][task] for task in tasks),
            str(item["item_id"]),
        ]
        for at, item in enumerate(items, start=1)
    ]
    return table(("#", *fields, "value", *tasks, "id"), rows, max_width=38)


def _shown(name: str, value: Any) -> Cell:
    if name == "year" and value is not None:
        return str(value)
    if name == "genres" and isinstance(value, str):
        return value.replace("|", ", ")
    return value if isinstance(value, str | int | float) or value is None else str(value)


def stages_table(timings_us: Mapping[str, int]) -> str:
    """Return the stage times on two lines: names above, times below."""
    ordered = in_order(timings_us)
    return table(list(ordered), [[milliseconds(micros) for micros in ordered.values()]])


def render(document: Mapping[str, Any]) -> str:
    """Return a described answer for people."""
    counts = document["counts"]
    eligible = counts["eligible"]
    shards = document["shards"]
    lost = f", {shards['failed']} of {shards['total']} shards failed" if shards["failed"] else ""
    reasons = f" ({', '.join(document['reasons'])})" if document["reasons"] else ""
    recall = document["expected_recall"]
    facts = [
        ("coverage", f"{document['coverage']:.4f}{lost}{reasons}"),
        ("recall", "unknown" if recall is None else f"{recall:.4f} of an exact search, expected"),
        ("generation", f"{document['generation']} of {document['model']}"),
        ("plan", document["plan"]),
        (
            "counts",
            f"{counts['addressed']:,} documents, "
            + (f"{eligible:,} eligible, " if eligible is not None else "")
            + f"{counts['probed']:,} probed, {counts['ann_kept']:,} kept, "
            + (f"{generated:,} generated, " if (generated := counts["semantic_kept"]) else "")
            + f"{counts['reranked']:,} reranked",
        ),
    ]
    if document["exhausted"]:
        facts.append(("exhausted", "fewer items match than were asked for"))
    facts += [("note", warning) for warning in document["warnings"]]
    return "\n\n".join(
        (items_table(document["items"]), pairs(facts), stages_table(document["timings_us"]))
    )
