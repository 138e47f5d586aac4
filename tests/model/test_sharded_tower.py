import itertools
from typing import Any

import pytest
import torch

from silvershard.model.embeddings import QuantizedTables, ShardedSequences, ShardedTables
from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.placement import TablePlanError, TableTopology
from silvershard.model.sharded_tower import shard_tower
from silvershard.model.two_tower import TwoTower


def devices(count: int, host_bytes: int = 1 << 30) -> TableTopology:
    return TableTopology(device="cpu", num_devices=count, host_bytes=host_bytes)


@pytest.fixture
def tower(publish_model: Any) -> Any:
    made = publish_model(encoder=HSTUEncoderConfig(max_length=16, layers=1), dim=32)
    return made.model, made.catalogue


@pytest.mark.parametrize(
    ("count", "sharding"),
    [
        (2, {}),
        (3, {"history": "row", "session": "row", "movie": "row"}),
        (2, {"history": "column", "session": "table", "genres": "column"}),
    ],
)
def test_a_tower_on_several_devices_keeps_its_bits(
    tower: Any, count: int, sharding: dict[str, Any]
) -> None:
    model, catalogue = tower
    ids = catalogue.item_ids
    users = [{}, *({"history": ids[at : at + 5].tolist()} for at in range(11))]
    whole, cut = model.quantized("int8"), model.quantized("int8")
    plans = shard_tower(cut, devices(count), sharding)
    assert [plan.kind for plan in plans] == ["pooled", "sequence", "pooled"]
    placed = {table.name: table for plan in plans for table in plan.tables}
    assert all(placed[name].sharding == wanted for name, wanted in sharding.items())
    assert isinstance(cut.user_tables, ShardedTables)
    assert isinstance(cut.item_tables, ShardedTables)
    assert isinstance(cut.session_table, ShardedSequences)
    wanted, found = whole.encode(users), cut.encode(users)
    assert torch.equal(found.embedding, wanted.embedding)
    assert torch.equal(found.user_state, wanted.user_state)
    features = dict(catalogue.features)
    assert torch.equal(cut.embed_items(features), whole.embed_items(features))
    before, after = whole.state_dict(), cut.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[key]) for key, one in before.items())


def test_all_tables_share_one_budget(tower: Any) -> None:
    model: TwoTower = tower[0].quantized("int8")
    plans = shard_tower(model, devices(2), {})
    for before, after in itertools.pairwise(plans):
        assert after.topology.host_bytes < before.topology.host_bytes
    used = sum(table.host_bytes for plan in plans for table in plan.tables)
    with pytest.raises(TablePlanError, match="does not fit"):
        shard_tower(tower[0].quantized("int8"), devices(2, used // 2), {})


def test_one_device_and_float_tables_are_left_alone(tower: Any) -> None:
    model: TwoTower = tower[0].quantized("int8")
    assert shard_tower(model, devices(1), {"history": "row"}) == []
    assert type(model.user_tables) is QuantizedTables
    assert shard_tower(tower[0], devices(3), {}) == []


def test_a_cut_of_an_unknown_table_is_refused(tower: Any) -> None:
    with pytest.raises(TablePlanError, match=r"sharding: must be of quantised tables .* 'films'"):
        shard_tower(tower[0].quantized("int8"), devices(2), {"films": "row"})
