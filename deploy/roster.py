"""Which copies of a shard the map names: so many as replicas are wanted; the others stay warm."""

from collections.abc import Iterable

Key = tuple[int, int]
"""Shard and number of the copy."""


class Roster:
    """The copies that are asked.

    A copy that is ready takes the place of one that is not, and keeps it: whoever comes back stays
    warm from then on, so that nothing changes twice.
    """

    def __init__(self, replicas: int) -> None:
        """Make a roster of nobody; at most ``replicas`` copies of each shard will be on it."""
        self.named: frozenset[Key] = frozenset()
        """The copies that the map names."""
        self.resting: frozenset[Key] = frozenset()
        """Copies that it shall not name, although they could be asked."""
        self._replicas = replicas

    def resize(self, replicas: int) -> None:
        """Name another number of copies of each shard from the next filling on."""
        self._replicas = replicas

    def fill(self, ready: Iterable[Iterable[Key]]) -> None:
        """Strike those that are not ready off the list, and fill it up with those that are.

        Args:
            ready: the copies that could be asked for a generation, for each that the map offers;
                among those that are not named yet the smaller number comes first.
        """
        named: set[Key] = set()
        for group in ready:
            places: dict[int, int] = {}
            before = self.named | named
            for key in sorted(set(group) - self.resting, key=lambda key: (key not in before, key)):
                taken = places.get(key[0], 0)
                if taken < self._replicas:
                    places[key[0]] = taken + 1
                    named.add(key)
        self.named = frozenset(named)
