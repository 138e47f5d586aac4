"""Writes down what happens to a cluster: queries and updates of its clients, faults, generations.

Any number of threads and processes may write one file: each line is one write to its end.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from history.events import (
    ActivateEvent,
    CatalogueEvent,
    Event,
    FaultEvent,
    Lost,
    QueryEvent,
    Token,
    WriteEvent,
    load,
    said_of,
)

from silvershard.cluster.client import Client, Query, RequestRefused, Result
from silvershard.cluster.updates import (
    ApplyResult,
    Durability,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    TableRows,
    Update,
)
from silvershard.model.catalogue import NULL_INT, Catalogue

_READ_BY_THE_CHECKER = ("k", "filter", "params", "exact", "exclude_ids", "generation", "alias")
_NEVER_LOGGED = {"INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}


class Recorder:
    """A file of events that grows; a child process that opens the same path adds to it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.clock = clock
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def record(self, *events: Event) -> None:
        """Add events; other writers put nothing between them."""
        text = "".join(f"{json.dumps(said_of(one), default=_plain)}\n" for one in events)
        content = text.encode()
        written = os.write(self._file, content)
        if written < len(content):
            raise OSError(f"wrote {written} of {len(content)} bytes of an event to {self.path}")

    def events(self) -> list[Event]:
        """Return what was recorded so far."""
        return load(self.path)

    @contextmanager
    def fault(self, name: str, target: str = "", **more: Any) -> Iterator[None]:
        """Record a fault that lasts as long as the context."""
        begin_s = self.clock()
        try:
            yield
        finally:
            end_s = self.clock()
            self.record(FaultEvent(name=name, target=target, begin_s=begin_s, end_s=end_s, **more))

    @contextmanager
    def activation(self, generation: int) -> Iterator[None]:
        """Record that a generation is made live in the context; also one that failed, maybe."""
        begin_s = self.clock()
        try:
            yield
        finally:
            self.record(ActivateEvent(generation=generation, begin_s=begin_s, end_s=self.clock()))

    def catalogue(
        self,
        generation: int,
        catalogue: Catalogue,
        *,
        num_partitions: int = 0,
        marker: tuple[str, Any] | None = None,
    ) -> None:
        """Record a generation with the attributes of its items."""
        items: dict[str, dict[str, Any]] = {str(one): {} for one in catalogue.item_ids.tolist()}
        for name, ragged in catalogue.categories.items():
            for row, attributes in enumerate(items.values()):
                attributes[name] = list(ragged.row(row))
        for name, column in catalogue.numbers.items():
            for value, attributes in zip(column.tolist(), items.values(), strict=True):
                if value != NULL_INT and value == value:
                    attributes[name] = value
        self.record(
            CatalogueEvent(
                generation=generation, num_partitions=num_partitions, items=items, marker=marker
            )
        )


class RecordingClient:
    """A client that writes down every query and every update; goes where a ``Client`` goes.

    Args:
        client: asks; closed with this one.
        recorder: takes the events.
        session: of the user behind it.
    """

    def __init__(self, client: Client, recorder: Recorder, session: str = "") -> None:
        self.client = client
        self.recorder = recorder
        self.session = session

    def __enter__(self) -> "RecordingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def retrieve(
        self,
        query: Query | None = None,
        *,
        timeout_s: float | None = None,
        settled: bool = False,
        shown: Callable[[Result], Mapping[str, Sequence[Any]]] = lambda result: {},
        **fields: Any,
    ) -> Result:
        """Ask as ``Client.retrieve`` does.

        Args:
            query: the request; or give its fields instead.
            timeout_s: time limit of this call.
            settled: whether all that was acked before is known to be applied.
            shown: returns what the answer shows of its items beside its fields.
            fields: of ``Query``.
        """
        asked = query or Query(**fields)
        sent_s = self.recorder.clock()
        try:
            result = self.client.retrieve(asked, timeout_s=timeout_s)
        except RequestRefused as error:
            self._failed(asked, sent_s, error.code, error.message, settled=settled)
            raise
        except BaseException as error:
            self._failed(asked, sent_s, "CANCELLED", repr(error), settled=settled)
            raise
        self.recorder.record(
            QueryEvent(
                sent_s=sent_s,
                done_s=self.recorder.clock(),
                session=self.session,
                router=self.client.address,
                request=request_of(asked),
                settled=settled,
                **answer_of(result, shown(result)),
            )
        )
        return result

    def _failed(
        self, query: Query, sent_s: float, code: str, message: str, *, settled: bool
    ) -> None:
        self.recorder.record(
            QueryEvent(
                sent_s=sent_s,
                done_s=self.recorder.clock(),
                code=code,
                message=message,
                session=self.session,
                router=self.client.address,
                request=request_of(query),
                settled=settled,
            )
        )

    def apply(
        self,
        updates: Sequence[Update],
        *,
        durability: Durability = Durability.LOGGED,
        timeout_s: float | None = None,
    ) -> ApplyResult:
        """Change items as ``Client.apply`` does; every update has a version of its own.

        What was sent is written down before it is sent, as one that nobody answered: so it is there
        if this process dies meanwhile.
        """
        invoked_s = self.recorder.clock()
        self.recorder.record(
            *(write_of(one, invoked_s, invoked_s, session=self.session) for one in items(updates))
        )
        try:
            result = self.client.apply(updates, durability=durability, timeout_s=timeout_s)
        except RequestRefused as error:
            if error.logged is not None:
                self._acked(updates, error.logged, invoked_s)
            elif error.code in _NEVER_LOGGED:
                self._acked(updates, None, invoked_s)
            raise
        self._acked(updates, result, invoked_s)
        return result

    def _acked(
        self, updates: Sequence[Update], result: ApplyResult | None, invoked_s: float
    ) -> None:
        """Write down what became of updates; None: all of them are refused."""
        done_s = self.recorder.clock()
        refused = {one.index for one in result.rejected} if result is not None else set()
        tokens = tuple(Token(*one) for one in result.tokens) if result is not None else ()
        events = []
        for at, update in enumerate(updates):
            if isinstance(update, TableRows):
                continue
            is_refused = result is None or at in refused
            events.append(
                write_of(
                    update,
                    invoked_s,
                    done_s,
                    outcome="refused" if is_refused else "acked",
                    tokens=() if is_refused else tokens,
                    session=self.session,
                )
            )
        self.recorder.record(*events)


def items(updates: Sequence[Update]) -> Iterator[ItemUpsert | ItemPatch | ItemDelete]:
    """Yield the updates of items."""
    for one in updates:
        if not isinstance(one, TableRows):
            yield one


def write_of(
    update: ItemUpsert | ItemPatch | ItemDelete,
    invoked_s: float,
    done_s: float,
    *,
    outcome: str = "unknown",
    **more: Any,
) -> WriteEvent:
    """Return an update as an event.

    Raises:
        ValueError: if it has no version of its own.
    """
    if not update.version:
        raise ValueError(
            f"an update in a history must have a version, got none of item {update.item_id}"
        )
    if isinstance(update, ItemDelete):
        more = {**more, "op": "delete", "urgent": update.urgent}
    else:
        more = {
            **more,
            "op": "patch" if isinstance(update, ItemPatch) else "upsert",
            "attributes": {name: _listed(value) for name, value in update.attributes.items()},
            "fields": {name: _listed(value) for name, value in update.fields.items()},
        }
        if isinstance(update, ItemUpsert):
            more["ttl_s"] = update.ttl_s
    return WriteEvent(
        item_id=update.item_id,
        version=update.version,
        invoked_s=invoked_s,
        done_s=done_s,
        outcome=outcome,
        **more,
    )


def request_of(query: Query) -> dict[str, Any]:
    """Return what the checker reads of a request."""
    blank = Query()
    said = {
        name: _listed(getattr(query, name))
        for name in _READ_BY_THE_CHECKER
        if getattr(query, name) != getattr(blank, name)
    }
    said["k"] = query.k
    if query.filter_mode:
        said["filter_mode"] = query.filter_mode.name
    if query.min_coverage is not None:
        said["min_coverage"] = query.min_coverage
    if query.after:
        said["after"] = [list(one) for one in query.after]
    return said


def answer_of(result: Result, shown: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return what the checker reads of an answer, as fields of a ``QueryEvent``."""
    coverage = result.coverage
    fields = {**result.fields, **shown}
    return {
        "ids": tuple(result.item_ids.tolist()),
        "fields": {name: [_listed(one) for one in column] for name, column in fields.items()},
        "generation": result.generation,
        "cut": tuple(Token(*one) for one in result.cut),
        "coverage": coverage.documents,
        "reasons": tuple(coverage.reasons),
        "shards_total": coverage.shards_total,
        "lost": tuple(Lost(one.shard, one.documents, one.reasons) for one in coverage.shards),
        "addressed": result.counts.addressed,
        "exhausted": result.exhausted,
        "warnings": tuple(result.warnings),
        "plan": result.plan,
        "shard_map_version": result.shard_map_version,
    }


def _listed(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _listed(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_listed(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    listed = _listed(value)
    if listed is value:
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return listed
