"""A constant load on a cluster from outside its hosts; every request goes into a history.

Run it with ``--history FILE --routers A,B --number N --until FILE``: each router is asked by a
thread of its own, which demands an answer from every document within two seconds, and the first one
is also given updates of items that no load of another number has, which are read back. It ends when
the last file is there.
"""

import argparse
import sys
import threading
import types
from pathlib import Path

# The folders of tests are on no path.
_package = types.ModuleType("history")
_package.__path__ = [str(Path(__file__).resolve().parent.parent / "history")]
sys.modules.setdefault("history", _package)

from history.recorder import Recorder, RecordingClient  # noqa: E402

from silvershard.cluster import Client, Query  # noqa: E402
from silvershard.cluster.consistency import UpdateToken, newest  # noqa: E402
from silvershard.cluster.updates import ItemUpsert  # noqa: E402
from silvershard.shard.errors import RetrievalError  # noqa: E402

PAUSE_S = 0.1
DEADLINE_S = 2.0
FIRST_ITEM = 1 << 41
OWN_ITEMS = 50


class Reader(threading.Thread):
    """Asks one router as long as the load lasts."""

    def __init__(self, address: str, recorder: Recorder, ended: threading.Event) -> None:
        super().__init__(name=f"reader of {address}")
        self._address = address
        self._recorder = recorder
        self._ended = ended

    def run(self) -> None:
        query = Query(
            features={"history": [1, 2, 3]}, k=40, min_coverage=1.0, return_fields=["title"]
        )
        client = Client(self._address, timeout_s=DEADLINE_S)
        with RecordingClient(client, self._recorder, session=self.name) as own:
            while not self._ended.wait(PAUSE_S):
                try:
                    own.retrieve(query)
                except RetrievalError:
                    continue


class Writer(threading.Thread):
    """Changes items through one router and reads them back; what is refused is sent again."""

    def __init__(
        self, address: str, recorder: Recorder, ended: threading.Event, first: int
    ) -> None:
        super().__init__(name="writer")
        self._first = first
        self._address = address
        self._recorder = recorder
        self._ended = ended
        self._tokens: tuple[UpdateToken, ...] = ()

    def run(self) -> None:
        client = Client(self._address, timeout_s=DEADLINE_S)
        version = 1
        with RecordingClient(client, self._recorder, session=self.name) as own:
            while not self._ended.wait(2 * PAUSE_S):
                try:
                    self._write(own, version)
                    version += 1
                    self._read(own)
                except RetrievalError:
                    continue

    def _write(self, client: RecordingClient, version: int) -> None:
        item = self._first + version % OWN_ITEMS
        update = ItemUpsert(
            item,
            attributes={"year": item - FIRST_ITEM, "genre": ["own"]},
            signals={"popularity": 1.0, "freshness": 1.0},
            fields={"title": f"own {version}", "year": 0},
            features={"movie": [item], "genres": ["drama"]},
            version=version,
        )
        self._tokens = newest((*self._tokens, *client.apply([update]).tokens))

    def _read(self, client: RecordingClient) -> None:
        low = self._first - FIRST_ITEM
        client.retrieve(
            Query(
                features={},
                k=OWN_ITEMS,
                filter=f"genre:own AND year >= {low} AND year < {low + OWN_ITEMS}",
                exact=True,
                min_coverage=1.0,
                return_fields=["title"],
                after=self._tokens,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--routers", required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--until", type=Path, required=True)
    options = parser.parse_args()
    routers = options.routers.split(",")
    ended = threading.Event()
    with Recorder(options.history) as recorder:
        threads: list[threading.Thread] = [Reader(one, recorder, ended) for one in routers]
        first = FIRST_ITEM + options.number * OWN_ITEMS
        threads.append(Writer(routers[0], recorder, ended, first))
        for one in threads:
            one.start()
        while not options.until.exists():
            ended.wait(PAUSE_S)
        ended.set()
        for one in threads:
            one.join()


if __name__ == "__main__":
    main()
