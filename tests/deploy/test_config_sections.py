import pydantic
import pytest

from silvershard.deploy.config_sections import (
    PlacementSection,
    ReplicasSection,
    ShardingSection,
    UpdatesSection,
)


def test_a_device_that_is_not_served_on_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="serves on cpu only, got 'cuda:0'"):
        ShardingSection(devices=("cpu", "cuda:0"))


@pytest.mark.parametrize("partitions", [3, 6, 63])
def test_the_partitions_of_a_log_are_a_power_of_two(partitions: int) -> None:
    with pytest.raises(pydantic.ValidationError, match=f"a power of two, got {partitions}"):
        UpdatesSection(partitions=partitions)
    assert UpdatesSection(partitions=64).partitions == 64


def test_a_feed_block_must_be_able_to_end() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"below updates.feed_block, 0.5, got 0.5"):
        UpdatesSection(feed_block=0.5, feed_block_hysteresis=0.5)


@pytest.mark.parametrize("url", ["redis://host:1/0?prefix=a", "sqlite:///a/b.sqlite", ""])
def test_a_log_is_a_url_of_a_store_that_is_known(url: str) -> None:
    assert UpdatesSection(log=url).log == url
    with pytest.raises(pydantic.ValidationError, match="log"):
        UpdatesSection(log="postgres://host/db")


def test_copies_are_spread_over_hosts_or_zones_and_some_may_wait() -> None:
    section = ReplicasSection(placement=PlacementSection(spread="zone"))
    assert ReplicasSection.model_validate(section.model_dump()) == section
    with pytest.raises(pydantic.ValidationError):
        ReplicasSection.model_validate({"placement": {"spread": "rack"}})
    assert (ShardingSection().standby, ShardingSection(replicas=2, standby=1).copies) == (0, 3)
    with pytest.raises(pydantic.ValidationError):
        ShardingSection(standby=5)
