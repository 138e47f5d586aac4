from typing import Any

from silvershard.deploy.config_sections import RuntimeSection
from silvershard.deploy.sequencer_seat import SequencerSeat
from silvershard.deploy.sequencer_watch import SequencerEntry, SequencerWatch
from silvershard.deploy.shard_watch import ShardDead


class FakeActor:
    """A sequencer that serves as soon as the test says so."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.serves = False
        self.dead = ""
        self.ended = False

    def restarts(self) -> int:
        return 0

    def entry(self) -> SequencerEntry | None:
        if self.dead:
            raise ShardDead(self.dead)
        return SequencerEntry(address=f"127.0.0.1:{self.port}", pid=1) if self.serves else None

    def ask_again(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class Setup:
    def __init__(self, *running: str) -> None:
        self.now_s = 100.0
        self.actors: list[FakeActor] = []
        self.seat = SequencerSeat(self.start, running.__contains__, clock=lambda: self.now_s)

    def start(self, name: str) -> Any:
        self.actors.append(FakeActor(name, 9000 + len(self.actors)))
        return SequencerWatch(0, self.actors[-1], RuntimeSection(), feel=None)

    def replaced(self) -> None:
        self.seat.replace()
        self.actors[-1].serves = True
        self.seat.poll()
        self.now_s += 10.0
        self.seat.poll()

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.actors]


def test_nobody_takes_updates_where_nobody_shall() -> None:
    setup = Setup()
    setup.seat.replace()
    setup.seat.poll()
    assert (setup.seat.serves, setup.seat.address, setup.seat.is_replacing) == (True, "", False)
    setup.seat.end()
    assert setup.actors == []


def test_the_next_one_takes_over_when_it_serves_and_the_last_one_leaves_later() -> None:
    setup = Setup()
    seat = setup.seat
    seat.start()
    assert (seat.serves, seat.address) == (False, "")
    setup.actors[0].serves = True
    seat.poll()
    assert (seat.serves, seat.address) == (True, "127.0.0.1:9000")
    seat.replace()
    seat.replace()
    seat.poll()
    assert (setup.names, seat.address) == (["sequencer", "sequencer-1"], "127.0.0.1:9000")
    assert seat.is_replacing
    setup.actors[1].serves = True
    seat.poll()
    assert (seat.actor, seat.address) == ("sequencer-1", "127.0.0.1:9001")
    # Routers do not know it yet, and the last one tells them that it wrote nothing.
    setup.now_s += 4.9
    seat.poll()
    assert (setup.actors[0].ended, seat.is_replacing) == (False, True)
    setup.now_s += 0.2
    seat.poll()
    assert (setup.actors[0].ended, seat.is_replacing, seat.refused) == (True, False, "")
    setup.replaced()
    assert (setup.names[2], seat.actor, seat.address) == (
        "sequencer",
        "sequencer",
        "127.0.0.1:9002",
    )
    seat.end()
    assert all(one.ended for one in setup.actors)


def test_one_that_cannot_start_takes_nobody_s_place() -> None:
    setup = Setup()
    setup.seat.start()
    setup.actors[0].serves = True
    setup.seat.poll()
    setup.seat.replace()
    setup.actors[1].dead = "the log is away"
    setup.seat.poll()
    assert (setup.seat.is_replacing, setup.seat.refused) == (False, "the log is away")
    assert (setup.seat.address, setup.actors[0].ended) == ("127.0.0.1:9000", False)
    assert setup.actors[1].ended
    setup.replaced()
    assert (setup.seat.refused, setup.seat.address) == ("", "127.0.0.1:9002")


def test_whoever_runs_already_is_adopted() -> None:
    setup = Setup("sequencer-1")
    setup.seat.start()
    assert (setup.names, setup.seat.actor) == (["sequencer-1"], "sequencer-1")
    setup.seat.replace()
    assert setup.names == ["sequencer-1", "sequencer"]
    setup.seat.end()
    assert all(one.ended for one in setup.actors)
