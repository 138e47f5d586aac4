"""What a cluster that starts tells the command that waits for it."""

from pydantic import Field

from silvershard.cluster.document import Document


class Progress(Document):
    """One line of it."""

    phase: str = Field(default="", description="what is being waited for")
    ready: bool = Field(default=False, description="the cluster serves")
    error: str = Field(default="", description="why it cannot serve")
    exit_code: int = Field(default=0, description="exit code that goes with the error")
