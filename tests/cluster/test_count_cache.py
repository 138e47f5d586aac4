from typing import Any

from silvershard.cluster.count_cache import CountCache
from silvershard.model.compiled_request import compile_request
from silvershard.model.request import Request


def test_the_count_cache_keeps_the_newest_thousand(whole: Any) -> None:
    cache = CountCache(lambda: 0.0)
    compiled = [
        compile_request(Request(filter=f"maker:{maker}"), whole.spec) for maker in range(1025)
    ]
    for count, one in enumerate(compiled):
        cache.put(one, count)
    assert cache.get(compiled[0]) is None
    assert cache.get(compiled[1]) == 1
    assert cache.get(compiled[1024]) == 1024


def test_a_count_is_forgotten_after_a_second(whole: Any) -> None:
    now_s = [5.0]
    cache = CountCache(lambda: now_s[0])
    one = compile_request(Request(filter="maker:1"), whole.spec)
    cache.put(one, 7)
    now_s[0] = 5.99
    assert cache.get(one) == 7
    now_s[0] = 6.0
    assert cache.get(one) is None
