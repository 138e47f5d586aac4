import pytest

from silvershard.model.limits import MAX_ANN_K
from silvershard.model.plan import (
    ALL_PAGES,
    PROBE,
    PROBE_WIDE,
    Plan,
    PlanError,
    check_semantic_k,
    choose_plan,
    parse_plan,
)
from silvershard.model.planes import PlaneDictionary
from silvershard.model.schema import Schema
from silvershard.model.semantic_config import MAX_SEMANTIC_K, SemanticConfig, SemanticSpec
from silvershard.model.spec import SearchDefaults, ServingSpec


def make_spec(documents: int = 100_000, num_clusters: int = 1024) -> ServingSpec:
    return ServingSpec(
        model="films",
        generation=1,
        documents=documents,
        dim=16,
        num_clusters=num_clusters,
        num_partitions=64,
        partition_documents=(documents, *(0,) * 63),
        page_slots=64,
        item_schema=Schema(),
        planes=PlaneDictionary(
            dtypes={},
            exact_planes={},
            first_bloom_plane=1,
            num_bloom_planes=0,
            num_hashes=1,
            seed=0,
            columns={},
            terms_width=0,
            false_positive_rate=0.0,
        ),
        defaults=SearchDefaults(probes=64, ann_k=500),
    )


SPEC = make_spec()
SEMANTIC = SPEC.model_copy(
    update={
        "semantic": SemanticSpec(decoder=SemanticConfig(), state_dim=8),
        "defaults": SearchDefaults(probes=64, ann_k=500, semantic_k=90),
    }
)


def test_without_a_filter_the_defaults_are_used() -> None:
    assert choose_plan(SPEC, k=10, eligible=None) == Plan(PROBE, 64, 500)


def test_a_broad_filter_changes_little() -> None:
    assert choose_plan(SPEC, k=10, eligible=100_000) == Plan(PROBE, 64, 500)


def test_a_selective_filter_probes_more_in_proportion() -> None:
    assert choose_plan(SPEC, k=10, eligible=25_000) == Plan(PROBE_WIDE, 256, 500)


def test_a_very_selective_filter_reads_all_pages() -> None:
    assert choose_plan(SPEC, k=10, eligible=1_000) == Plan(ALL_PAGES, 1024, 500)
    assert choose_plan(SPEC, k=10, eligible=0) == Plan(ALL_PAGES, 1024, 500)


def test_at_least_one_and_a_half_times_k_are_kept_and_enough_clusters_probed_for_them() -> None:
    assert choose_plan(SPEC, k=1000, eligible=None) == Plan(PROBE, 64, 1500)
    assert choose_plan(SPEC, k=20_000, eligible=None) == Plan(PROBE_WIDE, 308, 30_000)
    assert choose_plan(SPEC, k=100_000, eligible=None) == Plan(ALL_PAGES, 1024, 150_000)


def test_a_request_that_names_its_probes_gets_them_whatever_the_filter() -> None:
    assert choose_plan(SPEC, k=10, eligible=5, nprobe=7, ann_k=20) == Plan(PROBE, 7, 20)
    assert choose_plan(SPEC, k=10, eligible=5, nprobe=5000) == Plan(ALL_PAGES, 1024, 500)


def test_an_exact_search_keeps_every_eligible_item() -> None:
    assert choose_plan(SPEC, k=10, eligible=77, exact=True) == Plan(ALL_PAGES, 1024, 77)
    assert choose_plan(SPEC, k=10, eligible=None, exact=True) == Plan(ALL_PAGES, 1024, 100_000)


def test_a_catalogue_that_has_grown_counts_as_it_is_now() -> None:
    grown = choose_plan(SPEC, k=10, eligible=None, exact=True, documents=100_400)
    assert grown == Plan(ALL_PAGES, 1024, 100_400)
    filtered = choose_plan(SPEC, k=10, eligible=100_200, exact=True, documents=100_400)
    assert filtered == Plan(ALL_PAGES, 1024, 100_200)


def test_an_exact_search_over_too_many_items_is_refused_with_numbers() -> None:
    with pytest.raises(PlanError, match=rf"at most {MAX_ANN_K}; 400000 are eligible"):
        choose_plan(make_spec(documents=400_000), k=10, eligible=None, exact=True)


def test_a_plan_survives_its_text() -> None:
    for plan in (Plan(PROBE, 3, 5), Plan(PROBE_WIDE, 1023, 300_000), Plan(ALL_PAGES, 1024, 1)):
        assert parse_plan(str(plan), SPEC) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected kind"),
        ("probe", "expected kind"),
        ("probe(probes=-1,ann_k=5)", "expected kind"),
        ("scan(probes=1,ann_k=5)", "expected kind"),
        ("probe(probes=0,ann_k=5)", r"probes must be in 1\.\.1024"),
        ("probe(probes=1025,ann_k=5)", r"probes must be in 1\.\.1024, got 1025"),
        ("probe(probes=1,ann_k=0)", r"ann_k must be in 1\.\.300000"),
        ("probe(probes=1,ann_k=300001)", r"ann_k must be in 1\.\.300000"),
        ("all_pages(probes=3,ann_k=5)", "all_pages probes 1024"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text, SPEC)


def test_a_tiny_catalogue_reads_all_pages() -> None:
    plan = choose_plan(make_spec(documents=5, num_clusters=64), k=10, eligible=None)
    assert plan == Plan(ALL_PAGES, 64, 500)


@pytest.mark.parametrize("eligible", [None, 100_000, 25_000, 1_000, 0])
def test_every_plan_asks_the_decoder_as_often_as_the_request_or_the_model_says(
    eligible: int | None,
) -> None:
    plain = choose_plan(SPEC, k=10, eligible=eligible)
    for asked, given in ((None, 90), (0, 0), (7, 7)):
        plan = choose_plan(SEMANTIC, k=10, eligible=eligible, semantic_k=asked)
        assert plan == plain._replace(semantic_k=given)
    assert choose_plan(SEMANTIC, k=10, eligible=eligible, nprobe=3).semantic_k == 90


def test_an_exact_search_asks_the_decoder_only_when_told_to() -> None:
    assert choose_plan(SEMANTIC, k=10, eligible=77, exact=True).semantic_k == 0
    assert choose_plan(SEMANTIC, k=10, eligible=77, exact=True, semantic_k=5).semantic_k == 5


def test_a_plan_with_semantic_candidates_survives_its_text() -> None:
    plan = Plan(PROBE, 3, 5, 90)
    assert str(plan) == "probe(probes=3,ann_k=5,semantic_k=90)"
    assert parse_plan(str(plan), SEMANTIC) == plan
    assert parse_plan("probe(probes=3,ann_k=5)", SEMANTIC).semantic_k == 0


@pytest.mark.parametrize(
    ("semantic_k", "spec", "message"),
    [
        (1, SPEC, "must be 0, as model films has no semantic ids, got 1"),
        (-1, SEMANTIC, rf"must be in 0\.\.{MAX_SEMANTIC_K}, got -1"),
        (MAX_SEMANTIC_K + 1, SEMANTIC, rf"must be in 0\.\.{MAX_SEMANTIC_K}"),
    ],
)
def test_semantic_candidates_that_cannot_be_given_are_refused(
    semantic_k: int, spec: ServingSpec, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_semantic_k(semantic_k, spec)
    if semantic_k > 0:
        with pytest.raises(PlanError, match=message):
            parse_plan(f"probe(probes=1,ann_k=1,semantic_k={semantic_k})", spec)


TASKS = SPEC.model_copy(update={"item_schema": Schema(tasks=("liked", "rated", "shared"))})


def test_a_plan_names_the_tasks_that_it_leaves_out() -> None:
    plan = Plan(PROBE, 3, 5, 0, ("liked", "shared"))
    assert str(plan) == "probe(probes=3,ann_k=5,without=liked+shared)"
    assert parse_plan(str(plan), TASKS) == plan
    # In whatever order they are named, it is the same plan.
    assert parse_plan("probe(probes=3,ann_k=5,without=shared+liked)", TASKS) == plan


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("bought", "unknown task 'bought' in without; the model has liked, rated, shared"),
        ("liked+", "unknown task ''"),
        ("liked+liked", "without must name each task once"),
        ("", "expected kind"),
        ("liked,rated", "expected kind"),
    ],
)
def test_tasks_that_cannot_be_left_out_are_refused(without: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(f"probe(probes=3,ann_k=5,without={without})", TASKS)
