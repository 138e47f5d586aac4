from typing import Any

import pytest

from silvershard.cluster import ItemDelete, ItemPatch, ItemUpsert
from silvershard.deploy.update_json import update_from


def test_an_object_gives_the_update_that_it_names() -> None:
    upsert = {
        "item_id": 5,
        "attributes": {"genre": ["Drama"], "year": 1990, "price": None},
        "signals": {"popularity": 0.5},
        "fields": {"title": "Film", "year": None},
        "features": {"movie": [3], "genres": "Drama"},
        "ttl_s": 60,
        "version": 3,
        "if_version": 0,
    }
    expected = ItemUpsert(
        5,
        attributes={"genre": ["Drama"], "year": 1990, "price": []},
        signals={"popularity": 0.5},
        fields={"title": "Film", "year": None},
        features={"movie": [3], "genres": "Drama"},
        ttl_s=60,
        version=3,
        if_version=0,
    )
    assert update_from(upsert) == expected
    assert update_from({"op": "upsert", **upsert}) == expected
    patch = {"op": "patch", "item_id": 6, "signals": {"popularity": 2}}
    assert update_from(patch) == ItemPatch(6, signals={"popularity": 2})
    delete = {"op": "delete", "item_id": 7, "urgent": True, "version": 9}
    assert update_from(delete) == ItemDelete(7, urgent=True, version=9)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], r"must be a JSON object, got \[\]"),
        ({"op": "upsert"}, "item_id: must be given"),
        ({"op": "drop", "item_id": 5}, "op: must be upsert, patch, delete, got 'drop'"),
        ({"op": ["patch"], "item_id": 5}, "op: must be"),
        ({"item_id": "5"}, "item_id: must be an int, got '5'"),
        ({"item_id": True}, "item_id: must be an int"),
        ({"item_id": 5.0}, "item_id: must be an int"),
        ({"item_id": 5, "colour": 1}, "colour: is no key of upsert, which has attributes,"),
        ({"op": "patch", "item_id": 5, "ttl_s": 1}, "ttl_s: is no key of patch"),
        ({"op": "delete", "item_id": 5, "fields": {}}, "fields: is no key of delete"),
        ({"item_id": 5, "signals": [1]}, r"signals: must be an object, got \[1\]"),
        ({"item_id": 5, "signals": {"a": "1"}}, "signals.a: must be a number, got '1'"),
        ({"item_id": 5, "signals": {"a": True}}, "signals.a: must be a number, got True"),
        ({"item_id": 5, "fields": {"a": [1]}}, r"fields.a: must be a number or text, got \[1\]"),
        ({"item_id": 5, "attributes": {"a": {}}}, "attributes.a: must be a number or text"),
        ({"item_id": 5, "features": {"a": [None]}}, "features.a: must be a number or text"),
        ({"item_id": 5, "ttl_s": "1"}, "ttl_s: must be seconds"),
        ({"item_id": 5, "embedding": [1, "a"]}, "embedding: must be a list of numbers"),
        ({"op": "delete", "item_id": 5, "urgent": 1}, "urgent: must be true or false, got 1"),
        ({"item_id": 5, "version": None}, "version: must be an int"),
    ],
)
def test_what_is_no_update_is_refused_by_key(document: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        update_from(document)
