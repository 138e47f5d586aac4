from pathlib import Path

import pytest
from pydantic import ValidationError

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_config import (
    RemoteTableSection,
    TableHolding,
    TableRows,
    TablesSection,
)
from silvershard.shard.errors import StateError
from silvershard.shard.table_plan import TablePlan


def test_the_defaults_hold_together_and_every_field_is_described() -> None:
    RemoteTableSection()
    assert all(field.description for field in RemoteTableSection.model_fields.values())


@pytest.mark.parametrize("field", ["deadline_ms", "poll_ms"])
def test_times_must_be_positive(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        RemoteTableSection.model_validate({field: 0})


def test_a_remote_table_is_named_once() -> None:
    assert TablesSection(remote=("history", "recent")).remote == ("history", "recent")
    with pytest.raises(ValidationError, match=r"remote\n .*must name each table once"):
        TablesSection(remote=("history", "history"))


def test_a_client_of_the_tables_asks_as_the_section_says() -> None:
    tables = TablesSection(deadline_ms=7, cache_mib=3)
    ping = PingSection(every_ms=300)
    client = tables.client(ping)
    assert (client.deadline_ms, client.cache_mib, client.ping) == (7, 3, ping)


def test_a_holding_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tier.json"
    plan = TablePlan(name="users", num_rows=9, dim=4, num_shards=2)
    held = TableHolding(
        tables=(TableRows(plan=plan, path="/rows"), TableRows(plan=plan, seed=3)),
        log_url="sqlite:///x",
        log_id=7,
        cut=(1, 2),
    )
    held.write_atomic(path)
    assert TableHolding.read(path) == held
    path.write_text("{}")
    with pytest.raises(StateError, match=r"table holding .*tier\.json: tables: Field required"):
        TableHolding.read(path)
