"""Updates of items as JSON objects: ``{"op": "patch", "item_id": 5, "signals": {"views": 3}}``."""

import reprlib
from collections.abc import Mapping
from typing import Any

from silvershard.cluster import ItemDelete, ItemPatch, ItemUpsert

ItemUpdate = ItemUpsert | ItemPatch | ItemDelete

_VALUES = ("attributes", "signals", "fields", "features")
_VERSIONS = ("version", "if_version")
KEYS: Mapping[str, tuple[str, ...]] = {
    "upsert": (*_VALUES, *_VERSIONS, "embedding", "ttl_s"),
    "patch": (*_VALUES, *_VERSIONS),
    "delete": (*_VERSIONS, "urgent"),
}
"""What an object of each operation may have beside ``op`` and ``item_id``."""

_KINDS = {"upsert": ItemUpsert, "patch": ItemPatch, "delete": ItemDelete}


def update_from(document: object) -> ItemUpdate:
    """Return the update that a JSON object asks for.

    Lists and single values of columns are taken as they are, null is null; whether the schema has
    them is for the cluster to say.

    Args:
        document: ``op`` (upsert, patch or delete; by default upsert), ``item_id``, and what
            ``KEYS`` names.

    Raises:
        ValueError: naming the key, what was required and what was got.
    """
    if not isinstance(document, dict):
        raise ValueError(f"an update must be a JSON object, got {reprlib.repr(document)}")
    op = document.get("op", "upsert")
    if not isinstance(op, str) or op not in KEYS:
        raise ValueError(f"op: must be {', '.join(KEYS)}, got {reprlib.repr(op)}")
    given = {name: value for name, value in document.items() if name != "op"}
    if "item_id" not in given:
        raise ValueError("item_id: must be given")
    for name, value in given.items():
        if name != "item_id" and name not in KEYS[op]:
            raise ValueError(f"{name[:80]}: is no key of {op}, which has {', '.join(KEYS[op])}")
        given[name] = _checked(name, value)
    found: ItemUpdate = _KINDS[op](**given)
    return found


def _checked(name: str, value: Any) -> Any:
    if name in _VALUES:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: must be an object, got {reprlib.repr(value)}")
        return {key: _column(f"{name}.{key}", name, one) for key, one in value.items()}
    if name == "urgent":
        if not isinstance(value, bool):
            raise ValueError(f"urgent: must be true or false, got {reprlib.repr(value)}")
    elif name == "embedding":
        if not isinstance(value, list) or not all(_is_number(one) for one in value):
            raise ValueError(f"embedding: must be a list of numbers, got {reprlib.repr(value)}")
    elif name == "ttl_s":
        if not _is_number(value):
            raise ValueError(f"ttl_s: must be seconds, got {reprlib.repr(value)}")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: must be an int, got {reprlib.repr(value)}")
    return value


def _column(path: str, what: str, value: Any) -> Any:
    if what == "signals":
        if not _is_number(value):
            raise ValueError(f"{path}: must be a number, got {reprlib.repr(value)}")
        return value
    if value is None:
        return None if what == "fields" else []
    listed = value if isinstance(value, list) and what != "fields" else [value]
    if not all(isinstance(one, str) or _is_number(one) for one in listed):
        raise ValueError(f"{path}: must be a number or text, got {reprlib.repr(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
