import importlib.metadata

import pytest
from pydantic import Field, ValidationError

from silvershard.cluster.document import RELEASE, Document
from silvershard.cluster.shard_map import ShardEntry


class Inner(Document):
    name: str = Field(description="whatever")


class Outer(Document):
    inner: Inner = Field(description="whatever")
    count: int = Field(default=0, description="whatever")


def test_what_another_release_has_added_is_passed_over_and_kept() -> None:
    text = '{"inner":{"name":"a","later":[1]},"count":2,"more":{"x":null}}'
    read = Outer.model_validate_json(text)
    assert (read.inner.name, read.count) == ("a", 2)
    changed = read.model_copy(update={"count": 3})
    assert changed.model_dump_json() == text.replace('"count":2', '"count":3')
    assert changed != Outer(inner=Inner(name="a"), count=3)


def test_what_it_knows_is_checked_as_ever() -> None:
    with pytest.raises(ValidationError, match="epoch"):
        ShardEntry.model_validate(
            {"shard": 0, "replica": 0, "address": "a:1", "epoch": 0, "documents": 1, "pid": 1}
        )
    read = Outer.model_validate({"inner": {"name": "a"}})
    with pytest.raises(ValidationError, match="frozen"):
        read.count = 3  # type: ignore[misc]


def test_the_release_is_the_installed_one() -> None:
    assert importlib.metadata.version("silvershard") == RELEASE
