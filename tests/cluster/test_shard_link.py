import inspect
from typing import Any

import pytest

from silvershard.cluster.links import GrpcShardLink
from silvershard.cluster.shard_link import ShardLink

METHODS = [
    name
    for name, one in vars(ShardLink).items()
    if inspect.isfunction(one) and not name.startswith("_")
]


def test_the_methods_are_found() -> None:
    assert set(METHODS) == {"encode", "count", "open", "close", "fields", "release"}


@pytest.mark.parametrize("name", METHODS)
def test_the_links_of_the_tests_take_what_real_links_take(name: str, fake_link: Any) -> None:
    wanted = inspect.signature(getattr(ShardLink, name))
    assert inspect.signature(getattr(GrpcShardLink, name)) == wanted
    assert list(inspect.signature(getattr(fake_link, name)).parameters) == list(wanted.parameters)
    for kind in (GrpcShardLink, fake_link):
        assert inspect.iscoroutinefunction(getattr(kind, name)) == (name != "release")
