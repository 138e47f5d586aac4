import pytest
from pydantic import BaseModel, ValidationError

from silvershard.cluster.config import (
    AdmissionSection,
    ConcurrencySection,
    DegradeFloors,
    DegradeSection,
    DegradeTrigger,
    HealthSection,
    HedgingSection,
    ListenSection,
    ObservabilitySection,
    PingSection,
    QuerySection,
    RetriesSection,
    RouterConfig,
    TenantSection,
)

SECTIONS = (
    *(AdmissionSection, ConcurrencySection, TenantSection),
    *(DegradeFloors, DegradeSection, DegradeTrigger),
    *(HealthSection, HedgingSection, RetriesSection),
    *(ListenSection, ObservabilitySection, PingSection, QuerySection, RouterConfig),
)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_described(section: type[BaseModel]) -> None:
    assert [name for name, one in section.model_fields.items() if not one.description] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_settings_are_refused(section: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        section.model_validate({"map_path": "m", "surprise": 1})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (QuerySection, {"min_coverage": 1.01}),
        (QuerySection, {"min_coverage": float("nan")}),
        (QuerySection, {"default_deadline_ms": 0}),
        (AdmissionSection, {"queue": 0}),
        (AdmissionSection, {"hot": 1.1}),
        (AdmissionSection, {"tenants": {str(name): {"qps": 1} for name in range(1001)}}),
        (ConcurrencySection, {"min": 5, "max": 4}),
        (ConcurrencySection, {"mode": "free"}),
        (TenantSection, {"qps": 0}),
        (DegradeSection, {"ladder": ["nprobe", "nprobe"]}),
        (DegradeSection, {"ladder": ["drop_shard"]}),
        (DegradeFloors, {"nprobe": 0}),
        (DegradeTrigger, {"queue_delay_ms": 0}),
        (ListenSection, {"port": 65536}),
        (ListenSection, {"host": ""}),
        (PingSection, {"every_ms": 0}),
        (PingSection, {"suspect_after": 6, "eject_after": 5}),
        (HealthSection, {"max_ejected": 1.1}),
        (HedgingSection, {"after": "p50"}),
        (HedgingSection, {"budget": -0.1}),
        (RetriesSection, {"budget": 1.1}),
        (RetriesSection, {"max_attempts": 0}),
        (QuerySection, {"default_deadline_ms": 11_000}),
        (RouterConfig, {"map_path": ""}),
        (ObservabilitySection, {"http": "8002"}),
        (ObservabilitySection, {"http": "127.0.0.1:65536"}),
    ],
)
def test_values_out_of_range_are_refused(
    section: type[BaseModel], values: dict[str, object]
) -> None:
    with pytest.raises(ValidationError):
        section.model_validate(values)


def test_a_router_config_survives_its_file() -> None:
    config = RouterConfig(
        map_path="/state/map.json",
        admission=AdmissionSection(queue=3, tenants={"acme": TenantSection(qps=5)}),
    )
    assert RouterConfig.model_validate_json(config.model_dump_json()) == config


def test_the_default_query_settings_are_those_of_the_contract() -> None:
    query = QuerySection()
    assert (query.max_batch, query.max_delay_us) == (64, 500)
    assert query.min_coverage == 0.9
    hedging, retries = HedgingSection(), RetriesSection()
    assert (hedging.enabled, hedging.after, hedging.budget) == (True, "p95", 0.05)
    assert (retries.max_attempts, retries.budget) == (2, 0.1)
    assert HealthSection().max_ejected == 0.34


def test_a_router_of_no_cluster_answers_no_probes() -> None:
    assert RouterConfig(map_path="m").observability.http == ""
    assert ObservabilitySection().http == "127.0.0.1:8002"


def test_the_default_settings_of_overload_are_those_of_the_contract() -> None:
    admission, degrade = AdmissionSection(), DegradeSection()
    assert (admission.queue, admission.hot) == (256, 0.8)
    assert admission.concurrency.model_dump() == {"mode": "adaptive", "min": 4, "max": 64}
    assert degrade.ladder == ("nprobe", "ann_k", "tasks")
    assert (degrade.floors.nprobe, degrade.floors.ann_k) == (8, 200)
    assert degrade.trigger.model_dump() == {"queue_delay_ms": 5.0, "recover_after_ms": 5000}
