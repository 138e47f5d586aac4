"""How many items of the catalogue each filter lets through, as it was lately."""

from collections import OrderedDict
from collections.abc import Callable

from silvershard.model.compiled_request import CompiledRequest

_COUNT_TTL_S = 1.0
_COUNT_ENTRIES = 1024


class CountCache:
    """Eligible counts of filters over the whole catalogue, for a second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Make one that knows nothing."""
        self._clock = clock
        self._counts: OrderedDict[tuple[str, bytes], tuple[int, float]] = OrderedDict()

    def get(self, compiled: CompiledRequest) -> int | None:
        """Return the count of a request's filter; None if it is not known."""
        key = self._key(compiled)
        count, until_s = self._counts.get(key, (0, float("-inf")))
        if self._clock() >= until_s:
            self._counts.pop(key, None)
            return None
        self._counts.move_to_end(key)
        return count

    def put(self, compiled: CompiledRequest, count: int) -> None:
        """Remember the count of a request's filter."""
        self._counts[self._key(compiled)] = (count, self._clock() + _COUNT_TTL_S)
        if len(self._counts) > _COUNT_ENTRIES:
            self._counts.popitem(last=False)

    def _key(self, compiled: CompiledRequest) -> tuple[str, bytes]:
        # The filter mode may change the program of the same filter.
        return compiled.filter_key, compiled.scan.numpy().tobytes()
