import pytest
from pydantic import ValidationError

from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Attribute, Schema
from silvershard.model.spec import SearchDefaults, ServingSpec

PLANES = PlaneDictionary(
    dtypes={"year": "int"},
    exact_planes={},
    first_bloom_plane=1,
    num_bloom_planes=0,
    num_hashes=1,
    seed=0,
    columns={"year": 0},
    terms_width=0,
    false_positive_rate=0.0,
)


def make(**changes: object) -> ServingSpec:
    fields: dict[str, object] = {
        "model": "films",
        "generation": 1,
        "documents": 5,
        "dim": 16,
        "num_clusters": 4,
        "num_partitions": 64,
        "partition_documents": (5, *(0,) * 63),
        "page_slots": 64,
        "item_schema": Schema(attributes=(Attribute(name="year", kind="number", dtype="int"),)),
        "planes": PLANES,
        "defaults": SearchDefaults(probes=4, ann_k=10),
        **changes,
    }
    return ServingSpec.model_validate(fields)


def test_a_spec_survives_json() -> None:
    spec = make()
    assert ServingSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_slots": 96}, "page_slots must be 64 or 128, got 96"),
        ({"num_partitions": 65, "partition_documents": (5, *(0,) * 64)}, "power of two"),
        ({"partition_documents": (5,)}, "must have 64 entries, got 1"),
        ({"partition_documents": (4, *(0,) * 63)}, "must sum to documents=5, got 4"),
        ({"num_clusters": 3}, "probes must be at most num_clusters=3, got 4"),
        ({"dim": 1025}, "less than or equal to 1024"),
        (
            {"defaults": SearchDefaults(probes=4, ann_k=10, semantic_k=5)},
            "semantic_k must be 0 without semantic ids, got 5",
        ),
        ({"extra": 1}, "Extra inputs are not permitted"),
    ],
)
def test_an_inconsistent_spec_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)
