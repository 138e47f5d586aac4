from collections.abc import Callable, Mapping
from typing import Any

import pytest
from history.checker import Report, check
from history.events import numbered

LOG = 7


class Said:
    """Events of one small history, each a little after the one before; lines count from 1."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._now_s = 100.0

    def _add(self, kind: str, **said: Any) -> int:
        self.events.append({"kind": kind, **said})
        return len(self.events)

    def _times(self) -> tuple[float, float]:
        self._now_s += 1.0
        return self._now_s, self._now_s + 0.5

    def catalogue(self, generation: int = 1, **said: Any) -> int:
        items = {str(one): {"kind": ["a"], "year": 2000 + one} for one in range(4)}
        whole = {"items": items, "marker": ["title", f"G{generation}"], "num_partitions": 16}
        return self._add("catalogue", generation=generation, **{**whole, **said})

    def write(self, item: int, version: int, op: str = "upsert", **said: Any) -> int:
        sent_s, done_s = self._times()
        whole: dict[str, Any] = {"outcome": "acked", "invoked_s": sent_s, "done_s": done_s}
        if op != "delete":
            whole["attributes"] = {"kind": ["w"], "year": version}
            whole["fields"] = {"title": f"v{version}"}
        if said.get("outcome", "acked") == "acked" and "at" in said:
            whole["tokens"] = [[LOG, 0, said.pop("at")]]
        return self._add("write", item_id=item, version=version, op=op, **{**whole, **said})

    def query(self, ids: list[int] | None = None, titles: Any = None, **said: Any) -> int:
        sent_s, done_s = self._times()
        whole: dict[str, Any] = {"sent_s": sent_s, "done_s": done_s, "request": {"k": 100}}
        if ids is not None:
            whole |= {"ids": ids, "generation": 1, "coverage": 1.0}
        if titles is not None:
            whole["fields"] = {"title": titles}
        if "cut" in said:
            said["cut"] = [[LOG, 0, said["cut"]]]
        return self._add("query", **{**whole, **said})

    def fault(self, **said: Any) -> int:
        begin_s, end_s = self._times()
        whole = {"name": "kill", "target": "shard 0", "begin_s": begin_s, "end_s": end_s}
        return self._add("fault", **{**whole, **said})

    def activate(self, generation: int, **said: Any) -> int:
        begin_s, end_s = self._times()
        return self._add(
            "activate", **{"generation": generation, "begin_s": begin_s, "end_s": end_s, **said}
        )

    def report(self, **how: Any) -> Report:
        return check(numbered(self.events), **how)

    def wrong(self, **how: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Return of each violation its property, its lines and its items."""
        return [one[:3] for one in self.report(**how).violations]


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def exact() -> Callable[..., Mapping[str, Any]]:
    """``exact(filter, **more)`` is a request that everything that passes must answer."""

    def request(text: str = "", **more: Any) -> Mapping[str, Any]:
        return {"k": 100, "exact": True, "filter": text, **more}

    return request
