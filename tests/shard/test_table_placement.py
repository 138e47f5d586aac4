import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from silvershard.model.embeddings import ShardedTables
from silvershard.model.placement import TablePlanError
from silvershard.model.quantized_rows import restore_rows
from silvershard.model.remote_tables import StoredRows
from silvershard.shard.errors import SnapshotError
from silvershard.shard.load import load_executor, load_retriever
from silvershard.shard.snapshot import open_snapshot
from silvershard.shard.table_placement import TableSettings, connect_tables, place_tables


@pytest.fixture(scope="module")
def quantised(publish_model: Any) -> Any:
    return publish_model("int8")


@pytest.fixture(scope="module")
def remote(publish_model: Any) -> Any:
    return publish_model("int8", remote=("history", "recent", "history_genres"))


@pytest.fixture(scope="module")
def users(quantised: Any) -> list[dict[str, list[int]]]:
    ids = quantised.catalogue.item_ids
    return [{}, *({"history": ids[at : at + 6].tolist()} for at in range(0, 60, 6))]


def test_rows_are_loaded_with_a_model_that_is_whole_in_one_process(
    quantised: Any, remote: Any, users: list[Any]
) -> None:
    wanted = load_retriever(quantised.path)[0].encode(users)
    found = load_retriever(remote.path)[0].encode(users)
    assert torch.equal(found.embedding, wanted.embedding)
    assert torch.equal(found.user_state, wanted.user_state)
    assert found.fallback == (False,) * len(users)


def test_a_given_source_is_asked_instead(remote: Any, users: list[Any]) -> None:
    snapshot = open_snapshot(remote.path)
    stored = {name: snapshot.load_rows(name) for name in ("history", "recent", "history_genres")}
    changed = stored | {"recent": stored["recent"].flip(0)}
    asked = []

    class Sources:
        def __init__(self, rows: dict[str, torch.Tensor]) -> None:
            self.rows = rows

        def open(self, generation: int, tables: Any) -> StoredRows:
            asked.append((generation, sorted(tables)))
            return StoredRows(self.rows)

    executors = [
        load_executor(remote.path, 0, 1, tables=TableSettings(Sources(rows)))
        for rows in (stored, changed)
    ]
    assert asked == [(snapshot.spec.generation, sorted(stored))] * 2
    first, second = (one.encode(users).user_state for one in executors)
    assert torch.equal(first, load_retriever(remote.path)[0].encode(users).user_state)
    assert not torch.equal(first, second)


def test_rows_of_another_table_are_refused(remote: Any, tmp_path: Path) -> None:
    model = load_retriever(remote.path)[0].model
    snapshot = open_snapshot(remote.path)
    with pytest.raises(ValueError, match=r"rows of table history must be \(151, 20\) uint8, got"):
        connect_tables(model, None, lambda name: snapshot.load_rows(name)[1:])
    path = tmp_path / "gen-000001"
    shutil.copytree(remote.path, path)
    save_file({"weight": torch.zeros(3)}, path / "rows" / "recent.safetensors")
    with pytest.raises(SnapshotError, match=r"recent\.safetensors is damaged"):
        load_retriever(path)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tables_on_several_devices_give_the_same_bits(
    publish_model: Any, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    made = publish_model(precision, dim=32)
    ids = made.catalogue.item_ids
    users = [{}, *({"history": ids[at : at + 6].tolist()} for at in range(0, 60, 6))]
    wanted = load_retriever(made.path)[0].encode(users)
    for devices, sharding in (
        (2, {}),
        (3, {"history": "row", "recent": "row"}),
        (2, {"history": "column", "movie": "table"}),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            retriever = load_retriever(
                made.path, devices=["cpu"] * devices, tables=TableSettings(None, sharding)
            )[0]
        assert isinstance(retriever.model.user_tables, ShardedTables)
        assert f"cpu:{devices - 1}" in caplog.text
        for name, cut in sharding.items():
            lines = [line.split() for line in caplog.text.splitlines()]
            assert any(line[:1] == [name] and line[2] == cut for line in lines)
        found = retriever.encode(users)
        assert torch.equal(found.embedding, wanted.embedding)
        assert torch.equal(found.user_state, wanted.user_state)


def test_tables_that_do_not_fit_their_budget_are_refused(quantised: Any) -> None:
    with pytest.raises(TablePlanError, match="does not fit"):
        load_retriever(
            quantised.path, devices=["cpu", "cpu"], tables=TableSettings(host_bytes=2000)
        )


def test_a_cut_of_a_table_that_is_not_quantised_is_refused(generation: Any) -> None:
    settings = TableSettings(sharding={"history": "row"})
    with pytest.raises(ValueError, match=r"must be of quantised tables \[\], got 'history'"):
        load_retriever(generation.path, tables=settings)


def test_a_model_without_tables_of_ours_stays_as_it_is() -> None:
    assert place_tables(torch.nn.Linear(2, 2), ["cpu", "cpu"], TableSettings()) == []


def test_float_and_remote_tables_stay_where_they_are(generation: Any, remote: Any) -> None:
    model = load_retriever(generation.path)[0].model
    assert place_tables(model, ["cpu", "cpu"], TableSettings()) == []
    split = load_retriever(remote.path, devices=["cpu", "cpu"])[0].model
    assert restore_rows(split.item_tables.records("movie"), "int8").shape == (151, 16)
    assert isinstance(split.item_tables, ShardedTables)
    assert split.user_tables.features == ()
