from silvershard.deploy.cluster_size import (
    ClusterSize,
    Scaled,
    in_force,
    resized,
    size_from,
    size_of,
)
from silvershard.deploy.config import load


def test_the_size_of_settings() -> None:
    options = {"sharding.shards": 3, "sharding.replicas": 2, "sharding.standby": 1}
    config = load(None, environ={}, options=options)
    size = size_of(config)
    assert size == size_from(config.sharding) == ClusterSize(shards=3, replicas=2, standby=1)
    assert (size.copies, str(size)) == (3, "3 shards x 2 replicas x 1 standby")
    other = resized(config, ClusterSize(shards=1, replicas=1))
    assert (other.sharding.shards, other.sharding.copies) == (1, 1)
    assert other.sharding.devices == config.sharding.devices
    assert str(size_of(other)) == "1 shard x 1 replica"


def test_what_was_scaled_stays_in_force_until_the_settings_change() -> None:
    config = load(None, environ={}, options={"sharding.shards": 2})
    scaled = Scaled(size=ClusterSize(shards=5, replicas=2), instead_of=size_of(config))
    assert in_force(config, None) == config
    assert size_of(in_force(config, scaled)) == scaled.size
    changed = load(None, environ={}, options={"sharding.shards": 3})
    assert in_force(changed, scaled) == changed
