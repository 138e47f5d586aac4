from typing import Any

import numpy as np
import pytest
import torch

from silvershard.model.planes import ItemBits
from silvershard.shard.changes import PatchedItems
from silvershard.shard.mutation_batch import (
    MutationBatch,
    SignalPatches,
    in_columns,
    item_of,
    with_signals,
)
from silvershard.shard.mutations import Delete, ItemValues, Mutation, Patch, RowChange, Upsert

SIGNALS = ("popularity", "trend")


def columns(names: tuple[str, ...], *rows: tuple[int, int, int, list[float]]) -> SignalPatches:
    """Return patches of ``(place, item, version, values)``."""
    places, items, versions, values = zip(*rows, strict=True)
    return SignalPatches(
        np.array(places),
        np.array(items),
        np.array(versions),
        names,
        np.array(values, dtype=np.float32),
    )


def test_patches_of_their_own_item_stay_in_columns_of_the_schema() -> None:
    batch = MutationBatch(
        [(1, Delete(5, 2))],
        [
            columns(("trend",), (0, 7, 1, [0.5]), (3, 8, 4, [0.25])),
            columns(("trend", "popularity"), (2, 9, 3, [1, 2])),
        ],
    )
    found, others = in_columns(batch, SIGNALS)
    assert others == [Delete(5, 2)]
    assert found.item_ids.tolist() == [7, 8, 9]
    assert found.versions.tolist() == [1, 4, 3]
    assert found.values.tolist() == [[0, 0.5], [0, 0.25], [2, 1]]
    assert found.given.tolist() == [[False, True], [False, True], [True, True]]


def test_what_meets_another_change_of_its_item_keeps_its_place_in_the_log() -> None:
    upsert = Upsert(7, 2, ItemValues())
    batch = MutationBatch(
        [(1, upsert)],
        [
            columns(("trend",), (0, 7, 1, [0.5]), (2, 8, 3, [1]), (4, 9, 5, [2])),
            columns(("popularity",), (3, 8, 4, [3]), (5, 7, 6, [4])),
        ],
    )
    found, others = in_columns(batch, SIGNALS)
    assert found.item_ids.tolist() == [9]
    assert others == [
        Patch(7, 1, ItemValues(signals={"trend": 0.5})),
        upsert,
        Patch(8, 3, ItemValues(signals={"trend": 1.0})),
        Patch(8, 4, ItemValues(signals={"popularity": 3.0})),
        Patch(7, 6, ItemValues(signals={"popularity": 4.0})),
    ]


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (("colour",), (0, 1, 1, [1.0])),
        (("trend",), (0, 1, 1, [float("nan")])),
        (("trend",), (0, 1, 1, [float("inf")])),
        (("trend",), (0, -1, 1, [1.0])),
        (("trend",), (0, 1, 0, [1.0])),
    ],
)
def test_what_may_be_wrong_is_left_to_the_checks(names: tuple[str, ...], row: Any) -> None:
    found, others = in_columns(MutationBatch([], [columns(names, row)]), SIGNALS)
    assert len(found.item_ids) == 0
    assert len(others) == 1


def test_an_empty_batch_has_no_columns() -> None:
    found, others = in_columns(MutationBatch([]), SIGNALS)
    assert (found.values.shape, found.given.shape, others) == ((0, 2), (0, 2), [])


@pytest.mark.parametrize(
    ("mutation", "item"),
    [
        (Delete(5, 1), 5),
        (Delete(1 << 63, 1), -1),
        (Delete(-3, 1), -1),
        (Delete("a", 1), -1),  # type: ignore[arg-type]
        (RowChange("t", 1, (1,), np.zeros((1, 2), dtype=np.float32)), -1),
    ],
)
def test_items_are_known_where_their_id_is_possible(mutation: Mutation, item: int) -> None:
    assert item_of(mutation) == item


def test_patches_of_signals_go_behind_others_and_give_nothing_else() -> None:
    patched = PatchedItems(
        item_ids=torch.tensor([1]),
        versions=torch.tensor([5]),
        bits=ItemBits(torch.tensor([[True]]), torch.tensor([[3, 9, 9, 9]]), torch.tensor([[1990]])),
        attributes={"genre": torch.tensor([True])},
        signals=torch.tensor([[0.0, 0.0]]),
        signals_given=torch.tensor([[False, False]]),
        fields={"title": (np.array(["Ran"], dtype=object), np.array([True]))},
    )
    more, _ = in_columns(MutationBatch([], [columns(("trend",), (0, 7, 6, [0.5]))]), SIGNALS)
    found = with_signals(patched, more)
    assert found.item_ids.tolist() == [1, 7]
    assert found.versions.tolist() == [5, 6]
    assert found.bits.exact.tolist() == [[True], [False]]
    assert found.bits.terms.tolist() == [[3, 9, 9, 9], [torch.iinfo(torch.int64).max] * 4]
    assert found.attributes["genre"].tolist() == [True, False]
    assert found.signals.tolist() == [[0, 0], [0, 0.5]]
    assert found.signals_given.tolist() == [[False, False], [False, True]]
    assert found.fields["title"][1].tolist() == [True, False]
    assert len(found.fields["title"][0]) == 2
