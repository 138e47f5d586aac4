import threading
from typing import Any

import numpy as np
import pytest

from silvershard.cluster import table_pb2
from silvershard.cluster.table_flight import Flight, Part, cut
from silvershard.cluster.table_link import Refused

BOUNDS = np.array([0, 10, 20, 30])


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize(
    "positions", [[], [0], [29], [10], [9, 10], [0, 1, 2, 3, 9, 20, 29], list(range(30))]
)
def test_every_position_goes_once_to_the_shard_that_holds_it(
    positions: list[int], most: int
) -> None:
    asked = np.array(positions, dtype=np.int64)
    parts = cut(asked, BOUNDS, most)
    assert [one for _, rows in parts for one in asked[rows].tolist()] == positions
    for shard, rows in parts:
        assert 1 <= len(asked[rows]) <= most
        assert all(one // 10 == shard for one in asked[rows])
    shards = {one // 10 for one in positions}
    assert {shard for shard, _ in parts} == shards
    if most == 100:
        assert len(parts) == len(shards)


def make_flight(count: int) -> Flight:
    return Flight([Part(shard, slice(0, 1), table_pb2.TableCall()) for shard in range(count)], 1.0)


def test_a_flight_lands_when_its_last_call_has_ended() -> None:
    flight = make_flight(2)
    assert not flight.wait(0)
    flight.end(flight.parts[1], Refused("UNAVAILABLE", "gone"))
    assert not flight.wait(-5)
    waiter = threading.Thread(target=flight.wait, args=(30,))
    waiter.start()
    flight.end(flight.parts[0], table_pb2.TableReply(records=b"3"))
    waiter.join(10)
    assert not waiter.is_alive()
    assert flight.wait(0)
    assert flight.parts[1].outcome == Refused("UNAVAILABLE", "gone")


def test_a_flight_without_calls_has_landed() -> None:
    assert make_flight(0).wait(0)


def test_only_calls_without_an_end_are_forgotten() -> None:
    class Link:
        forgotten: Any = []  # noqa: RUF012

        def forget(self, call_id: int) -> None:
            self.forgotten.append(call_id)

    flight, link = make_flight(3), Link()
    for number, part in enumerate(flight.parts[:2]):
        part.link, part.call_id = link, 40 + number  # type: ignore[assignment]
    flight.end(flight.parts[0], table_pb2.TableReply())
    flight.forget()
    assert link.forgotten == [41]
