import pytest
from pydantic import ValidationError

from silvershard.cluster.config import PingSection
from silvershard.cluster.table_config import RemoteTableSection


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
