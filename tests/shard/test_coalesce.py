import numpy as np
import pytest

from silvershard.model.planes import PlaneDictionary
from silvershard.shard.coalesce import Coalesced, Step, coalesce
from silvershard.shard.mutations import Delete, ItemMutation, ItemValues, Patch, Upsert
from silvershard.shard.snapshot import open_snapshot


@pytest.fixture(scope="module")
def planes(generation) -> PlaneDictionary:
    found = open_snapshot(generation.path).spec.planes
    assert found.terms_width == 4
    return found


def makers(*values: int) -> ItemValues:
    return ItemValues(attributes={"maker": values})


def signal(value: float) -> ItemValues:
    return ItemValues(signals={"popularity": value})


def changes(found: Coalesced) -> list[list[ItemMutation]]:
    return [[step.mutation for step in wave] for wave in found.waves]


def test_the_last_of_upserts_and_deletes_wins(planes: PlaneDictionary) -> None:
    found = coalesce(
        [
            Upsert(1, 1, makers(1)),
            Delete(2, 2),
            Upsert(1, 3, makers(3)),
            Upsert(2, 4, makers(4)),
            Upsert(3, 5, makers(5)),
            Patch(4, 6, signal(1)),
            Delete(3, 7),
            Delete(4, 8),
        ],
        planes,
    )
    assert found.waves == [
        [
            Step(Upsert(1, 3, makers(3)), 2),
            Step(Upsert(2, 4, makers(4)), 3),
            Step(Delete(3, 7)),
            Step(Delete(4, 8)),
        ]
    ]
    assert found.rejected == []


def test_a_patch_is_merged_into_what_is_before_it(planes: PlaneDictionary) -> None:
    found = coalesce(
        [
            Patch(2, 1, signal(1)),
            Upsert(1, 2, makers(1, 2)),
            Patch(1, 3, makers(3)),
            Patch(2, 4, ItemValues(signals={"freshness": 2})),
            Patch(1, 5, signal(5)),
        ],
        planes,
    )
    merged = ItemValues(attributes={"maker": (3,)}, signals={"popularity": 5})
    assert found.waves == [
        [
            Step(Patch(2, 4, ItemValues(signals={"popularity": 1, "freshness": 2}))),
            # What is embedded are the features of the upsert itself.
            Step(Upsert(1, 5, merged), 1),
        ]
    ]


def test_an_older_version_that_comes_again_is_ignored(planes: PlaneDictionary) -> None:
    mutations: list[ItemMutation] = [
        Delete(1, 9, urgent=True),
        Upsert(1, 5, makers(1)),
        Patch(1, 9, makers(2)),
        Delete(1, 9),
    ]
    found = coalesce(mutations, planes)
    assert changes(found) == [[Delete(1, 9, urgent=True)]]
    assert found.rejected == []


def test_a_patch_of_what_is_deleted_is_refused(planes: PlaneDictionary) -> None:
    found = coalesce([Delete(1, 1), Patch(1, 2, signal(1)), Upsert(1, 3, makers(1))], planes)
    assert changes(found) == [[Upsert(1, 3, makers(1))]]
    assert found.rejected == [(1, "there is no such item to patch")]


def test_a_patch_that_overflows_an_upsert_is_refused_alone(planes: PlaneDictionary) -> None:
    crowded = ItemValues(attributes={"genre": ("Western",)}, signals={"popularity": 9})
    found = coalesce(
        [Upsert(1, 1, makers(1, 2, 3, 4)), Patch(1, 2, crowded), Patch(1, 3, signal(3))], planes
    )
    kept = ItemValues(attributes={"maker": (1, 2, 3, 4)}, signals={"popularity": 3})
    assert changes(found) == [[Upsert(1, 3, kept)]]
    assert found.rejected == [(1, "the item would have 5 rare values, this generation holds 4")]


def test_patches_that_may_be_refused_stand_alone(planes: PlaneDictionary) -> None:
    """Merged, a patch that gives rare values would take the others with it when it is refused."""
    found = coalesce(
        [
            Patch(1, 1, signal(1)),
            Patch(1, 2, ItemValues(attributes={"genre": ("Drama",)})),
            Patch(1, 3, makers(1)),
            Patch(1, 4, signal(4)),
            Patch(2, 5, makers(1)),
        ],
        planes,
    )
    assert changes(found) == [
        [
            Patch(1, 2, ItemValues({"genre": ("Drama",)}, {"popularity": 1})),
            Patch(2, 5, makers(1)),
        ],
        [Patch(1, 3, makers(1))],
        [Patch(1, 4, signal(4))],
    ]


def test_a_generation_that_is_yet_to_be_made_holds_everything() -> None:
    mutations = [Patch(1, 1, makers(*range(9))), Patch(1, 2, signal(1))]
    mutations += [Patch(1, 3, ItemValues(attributes={"genre": ("Western",)}))]
    found = coalesce(mutations, None)
    merged = ItemValues({"maker": tuple(range(9)), "genre": ("Western",)}, {"popularity": 1})
    assert changes(found) == [[Patch(1, 3, merged)]]


def test_every_wave_holds_an_item_once(planes: PlaneDictionary) -> None:
    generator = np.random.default_rng(0)
    mutations: list[ItemMutation] = []
    for version in range(1, 400):
        item_id = int(generator.integers(0, 20))
        values = makers(*generator.integers(0, 9, 2).tolist())
        kind = generator.integers(0, 60)
        mutations.append(
            Delete(item_id, version)
            if kind == 0
            else Upsert(item_id, version, values)
            if kind == 1
            else Patch(item_id, version, values if kind < 20 else signal(version))
        )
    found = changes(coalesce(mutations, planes))
    assert len(found) > 1
    for wave in found:
        ids = [one.item_id for one in wave]
        assert len(set(ids)) == len(ids)
