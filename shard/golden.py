"""Golden requests: questions of a generation together with the answers of its eager model.

Publishing asks the model in memory, before anything of it is packed, and writes what it says into
the generation as ``golden.json``. Whoever loads, shards, serves or activates the generation later
can ask again and compare: every id, the order, and all bits of every score.

Shapes: K results, n items.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, cast

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from silvershard.kernels import quantize_rows
from silvershard.model.brute_force import BruteForce
from silvershard.model.catalogue import Catalogue, Ragged
from silvershard.model.quality import same_ranking
from silvershard.model.request import FilterMode, Request, WeightedIds
from silvershard.model.retriever import Retriever
from silvershard.shard.errors import SnapshotError
from silvershard.shard.load import load_retriever
from silvershard.shard.snapshot import GOLDEN, PartitionData, Snapshot, open_snapshot

MAX_EXACT_ITEMS = 20_000
"""Eligible items of an exact request up to which it is also answered by brute force."""

EMBEDDED_ITEMS = 512
"""Items that a generation embeds again when it is checked."""

_DEFAULTS = Request()


class Answered(Protocol):
    """What an answer says, whether it comes from a module or from a cluster."""

    @property
    def item_ids(self) -> Any:
        """``(K,)`` int64, best first."""

    @property
    def scores(self) -> Any:
        """``(K,)`` float32."""

    @property
    def task_scores(self) -> Mapping[str, Any]:
        """``(K,)`` float32 per task."""

    @property
    def exhausted(self) -> bool:
        """Whether fewer than k items are eligible."""


class ItemTower(Protocol):
    """What packing needs of a model."""

    def embed_items(self, features: dict[str, Ragged]) -> Tensor:
        """Return the embedding of each item, ``(n, D)`` float32."""
        ...


class _Ranking(NamedTuple):
    item_ids: Any
    scores: Any


class GoldenAnswer(BaseModel):
    """What the eager model answers; every number is the float32 itself, so no bit is lost."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    plan: str = Field(description="the plan that the answer names")
    exhausted: bool = Field(description="whether fewer than k items are eligible")
    item_ids: tuple[int, ...] = Field(description="best first")
    scores: tuple[float, ...] = Field(description="value of each item")
    task_scores: dict[str, tuple[float, ...]] = Field(description="probabilities by task")


class GoldenCase(BaseModel):
    """One request with its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: dict[str, Any] = Field(description="the fields of the request that are no defaults")
    answer: GoldenAnswer = Field(description="what it must be answered with")

    def to_request(self) -> Request:
        """Return the request.

        Raises:
            TypeError: if a field is unknown.
        """
        fields = dict(self.request)
        if "features" in fields:
            fields["features"] = {
                name: WeightedIds(**values) if isinstance(values, dict) else values
                for name, values in fields["features"].items()
            }
        if "filter_mode" in fields:
            fields["filter_mode"] = FilterMode(fields["filter_mode"])
        return Request(**fields)


class Golden(BaseModel):
    """The golden requests of a generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: tuple[GoldenCase, ...] = Field(description="requests with their answers")

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        document = self.model_dump(mode="json")
        return json.dumps(document, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def of(cls, retriever: Retriever, requests: Sequence[Request]) -> Self:
        """Return requests with the answers of a retriever, each asked alone.

        Raises:
            RequestError: if a request cannot be served as stated.
        """
        cases = []
        for request in requests:
            (answer,) = retriever([request])
            cases.append(
                GoldenCase(
                    request=_described(request),
                    answer=GoldenAnswer(
                        plan=str(answer.plan),
                        exhausted=answer.exhausted,
                        item_ids=tuple(answer.item_ids.tolist()),
                        scores=tuple(answer.scores.tolist()),
                        task_scores={
                            name: tuple(one.tolist()) for name, one in answer.task_scores.items()
                        },
                    ),
                )
            )
        return cls(cases=tuple(cases))


class Embedded:
    """Items with the embeddings that they were packed from.

    Args:
        item_ids: ``(n,)`` in any order.
        embeddings: ``(n, D)`` float32 of these items.
    """

    def __init__(self, item_ids: NDArray[np.int64], embeddings: Tensor) -> None:
        self.item_ids = item_ids
        self._order = np.argsort(item_ids)
        self._ordered = item_ids[self._order]
        self._embeddings = embeddings

    def of(self, item_ids: NDArray[np.int64]) -> Tensor:
        """Return the embeddings of some of the items; of an unknown one, those of another."""
        at = np.searchsorted(self._ordered, item_ids).clip(max=len(self._ordered) - 1)
        return self._embeddings[torch.from_numpy(self._order[at])]


class Difference(NamedTuple):
    """A golden request that was answered otherwise."""

    number: int
    """Of the request, from 0."""
    text: str
    """The first difference, in words."""

    def __str__(self) -> str:
        return f"golden request {self.number}: {self.text}"


def differences(
    golden: Golden, answer: Callable[[Request], Answered | None]
) -> Iterator[Difference]:
    """Ask every golden request; yield what is answered otherwise, in order.

    Args:
        golden: the requests.
        answer: asks one; None where it cannot be asked there.
    """
    for number, case in enumerate(golden.cases):
        got = answer(case.to_request())
        text = None if got is None else difference(got, case.answer)
        if text:
            yield Difference(number, text)


def difference(got: Answered, wanted: Answered) -> str | None:
    """Return the first difference between two answers in words, or None if they are the same.

    Ids, order, the bits of scores and task scores and ``exhausted`` must be equal, and the plan
    where both name one.
    """
    plans = [getattr(one, "plan", None) for one in (got, wanted)]
    if None not in plans and str(plans[0]) != str(plans[1]):
        return f"the plan is {plans[0]} and must be {plans[1]}"
    same = same_ranking(
        _Ranking(got.item_ids, got.scores), _Ranking(wanted.item_ids, wanted.scores)
    )
    if not same:
        return f"got first, required second: {same.difference}"
    if set(got.task_scores) != set(wanted.task_scores):
        return (
            f"the tasks are {', '.join(sorted(got.task_scores)) or 'none'} and must be "
            f"{', '.join(sorted(wanted.task_scores)) or 'none'}"
        )
    for task in sorted(wanted.task_scores):
        same = same_ranking(
            _Ranking(got.item_ids, got.task_scores[task]),
            _Ranking(wanted.item_ids, wanted.task_scores[task]),
        )
        if not same:
            return f"task {task}, got first, required second: {same.difference}"
    if got.exhausted != wanted.exhausted:
        return f"exhausted is {got.exhausted} and must be {wanted.exhausted}"
    return None


def read_golden(snapshot: Snapshot) -> Golden:
    """Return the golden requests of a generation; none where it was published without.

    Raises:
        SnapshotError: if the file is missing, damaged or of another form.
    """
    if GOLDEN not in snapshot.manifest.files:
        return Golden(cases=())
    try:
        golden = Golden.model_validate_json(snapshot.read(GOLDEN))
        for case in golden.cases:
            case.to_request()
    except (pydantic.ValidationError, TypeError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise SnapshotError(str(snapshot.path), f"{GOLDEN} cannot be read: {problem}") from None
    return golden


def check_exact(golden: Golden, brute_force: BruteForce) -> None:
    """Compare the answers of exact requests with those that the module gives without an index.

    Raises:
        ValueError: naming the first difference.
    """

    def answer(request: Request) -> Answered | None:
        if not request.exact or int(brute_force.eligible(request).sum()) > MAX_EXACT_ITEMS:
            return None
        return brute_force.answer(request)

    for found in differences(golden, answer):
        raise ValueError(f"the index does not answer as the model without it: {found}")


def check_generation(
    path: Path, *, packed: Embedded | None = None, num_embedded: int = EMBEDDED_ITEMS
) -> int:
    """Load a generation whole and compare it with what was written down of its model.

    Its golden requests must be answered as by the eager model. The first of its items must have the
    codes, scales and cached embeddings that its own item tower gives them, bit for bit.

    Args:
        path: directory of the generation.
        packed: what all of its items were packed from, to be compared as well.
        num_embedded: items that the tower embeds again: whole partitions, until there are as many.

    Returns:
        How many golden requests were asked.

    Raises:
        SnapshotError: if a file is missing or damaged, naming it, or if an answer or an item
            differs, naming the first difference.
    """
    snapshot = open_snapshot(path)
    golden = read_golden(snapshot)
    retriever, _ = load_retriever(path)
    again: list[PartitionData] = []
    left, held = num_embedded, 0
    for number in range(snapshot.spec.num_partitions):
        data = snapshot.load_partition(number) if packed or left > 0 else None
        if data is None:
            continue
        if packed:
            _check_packed(snapshot, data, packed.of(data.catalogue.item_ids))
        if left > 0:
            again.append(data)
        left -= len(data.catalogue)
        held += len(data.catalogue)
    if packed and held != len(packed.item_ids):
        raise SnapshotError(
            str(path), f"must hold the {len(packed.item_ids)} published items, got {held}"
        )
    if again:
        features = Catalogue.concat([data.catalogue for data in again]).features
        with torch.inference_mode():
            embedded = cast(ItemTower, retriever.model).embed_items(dict(features))
        sizes = [len(data.catalogue) for data in again]
        for data, part in zip(again, embedded.split(sizes), strict=True):
            _check_packed(snapshot, data, part)
    for found in differences(golden, lambda request: retriever([request])[0]):
        raise SnapshotError(str(path), str(found))
    return len(golden.cases)


def _check_packed(snapshot: Snapshot, data: PartitionData, embeddings: Tensor) -> None:
    """Compare the packed items of a partition with their embeddings ``(n, D)``, bit for bit."""
    codes, scales = quantize_rows(embeddings)
    for name, wanted in (("codes", codes), ("scales", scales), ("cache", embeddings.half())):
        differs = (getattr(data, name) != wanted.cpu()).flatten(1 if wanted.ndim > 1 else 0)
        rows = torch.nonzero(differs)[:, 0]
        if len(rows):
            item = data.catalogue.item_ids[int(rows[0])]
            raise SnapshotError(
                str(snapshot.path),
                f"the {name} of item {item} are not those of the embedding that the model gives it",
            )


def _described(request: Request) -> dict[str, Any]:
    """Return the fields of a request that are no defaults, as JSON values."""
    names = [field.name for field in dataclasses.fields(Request)]
    given = {name: _plain(getattr(request, name)) for name in names}
    return {
        name: value for name, value in given.items() if value != _plain(getattr(_DEFAULTS, name))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, WeightedIds):
        return {"ids": _plain(value.ids), "weights": _plain(value.weights)}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, FilterMode) else value
