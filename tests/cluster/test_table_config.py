import pytest
from pydantic import ValidationError

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_config import RemoteTableSection, TablesSection


def test_the_defaults_hold_together_and_every_field_is_described() -> None:
    RemoteTableSection()
    assert all(field.description for field in RemoteTableSection.model_fields.values())


def test_rows_cannot_be_fresher_than_the_beats_that_tell_of_changes() -> None:
    RemoteTableSection(max_stale_ms=200, ping=PingSection(every_ms=100))
    with pytest.raises(ValidationError, match=r"at least twice ping\.every_ms=101, got 200"):
        RemoteTableSection(max_stale_ms=200, ping=PingSection(every_ms=101))


@pytest.mark.parametrize("field", ["deadline_ms", "max_stale_ms", "poll_ms"])
def test_times_must_be_positive(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        RemoteTableSection.model_validate({field: 0})


def test_a_remote_table_is_named_once() -> None:
    assert TablesSection(remote=("history", "recent")).remote == ("history", "recent")
    with pytest.raises(ValidationError, match=r"remote\n .*must name each table once"):
        TablesSection(remote=("history", "history"))


def test_a_client_of_the_tables_asks_as_the_section_says() -> None:
    tables = TablesSection(deadline_ms=7, cache_mib=3, max_stale_ms=900)
    ping = PingSection(every_ms=300)
    client = tables.client(ping)
    assert (client.deadline_ms, client.cache_mib, client.max_stale_ms) == (7, 3, 900)
    assert client.ping == ping
    with pytest.raises(ValueError, match=r"at least twice ping\.every_ms=500"):
        tables.client(PingSection(every_ms=500))
