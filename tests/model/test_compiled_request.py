from dataclasses import astuple
from typing import Any

import pytest
import torch

from silvershard.model.compiled_request import (
    CompiledRequest,
    RequestCompiler,
    compile_request,
)
from silvershard.model.plan import Plan
from silvershard.model.request import FilterMode, Request, RequestError
from silvershard.model.spec import ServingSpec
from silvershard.shard.snapshot import open_snapshot


@pytest.fixture(scope="module")
def spec(generation) -> ServingSpec:
    return open_snapshot(generation.path).spec


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"k": 0}, "k", r"must be in 1\.\.100000, got 0"),
        ({"k": 100_001}, "k", r"must be in 1\.\.100000, got 100001"),
        ({"nprobe": 17}, "search.nprobe", r"must be in 0\.\.16, got 17"),
        ({"nprobe": -1}, "search.nprobe", r"must be in 0\.\.16, got -1"),
        ({"ann_k": 300_001}, "search.ann_k", r"must be in 0\.\.300000, got 300001"),
        ({"exclude_ids": range(100_001)}, "exclude_ids", "at most 100000 ids, got 100001"),
        ({"features": {"hobby": [1]}}, "features.hobby", "unknown user feature.*history"),
        ({"features": {"history": ["a"]}}, "features.history", "must be an int, got str"),
        ({"features": {"history": [1.5]}}, "features.history", "must be an int, got float"),
        ({"filter": "colour:red"}, "filter", "colour"),
        ({"filter": "genre:Comedy AND"}, "filter", "position 16"),
        ({"filter": "year >= $y"}, "filter", "y"),
        (
            {"task_weights": {"shared": 1.0}},
            "task_weights",
            "unknown weight 'shared'.*liked, rated",
        ),
        ({"task_weights": {"liked": float("nan")}}, "task_weights", "finite"),
        ({"plan": "everything"}, "search.plan", "expected kind"),
        ({"plan": "probe(probes=3,ann_k=9)", "nprobe": 3}, "search.plan", "excludes exact, nprobe"),
        ({"return_fields": ["director"]}, "return_fields", "unknown field 'director'.*title, year"),
    ],
)
def test_a_bad_request_is_refused_and_the_field_named(
    spec: ServingSpec, changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compile_request(Request(**changes), spec)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_equal_filters_have_equal_keys_and_none_has_an_empty_one(spec: ServingSpec) -> None:
    texts = [
        "genre:Comedy AND year >= 1990",
        "year >= 1990 & genre:Comedy",
        "NOT NOT genre:Comedy AND year>=1990",
    ]
    keys = {compile_request(Request(filter=text), spec).filter_key for text in texts}
    assert len(keys) == 1
    bare = compile_request(Request(filter="  "), spec)
    assert bare.filter_key == ""
    assert not bare.needs_count


def test_a_pinned_plan_needs_no_count(spec: ServingSpec) -> None:
    plan = "probe(probes=3,ann_k=9)"
    compiled = compile_request(Request(filter="genre:Comedy", plan=plan), spec)
    assert not compiled.needs_count
    assert compiled.plan(spec, None) == Plan("probe", 3, 9)


def test_exclusions_are_distinct_sorted_and_possible(spec: ServingSpec) -> None:
    compiled = compile_request(Request(exclude_ids=[5, 3, 5, 2**63 + 1]), spec)
    assert compiled.exclude == (3, 5)


def test_weights_of_the_request_replace_the_defaults(spec: ServingSpec) -> None:
    default = compile_request(Request(), spec).value_constants
    changed = compile_request(Request(task_weights={"liked": 7.0}), spec).value_constants
    assert default.tolist() != changed.tolist()
    assert 7.0 in changed.tolist()


def test_weights_are_refused_where_the_model_forbids_them(spec: ServingSpec) -> None:
    schema = spec.item_schema.model_copy(update={"allow_task_weights": False})
    fixed = spec.model_copy(update={"item_schema": schema})
    with pytest.raises(RequestError, match="does not allow"):
        compile_request(Request(task_weights={"liked": 1.0}), fixed)


def test_a_request_may_bring_a_formula_and_its_weights(spec: ServingSpec) -> None:
    own = compile_request(Request(value="score * $mine", task_weights={"mine": 3.0}), spec)
    assert own.value_constants.tolist() == [0.0, 3.0, 0.0]
    assert compile_request(Request(), spec).value_ops.tolist() != own.value_ops.tolist()
    with pytest.raises(RequestError, match="unknown weight") as caught:
        compile_request(Request(value="score * $mine"), spec)
    assert caught.value.field == "value"
    with pytest.raises(RequestError, match="divides by zero") as caught:
        compile_request(Request(value="score / $w", task_weights={"w": 0.0}), spec)
    assert caught.value.field == "value"


def test_a_formula_is_refused_where_the_model_forbids_it(spec: ServingSpec) -> None:
    schema = spec.item_schema.model_copy(update={"allow_value": False})
    fixed = spec.model_copy(update={"item_schema": schema})
    compile_request(Request(), fixed)
    with pytest.raises(RequestError, match="does not allow a formula") as caught:
        compile_request(Request(value="score"), fixed)
    assert caught.value.field == "value"


def test_an_exact_search_that_is_too_large_is_the_requests_fault(spec: ServingSpec) -> None:
    large = spec.model_copy(update={"documents": 400_000})
    compiled = compile_request(Request(exact=True), large)
    with pytest.raises(RequestError, match="400000 are eligible") as caught:
        compiled.plan(large, None)
    assert caught.value.field == "search.exact"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("", {"rated", "liked"}),
        ("score", set()),
        ("popularity * 2", set()),
        ("liked > 0.5", {"liked"}),
        ("where(rated > 1, 2, freshness)", {"rated"}),
    ],
)
def test_the_tasks_that_a_formula_reads_are_known(
    spec: ServingSpec, value: str, read: set[str]
) -> None:
    assert compile_request(Request(value=value), spec).tasks_read == read


def test_a_pinned_plan_must_not_leave_out_what_the_formula_reads(spec: ServingSpec) -> None:
    plan = "probe(probes=3,ann_k=9,without=liked)"
    with pytest.raises(RequestError, match="reads task 'liked', which the plan leaves out") as it:
        compile_request(Request(plan=plan), spec)
    assert it.value.field == "search.plan"
    compiled = compile_request(Request(plan=plan, value="rated"), spec)
    assert compiled.plan(spec, None) == Plan("probe", 3, 9, 0, ("liked",))


def alike(one: CompiledRequest, other: CompiledRequest) -> bool:
    values = zip(astuple(one), astuple(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def test_a_compiler_that_remembers_gives_what_one_that_does_not_gives(spec: ServingSpec) -> None:
    compiler = RequestCompiler(spec)
    requests = [
        Request(),
        Request(filter="year > 1990"),
        Request(filter="year > 1990", filter_mode=FilterMode.EXACT),
        Request(filter="year > $y", params={"y": 1990}),
        Request(filter="year > $y", params={"y": 1991}),
        Request(filter="genre:Comedy", task_weights={"liked": 2.0}, k=3),
        Request(filter="genre:Comedy", task_weights={"liked": 3.0}, exclude_ids=[5]),
    ]
    for request in requests * 2:
        assert alike(compiler.compile(request), compile_request(request, spec))
    first, second = (compiler.compile(Request(filter="year > 1990")) for _ in range(2))
    assert first.scan is second.scan
    assert first.value_ops is second.value_ops


def test_a_compiler_refuses_what_is_wrong_every_time(spec: ServingSpec) -> None:
    compiler = RequestCompiler(spec)
    for _ in range(2):
        with pytest.raises(RequestError, match="position 16"):
            compiler.compile(Request(filter="genre:Comedy AND"))
