import os

from silvershard.deploy.config_sections import RuntimeSection
from silvershard.deploy.sequencer_watch import SequencerEntry, SequencerWatch


class Handle:
    def __init__(self) -> None:
        self.said: SequencerEntry | None = None
        self.count = 0

    def restarts(self) -> int:
        return self.count

    def entry(self) -> SequencerEntry | None:
        return self.said

    def ask_again(self) -> None:
        self.said = None

    def end(self) -> None:
        pass


def test_the_record_follows_the_life_of_the_sequencer() -> None:
    handle = Handle()
    watch = SequencerWatch(0, handle, RuntimeSection())
    assert watch.name == "the sequencer"
    assert (watch.record.state, watch.record.pid, watch.record.address) == ("starting", 0, "")
    handle.said = SequencerEntry(address="127.0.0.1:7", pid=os.getpid())
    watch.poll()
    assert (watch.record.state, watch.record.address) == ("serving", "127.0.0.1:7")
    handle.count = 1
    watch.poll()
    assert (watch.record.state, watch.record.restarts) == ("restarting", 1)
    assert watch.record.reason == f"process {os.getpid()} ended"
