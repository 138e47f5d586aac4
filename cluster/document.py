"""What processes of one cluster write for each other, whichever releases they are of.

While processes are restarted one by one after a new release was installed, the old ones read what
the new ones write. They pass over what they do not know, and leave it where it is when they write
the document again.
"""

import importlib.metadata

from pydantic import BaseModel, ConfigDict

RELEASE = importlib.metadata.version("silvershard")
"""The release that this process runs, whatever has been installed since it started."""


class Document(BaseModel):
    """A document that another process reads; fields of other releases are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")
