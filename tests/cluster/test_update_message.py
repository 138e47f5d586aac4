import numpy as np
import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.update_message import mutation_to
from silvershard.cluster.updates import ItemDelete, ItemPatch, ItemUpsert, TableRows, Update


def test_what_is_not_given_is_not_in_the_message() -> None:
    assert mutation_to(ItemPatch(5)) == retrieval_pb2.Mutation(
        patch=retrieval_pb2.ItemPatch(item_id=5)
    )
    null = mutation_to(ItemPatch(5, fields={"year": None}, attributes={"genre": []}))
    assert list(null.patch.fields.features) == ["year"]
    assert null.patch.attributes.features["genre"] == retrieval_pb2.Values()


def test_numbers_of_numpy_count_as_their_kind() -> None:
    update = ItemUpsert(
        np.int64(5),  # type: ignore[arg-type]
        attributes={"year": np.int64(1990)},  # type: ignore[dict-item]
        features={"numbers": np.array([0.5, 2.0])},
        embedding=np.array([1, 2], dtype=np.int8),
    )
    message = mutation_to(update).upsert
    assert message.item_id == 5
    assert message.attributes.features["year"].ints == [1990]
    assert message.features.features["numbers"].doubles == [0.5, 2.0]
    assert np.frombuffer(message.embedding.data, "<f4").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("update", "text"),
    [
        (ItemUpsert(-1), r"item_id: must be in 0\.\."),
        (ItemUpsert(1 << 63), r"item_id: must be in 0\.\."),
        (ItemUpsert("5"), "item_id: must be an int"),  # type: ignore[arg-type]
        (ItemDelete(5, version=-1), "version: must be in"),
        (ItemDelete(5, if_version=-1), "if_version: must be in"),
        (ItemPatch(5, attributes={"a": [1, "b"]}), "attributes.a: must be ints, floats or strings"),
        (ItemPatch(5, features={"a": [True]}), "features.a: must be ints"),
        (ItemPatch(5, fields={"a": b"x"}), "fields.a: must be"),  # type: ignore[dict-item]
        (ItemPatch(5, signals={"a": "1"}), "signals.a: must be"),  # type: ignore[dict-item]
        (ItemPatch(5, signals={"a": True}), "signals.a: must be"),
        (ItemUpsert(5, ttl_s=-1.0), "ttl_s: must be in"),
        (ItemUpsert(5, ttl_s=float("nan")), "ttl_s: must be in"),
        (ItemUpsert(5, embedding=["x"]), "embedding: must be numbers"),
        (ItemUpsert(5, embedding=[10**400]), "embedding: must be numbers"),
        (TableRows("t", [1 << 63], [[1.0]]), "rows: "),
        (TableRows("t", [0], "x"), "values: must be numbers"),
    ],
)
def test_what_has_no_form_on_the_wire_is_refused_by_name(update: Update, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mutation_to(update)
