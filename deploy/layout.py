"""Where each shard process of several hosts is, and the name under which Ray knows it.

It is written down before anything is started by it, so that whoever adopts a cluster finds all that
runs. Without I/O.

Shapes: S shards.
"""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, Self

from pydantic import Field

from silvershard.cluster.document import Document
from silvershard.deploy.placement import Copy

Role = Literal["coming", "serving", "leaving"]


class Place(NamedTuple):
    """One copy of a shard of one cut of the catalogue."""

    num_shards: int
    shard: int
    replica: int


class PlacedCopy(Document):
    """One process of a shard."""

    actor: str = Field(min_length=1, description="its name in Ray, which nobody had before")
    num_shards: int = Field(ge=1, description="shards S that the catalogue is cut into")
    shard: int = Field(ge=0, description="index of the shard")
    replica: int = Field(ge=0, description="number of the copy; standbys come after replicas")
    host: str = Field(min_length=1, description="where it is")
    role: Role = Field(default="serving", description="whether it takes the place of another one")

    @property
    def place(self) -> Place:
        """Return which copy it is."""
        return Place(self.num_shards, self.shard, self.replica)


class Layout(Document):
    """Every shard process of a cluster; there may be two in one place while it moves."""

    serial: int = Field(default=0, ge=0, description="grows with every name that is given")
    copies: tuple[PlacedCopy, ...] = Field(default=(), description="the newest one last")

    def of(self, actor: str) -> PlacedCopy:
        """Return the process of a name; one that is not there is an error of the caller."""
        return next(one for one in self.copies if one.actor == actor)

    def at(self, place: Place) -> PlacedCopy | None:
        """Return the process that takes a place, or has it; None if there is none."""
        found = [one for one in self.copies if one.place == place and one.role != "leaving"]
        return found[-1] if found else None

    def added(self, hosts: Mapping[Place, str], role: Role = "serving") -> Self:
        """Return the layout with a process more in some places, given the host of each."""
        serial, copies = self.serial, list(self.copies)
        for place, host in hosts.items():
            serial += 1
            name = f"shard-{place.shard}-{place.replica}-{serial}"
            copies.append(PlacedCopy(actor=name, host=host, role=role, **place._asdict()))
        return self.model_copy(update={"serial": serial, "copies": tuple(copies)})

    def without(self, actor: str) -> Self:
        """Return the layout without a process."""
        left = tuple(one for one in self.copies if one.actor != actor)
        return self.model_copy(update={"copies": left})

    def relieved(self) -> Self:
        """Return the layout with those that were coming in the places of the others."""
        coming = {one.place for one in self.copies if one.role == "coming"}
        roles: dict[Role, Role] = {"coming": "serving", "serving": "leaving", "leaving": "leaving"}
        return self.model_copy(
            update={
                "copies": tuple(
                    one.model_copy(update={"role": roles[one.role]}) if one.place in coming else one
                    for one in self.copies
                )
            }
        )

    def left(self, actors: Collection[str]) -> Self:
        """Return the layout with some processes on their way out."""
        return self.model_copy(
            update={
                "copies": tuple(
                    one.model_copy(update={"role": "leaving"}) if one.actor in actors else one
                    for one in self.copies
                )
            }
        )


def copy_of(place: Place, replicas: int) -> Copy:
    """Return a copy as placement knows it; standbys are numbered after R replicas."""
    if place.replica < replicas:
        return Copy(place.shard, place.replica)
    return Copy(place.shard, place.replica - replicas, standby=True)


def number_of(copy: Copy, replicas: int) -> int:
    """Return the number of a copy among those of its shard."""
    return copy.replica + (replicas if copy.standby else 0)
