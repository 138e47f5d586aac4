"""What one commit changes in a part of the index: encoded items, ready to be written.

Shapes: n upserts, m patches, d deletes, D embedding dimension, S signals, V columns, L semantic
codes.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray
from torch import Tensor

from silvershard.model.planes import ItemBits

NOTHING_TO_PATCH: Final = "there is no such item to patch"
"""Why a patch of an item is refused that is not there."""


class NewItems(NamedTuple):
    """Items that replace whatever their ids held."""

    item_ids: Tensor
    """``(n,)`` int64 >= 0."""
    versions: Tensor
    """``(n,)`` int64 >= 1."""
    clusters: Tensor
    """``(n,)`` int32 in [0, C)."""
    codes: Tensor
    """``(n, D)`` int8."""
    scales: Tensor
    """``(n,)`` float32, finite and >= 0."""
    cache: Tensor
    """``(n, D)`` float16, finite."""
    bits: ItemBits
    signals: Tensor
    """``(n, S)`` float32."""
    fields: Mapping[str, NDArray[Any]]
    """Of every field ``(n,)``; missing is None, NaN or ``NULL_INT``."""
    semantic_codes: Tensor | None
    """``(n, L)`` int16; None where the generation has no semantic ids."""


class PatchedItems(NamedTuple):
    """Items that keep what is not given."""

    item_ids: Tensor
    """``(m,)`` int64 >= 0."""
    versions: Tensor
    """``(m,)`` int64 >= 1."""
    bits: ItemBits
    """Encoded from the given attributes only."""
    attributes: Mapping[str, Tensor]
    """Of some attributes ``(m,)`` bool: which items give them; the others nobody gives."""
    signals: Tensor
    """``(m, S)`` float32."""
    signals_given: Tensor
    """``(m, S)`` bool."""
    fields: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    """Of some fields the values ``(m,)`` and which of them are given, ``(m,)`` bool."""


class Changes(NamedTuple):
    """One commit; an item stands in at most one of the three."""

    upserts: NewItems
    patches: PatchedItems
    deletes: Tensor
    """``(d,)`` int64 >= 0."""
    delete_versions: Tensor
    """``(d,)`` int64 >= 1."""
