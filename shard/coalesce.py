"""What the mutations of a batch come to, item by item.

However a history is cut into batches, the items end up the same: mutations are merged only where
that changes nothing, refusals included.
"""

from collections.abc import Iterable
from typing import NamedTuple

from silvershard.model.planes import PlaneDictionary
from silvershard.shard.changes import NOTHING_TO_PATCH
from silvershard.shard.mutations import Delete, ItemMutation, Patch, Upsert, count_rare

Rejection = tuple[int, str]
"""An item id, -1 where rows of a table were meant, and the reason."""


class Step(NamedTuple):
    """One change of one item."""

    mutation: ItemMutation
    source: int = -1
    """Of an upsert: the place among the given mutations of the one that it began with."""


class Coalesced(NamedTuple):
    """The changes of a batch."""

    waves: list[list[Step]]
    """To be applied one after another; an item stands at most once in each."""
    rejected: list[Rejection]


def coalesce(mutations: Iterable[ItemMutation], planes: PlaneDictionary | None) -> Coalesced:
    """Return what checked mutations come to, in log order.

    The last of upserts and deletes wins; a patch is merged into the upsert or patch before it. A
    patch is refused after a delete, and where it would give the upsert before it more rare values
    than an item can hold. Where only the index can tell, because the item was there before, the
    patch gets a wave of its own. A mutation whose version is not above that of an earlier one of
    its item is an old one that came again, and is ignored.

    Args:
        mutations: of any items.
        planes: of the generation; None: of one that is yet to be made, which holds everything.
    """
    steps: dict[int, list[Step]] = {}
    rejected: list[Rejection] = []
    for place, mutation in enumerate(mutations):
        own = steps.setdefault(mutation.item_id, [])
        last = own[-1].mutation if own else None
        if last is not None and mutation.version <= last.version:
            continue
        if not isinstance(mutation, Patch):
            own[:] = [Step(mutation, place if isinstance(mutation, Upsert) else -1)]
        elif last is None:
            own.append(Step(mutation))
        elif isinstance(last, Delete):
            rejected.append((mutation.item_id, NOTHING_TO_PATCH))
        elif isinstance(last, Upsert):
            values = last.values.patched(mutation.values)
            rare = 0 if planes is None else count_rare(values, planes)
            if planes is not None and rare > planes.terms_width:
                rejected.append((mutation.item_id, _too_many(rare, planes.terms_width)))
                continue
            own[-1] = Step(
                Upsert(last.item_id, mutation.version, values, last.embedding), own[-1].source
            )
        elif planes is not None and (_may_fail(last, planes) or _may_fail(mutation, planes)):
            own.append(Step(mutation))
        else:
            own[-1] = Step(
                Patch(last.item_id, mutation.version, last.values.patched(mutation.values))
            )
    waves: list[list[Step]] = []
    for own in steps.values():
        for wave, step in enumerate(own):
            if wave == len(waves):
                waves.append([])
            waves[wave].append(step)
    return Coalesced(waves, rejected)


def _may_fail(patch: Patch, planes: PlaneDictionary) -> bool:
    """Return whether the rare values of a patch may be too many beside those of its item."""
    return count_rare(patch.values, planes) > 0


def _too_many(rare: int, width: int) -> str:
    return f"the item would have {rare} rare values, this generation holds {width}"
