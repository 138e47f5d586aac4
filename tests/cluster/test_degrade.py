from typing import Any

import pytest

from silvershard.cluster.admission import INTERVAL_S
from silvershard.cluster.config import DegradeFloors, DegradeSection, DegradeTrigger
from silvershard.cluster.degrade import Ladder, Reduced
from silvershard.cluster.degrade_policy import UNDEMANDING, DegradeMode, DegradePolicy
from silvershard.model.compiled_request import compile_request
from silvershard.model.plan import ALL_PAGES, PROBE, PROBE_WIDE, Plan, choose_plan
from silvershard.model.request import Request, RequestError
from silvershard.model.spec import SearchDefaults, ServingSpec


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ladder_of(clock: Clock, **config: Any) -> Ladder:
    return Ladder(DegradeSection(**config), clock)


def press(ladder: Ladder, clock: Clock, seconds: float, delay_s: float = 0.02) -> None:
    """Let the queue delay be that long, looked at every millisecond."""
    for _ in range(round(seconds * 1000)):
        ladder.observe(delay_s)
        clock.now_s += 0.001
    ladder.observe(delay_s)


# ---- when


def test_a_delay_that_stands_leads_down_step_by_step_and_no_further_than_the_last(
    clock: Clock,
) -> None:
    ladder = ladder_of(clock)
    levels = [ladder.level]
    for _ in range(8):
        press(ladder, clock, INTERVAL_S)
        levels.append(ladder.level)
    assert ladder.lowest == 5
    assert levels == [0, 1, 2, 3, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("calm_s", [0.0, 0.005])
def test_a_burst_is_no_overload(clock: Clock, calm_s: float) -> None:
    ladder = ladder_of(clock)
    for _ in range(50):
        press(ladder, clock, INTERVAL_S * 0.9)
        ladder.observe(calm_s)
    assert ladder.level == 0


def test_it_recovers_step_by_step_only_after_the_delay_stayed_away(clock: Clock) -> None:
    ladder = ladder_of(clock, trigger=DegradeTrigger(recover_after_ms=2000))
    press(ladder, clock, 3.5 * INTERVAL_S)
    assert ladder.level == 3
    ladder.observe(0.0)
    clock.now_s += 1.9
    assert ladder.level == 3
    # Short as it is, it begins the wait anew.
    ladder.observe(0.006)
    clock.now_s += 0.05
    ladder.observe(0.004)
    clock.now_s += 1.9
    assert ladder.level == 3
    clock.now_s += 0.2
    assert ladder.level == 2
    clock.now_s += 1.8
    assert ladder.level == 2
    clock.now_s += 0.2
    assert ladder.level == 1
    clock.now_s += 60
    assert ladder.level == 0


def test_it_does_not_recover_while_the_delay_stands_although_nobody_looks(clock: Clock) -> None:
    ladder = ladder_of(clock)
    press(ladder, clock, INTERVAL_S)
    clock.now_s += 60
    assert ladder.level == 1


def test_without_steps_there_is_nothing_to_leave_out(clock: Clock) -> None:
    ladder = ladder_of(clock, ladder=())
    press(ladder, clock, 1.0)
    assert ladder.level == 0


# ---- what


@pytest.fixture(scope="module")
def spec(whole: Any) -> ServingSpec:
    """The generation as if it had many clusters and other defaults."""
    own: ServingSpec = whole.spec
    return own.model_copy(
        update={
            "num_clusters": 1024,
            "documents": 1_000_000,
            "defaults": SearchDefaults(probes=64, ann_k=500),
        }
    )


def reduced(
    spec: ServingSpec,
    level: int,
    request: Request,
    policy: DegradePolicy = UNDEMANDING,
    *,
    eligible: int | None = None,
    returns_tasks: bool = True,
    **config: Any,
) -> Reduced:
    compiled = compile_request(request, spec)
    return ladder_of(Clock(), **config).reduce(
        compiled.plan(spec, eligible, spec.documents),
        level,
        compiled,
        policy,
        spec,
        documents=spec.documents,
        eligible=eligible,
        returns_tasks=returns_tasks,
    )


FEWER, SHALLOWER, SKIPPED = "NPROBE_REDUCED", "RERANK_DEPTH_REDUCED", "TASKS_SKIPPED"


def test_probes_then_candidates_then_tasks_and_each_step_is_named(spec: ServingSpec) -> None:
    found = [reduced(spec, level, Request(k=10, value="score")) for level in range(6)]
    assert [tuple(one.plan[1:3]) for one in found] == [
        *((64, 500), (32, 500), (8, 500)),
        *((8, 250), (8, 200), (8, 200)),
    ]
    assert [one.plan.without for one in found] == [()] * 5 + [("rated", "liked")]
    assert [one.reasons for one in found] == [
        *((), (FEWER,), (FEWER,)),
        *((FEWER, SHALLOWER), (FEWER, SHALLOWER), (FEWER, SHALLOWER, SKIPPED)),
    ]
    assert {one.plan.kind for one in found} == {PROBE}


def test_the_steps_are_taken_in_the_order_of_the_configuration(spec: ServingSpec) -> None:
    order = ("tasks", "ann_k")
    found = [reduced(spec, level, Request(value="score"), ladder=order) for level in range(4)]
    both = (SHALLOWER, SKIPPED)
    assert [one.reasons for one in found] == [(), (SKIPPED,), both, both]
    assert [tuple(one.plan[1:3]) for one in found] == [(64, 500), (64, 500), (64, 250), (64, 200)]


@pytest.mark.parametrize("level", range(1, 6))
def test_floors_hold_and_what_is_below_them_already_is_no_degradation(
    spec: ServingSpec, level: int
) -> None:
    floors = DegradeFloors(nprobe=40, ann_k=300, required_tasks=("liked", "unheard_of"))
    found = reduced(spec, level, Request(value="score"), floors=floors)
    assert found.plan.probes >= 40
    assert found.plan.ann_k >= 300
    assert found.plan.without == ()
    high = DegradeFloors(nprobe=64, ann_k=500, required_tasks=("liked", "rated"))
    untouched = reduced(spec, level, Request(value="score"), floors=high)
    assert untouched == Reduced(Plan(PROBE, 64, 500))


def test_the_request_has_floors_of_its_own(spec: ServingSpec) -> None:
    policy = DegradePolicy(DegradeMode.ALLOW, 50, 450, ("rated",))
    found = reduced(spec, 5, Request(value="score"), policy)
    assert found.plan == Plan(PROBE, 50, 450)


@pytest.mark.parametrize(
    "request_of",
    [
        {"plan": "probe(probes=64,ann_k=500)"},
        {"exact": True, "filter": "maker:3"},
        {"filter": "maker:3"},
    ],
    ids=["pinned", "exact", "nothing eligible"],
)
@pytest.mark.parametrize("mode", DegradeMode)
def test_some_plans_are_never_changed(
    spec: ServingSpec, request_of: dict[str, Any], mode: DegradeMode
) -> None:
    eligible = 900 if "exact" in request_of else 0
    request = Request(value="score", **request_of)
    found = reduced(spec, 5, request, DegradePolicy(mode), eligible=eligible)
    assert found == reduced(spec, 0, request, eligible=eligible)
    assert found.reasons == ()


def test_never_is_respected(spec: ServingSpec) -> None:
    found = reduced(spec, 5, Request(value="score"), DegradePolicy(DegradeMode.NEVER))
    assert found == Reduced(Plan(PROBE, 64, 500))


def test_numbers_of_the_request_stay_unless_it_allows_less(spec: ServingSpec) -> None:
    both = Request(nprobe=60, ann_k=400)
    assert reduced(spec, 5, both) == Reduced(Plan(PROBE, 60, 400))
    allowed = reduced(spec, 3, both, DegradePolicy(DegradeMode.ALLOW))
    assert allowed == Reduced(Plan(PROBE, 8, 200), (FEWER, SHALLOWER))
    probes = reduced(spec, 3, Request(nprobe=60))
    assert probes == Reduced(Plan(PROBE, 60, 250), (SHALLOWER,))


def test_a_selective_filter_keeps_its_share_of_the_floor(spec: ServingSpec) -> None:
    request = Request(filter="maker:3")
    wide = choose_plan(spec, k=10, eligible=250_000)
    assert wide == Plan(PROBE_WIDE, 256, 500)
    found = [reduced(spec, level, request, eligible=250_000).plan for level in (1, 2)]
    assert found == [Plan(PROBE_WIDE, 128, 500), Plan(PROBE, 32, 500)]
    # All pages cost what half of them do, so less work begins below that.
    assert choose_plan(spec, k=10, eligible=50_000).kind == ALL_PAGES
    found = [reduced(spec, level, request, eligible=50_000).plan for level in (1, 2)]
    assert found == [Plan(PROBE_WIDE, 256, 500), Plan(PROBE, 64, 500)]


def test_k_results_still_have_room(spec: ServingSpec) -> None:
    found = reduced(spec, 5, Request(k=20_000))
    assert found.plan == Plan(PROBE, 31, 20_000)
    few = reduced(spec, 5, Request(k=1000, filter="maker:3"), eligible=2000)
    # On average 256 clusters hold 500 of 2000 items: too few for 1000.
    assert few.plan.kind == ALL_PAGES
    assert few.plan.ann_k == 1000


def test_the_decoder_of_semantic_ids_is_asked_for_as_much_less(spec: ServingSpec) -> None:
    compiled = compile_request(Request(), spec)
    ladder = ladder_of(Clock())
    plan = Plan(PROBE, 64, 500, 90)
    asked: dict[str, Any] = {"documents": spec.documents}
    found = ladder.reduce(plan, 3, compiled, UNDEMANDING, spec, **asked)
    assert found.plan == Plan(PROBE, 8, 250, 45)
    assert ladder.reduce(plan, 2, compiled, UNDEMANDING, spec, **asked).plan.semantic_k == 90


def test_a_task_that_the_formula_reads_is_never_skipped(spec: ServingSpec) -> None:
    assert reduced(spec, 5, Request()).plan.without == ()
    assert SKIPPED not in reduced(spec, 5, Request()).reasons
    # To compute one task is to compute nearly all of the others.
    found = reduced(spec, 5, Request(value="liked + 0.5 * popularity"))
    assert found.plan.without == ()
    assert SKIPPED not in found.reasons


def test_tasks_that_nobody_asked_to_be_told_are_skipped_without_a_word(spec: ServingSpec) -> None:
    found = reduced(spec, 5, Request(value="score"), returns_tasks=False)
    assert found.plan.without == ("rated", "liked")
    assert SKIPPED not in found.reasons


@pytest.mark.parametrize(
    ("policy", "field", "message"),
    [
        (DegradePolicy(min_nprobe=1025), "degrade.min_nprobe", "must be in 0..1024, got 1025"),
        (
            DegradePolicy(required_tasks=("liked", "bought")),
            "degrade.required_tasks",
            "unknown task 'bought'; the model has rated, liked",
        ),
    ],
)
def test_a_policy_that_the_generation_cannot_meet_is_refused(
    spec: ServingSpec, clock: Clock, policy: DegradePolicy, field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        ladder_of(clock).check(policy, spec)
    assert raised.value.field == field
    ladder_of(clock).check(DegradePolicy(required_tasks=("liked",), min_nprobe=1024), spec)
