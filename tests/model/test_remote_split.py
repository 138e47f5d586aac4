from typing import Any

import pytest
import torch

from silvershard.model.encoder_config import HSTUEncoderConfig
from silvershard.model.quantized_rows import restore_rows
from silvershard.model.remote_split import split_remote
from silvershard.model.remote_tables import StoredRows

POOLED = ("history", "recent", "history_genres")


@pytest.fixture(scope="module")
def users(generation: Any) -> list[dict[str, list[int]]]:
    ids = generation.catalogue.item_ids
    return [
        {},
        {"history": ids[:1].tolist()},
        {"history": [7, 8]},
        *({"history": ids[at : at + 9].tolist()} for at in range(0, 60, 5)),
    ]


@pytest.mark.parametrize("tables", [("history",), ("history_genres", "recent"), POOLED])
def test_a_tower_with_remote_tables_encodes_like_the_quantised_tower(
    generation: Any, users: list[Any], tables: tuple[str, ...]
) -> None:
    whole = generation.model.quantized("int8")
    split = split_remote(generation.model, tables)
    assert set(split.records) == set(tables)
    tower = split.model.quantized("int8")
    tower.remote.connect(StoredRows(split.records))
    wanted, found = whole.encode(users), tower.encode(users)
    assert torch.equal(found.embedding, wanted.embedding)
    assert torch.equal(found.user_state, wanted.user_state)
    assert found.warnings == wanted.warnings
    assert found.fallback == (False,) * len(users)
    assert wanted.fallback == ()


def test_a_quantised_tower_is_split_without_another_rounding(generation: Any) -> None:
    whole = generation.model.quantized("int8")
    once, twice = split_remote(generation.model, POOLED), split_remote(whole, POOLED)
    for name in POOLED:
        assert torch.equal(once.records[name], twice.records[name])


def test_a_remote_session_is_read_like_a_local_one(publish_model: Any, users: list[Any]) -> None:
    made = publish_model(encoder=HSTUEncoderConfig(max_length=16, layers=1))
    ids = made.catalogue.item_ids
    users = [{"history": ids[at : at + 7].tolist()} for at in range(9)] + [{}]
    split = split_remote(made.model, ("session", "recent"))
    assert split.model.session_table is None
    tower = split.model.quantized("int8")
    tower.remote.connect(StoredRows(split.records))
    wanted, found = made.model.quantized("int8").encode(users), tower.encode(users)
    assert torch.equal(found.embedding, wanted.embedding)
    assert torch.equal(found.user_state, wanted.user_state)


def test_tables_of_further_user_features_may_be_remote(publish_model: Any) -> None:
    made = publish_model(user_ids=({"name": "tags", "dtype": "string", "size": 3},))
    ids = made.catalogue.item_ids
    users = [{"history": ids[:4].tolist(), "tags": ["Action", "Drama"]}, {"tags": ["Comedy"]}, {}]
    split = split_remote(made.model, ("user_tags", "history"))
    assert list(split.records) == ["user_tags", "history"]
    tower = split.model.quantized("int8")
    tower.remote.connect(StoredRows(split.records))
    wanted, found = made.model.quantized("int8").encode(users), tower.encode(users)
    assert torch.equal(found.user_state, wanted.user_state)
    assert not torch.equal(found.user_state[1], found.user_state[2])


def test_the_model_does_not_hold_what_was_taken_out(generation: Any) -> None:
    split = split_remote(generation.model, ("history",))
    before, after = generation.model.state_dict(), split.model.state_dict()
    (gone,) = before.keys() - after.keys()
    assert "history.weight" in gone
    assert all(torch.equal(before[key], after[key]) for key in after)
    error = restore_rows(split.records["history"], "int8") - before[gone]
    assert error.abs().max() < 0.02


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (("films",), "^remote must name tables of the user tower .* got 'films'$"),
        (("history", "history"), "once each, got 'history'"),
        (("session",), "got 'session'"),
    ],
)
def test_tables_that_the_tower_does_not_have_are_refused(
    generation: Any, tables: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_remote(generation.model, tables)


def test_int4_tables_and_towers_that_were_split_are_refused(generation: Any) -> None:
    with pytest.raises(ValueError, match="table history must be float32 or int8, got int4"):
        split_remote(generation.model.quantized("int4"), ("history",))
    split = split_remote(generation.model, ("history",)).model
    with pytest.raises(ValueError, match=r"tables \['history'\] are remote already"):
        split_remote(split, ("recent",))
