"""What a generation is checked for before it goes live, each check on its own.

Shapes: n items, B requests, H heads, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from silvershard.model.audit import IndexAudit, recall
from silvershard.model.compiled_request import compile_request
from silvershard.model.planes import shortfall
from silvershard.model.request import Request
from silvershard.model.schema import Schema
from silvershard.shard.errors import SnapshotError
from silvershard.shard.generations import generation_dir
from silvershard.shard.golden import check_generation, read_golden
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import Snapshot, open_snapshot

_AUDITED = 32
"""Requests whose results are searched for exactly, at most."""
_AUDIT_K = 100

# What requests and updates name, so that it must not vanish or change its kind.
_NAMED: Mapping[str, tuple[str, ...]] = {
    "user_features": ("kind", "dtype", "width"),
    "item_features": ("kind", "dtype", "width"),
    "attributes": ("kind", "dtype"),
    "fields": ("dtype",),
}
_LISTED = ("signals", "heads", "tasks")


class Check(NamedTuple):
    """What one check found."""

    name: str
    passed: bool
    text: str
    """What was found, in words."""


def run_checks(
    path: Path,
    live: Path | None,
    *,
    max_recall_loss: float,
    load: bool = True,
    allow_schema: bool = False,
) -> Iterator[Check]:
    """Check a generation, cheap things first; the first failure is the last check.

    Args:
        path: directory of the generation.
        live: directory of the one that is served; None if there is none.
        max_recall_loss: by how much the recall of its index may be below that of the live one.
        load: load it whole, to ask its golden requests and to audit its index.
        allow_schema: let through what requests or updates for the live one would not fit.

    Raises:
        SnapshotError: if its manifest, or anything of the live one, is missing or damaged.
    """
    snapshot = open_snapshot(path)
    for check in _checks(snapshot, live, max_recall_loss, load=load, allow_schema=allow_schema):
        yield check
        if not check.passed:
            return


def _checks(
    snapshot: Snapshot, live: Path | None, max_recall_loss: float, *, load: bool, allow_schema: bool
) -> Iterator[Check]:
    yield _guarded("checksums", lambda: _check_files(snapshot))
    served = open_snapshot(live) if live is not None else None
    if served is not None:
        problems = incompatibilities(served, snapshot)
        text = "; ".join(problems) if problems else "what clients of the live one name is there"
        if problems and allow_schema:
            text = f"allowed: {text}"
        yield Check("schema", not problems or allow_schema, text)
    if not load:
        return
    yield _guarded("golden requests", lambda: _check_golden(snapshot.path))
    yield _check_recall(snapshot, served, max_recall_loss)


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except SnapshotError as error:
        return Check(name, False, str(error))


def _check_files(snapshot: Snapshot) -> str:
    if generation_dir(snapshot.path.parent, snapshot.spec.generation).name != snapshot.path.name:
        raise SnapshotError(
            str(snapshot.path), f"it holds generation {snapshot.spec.generation}, not its own"
        )
    snapshot.verify()
    return f"all {len(snapshot.manifest.files)} files are as they were published"


def _check_golden(path: Path) -> str:
    asked = check_generation(path)
    return f"{asked} requests are answered bit for bit as by the model that was published"


def incompatibilities(live: Snapshot, new: Snapshot) -> list[str]:
    """Return in words what requests or updates for one generation name and another has not."""
    problems = []
    if live.spec.model != new.spec.model:
        problems.append(f"model must be {live.spec.model}, got {new.spec.model}")
    before, after = live.spec.item_schema, new.spec.item_schema
    for part, settings in _NAMED.items():
        problems += _missing(part, settings, getattr(before, part), getattr(after, part))
    for part in _LISTED:
        gone = [one for one in getattr(before, part) if one not in getattr(after, part)]
        problems += [f"{part}: {name} is gone" for name in gone]
    problems += _shorter(before, after)
    narrower = shortfall(live.spec.planes, new.spec.planes)
    return problems + ([f"planes: {narrower}"] if narrower else [])


def _missing(
    part: str, settings: Sequence[str], before: Sequence[Any], after: Sequence[Any]
) -> list[str]:
    found = {one.name: one for one in after}
    problems = []
    for one in before:
        if one.name not in found:
            problems.append(f"{part}: {one.name} is gone")
            continue
        for setting in settings:
            was, now = getattr(one, setting), getattr(found[one.name], setting)
            if was != now:
                problems.append(f"{part}: {setting} of {one.name} must be {was}, got {now}")
    return problems


def _shorter(before: Schema, after: Schema) -> list[str]:
    """Return item features of which the next generation takes fewer values."""
    most = {one.name: one.max_length for one in after.item_features}
    return [
        f"item_features: max_length of {one.name} must be at least {one.max_length}, "
        f"got {most[one.name]}"
        for one in before.item_features
        if most.get(one.name, one.max_length) < one.max_length
    ]


def _check_recall(snapshot: Snapshot, live: Snapshot | None, max_loss: float) -> Check:
    requests = _requests(live or snapshot)
    if not requests:
        return Check("recall", True, "published without golden requests, so nothing is measured")
    # One after the other, so that one of them is in memory.
    before = measure_recall(live.path, requests) if live is not None else None
    found = measure_recall(snapshot.path, requests)
    k = _audit_k(snapshot)
    text = f"the index finds {found:.4f} of the {k} best of {len(requests)} requests"
    if before is None:
        return Check("recall", True, text)
    passed = found >= before - max_loss
    limit = "" if passed else f", at most {max_loss:g} less is allowed (swap.max_recall_loss)"
    return Check("recall", passed, f"{text}, that of the live one {before:.4f}{limit}")


def _requests(snapshot: Snapshot) -> list[Request]:
    requests = [case.to_request() for case in read_golden(snapshot).cases]
    return [Request(features=one.features) for one in requests][:_AUDITED]


@torch.inference_mode()
def measure_recall(path: Path, requests: Sequence[Request]) -> float:
    """Return the share of an exact search that the index of a generation finds by default.

    Exact is float32 over the embeddings as they are cached.
    """
    snapshot = open_snapshot(path)
    retriever, _ = load_retriever(path)
    spec = snapshot.spec
    item_ids, embeddings = _cached(snapshot)
    if not len(item_ids):
        return 1.0
    compiled = [compile_request(one, spec) for one in requests]
    query = retriever.encode([one.features for one in compiled]).embedding  # (B, H, D)
    audit = IndexAudit(retriever, item_ids, embeddings)
    k = _audit_k(snapshot)
    found = audit.indexed(query, spec.defaults.probes, spec.defaults.ann_k, k)
    return float(recall(found, audit.exact(query, k)).mean())


def _audit_k(snapshot: Snapshot) -> int:
    """Return how many results of a request are compared."""
    return min(_AUDIT_K, snapshot.spec.defaults.ann_k)


def _cached(snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the ids ``(n,)`` of all items and their embeddings ``(n, D)``, as cached."""
    held = [snapshot.load_partition(one) for one in range(snapshot.spec.num_partitions)]
    parts = [one for one in held if one is not None]
    if not parts:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, snapshot.spec.dim)
    ids = np.concatenate([one.catalogue.item_ids for one in parts])
    return torch.from_numpy(ids), torch.cat([one.cache for one in parts]).float()
