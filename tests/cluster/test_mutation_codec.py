from typing import Any

import numpy as np
import pytest

from silvershard.cluster import retrieval_pb2, update_pb2
from silvershard.cluster.mutation_codec import (
    body_of,
    logged,
    logged_batch,
    logged_from,
    mutation_from,
    sealed,
    ttl_s,
)
from silvershard.cluster.signal_records import SignalRecords
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, TableRows, Update
from silvershard.shard.errors import MutationError
from silvershard.shard.mutations import Delete, ItemValues, Patch, RowChange, Upsert

COLUMNS: dict[str, Any] = {
    "attributes": {"genre": ["Drama", "Comedy"], "year": 1990, "price": (2.5,), "maker": []},
    "signals": {"popularity": 0.5},
    "fields": {"title": "Film", "year": None},
    "features": {"movie": np.array([3, 4]), "genres": ["Drama"]},
}
VALUES = ItemValues(
    attributes={"genre": ("Drama", "Comedy"), "year": (1990,), "price": (2.5,), "maker": ()},
    signals={"popularity": 0.5},
    fields={"title": "Film", "year": None},
    features={"movie": (3, 4), "genres": ("Drama",)},
)


def through(update: Update, version: int = 7, expires_unix_ms: int = 0) -> Any:
    data = mutation_to(update).SerializeToString()
    message = retrieval_pb2.Mutation.FromString(data)
    return logged_from(logged(message, version, expires_unix_ms))


def test_every_kind_of_update_comes_through_the_log_unchanged() -> None:
    assert through(ItemUpsert(5, **COLUMNS)) == Upsert(5, 7, VALUES)
    assert through(ItemUpsert(5), 8, 99) == Upsert(5, 8, ItemValues(), None, 99)
    assert through(ItemUpsert(5, embedding=[0.5, -1.0])) == Upsert(5, 7, ItemValues(), (0.5, -1.0))
    assert through(ItemPatch(6, **COLUMNS)) == Patch(6, 7, VALUES)
    assert through(ItemDelete(7)) == Delete(7, 7)
    assert through(ItemDelete(7, urgent=True)) == Delete(7, 7, urgent=True)


def test_rows_of_a_table_come_through_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    found = through(TableRows("users", [4, 2], values, version=3))
    assert isinstance(found, RowChange)
    assert (found.table, found.version, found.rows) == ("users", 7, (4, 2))
    assert found.values.dtype == np.float32
    assert found.values.tobytes() == values.tobytes()


def test_versions_and_tests_are_kept_in_the_request_only() -> None:
    message = mutation_to(ItemUpsert(5, version=3, if_version=0, ttl_s=1.5))
    assert (message.version, message.HasField("if_version"), message.if_version) == (3, True, 0)
    assert ttl_s(message) == 1.5
    assert ttl_s(mutation_to(ItemUpsert(5))) is None
    assert ttl_s(mutation_to(ItemPatch(5))) is None
    assert not mutation_to(ItemDelete(5)).HasField("if_version")
    assert through(ItemUpsert(5, version=3, if_version=0, ttl_s=1.5)) == Upsert(5, 7, ItemValues())
    # The message itself stays as it was.
    logged(message, 9)
    assert ttl_s(message) == 1.5


@pytest.mark.parametrize("version", [1, 127, 128, 300, 1 << 31, (1 << 63) - 1])
@pytest.mark.parametrize("expires_unix_ms", [0, 1, 1 << 41])
def test_a_payload_is_what_protobuf_makes_of_the_record(version: int, expires_unix_ms: int) -> None:
    for update in (
        ItemUpsert(5, fields={"title": "x" * 300}, version=9, if_version=3, ttl_s=2.0),
        ItemPatch(6, signals={"popularity": 0.5}),
        ItemDelete(7, urgent=True),
        TableRows("users", [4], np.ones((1, 3))),
    ):
        message = mutation_to(update)
        expected = update_pb2.LoggedMutation(mutation=message, expires_unix_ms=expires_unix_ms)
        expected.mutation.version = version
        expected.mutation.ClearField("if_version")
        if isinstance(update, ItemUpsert):
            expected.mutation.upsert.ClearField("ttl")
        payload = sealed(body_of(message), version, expires_unix_ms)
        assert payload == expected.SerializeToString()


def test_messages_that_mix_or_overfill_are_refused_by_field() -> None:
    mixed = retrieval_pb2.Values(ints=[1], strings=["a"])
    weighted = retrieval_pb2.Values(ints=[1], weights=b"abcd")
    two = retrieval_pb2.Values(ints=[1, 2])
    for what, values, text in (
        ("attributes", mixed, "attributes.a: must be values of one kind"),
        ("features", weighted, "features.a: must have no weights"),
        ("fields", two, "fields.a: must have one value"),
    ):
        message = retrieval_pb2.Mutation()
        getattr(message.patch, what).features["a"].CopyFrom(values)
        with pytest.raises(MutationError, match=text):
            mutation_from(message, 1)


def test_half_precision_rows_are_widened_exactly() -> None:
    numbers = np.array([[1.5, -0.25]], dtype=np.float32)
    bf16 = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    for dtype, data in ((1, numbers.astype("<f2").tobytes()), (2, bf16)):
        values = retrieval_pb2.Tensor(dtype=dtype, shape=[1, 2], data=data)
        message = retrieval_pb2.Mutation(rows=retrieval_pb2.RowUpdate(rows=[0], values=values))
        found = mutation_from(message, 1)
        assert isinstance(found, RowChange)
        assert found.values.tobytes() == numbers.tobytes()


def test_a_record_that_is_no_mutation_is_refused() -> None:
    with pytest.raises(MutationError, match="payload: must be a LoggedMutation"):
        logged_from(b"\xff\xff")
    with pytest.raises(MutationError, match="op: must be"):
        logged_from(b"")


def test_a_batch_keeps_the_places_of_what_is_read_and_refuses_the_rest_by_item() -> None:
    patches = [logged(mutation_to(ItemPatch(at, signals={"a": 0.5})), at) for at in range(1, 10)]
    mixed = retrieval_pb2.Mutation()
    mixed.patch.item_id = 77
    mixed.patch.attributes.features["a"].CopyFrom(retrieval_pb2.Values(ints=[1], strings=["a"]))
    payloads = [b"\xff\xff", *patches, logged(mixed, 3), logged(mutation_to(ItemDelete(5)), 4), b""]
    batch, refused = logged_batch(payloads, SignalRecords())
    (found,) = batch.patches
    assert found.places.tolist() == list(range(1, 10))
    assert batch.placed == [(11, Delete(5, 4))]
    assert [item for item, _ in refused] == [-1, 77, -1]
    assert refused[1][1].startswith("attributes.a: must be values of one kind")
