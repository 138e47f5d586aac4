import math
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from silvershard.cluster import mutation_check, retrieval_pb2
from silvershard.cluster.live_generation import LiveGeneration, load_live_generation
from silvershard.cluster.mutation_check import MutationCheck
from silvershard.cluster.mutation_codec import mutation_from
from silvershard.cluster.update_log import NO_ITEM
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, TableRows, Update
from silvershard.model.catalogue import NULL_INT
from silvershard.model.schema import Field, UserFeature
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import MAX_TEXT_BYTES, check

ITEM = 5
WHOLE: dict[str, Any] = {
    "attributes": {"genre": ["Drama"], "year": 1990, "price": 2.5, "maker": []},
    "signals": {"popularity": 0.5, "freshness": -0.0},
    "fields": {"title": "Film", "year": None, "stars": 4.5},
    "features": {"movie": [3], "genres": ["Drama"], "sound": [0.5, 1.5], "plot": ["words"]},
}


@pytest.fixture(scope="module")
def live(generation: Any) -> LiveGeneration:
    """A generation whose schema has every kind of column."""
    found = load_live_generation(generation.path)
    schema = found.spec.item_schema
    schema = schema.model_copy(
        update={
            "item_features": (
                *schema.item_features,
                UserFeature(name="sound", kind="numbers", dtype="float", width=2),
                UserFeature(name="plot", kind="text", dtype="string"),
            ),
            "fields": (*schema.fields, Field(name="stars", dtype="float")),
        }
    )
    return found._replace(spec=found.spec.model_copy(update={"item_schema": schema}))


@pytest.fixture(scope="module")
def checks(live: LiveGeneration) -> MutationCheck:
    return MutationCheck(live.spec, live.tables)


def outcome(checks: MutationCheck, message: retrieval_pb2.Mutation) -> int | str:
    try:
        return checks(message, message.WhichOneof("op") or "", message.ByteSize())
    except MutationError as error:
        return str(error)


def expected(live: LiveGeneration, message: retrieval_pb2.Mutation) -> int | str:
    try:
        mutation = check(mutation_from(message, 1), live.spec, live.tables)
    except MutationError as error:
        return str(error)
    return getattr(mutation, "item_id", NO_ITEM)


@pytest.mark.parametrize(
    "update",
    [
        ItemPatch(ITEM, signals={"popularity": 0.5, "freshness": 1e30}),
        ItemUpsert(ITEM, **WHOLE),
        ItemUpsert(ITEM, attributes={"genre": [], "maker": [1, 2]}, fields={"title": None}),
        ItemUpsert(ITEM),
        ItemPatch(ITEM, features={"sound": [], "plot": []}),
        ItemDelete(ITEM, urgent=True),
    ],
)
def test_what_is_plain_is_told_from_its_message(
    checks: MutationCheck, monkeypatch: pytest.MonkeyPatch, update: Update
) -> None:
    # Without the long way there is only the short one.
    monkeypatch.delattr(mutation_check, "mutation_from")
    assert outcome(checks, mutation_to(update)) == ITEM


def changed(**columns: Any) -> Update:
    return ItemUpsert(ITEM, **{what: {**WHOLE[what], **new} for what, new in columns.items()})


def values(**parts: Any) -> retrieval_pb2.Mutation:
    """An upsert whose attribute ``maker`` is what no client would send."""
    message = mutation_to(ItemUpsert(ITEM, attributes={"maker": [1]}))
    message.upsert.attributes.features["maker"].CopyFrom(retrieval_pb2.Values(**parts))
    return message


@pytest.mark.parametrize(
    "message",
    [
        *(
            mutation_to(one)
            for one in (
                ItemPatch(ITEM, signals={"other": 1.0}),
                ItemPatch(ITEM, signals={"popularity": math.nan}),
                ItemPatch(ITEM, signals={"popularity": math.inf}),
                changed(attributes={"other": 1}),
                changed(attributes={"year": 1.5}),
                changed(attributes={"year": [1, 2]}),
                changed(attributes={"year": NULL_INT}),
                changed(attributes={"year": -NULL_INT - 1}),
                changed(attributes={"price": math.nan}),
                changed(attributes={"price": math.inf}),
                changed(attributes={"price": 1e300}),
                changed(attributes={"price": 3}),
                changed(attributes={"genre": 3}),
                changed(attributes={"maker": [NULL_INT]}),
                changed(attributes={"maker": list(range(1000, 1004))}),
                changed(attributes={"maker": list(range(1000, 1003)), "genre": ["a", "b"]}),
                changed(attributes={"maker": list(range(1000, 1900))}),
                changed(attributes={"maker": [1000] * 900}),
                changed(fields={"other": 1}),
                changed(fields={"year": NULL_INT}),
                changed(fields={"year": "1990"}),
                changed(fields={"stars": math.nan}),
                changed(fields={"title": "x" * MAX_TEXT_BYTES}),
                changed(fields={"title": "x" * (MAX_TEXT_BYTES + 1)}),
                changed(fields={"title": "\N{SNOWMAN}" * (MAX_TEXT_BYTES // 3 + 1)}),
                changed(features={"other": 1}),
                changed(features={"movie": [1, 2]}),
                changed(features={"genres": ["a"] * 8}),
                changed(features={"genres": ["a"] * 9}),
                changed(features={"sound": [1.0]}),
                changed(features={"sound": [1.0, 1e39]}),
                changed(features={"sound": [1.0, math.nan]}),
                changed(features={"plot": ["words"] * 30_000}),
                changed(features={"plot": ["w" * 60_000] * 20}),
                ItemUpsert(ITEM, embedding=[0.5, 1.0]),
                TableRows("history", [1, 2], np.ones((2, 4))),
                TableRows("nothing", [1], np.ones((1, 4))),
            )
        ),
        values(ints=[1], strings=["a"]),
        values(ints=[1], weights=b"abcd"),
        values(weights=b"abcd"),
        values(floats=[1.0]),
        retrieval_pb2.Mutation(),
        retrieval_pb2.Mutation(delete=retrieval_pb2.ItemDelete(item_id=1 << 63)),
        retrieval_pb2.Mutation(patch=retrieval_pb2.ItemPatch(item_id=(1 << 64) - 1)),
        retrieval_pb2.Mutation(patch=retrieval_pb2.ItemPatch(item_id=(1 << 63) - 1)),
    ],
    ids=lambda message: f"{message!s:.60}",
)
def test_everything_else_ends_as_the_check_of_a_mutation_does(
    live: LiveGeneration, checks: MutationCheck, message: retrieval_pb2.Mutation
) -> None:
    assert outcome(checks, message) == expected(live, message)


def test_random_messages_end_as_the_check_of_a_mutation_does(
    live: LiveGeneration, checks: MutationCheck
) -> None:
    draw = np.random.default_rng(0)
    seeds = [
        mutation_to(one).SerializeToString()
        for one in (
            ItemUpsert(ITEM, **WHOLE),
            ItemPatch(ITEM, attributes=WHOLE["attributes"]),
            ItemPatch(ITEM, signals=WHOLE["signals"]),
            ItemDelete(ITEM, version=3),
            TableRows("history", [1, 2], np.ones((2, 4))),
        )
    ]
    outcomes = []
    for turn in range(6000):
        data = bytearray(seeds[turn % len(seeds)])
        for _ in range(int(draw.integers(1, 4))):
            data[int(draw.integers(len(data)))] = int(draw.integers(256))
        try:
            message = retrieval_pb2.Mutation.FromString(bytes(data))
        except DecodeError:
            continue
        outcomes.append(outcome(checks, message))
        assert outcomes[-1] == expected(live, message), message
    refused = sum(isinstance(one, str) for one in outcomes)
    assert 500 < refused < len(outcomes) - 500
