"""The sequencer, watched like a shard."""

from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.deploy.shard_watch import ActorWatch, Handle
from silvershard.deploy.state import SequencerRecord


class SequencerEntry(Document):
    """Where the sequencer serves."""

    address: str = Field(min_length=1, description="host:port of its gRPC server")
    pid: int = Field(ge=1, description="its process")
    release: str = Field(default="", description="release of silvershard that it runs")


SequencerHandle = Handle[SequencerEntry]


class SequencerWatch(ActorWatch[SequencerEntry]):
    """The state of the sequencer."""

    kind = "sequencer"

    @property
    def name(self) -> str:
        """Return what people call it."""
        return "the sequencer"

    @property
    def record(self) -> SequencerRecord:
        """Return the sequencer as status shows it."""
        return SequencerRecord(
            state=self.state,
            pid=self.entry.pid if self.entry else 0,
            address=self.entry.address if self.entry else "",
            release=self.entry.release if self.entry else "",
            restarts=self.restarts,
            reason=self.reason,
        )
